"""Settings of nuclei that other programs found, and which file is of which slide."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow.fs as pafs
from pydantic import Field, model_validator

from lemon.errors import ConfigError
from lemon.nuclei.given.read import INSIDE, SUFFIXES, digest_of
from lemon.runtime.config import PRESET, AnyPath, Frozen
from lemon.runtime.identifiers import file_stem, some
from lemon.runtime.raw_tables import TableError, loose, read_raw
from lemon.runtime.store import Store, local_copy, locate, path_exists
from lemon.runtime.tables import Column, Form, is_table, read_user_table
from lemon.schema import SlideRow
from lemon.slides.cohort import beside
from lemon.slides.errors import SlideError

Flip = Literal["none", "x", "y", "xy", "transpose"]


class CellsFrom(Frozen):
    """Nuclei of other programs in place of a segmenter's."""

    path: AnyPath = Field(
        description="a folder of files named like the slides, a table with slide_id and path, or the file of one slide"
    )
    unit: Literal["auto", "px", "um"] = Field("auto", description="of coordinates; auto: as the format has it")
    level: int | None = Field(None, ge=0, description="coordinates are px of this level of the slide")
    mpp: float | None = Field(None, gt=0, description="um a unit of the coordinates, where they are px of no level")
    flip: Flip = Field("none", description="axes that run the other way, or transpose: y comes before x")
    offset_px: tuple[float, float] = Field((0, 0), description="level-0 px that are added, [x,y], after all else")
    alignment: AnyPath | None = Field(
        None, description="matrix of Xenium Explorer (CSV, 3 x 3) that takes px of this slide to px of Xenium's image"
    )
    radius_um: float = Field(4.0, gt=0, description="of the circles that stand for outlines where there are centroids")

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        """``cells_from=PATH``, alone or with other keys, is ``cells_from.path=PATH``."""
        if isinstance(value, str):
            return {"path": value}
        if isinstance(value, dict) and PRESET in value:
            return {"path": value[PRESET]} | {key: each for key, each in value.items() if key != PRESET}
        return value

    @model_validator(mode="after")
    def _one_unit(self) -> CellsFrom:
        given = [name for name in ("unit", "level", "mpp") if getattr(self, name) not in ("auto", None)]
        if len(given) > 1 and given != ["unit", "level"]:
            raise ValueError(f"got {' and '.join(given)}; expected one of them")
        if self.unit == "um" and self.level is not None:
            raise ValueError("got unit=um and level; expected one of them")
        return self

    def check(self, slide_ids: Sequence[str]) -> None:
        """Raises ConfigError where there is nothing at the path, or one file for several slides."""
        key, expected = "cells_from.path", Files.expected
        if not path_exists(self.path):
            raise ConfigError(f"{key}: got {self.path!r}, which is not there; expected {expected}")
        if self.alignment is not None:
            read_alignment(self.alignment)
        files = Files(self.path)
        if files.single and len(slide_ids) > 1:
            raise ConfigError(f"{key}: got one file, {self.path}, for {len(slide_ids)} slides; expected {expected}")
        if not any(files.named(slide_id) for slide_id in slide_ids):
            raise ConfigError(
                f"{key}: {self.path} has no file for any of {len(slide_ids)} slides, as {some(slide_ids, shown=2)}; "
                f"expected {expected}"
            )

    def digest(self, slide_id: str) -> str | None:
        """Of the bytes of a slide's file of nuclei (SHA-256, 32 digits); None where there is none, or several."""
        with contextlib.suppress(SlideError, OSError), local_copy(Files(self.path).of(slide_id)) as path:
            return digest_of(path)
        return None

    def changed(self, rows: Iterable[SlideRow]) -> set[str]:
        """Slides whose nuclei are other ones than those that rows of the slides table were made with."""
        return {row.slide_id for row in rows if self.digest(row.slide_id) not in (None, row.nuclei_digest)}

    def result_settings(self) -> dict[str, Any]:
        """Without the path: each slide's row has the digest of its own file."""
        settings = self.model_dump(exclude={"path", "alignment"})
        return settings | ({} if self.alignment is None else {"alignment": read_alignment(self.alignment)})


def read_alignment(path: str) -> list[list[float]]:
    """A 3 x 3 matrix out of a CSV without a header. Raises ConfigError."""
    try:
        store, name = locate(path)
        lines = store.read_bytes(name).decode("utf-8-sig").split()
        rows = [[float(value) for value in line.replace(";", ",").split(",")] for line in lines]
    except (OSError, ValueError) as error:
        raise ConfigError(f"cells_from.alignment: {path} cannot be read ({error}); expected a CSV of 3 x 3") from None
    if [len(row) for row in rows] != [3, 3, 3] or rows[2] != [0, 0, 1] or np.linalg.det(rows) == 0:
        raise ConfigError(f"cells_from.alignment: {path} is no affine matrix; expected a CSV of 3 x 3, last line 0,0,1")
    return rows


class Files:
    """Which file of nuclei is of which slide: what ``cells_from.path`` stands for. Raises ConfigError."""

    expected = "a folder with files named like the slides, a table with slide_id and path, or the file of one slide"

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/")
        store, name = locate(self.path)
        is_folder = store.info(name).type == pafs.FileType.Directory
        self._table = None if is_folder else _read_mapping(path)
        self._folder = Store(self.path) if is_folder and not _is_nuclei(Store(self.path)) else None
        self.single = self._table is None and self._folder is None
        """Whether the path is the nuclei of one slide."""

    def named(self, slide_id: str) -> list[str]:
        """Paths of the files of a slide."""
        if self._table is not None:
            return self._table.get(slide_id, [])
        if self._folder is None:
            return [self.path]
        folder, names = self._folder, dict.fromkeys([slide_id, file_stem(slide_id)])
        found = [f"{name}{suffix}" for name in names for suffix in SUFFIXES if folder.exists(f"{name}{suffix}")]
        found += [name for name in names if _is_nuclei(Store(f"{folder.uri}/{name}"))]
        return [f"{folder.uri}/{name}" for name in found]

    def of(self, slide_id: str) -> str:
        """Path of the file of a slide. Raises SlideError, one line, where there is none, or several."""
        names = self.named(slide_id)
        if len(names) == 1:
            return names[0]
        if not names:
            raise SlideError(f"cells_from: {self.path} has no file of nuclei for it")
        several = some([name.rpartition("/")[2] for name in names])
        raise SlideError(
            f"cells_from: {self.path} has {len(names)} files for it ({several}); "
            "expected one: name it in a table with slide_id and path"
        )


def _is_nuclei(folder: Store) -> bool:
    """Whether a folder holds the nuclei of one slide: a store of zarr, or what a program writes of a slide."""
    return folder.root.endswith(".zarr") or any(folder.exists(name) for name in INSIDE)


_MAPPING = Form("cells_from:", (Column("slide_id", filled=True), Column("path")), others=True)


def _read_mapping(path: str) -> dict[str, list[str]] | None:
    """Slide id -> its files, which a table names from its own folder; None for what is no such table."""
    if not is_table(path):
        return None
    try:
        header = {loose(name) for name in read_raw(path, known=_MAPPING.names).header}
    except TableError:
        return None  # read as nuclei, which tells what is wrong
    if not {"slideid", "path"} <= header:
        return None
    files: dict[str, list[str]] = {}
    for row in read_user_table(path, form=_MAPPING).rows():
        if row["path"] is not None:
            files.setdefault(row["slide_id"], []).append(beside(path, row["path"]))
    return files
