"""What of its surroundings a nucleus's vector holds: nothing, the vectors of its neighbours, or the tissue around it.

A vector is made of parts, of which the nucleus's own is the first: [own], [own, mean of the neighbours, their standard
deviation], or [own, field]. Whatever compares vectors by direction weighs the parts by their lengths, so a field is
brought to the length of the own part; mean and deviation have the units of the own part as they are.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from scipy.spatial import cKDTree

from lemon.cells.fields import PLACE, cut_fields, full_scratch_error, place_um
from lemon.embed.stream import SlideCells
from lemon.encoders.open import Encoder
from lemon.errors import ConfigError
from lemon.runtime.identifiers import some
from lemon.runtime.scratch import scratch_folder
from lemon.runtime.store import fingerprint
from lemon.schema import CELL_MPP, SlideRow
from lemon.slides.errors import SlideError
from lemon.slides.source import changed_sources

Pieces: TypeAlias = Generator[tuple[pa.RecordBatch, np.ndarray]]
"""Rows of a slide's cells, in the order of its shard, with their vectors float32 [n, W]."""

CELLS_AT_A_TIME = 2048  # whose neighbours' vectors are in memory: 31 MB of ten of 384 values


class Context:
    """A way to make vectors of a slide's cells.

    ``facts`` is what settings say of it (None: there is nothing but the own part), ``encoder`` that of what lies around
    the nucleus, where there is another one.
    """

    facts: dict[str, Any] | None = None
    encoder: Encoder | None = None

    def width(self, own: int) -> int:
        """Values of a vector whose own part has so many."""
        return own

    def fingerprint(self, encoder: Encoder) -> str:
        """16 hexadecimal digits of all that decides a vector; the encoder's own where there is nothing else."""
        if self.facts is None:
            return encoder.fingerprint
        return fingerprint({"encoder": encoder.fingerprint, **self.facts})

    def check_cells(self, slides: Sequence[SlideRow]) -> None:
        """Raises ConfigError where the cells of slides cannot have this context."""

    def check_slide(self, slide: SlideRow) -> None:
        """Raises SlideError where a slide cannot have this context."""

    def notes(self) -> list[str]:
        """Lines that a user should know before work begins."""
        return []

    def to(self, device: torch.device) -> Self:
        """The same, computing on a device."""
        if self.encoder is not None:
            self.encoder.to(device)
        return self

    def vectors(self, slide: SlideCells) -> Pieces:
        """Vectors of a slide's cells, piece by piece.

        Raises ShardError, and SlideError or RegionError where its pixels cannot be read.
        """
        raise NotImplementedError


class Nucleus(Context):
    """The vector of the nucleus's own crop."""

    def vectors(self, slide: SlideCells) -> Pieces:
        """As they come from the encoder."""
        yield from slide.encoded()


class Neighbours(Context):
    """The own vector with mean and standard deviation of those of the ``k`` nearest nuclei within a radius.

    They are nuclei of the same slide; without the nucleus itself. Where there are fewer, those that there are count; a
    nucleus without any has its own vector for the mean, and no deviation.
    """

    def __init__(self, *, k: int, radius_um: float) -> None:
        self.k, self.radius_um = k, radius_um
        self.facts = {"name": "neighbours", "k": k, "radius_um": radius_um}

    def width(self, own: int) -> int:
        """Own, mean and deviation."""
        return 3 * own

    def check_cells(self, slides: Sequence[SlideRow]) -> None:
        """Raises ConfigError for slides of which a sample was kept: its nearest nuclei are not the true ones."""
        sampled = [row for row in slides if row.n_cells != row.n_nuclei]
        if sampled:
            first, names = sampled[0], some([row.slide_id for row in sampled])
            raise ConfigError(
                f"context: got neighbours, and cells hold {first.n_cells} of {first.n_nuclei} nuclei of "
                f"{first.slide_id} ({len(sampled)} such slides: {names}); expected all of them: lemon curate with "
                "cells_per_slide=null"
            )

    def vectors(self, slide: SlideCells) -> Pieces:
        """All cells are encoded first; their vectors wait on the scratch disk."""
        with scratch_folder() as folder:
            own, batches = _Kept(folder / "own", slide.encoder.width), []
            for batch, vectors in slide.encoded():
                own.append(vectors)
                batches.append(batch.select(slide.FACTS))
            known, tree, start = own.read(), cKDTree(place_um(batches)), 0
            for batch in batches:
                rows = np.arange(start, start + len(batch))
                yield batch, with_neighbours(known, tree, rows, k=self.k, radius_um=self.radius_um)
                start += len(batch)


