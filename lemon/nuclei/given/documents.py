"""Nuclei in JSON: QuPath's GeoJSON, CellViT, HistoPLUS, HoVer-Net, and the details that StarDist returns.

A file is read item by item: what is held is its text and the arrays, not a Python object for each number. Layouts are
those of the programs' own sources:

- GeoJSON (QuPath's PathIO): a FeatureCollection, or a list of features, or one; a cell has its nucleus in
  ``nucleusGeometry``. CellViT writes one MultiPolygon (or MultiPoint) for each class;
- CellViT (``cells.json``, ``cell_detection.json``): ``cells`` with ``contour``, ``centroid``, ``type``, ``type_prob``,
  and ``type_map`` of names to codes; px of level 0;
- HistoPLUS (``cell_masks.json``): ``cell_masks``, a tile each, by column, row and level of OpenSlide's DeepZoom, with
  ``masks`` in px of the tile;
- HoVer-Net (``json/``): ``nuc`` by id, ``mag`` the magnification that coordinates are px of (null: of the image);
- StarDist: the second value of ``predict_instances`` as JSON: ``coord`` [N, 2, rays] and ``points`` [N, 2], y first.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lemon.nuclei.given.nuclei import Gathered, GivenError, GivenNuclei, gathered
from lemon.runtime.identifiers import some
from lemon.slides.reader import SlideReader

NAMES = "QuPath's GeoJSON, or the JSON of CellViT, HistoPLUS, HoVer-Net or StarDist"

_BLANK = re.compile(r"[ \t\r\n]*")
_BEGIN = object()
_decode = json.JSONDecoder().raw_decode


def read_document(path: Path, reader: SlideReader) -> GivenNuclei:
    """The nuclei of a JSON file, plain or gzipped. Raises GivenError."""
    taker: _Taker | None = None
    rest: dict[str, Any] = {}
    try:
        for part, key, value in _walk(_text(path)):
            if part not in _TAKERS:
                rest[part] = value
                continue
            taker = taker or _TAKERS[part](reader)
            if value is not _BEGIN:
                taker.take(key, value)
        if taker is not None:
            return taker.nuclei(rest)
        if "coord" in rest or "points" in rest:
            return stardist_nuclei(rest)
    except (json.JSONDecodeError, RecursionError) as error:
        raise GivenError(f"no JSON, or not all of it ({error})") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise GivenError(f"an entry is not as {NAMES} have it ({type(error).__name__}: {error})") from None
    raise GivenError(f"has {some(sorted(rest)) or 'nothing'}; expected {NAMES}")


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise GivenError(f"no text, or a damaged gzip ({error})") from None


class _Cursor:
    """A place in a JSON text that moves on as values are read."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def sign(self) -> str:
        """The next character that is no blank; the cursor stays before it."""
        match = _BLANK.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The value that begins here."""
        self.sign()
        value, self.at = _decode(self.text, self.at)
        return value

    def entries(self) -> Iterator[str | None]:
        """Key of each entry of the list (None) or object that begins here; whoever asks reads its value."""
        begin = self.sign()
        if begin not in ("[", "{"):
            raise json.JSONDecodeError("expected a list or an object", self.text, self.at)
        end = "]" if begin == "[" else "}"
        self.at += 1
        if self.sign() == end:
            self.at += 1
            return
        while True:
            yield self._key() if begin == "{" else None
            sign = self.sign()
            if sign not in (",", end):
                raise json.JSONDecodeError("expected a comma", self.text, self.at)
            self.at += 1
            if sign == end:
                return

    def _key(self) -> str:
        key = str(self.value())
        if self.sign() != ":":
            raise json.JSONDecodeError("expected a colon", self.text, self.at)
        self.at += 1
        return key


def _walk(text: str) -> Iterator[tuple[str, str | None, Any]]:
    """Part, key and value: of parts with nuclei _BEGIN and then each entry, of others the whole.

    A list is taken for the part ``features``.
    """
    cursor = _Cursor(text)
    if cursor.sign() == "[":
        yield "features", None, _BEGIN
        for key in cursor.entries():
            yield "features", key, cursor.value()
        return
    for part in cursor.entries():
        assert part is not None
        if part in _TAKERS:
            yield part, None, _BEGIN
            for key in cursor.entries():
                yield part, key, cursor.value()
        else:
            yield part, None, cursor.value()


class _Taker:
    """Takes the entries of one program's part, and gives the nuclei when all are taken."""

    def __init__(self, reader: SlideReader) -> None:
        self.reader, self.found = reader, Gathered()

    def take(self, _key: str | None, entry: Any) -> None:
        """Take an entry."""
        raise NotImplementedError

    def nuclei(self, _rest: Mapping[str, Any]) -> GivenNuclei:
        """All nuclei; ``_rest`` are the document's other parts."""
        return self.found.nuclei(notes=())


