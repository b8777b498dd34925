"""Figures that other stages drew: the atlas (Figure 4) and the views of each policy (Figure 5)."""

from __future__ import annotations

import io
from collections.abc import Iterator

from PIL import Image

from lemon.atlas.job import MAP_NAME
from lemon.report.beside_paper import facts_of
from lemon.report.blocks import Picture, Section, plural
from lemon.report.files import data_uri
from lemon.report.paper import ARTEFACTS
from lemon.report.sources import Report
from lemon.runtime.store import Store
from lemon.slides.images import ImageError, read_image

EMBEDDED_PX = 1600
"""Width at which the page holds a picture; the file beside it is the whole."""


def atlas_sections(report: Report) -> Iterator[Section]:
    """Figure 4 of an output of ``lemon atlas``; none, with a line, where it is not there."""
    folder, store = report.config.atlas, report.store
    if not folder:
        return
    copies = {"figure4.png": "atlas.png", "figure4.svg": "atlas.svg", "atlas.html": "atlas.html"}
    try:
        atlas = Store(folder)
        absent = [name for name in (*copies.values(), MAP_NAME) if not atlas.exists(name)]
        if absent:
            line = f"atlas: {folder} holds no {absent[0]}; expected an output of lemon atlas"
            report.sources.add_missing(line, requested=True)
            return
        for target, name in copies.items():
            store.write_bytes(target, atlas.read_bytes(name))
        source = jpeg_data_uri(store.read_bytes("figure4.png"))
        cells = atlas.read_table(MAP_NAME, columns=["slide_id"])
    except (OSError, ValueError) as error:
        report.sources.add_missing(f"atlas: {folder} cannot be read: {error}", requested=True)
        return
    artefact, n_slides = ARTEFACTS["figure4"], len(cells["slide_id"].unique())
    caption = (
        f"{plural(len(cells), 'cell')} of {plural(n_slides, 'slide')} by their embeddings, and the cells themselves. "
        "The page of the map (HTML) zooms in."
    )
    alt = (
        "Left: a point for each cell; those that look alike to the encoder lie together. Right: their images in place."
    )
    yield Section(
        "figure4",
        "Figure 4: an atlas of cells",
        artefact,
        pictures=[Picture(caption, alt, [*copies], source=source)],
        facts=facts_of(artefact, {"Cells": f"{len(cells):,}", "Slides": f"{n_slides:,}"}),
    )


def views_sections(report: Report) -> Iterator[Section]:
    """Figure 5 of a picture; none, with a line, where it cannot be read."""
    if not report.config.views:
        return
    try:
        whole = Image.fromarray(read_image(report.config.views))
    except ImageError as error:
        report.sources.add_missing(f"views: {error}", requested=True)
        return
    with report.store.write("figure5.png") as stream:
        whole.save(stream, "PNG")
    source = jpeg_data_uri(report.store.read_bytes("figure5.png"))
    caption = "A row for each policy: cells as the encoder sees them without augmentation, and two views of each."
    alt = "Rows of small images: cells and their views under each augmentation policy."
    picture = Picture(caption, alt, ["figure5.png"], source=source)
    yield Section("figure5", "Figure 5: views", ARTEFACTS["figure5"], pictures=[picture])


def jpeg_data_uri(content: bytes) -> str:
    """A picture as a JPEG of at most ``EMBEDDED_PX`` across, in a data URI."""
    with Image.open(io.BytesIO(content)) as opened:
        picture = Image.new("RGB", opened.size, "white")
        picture.paste(opened, mask=opened.getchannel("A") if opened.mode == "RGBA" else None)
    picture.thumbnail((EMBEDDED_PX, 4 * EMBEDDED_PX))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=88, optimize=True)
    return data_uri(stream.getvalue(), "image/jpeg")