class Field(Context):
    """The own vector with that of the tissue around the nucleus, a square of ``um``, by another encoder.

    The square is read from the slide at 0.25 um/px, white where the slide ends, and resized to what the encoder sees.
    """

    encoder: Encoder

    def __init__(self, encoder: Encoder, *, um: float) -> None:
        self.encoder, self.um, self.side_px = encoder, um, round(um / CELL_MPP)
        self.facts = {
            "name": "field",
            "um": um,
            "model": encoder.name,
            "model_fingerprint": encoder.fingerprint,
        }

    def width(self, own: int) -> int:
        """Own and field."""
        return own + self.encoder.width

    def fingerprint(self, encoder: Encoder) -> str:
        """Of the weights, whatever they are called."""
        facts = {key: value for key, value in (self.facts or {}).items() if key != "model"}
        return fingerprint({"encoder": encoder.fingerprint, **facts})

    def check_slide(self, slide: SlideRow) -> None:
        """Raises SlideError where the slide's file is not the one that its cells were cut from."""
        if changed_sources([slide], {slide.slide_id: slide.path}):
            raise SlideError("is another file than its cells were cut from; curate it again")

    def notes(self) -> list[str]:
        """That an encoder of cells is shown another scale than the one that it was trained at."""
        of = self.encoder.cell_input
        if of.input_px is not None or math.isclose(of.crop_px * of.um_per_px, self.um, rel_tol=0.1):
            return []  # what is resized was no encoder of cells to begin with
        trained = of.crop_px * of.um_per_px
        return [
            f"context.model: {self.encoder.name} was trained on crops of {trained:g} um and sees {self.um:g} um here"
        ]

    def vectors(self, slide: SlideCells) -> Pieces:
        """Fields are encoded first, in the order of their places on the slide; they wait on the scratch disk."""
        with scratch_folder() as folder:
            around, order = _Kept(folder / "fields", self.encoder.width), []
            batches = list(slide.batches(PLACE))
            for rows, fields in cut_fields(slide.path, batches, side_px=self.side_px):
                with slide.device.running():
                    around.append(self.encoder.embed_fields(fields, bf16=slide.bf16).float().cpu().numpy())
                order.append(rows)
            known, place, start = around.read(), np.argsort(np.concatenate(order)), 0
            for batch, own in slide.encoded():
                yield batch, with_field(own, known[place[start : start + len(batch)]])
                start += len(batch)


def with_neighbours(vectors: np.ndarray, tree: cKDTree, rows: np.ndarray, *, k: int, radius_um: float) -> np.ndarray:
    """Own vectors of rows with mean and standard deviation of those of their neighbours: float32 [n, 3 D].

    Args:
        vectors: of all nuclei of the slide, float32 [N, D].
        tree: of their places [N, 2] in um.
        rows: whose vectors are asked for, int [n].
        k: neighbours of each, at most; the nucleus itself is none.
        radius_um: nuclei that are as far or farther are no neighbours.
    """
    made = np.empty((len(rows), 3 * vectors.shape[1]), np.float32)
    for start in range(0, len(rows), CELLS_AT_A_TIME):
        some_rows = rows[start : start + CELLS_AT_A_TIME]
        own, nearest = vectors[some_rows], nearest_rows(tree, some_rows, k=k, radius_um=radius_um)
        made[start : start + len(some_rows)] = np.concatenate([own, *_mean_and_spread(vectors, nearest, own)], axis=1)
    return made


def nearest_rows(tree: cKDTree, rows: np.ndarray, *, k: int, radius_um: float) -> np.ndarray:
    """The ``k`` nearest other points of points of a tree, the nearest first: int64 [n, k], -1 where there is none."""
    _, nearest = tree.query(tree.data[rows], k=k + 1, distance_upper_bound=radius_um)
    # A point is its own nearest, but not always the first where several lie at one place.
    valid = (nearest < tree.n) & (nearest != rows[:, None])
    first = np.argsort(~valid, axis=1, kind="stable")[:, :k]
    return np.where(np.take_along_axis(valid, first, 1), np.take_along_axis(nearest, first, 1), -1)


def _mean_and_spread(vectors: np.ndarray, nearest: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the vectors [N, D] of rows int [n, k], -1 being none; of no row at all ``own`` [n, D] and zeros."""
    weight = (nearest >= 0).astype(np.float32)  # [n, k]
    count = weight.sum(axis=1, keepdims=True)  # [n, 1]
    share = weight / np.maximum(count, 1)
    there = np.asarray(vectors[np.maximum(nearest, 0)], np.float32)  # [n, k, D]
    mean = np.where(count, np.einsum("nk,nkd->nd", share, there), own)
    there -= mean[:, None]
    there *= there
    return mean, np.sqrt(np.einsum("nk,nkd->nd", share, there))


def with_field(own: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Vectors float32 [n, D] with those of their fields [n, F], which are brought to the same length: [n, D + F].

    So the cosine of two such vectors is the mean of the cosines of their parts.
    """
    length, of_field = (np.linalg.norm(part, axis=1, keepdims=True) for part in (own, field))
    return np.concatenate([own, field * (length / np.maximum(of_field, 1e-12))], axis=1).astype(np.float32)


class _Kept:
    """Vectors float32 [N, width] in a file, in the order in which they came: a slide's may not fit the memory."""

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width = path, width

    def append(self, vectors: np.ndarray) -> None:
        """Raises FatalError where the disk is full: every slide would meet that."""
        try:
            with self.path.open("ab") as stream:
                stream.write(np.ascontiguousarray(vectors, np.float32).data)
        except OSError as error:
            raise full_scratch_error(self.path, "vectors", error) from None

    def read(self) -> np.ndarray:
        return np.memmap(self.path, np.float32, "r").reshape(-1, self.width)