class _GeoJson(_Taker):
    """Features of GeoJSON. Annotations are passed over where there are detections or cells: they are regions then."""

    def __init__(self, reader: SlideReader) -> None:
        super().__init__(reader)
        self.annotations = Gathered()
        self.others: Counter[str] = Counter()

    def take(self, _key: str | None, entry: Any) -> None:
        """Take a feature; a nucleus' outline has precedence over its cell's."""
        properties = entry.get("properties") or {}
        kind = str(properties.get("objectType") or properties.get("object_type") or _old_kind(entry.get("id")))
        geometry = entry.get("nucleusGeometry") or entry.get("geometry") or {}
        outlines = _outlines(geometry)
        if not outlines:
            self.others[str(geometry.get("type", "no geometry"))] += 1
            return
        is_annotation = kind == "annotation"
        if not is_annotation and len(outlines) > 1:  # one object in pieces
            outlines = [max(outlines, key=_extent)]
        where = self.annotations if is_annotation else self.found
        name = None if _old_kind(entry.get("id")) else entry.get("id")
        for index, outline in enumerate(outlines):
            piece = name if name is None or len(outlines) == 1 else f"{name}#{index}"
            where.add(outline, id=piece, label=_class_of(properties), probability=_detection_probability(properties))

    def nuclei(self, _rest: Mapping[str, Any]) -> GivenNuclei:
        """Detections and cells, or else the annotations."""
        notes = [f"{count} of geometry {kind} passed over" for kind, count in self.others.items()]
        if not self.found.outlines:
            return self.annotations.nuclei(notes=tuple(notes))
        if self.annotations.outlines:
            notes.append(f"{len(self.annotations.outlines)} annotations passed over, as there are detections")
        return self.found.nuclei(notes=tuple(notes))


class _CellVit(_Taker):
    """Cells of CellViT; its contours are OpenCV's, with the patch's corner added."""

    def take(self, _key: str | None, entry: Any) -> None:
        """Take a cell, of cells.json with a contour, of cell_detection.json with a centroid alone."""
        outline = entry["contour"] if "contour" in entry else [entry["centroid"]]
        self.found.add(outline, id=None, label=entry.get("type"), probability=entry.get("type_prob"))

    def nuclei(self, rest: Mapping[str, Any]) -> GivenNuclei:
        """All cells, with the names of their types."""
        names = {str(code): name for name, code in (rest.get("type_map") or {}).items()}
        self.found.classes = [names.get(str(code), code) if code else None for code in self.found.classes]
        return self.found.nuclei(centred=True)


class _HistoPlus(_Taker):
    """Tiles of HistoPLUS, on the grid of OpenSlide's DeepZoom, whose last level is the slide's level 0."""

    def take(self, _key: str | None, entry: Any) -> None:
        """Take a tile's cells. Ids count within a tile: ``column_row_id`` is unique."""
        last = math.ceil(math.log2(max(self.reader.width_px, self.reader.height_px)))
        scale = 2.0 ** (last - int(entry["level"]))
        corner = scale * np.array([entry["x"] * entry["width"], entry["y"] * entry["height"]], np.float64)
        for mask in entry["masks"]:
            outline = np.asarray(mask.get("coordinates") or [mask["centroid"]], np.float64)
            self.found.add(
                corner + scale * (outline + 0.5) - 0.5,
                id=f"{entry['x']:g}_{entry['y']:g}_{mask['cell_id']}",
                label=mask.get("cell_type"),
                probability=mask.get("confidence"),
            )

    def nuclei(self, _rest: Mapping[str, Any]) -> GivenNuclei:
        """All cells."""
        return self.found.nuclei(centred=True)


