"""The atlas's page: as one HTML file that needs nothing else, and as what ``lemon atlas serve=true`` sends.

Both have the same markup and scripts. In the file, numbers are base64 of little-endian arrays; thumbnails are JPEG
sheets of 256 cells that lie together on the map, so that a look at one place decodes few of them. What the map's first
frame needs stands before the scripts, all else behind them, so that the browser draws while it still reads.
OpenSeadragon (BSD-3-Clause, assets/vendor) shows the slides.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from tqdm import tqdm

from lemon.atlas.cells import THUMBNAIL_MPP, AtlasCells
from lemon.atlas.compare import Comparison
from lemon.atlas.fields import Category, Measure
from lemon.atlas.listed import Listed
from lemon.atlas.projection import compact, curve_order, quantise
from lemon.atlas.tissue import OUTLINE_UM, TILE_PX, outlines_of, pictures_of
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
_SCRIPTS = ("data.js", "thumbnails.js", "map.js", "tissue.js", "panels.js", "labels.js", "turns.js", "main.js")

_FILE_SOURCES = "img-src blob: data:"
_SERVED_SOURCES = "img-src 'self' blob: data:; connect-src 'self'"

N_CLASS_COLORS = 32  # classes that can be named in the page

FIRST = ("positions",)
"""Arrays that the first frame needs, beside the field that colours it."""


@dataclass(frozen=True)
class PageData:
    """What the page shows: facts, arrays by name with a value a cell (but for outlines), and the cells' ids."""

    title: str
    subtitle: str
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]
    ids: dict[str, list[str | None]]
    """``ids``, and ``foreign-ids``, those in another program: empty where no cell has one."""
    order: np.ndarray
    """Cells in the order of their thumbnails in the sheets."""


def page_data(
    cells: AtlasCells,
    *,
    unit: np.ndarray,
    categories: Sequence[Category],
    measures: Sequence[Measure],
    title: str,
    subtitle: str,
    against: tuple[np.ndarray, Comparison] | None = None,
) -> PageData:
    """Arrange cells for the page.

    Args:
        cells: in the order of rank.
        unit: positions in the unit square, y downwards [N, 2].
        categories, measures: what the page can colour by; it begins with the first category.
        title, subtitle: plain text.
        against: positions by the other encoder, as ``unit``, and how far the two agree.
    """
    title, subtitle = redacted(title), redacted(subtitle)
    quantised = quantise(unit)
    order = curve_order(quantised)
    table = cells.table
    places = np.stack([table["x_level0_px"].to_numpy(), table["y_level0_px"].to_numpy()], axis=1)
    vectors, weights = compact(cells.vectors)
    number = {row.slide_id: index for index, row in enumerate(cells.slides)}
    slides = np.array([number[slide_id] for slide_id in table["slide_id"].to_pylist()], np.uint32)
    counts, outlines = outlines_of(table["polygon"], places, table["mpp"].to_numpy())
    fields: list[Category | Measure] = [*categories, *measures, *([against[1].measure] if against else [])]
    arrays = {"positions": quantised} | {field.key: _values(field) for field in fields}
    arrays |= {"slots": np.argsort(order).astype(np.uint32)}  # the inverse: where in that order a cell is
    arrays |= {"places": places.astype(np.float32), "slide": slides}
    arrays |= {"corners": counts, "outlines": outlines, "vectors": vectors}
    if against:
        arrays["positions-against"] = quantise(against[0])
    facts = {
        "against": {"names": against[1].models, "told": redacted(against[1].told)} if against else None,
        "count": len(table),
        "slides": [row.slide_id for row in cells.slides],
        "weights": weights.tolist(),
        "outlineUm": OUTLINE_UM,
        "palette": [_hex(color) for color in palette(N_CLASS_COLORS)],
        "title": title,
        "thumbnailPx": cells.thumbnails.shape[1],
        "thumbnailUmPerPx": THUMBNAIL_MPP,
        "sheetSide": SHEET_SIDE,
        "tilePx": TILE_PX,
        "fields": [_described(field) for field in fields],
        "scale": [_hex(color) for color in _scale_colors()],
    } | list_facts(cells.listed)
    foreign = table["foreign_id"]
    given = foreign.to_pylist() if foreign.null_count < len(foreign) else []
    return PageData(title, subtitle, facts, arrays, {"ids": table["cell_id"].to_pylist(), "foreign-ids": given}, order)


def list_facts(listed: Listed | None) -> dict[str, Any]:
    """The cells that the page opens with, and the classes to offer for them."""
    return {"list": None if listed is None else asdict(listed)}


