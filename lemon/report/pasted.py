"""Figures that other stages drew: the atlas (Figure 4) and the views of each policy (Figure 5)."""

from __future__ import annotations

import io

from PIL import Image

from lemon.atlas.job import MAP_NAME
from lemon.report.blocks import Picture, Section, plural
from lemon.report.paper import ARTEFACTS
from lemon.report.sections import data_uri, facts_of
from lemon.report.sources import Sources
from lemon.runtime.store import Store
from lemon.slides.images import ImageError, read_image

EMBEDDED_PX = 1600
"""Width at which the page holds a picture; the file beside it is the whole."""


def atlas_section(folder: str, sources: Sources, store: Store) -> Section | None:
    """Figure 4 of an output of ``lemon atlas``; None, with a line, where it is not there."""
    copies = {"figure4.png": "atlas.png", "figure4.svg": "atlas.svg", "atlas.html": "atlas.html"}
    try:
        atlas = Store(folder)
        absent = [name for name in (*copies.values(), MAP_NAME) if not atlas.exists(name)]
        if absent:
            sources.add_missing(
                f"atlas: {folder} holds no {absent[0]}; expected an output of lemon atlas", requested=True
            )
            return None
        for target, name in copies.items():
            store.write_bytes(target, atlas.read_bytes(name))
        source = jpeg_data_uri(store.read_bytes("figure4.png"))
        cells = atlas.read_table(MAP_NAME, columns=["slide_id"])
    except (OSError, ValueError) as error:
        sources.add_missing(f"atlas: {folder} cannot be read: {error}", requested=True)
        return None
    artefact = ARTEFACTS["figure4"]
    section = Section("figure4", "Figure 4: an atlas of cells", artefact)
    n_slides = len(cells["slide_id"].unique())
    section.facts = facts_of(artefact, {"Cells": f"{len(cells):,}", "Slides": f"{n_slides:,}"})
    caption = (
        f"{plural(len(cells), 'cell')} of {plural(n_slides, 'slide')} by their embeddings, and the cells themselves."
    )
    alt = (
        "Left: a point for each cell; those that look alike to the encoder lie together. Right: their images in place."
    )
    section.pictures = [Picture(caption, alt, source, [*copies])]
    return section


def views_section(path: str, sources: Sources, store: Store) -> Section | None:
    """Figure 5 of a picture; None, with a line, where it cannot be read."""
    try:
        picture = Image.fromarray(read_image(path))
    except ImageError as error:
        sources.add_missing(f"views: {error}", requested=True)
        return None
    with store.write("figure5.png") as stream:
        picture.save(stream, "PNG")
    source = jpeg_data_uri(store.read_bytes("figure5.png"))
    section = Section("figure5", "Figure 5: views", ARTEFACTS["figure5"])
    caption = "A row for each policy: cells as the encoder sees them without augmentation, and two views of each."
    alt = "Rows of small images: cells and their views under each augmentation policy."
    section.pictures = [Picture(caption, alt, source, ["figure5.png"])]
    return section


def jpeg_data_uri(content: bytes) -> str:
    """A picture as a JPEG of at most ``EMBEDDED_PX`` across, in a data URI."""
    with Image.open(io.BytesIO(content)) as opened:
        picture = Image.new("RGB", opened.size, "white")
        picture.paste(opened, mask=opened.getchannel("A") if opened.mode == "RGBA" else None)
    picture.thumbnail((EMBEDDED_PX, 4 * EMBEDDED_PX))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=88, optimize=True)
    return data_uri(stream.getvalue(), "image/jpeg")
