"""What a page shows and the files beside it: figures, as SVG that follows the page's colours, and tables as CSV."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib.figure import Figure

from lemon.probe.figures import save_figure
from lemon.probe.tables import as_csv
from lemon.report.blocks import Picture
from lemon.runtime.store import Store

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_COLORS = (("#000000", "currentColor"), ("#ffffff", "none"))
_LEFT_OUT = {f"{{{_SVG}}}{name}" for name in ("metadata", "style")}  # the style would be the whole page's
_PT = 4 / 3  # px


def picture(figure: Figure, store: Store, stem: str, *, caption: str, alt: str) -> Picture:
    """Write a figure as PNG and SVG; the page holds the SVG."""
    files = save_figure(figure, store, stem)
    return Picture(caption, alt, files, drawing=inline_svg(store.read_bytes(f"{stem}.svg"), prefix=stem))


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as a source that needs no request."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write_csv(store: Store, name: str, records: Sequence[dict[str, Any]]) -> None:
    """Records with the same keys as a file beside the page."""
    store.write_bytes(name, as_csv(records).encode())


def inline_svg(content: bytes, *, prefix: str) -> Markup:
    """An SVG file of matplotlib as an element of a page.

    Black becomes the colour of the page's text and white its ground, so that dark pages have dark figures; ids begin
    with ``prefix``, so that two figures of a page share none. ``artist.set_url("#anchor")`` made a point a link.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(content)  # without comments, in which matplotlib writes texts
    for element in list(root.iter()):
        for child in [child for child in element if child.tag in _LEFT_OUT]:
            element.remove(child)
    ids = {name for element in root.iter() if (name := element.get("id"))}
    for element in root.iter():
        for key, value in element.items():
            element.set(key, _themed(value) if key == "style" else _own(value, key, ids, prefix=prefix))
    width = round(float(root.get("width", "0").removesuffix("pt")) * _PT)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("style", f"width: {width}px; min-width: {round(0.8 * width)}px")
    # ElementTree has escaped all that is text.
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _themed(style: str) -> str:
    for color, replacement in _COLORS:
        style = re.sub(rf"\b(fill|stroke): {color}", rf"\1: {replacement}", style)
    return style


def _own(value: str, key: str, ids: set[str], *, prefix: str) -> str:
    """An attribute whose references to ids of this figure, or whose id, has the prefix."""
    if key == "id":
        return f"{prefix}-{value}"
    if value.startswith("#") and value[1:] in ids:
        return f"#{prefix}-{value[1:]}"
    return re.sub(r"^url\(#(.+)\)$", rf"url(#{prefix}-\1)", value)