def write_page(store: Store, cells: AtlasCells, data: PageData, *, side_px: int) -> int:
    """Write atlas.html; returns its size in bytes. ``side_px`` is the longer side of a slide's picture; 0 for none."""
    size = 0
    with store.write("atlas.html") as stream:
        for part in _file_parts(cells, data, side_px=side_px):
            size += stream.write(part.encode(errors="replace"))
    return size


def served_page(title: str, subtitle: str, facts: dict[str, Any]) -> bytes:
    """The page as a server sends it, which asks that server for all but the facts."""
    facts = facts | {"served": True, "areSlidesThere": True}
    head, tail = _template(title, subtitle, sources=_SERVED_SOURCES)
    parts = (head, _element("facts", script_json(facts)), _script(), _vendored(), tail)
    return "".join(parts).encode(errors="replace")


def _file_parts(cells: AtlasCells, data: PageData, *, side_px: int) -> Iterator[str]:
    """The page, piece by piece: markup, what the first frame needs, scripts, and only then all else."""
    head, tail = _template(data.title, data.subtitle, sources=_FILE_SOURCES)
    first = {*FIRST, *(field["key"] for field in data.facts["fields"][:1])}
    yield head
    yield _element("facts", script_json(data.facts | {"served": False, "areSlidesThere": bool(side_px)}))
    for name in data.arrays:
        if name in first:
            yield _element(f"data-{name}", _base64(data.arrays[name]))
    yield _script()
    yield _vendored()
    for name, ids in data.ids.items():
        yield _element(f"data-{name}", script_json(ids))
    for name in data.arrays:
        if name not in first:
            yield _element(f"data-{name}", _base64(data.arrays[name]))
    for number, sheet in enumerate(sheets_of(cells.thumbnails, data.order)):
        yield _element(f"data-sheet-{number}", base64.b64encode(sheet).decode())
    for number, picture in enumerate(pictures_of(cells.slides, side_px=side_px) if side_px else ()):
        told = asdict(picture) | {"jpeg": base64.b64encode(picture.jpeg).decode()}
        yield _element(f"data-slide-{number}", script_json(told))
    yield tail


def _template(title: str, subtitle: str, *, sources: str) -> tuple[str, str]:
    """Markup before and after the data. In one pass: what is put in is text, whatever braces it has."""
    page = (_ASSETS / "page.html").read_text(encoding="utf-8")
    filled = {"style": (_ASSETS / "style.css").read_text(encoding="utf-8"), "sources": sources}
    filled |= {"title": html.escape(title), "subtitle": html.escape(subtitle)}
    head, tail = (_PLACE.sub(lambda place: filled[place[1]], part) for part in page.split("{{data}}"))
    return head, tail


def _element(name: str, text: str) -> str:
    """Data that the page's scripts find by name."""
    return f'<script type="text/plain" id="{name}">{text}</script>\n'


def _script() -> str:
    scripts = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    return f'<script>\n"use strict";\n(() => {{\n{scripts}}})();\n</script>\n'


def _vendored() -> str:
    return f'<script id="vendored">\n{_VENDORED.read_text(encoding="utf-8")}</script>\n'


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no ``<`` can end it, whatever a slide is called."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def sheets_of(thumbnails: np.ndarray, order: np.ndarray) -> Iterator[bytes]:
    """JPEG sheets of 16 x 16 thumbnails of uint8 [N, P, P, 3] in an order, by row; the last is filled with white."""
    side, px = SHEET_SIDE, thumbnails.shape[1]
    starts = range(0, len(order), side * side)
    for start in tqdm(starts, unit="sheet", desc="sheets of cells", disable=None):
        cells = np.full((side * side, px, px, 3), 255, np.uint8)
        part = order[start : start + side * side]
        cells[: len(part)] = thumbnails[part]
        sheet = cells.reshape(side, side, px, px, 3).transpose(0, 2, 1, 3, 4).reshape(side * px, side * px, 3)
        stream = io.BytesIO()
        Image.fromarray(sheet).save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True, subsampling="4:2:0")
        yield stream.getvalue()


def _values(field: Category | Measure) -> np.ndarray:
    return field.codes if isinstance(field, Category) else field.values


def _described(field: Category | Measure) -> dict[str, Any]:
    known = {"key": field.key, "title": field.title}
    if isinstance(field, Category):
        return known | {"kind": "category", "names": field.names, "colors": [_hex(color) for color in field.colors]}
    return known | {"kind": "measure", "unit": field.unit, "low": field.low, "high": field.high}


def _scale_colors(count: int = 256) -> list[tuple[int, int, int]]:
    """viridis: even steps to the eye, also where red and green look alike."""
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 1, count))[:, :3]
    return [(int(red), int(green), int(blue)) for red, green, blue in np.round(colors * 255)]


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(little_endian(array)).decode()


def little_endian(array: np.ndarray) -> bytes:
    """The bytes of an array as the page reads them."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
