"""What ``lemon atlas serve=true`` sends: written once into ``served/`` of the output, then only read.

Each array is a file of little-endian values; sheets of thumbnails lie one behind another in one file. The server holds
none of it in memory: files are copied to the browser a piece at a time, vectors are mapped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lemon.atlas.cells import AtlasCells, Chosen
from lemon.atlas.page import PageData, little_endian, sheets_of
from lemon.embed.names import clusters_name, morphometry_name
from lemon.runtime.store import Store, fingerprint
from lemon.schema import SlideRow

FOLDER = "served"
CONTENT = f"{FOLDER}/content.json"
"""Written last, so that with it all else is there."""

SHEETS, ENDS, ROWS = (f"{FOLDER}/{name}" for name in ("sheets.bin", "sheet-ends.bin", "rows.bin"))

LAYOUT = 1
"""Of these files; another one is made again."""

SLIDE_FACTS = ("slide_id", "path", "mpp", "width_px", "height_px", "status", "n_cells")


@dataclass(frozen=True)
class Piece:
    """Bytes of a file from ``start`` on."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class Served:
    """What is served, with paths of its files; ``count`` cells in the order of rank."""

    title: str
    subtitle: str
    facts: dict[str, Any]
    slides: tuple[SlideRow, ...]
    files: dict[str, Path]
    """Of arrays, and of ``ids``, by name."""
    sheets: Path
    sheet_ends: np.ndarray  # int64 [S]
    rows: np.ndarray  # int32 [N]: each cell's row in the tables of its slide

    @property
    def count(self) -> int:
        """Cells."""
        return int(self.facts["count"])

    def mapped(self, name: str, dtype: str) -> np.ndarray:
        """An array, mapped from its file."""
        return np.memmap(self.files[name], np.dtype(dtype), "r")

    def piece(self, name: str) -> Piece | None:
        """Where the bytes of an array, of ``ids`` or of ``sheet-N`` lie; None for another name."""
        kind, _, number = name.partition("-")
        if kind == "sheet" and number.isascii() and number.isdigit() and int(number) < len(self.sheet_ends):
            start = int(self.sheet_ends[int(number) - 1]) if int(number) else 0
            return Piece(self.sheets, start, int(self.sheet_ends[int(number)]) - start)
        path = self.files.get(name)
        return None if path is None else Piece(path, 0, path.stat().st_size)


def circumstances_of(chosen: Chosen, settings: dict[str, Any]) -> str:
    """Names all that the served files are made from."""
    slides = dict.fromkeys(rows.part.slide_id for rows in chosen.rows)
    names = [name(slide_id) for slide_id in slides for name in (clusters_name, morphometry_name)]
    derived = [record.sha256 for name in names for record in chosen.encoders[0].store.records.of(name)[:1]]
    added = [(rows.part.slide_id, rows.first) for rows in chosen.added]
    return fingerprint([LAYOUT, [chosen.fingerprint_of(each) for each in chosen.encoders], added, derived, settings])


def is_written(store: Store, circumstances: str) -> bool:
    """Whether the files are there, made from the same."""
    return store.exists(CONTENT) and store.read_json(CONTENT).get("circumstances") == circumstances


def write_served(store: Store, cells: AtlasCells, data: PageData, *, circumstances: str) -> int:
    """Write the files; returns their size in bytes."""
    store.delete(CONTENT)
    for name, array in data.arrays.items():
        store.write_bytes(_file(name), little_endian(array))
    for name, ids in data.ids.items():
        store.write_bytes(_file(name), json.dumps(ids, ensure_ascii=False).encode(errors="replace"))
    store.write_bytes(ROWS, little_endian(cells.table["row"].to_numpy().astype(np.int32)))
    ends, end = [], 0
    with store.write(SHEETS) as stream:
        for sheet in sheets_of(cells.thumbnails, data.order):
            end += stream.write(sheet)
            ends.append(end)
    store.write_bytes(ENDS, little_endian(np.array(ends, np.int64)))
    content: dict[str, Any] = {"title": data.title, "subtitle": data.subtitle, "facts": data.facts}
    content["data"] = sorted({*data.arrays, *data.ids})
    content["slides"] = [{name: getattr(row, name) for name in SLIDE_FACTS} for row in cells.slides]
    store.write_json(CONTENT, content | {"circumstances": circumstances})
    return sum(store.size(name) for name in store.list(FOLDER))


def open_served(store: Store) -> Served:
    """The files that ``write_served`` wrote into a local store."""
    content = store.read_json(CONTENT)
    files = {name: Path(store.path(_file(name))) for name in content["data"]}
    return Served(
        content["title"],
        content["subtitle"],
        content["facts"],
        tuple(SlideRow(**row) for row in content["slides"]),
        files,
        Path(store.path(SHEETS)),
        np.fromfile(store.path(ENDS), "<i8"),
        np.memmap(store.path(ROWS), np.dtype("<i4"), "r"),
    )


def _file(name: str) -> str:
    return f"{FOLDER}/{name}.bin"
