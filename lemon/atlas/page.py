"""The atlas as one HTML file that needs nothing else: no network, no server.

Numbers are base64 of little-endian arrays; thumbnails are JPEG sheets of 256 cells that lie together on the map, so
that a look at one place decodes few of them. The browser draws the map while it still reads the sheets and the slides.
OpenSeadragon (BSD-3-Clause, assets/vendor) shows the slides.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from tqdm import tqdm

from lemon.atlas.cells import THUMBNAIL_MPP, AtlasCells
from lemon.atlas.fields import Category, Measure
from lemon.atlas.projection import compact, curve_order, quantise
from lemon.atlas.tissue import OUTLINE_UM, Picture, outlines_of, pictures_of
from lemon.embed.clusters import palette
from lemon.runtime.secrets import redacted
from lemon.runtime.store import Store

SHEET_SIDE = 16  # cells; a sheet is decoded as soon as one of its cells is looked at

# Measured at 48 px: CoNSeP (40x) 319 bytes a cell with a mean error of 3.5 grey levels, as WebP 75; an upsampled 20x
# slide 360 bytes with 6.6, WebP 55 321 with 6.4. WebP takes ten times as long to write for a tenth less at best.
JPEG_QUALITY = 55

_PLACE = re.compile(r"\{\{(\w+)\}\}")

_ASSETS = Path(__file__).resolve().parent / "assets"
_VENDORED = _ASSETS / "vendor" / "openseadragon.min.js"
_SCRIPTS = ("data.js", "thumbnails.js", "map.js", "tissue.js", "panels.js", "labels.js", "main.js")

N_CLASS_COLORS = 32  # classes that can be named in the page


def write_page(
    store: Store,
    cells: AtlasCells,
    *,
    unit: np.ndarray,
    categories: Sequence[Category],
    measures: Sequence[Measure],
    side_px: int,
    title: str,
    subtitle: str,
) -> int:
    """Write atlas.html; returns its size in bytes.

    Args:
        store: the output.
        cells: in the order of rank.
        unit: positions in the unit square, y downwards [N, 2].
        categories, measures: what the page can colour by; it begins with the first category.
        side_px: longer side of a slide's picture; 0 for none.
        title, subtitle: plain text, escaped here.
    """
    title, subtitle = redacted(title), redacted(subtitle)
    quantised = quantise(unit)
    order = curve_order(quantised)
    slots = np.argsort(order).astype(np.uint32)  # the inverse: where in that order a cell is
    table, thumbnails = cells.table, cells.thumbnails
    places = np.stack([table["x_level0_px"].to_numpy(), table["y_level0_px"].to_numpy()], axis=1)
    vectors, weights = compact(cells.vectors)
    number = {row.slide_id: index for index, row in enumerate(cells.slides)}
    slides = np.array([number[slide_id] for slide_id in table["slide_id"].to_pylist()], np.uint32)
    polygons = table["polygon"].to_numpy(zero_copy_only=False)
    counts, outlines = outlines_of(polygons, places, table["mpp"].to_numpy())
    arrays = {"positions": quantised, "slots": slots, "places": places.astype(np.float32), "slide": slides}
    arrays |= {"vectors": vectors, "weights": weights, "corners": counts, "outlines": outlines}
    arrays |= {category.key: category.codes for category in categories}
    arrays |= {measure.key: measure.values for measure in measures}
    foreign = table["foreign_id"]
    facts = {
        "ids": table["cell_id"].to_pylist(),
        "foreignIds": foreign.to_pylist() if foreign.null_count < len(foreign) else [],
        "slides": [row.slide_id for row in cells.slides],
        "outlineUm": OUTLINE_UM,
        "palette": [_hex(color) for color in palette(N_CLASS_COLORS)],
        "title": title,
        "thumbnailPx": thumbnails.shape[1],
        "thumbnailUmPerPx": THUMBNAIL_MPP,
        "sheetSide": SHEET_SIDE,
        "fields": [*map(_category, categories), *map(_measure, measures)],
        "scale": [_hex(color) for color in _scale_colors()],
    }
    pictures = pictures_of(cells.slides, side_px=side_px) if side_px else iter(())
    size = 0
    with store.write("atlas.html") as stream:
        for part in _parts(facts, arrays, thumbnails[order], pictures, title=title, subtitle=subtitle):
            size += stream.write(part.encode(errors="replace"))
    return size


def _parts(
    facts: dict[str, Any],
    arrays: dict[str, np.ndarray],
    thumbnails: np.ndarray,
    pictures: Iterator[Picture],
    *,
    title: str,
    subtitle: str,
) -> Iterator[str]:
    """The page, piece by piece: markup, numbers, scripts, and only then the sheets and the slides."""
    page = (_ASSETS / "page.html").read_text(encoding="utf-8")
    filled = {"style": (_ASSETS / "style.css").read_text(encoding="utf-8")}
    filled |= {"title": html.escape(title), "subtitle": html.escape(subtitle)}
    # In one pass over the template: what is put in is text, whatever braces it has.
    head, tail = (_PLACE.sub(lambda place: filled[place[1]], part) for part in page.split("{{data}}"))
    yield head
    yield f'<script type="application/json" id="facts">{script_json(facts)}</script>\n'
    for name, array in arrays.items():
        yield f'<script type="text/plain" id="array-{name}">{_base64(array)}</script>\n'
    yield f'<script id="vendored">\n{_VENDORED.read_text(encoding="utf-8")}</script>\n'
    scripts = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    yield f'<script>\n"use strict";\n(() => {{\n{scripts}}})();\n</script>\n'
    sheets = tqdm(
        sheets_of(thumbnails), total=-(-len(thumbnails) // SHEET_SIDE**2), unit="sheet", desc="page", disable=None
    )
    for number, sheet in enumerate(sheets):
        yield f'<script type="text/plain" id="sheet-{number}">{base64.b64encode(sheet).decode()}</script>\n'
    for number, picture in enumerate(pictures):
        told = asdict(picture) | {"jpeg": base64.b64encode(picture.jpeg).decode()}
        yield f'<script type="application/json" id="slide-{number}">{script_json(told)}</script>\n'
    yield tail


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no ``<`` can end it, whatever a slide is called."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def sheets_of(thumbnails: np.ndarray) -> Iterator[bytes]:
    """JPEG sheets of 16 x 16 thumbnails, row by row, of uint8 [N, P, P, 3]; the last is filled with white."""
    side, px = SHEET_SIDE, thumbnails.shape[1]
    for start in range(0, len(thumbnails), side * side):
        cells = np.full((side * side, px, px, 3), 255, np.uint8)
        part = thumbnails[start : start + side * side]
        cells[: len(part)] = part
        sheet = cells.reshape(side, side, px, px, 3).transpose(0, 2, 1, 3, 4).reshape(side * px, side * px, 3)
        stream = io.BytesIO()
        Image.fromarray(sheet).save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True, subsampling="4:2:0")
        yield stream.getvalue()


def _category(field: Category) -> dict[str, Any]:
    colors = [_hex(color) for color in field.colors]
    return {"kind": "category", "key": field.key, "title": field.title, "names": field.names, "colors": colors}


def _measure(field: Measure) -> dict[str, Any]:
    known = {"kind": "measure", "key": field.key, "title": field.title, "unit": field.unit}
    return known | {"low": field.low, "high": field.high}


def _scale_colors(count: int = 256) -> list[tuple[int, int, int]]:
    """viridis: even steps to the eye, also where red and green look alike."""
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 1, count))[:, :3]
    return [(int(red), int(green), int(blue)) for red, green, blue in np.round(colors * 255)]


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _base64(array: np.ndarray) -> str:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return base64.b64encode(little.tobytes()).decode()