class _HoverNet(_Taker):
    """Nuclei of HoVer-Net, by id."""

    def take(self, key: str | None, entry: Any) -> None:
        """Take a nucleus. Type 0 is background: a nucleus without a class."""
        outline = entry.get("contour") or [entry["centroid"]]
        self.found.add(outline, id=key, label=entry.get("type") or None, probability=entry.get("type_prob"))

    def nuclei(self, rest: Mapping[str, Any]) -> GivenNuclei:
        """All nuclei: px at the magnification that the file states, where 40x is 0.25 um/px and so on."""
        magnification = rest.get("mag")
        if not magnification:
            return self.found.nuclei(centred=True)
        own = 40 / 2 ** round(math.log2(self.reader.mpp / 0.25))  # the slide's, as its header would state it
        unit = f"px at {float(magnification):g}x of a slide of {own:g}x"
        return self.found.nuclei(centred=True, scale=own / float(magnification), unit=unit)


def stardist_nuclei(details: Mapping[str, Any]) -> GivenNuclei:
    """Nuclei of what ``predict_instances`` of StarDist returns beside its label image: y comes before x."""
    if "coord" in details:
        rays = np.asarray(details["coord"], np.float64)  # [N, 2, rays]
        if rays.ndim != 3 or rays.shape[1] != 2:
            raise GivenError(f"coord: got the shape {list(rays.shape)}; expected [N, 2, rays], as StarDist has it")
        points, sizes = rays[:, ::-1].transpose(0, 2, 1).reshape(-1, 2), [rays.shape[2]] * len(rays)
    else:
        points = np.asarray(details["points"], np.float64).reshape(-1, 2)[:, ::-1]
        sizes = [1] * len(points)
    classes, probability = details.get("class_id"), details.get("prob")
    names = None if classes is None else [str(code) if code else None for code in np.asarray(classes).tolist()]
    return gathered(points, sizes, classes=names, probability=probability, centred=True)


_TAKERS: Mapping[str, Callable[[SlideReader], _Taker]] = {
    "features": _GeoJson,
    "cells": _CellVit,
    "cell_masks": _HistoPlus,
    "nuc": _HoverNet,
}
"""The part that holds the nuclei of a program, and who takes its entries."""


# --- GeoJSON ----------------------------------------------------------------------------------------------------------


def _outlines(geometry: Mapping[str, Any]) -> list[Any]:
    """The outer rings of a geometry, or its points as outlines of one corner."""
    coordinates = geometry.get("coordinates") or []
    kind = geometry.get("type")
    if kind == "Polygon":
        return [_open_ring(coordinates[0])] if coordinates else []
    if kind == "MultiPolygon":
        return [_open_ring(polygon[0]) for polygon in coordinates if polygon]
    if kind == "Point":
        return [[coordinates]] if coordinates else []
    return [[point] for point in coordinates] if kind == "MultiPoint" else []


def _open_ring(ring: list[Any]) -> list[Any]:
    return ring[:-1] if len(ring) > 1 and ring[0] == ring[-1] else ring


def _extent(ring: list[Any]) -> float:
    width, height = np.ptp(np.asarray(ring, np.float64)[:, :2], axis=0)
    return float(width * height)


def _old_kind(name: Any) -> str:
    """The kind that QuPath before 0.4 wrote as the id (PathCellObject); "" for an id."""
    match = re.fullmatch(r"Path(\w+)Object", name) if isinstance(name, str) else None
    return match[1].lower() if match else ""


def _class_of(properties: Mapping[str, Any]) -> str | None:
    """The class: QuPath writes a name, or the names of a derived class."""
    given = properties.get("classification")
    if isinstance(given, Mapping):
        names = given.get("names")
        return ": ".join(map(str, names)) if names else given.get("name")
    return None if given is None else str(given)


def _detection_probability(properties: Mapping[str, Any]) -> Any:
    """What QuPath's StarDist extension measures; None where there is no such measurement."""
    measured = properties.get("measurements") or {}
    if isinstance(measured, list):  # QuPath before 0.4
        measured = {each.get("name"): each.get("value") for each in measured}
    return measured.get("Detection probability")
