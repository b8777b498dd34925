"""What surroundings add to a nucleus's vector, and what they cost: nucleus, neighbours, field, by the same probe.

python -m benchmarks.context --data FOLDER [--weights FOLDER] [--cache FOLDER] [--tasks NAME ...] [--encoders NAME ...]
    [--fields NAME ...] [--cells 3000] [--k 10] [--radius-um 50] [--um 56]

FOLDER has masks/consep_train and nucls15 as their tasks read them (lemon.probe.tasks). A folder in --weights is an
encoder by its name. Vectors are those of ``lemon embed context=``: the same functions make them. Score: balanced
accuracy of the linear probe, mean over the task's five folds by image, with its 95 % interval over images; differences
to the nucleus alone, and of a field to that of the first of --fields (``over_first``), are over the same draws of
images. Neighbours and fields are of the nucleus's own image, and no image is on both sides of a fold, so nothing of a
test image is seen in training.

``random`` is a control: as many other nuclei of the same image, drawn at random, in place of the nearest. What it gains
is what an image's mean tells; only what neighbours gain beyond it is due to their being near.

Costs are ms of CPU a cell, of all threads, as other work on the machine changes them little. At most --cells nuclei of
a task are scored, drawn at random, always the same; neighbours are sought among all. Vectors are kept in --cache by
image: a run that was stopped goes on.

What the figures do not say: neighbours are the labelled nuclei of which a task has a crop, found by experts, not by a
segmenter; those at an image's border are missing. An image is mirrored at its border where a field reaches over it
(``reaching``: the share of fields that do; a tile of the NuCLS excerpt is hardly larger than a field).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

import lemon
from benchmarks.record import record
from benchmarks.robustness import exported_one
from lemon.cells.crop import corners_of, cut_crops
from lemon.cells.fields import PX_AT_A_TIME
from lemon.embed.context import with_field, with_neighbours
from lemon.encoders.open import Encoder
from lemon.probe import metrics
from lemon.probe.config import ProbeSettings
from lemon.probe.score import score_task
from lemon.probe.task import Fold, Protocol, Task
from lemon.probe.tasks import consep, nucls, nucls15
from lemon.probe.tasks.crops import to_crop_mpp
from lemon.schema import CELL_MPP
from lemon.slides.images import read_image

SEED = 0


@dataclass(frozen=True)
class Benchmark:
    """A task with places of nuclei: where it lies, um/px of its images, and how it is read."""

    folder: str
    mpp: float
    load: Callable[[Path], Task]

    def image(self, data: Path, name: str) -> np.ndarray:
        """An image uint8 [H, W, 3] at 0.25 um/px."""
        (path,) = (file for file in (data / self.folder).glob(f"{name}.*") if file.suffix in (".png", ".jpg"))
        return to_crop_mpp(read_image(path), mpp=self.mpp)


BENCHMARKS = {
    "CoNSeP": Benchmark("masks/consep_train", CELL_MPP, consep.load),
    "NuCLS-15": Benchmark("nucls15", nucls.MPP, nucls15.load),
}


def main() -> None:
    """Score every context of every encoder on every task, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "lemon-context")
    parser.add_argument("--tasks", nargs="+", default=list(BENCHMARKS), choices=list(BENCHMARKS))
    parser.add_argument("--encoders", nargs="+", default=["lemon_mini"])
    parser.add_argument("--fields", nargs="*", default=["lemon_mini", "efficientnet_lite0"])
    parser.add_argument("--cells", type=int, default=3000)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--radius-um", type=float, default=50.0)
    parser.add_argument("--um", type=float, default=56.0)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    for name in options.tasks:
        task = BENCHMARKS[name].load(options.data / BENCHMARKS[name].folder)
        rows = np.sort(np.random.default_rng(SEED).permutation(len(task.images))[: options.cells])
        scored = part_of(task, rows)
        for encoder in options.encoders:
            alone, first = None, None
            for row, vectors in contexts(name, task, rows, encoder, options):
                pooled = held_out(scored, vectors)
                alone = alone or pooled
                row |= scores(pooled, alone)
                if row["context"] == "field":
                    first = first or pooled
                    row["over_first"] = rounded(pooled.less(first))
                print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
                record("context", row, packages=("numpy", "scikit-learn", "scipy", "torch"))


def part_of(task: Task, rows: np.ndarray) -> Task:
    """Some of a task's nuclei, int [n] in rising order, in the folds that they are in."""
    assert task.place_um is not None

    def fold_of(fold: Fold) -> Fold:
        sides = (np.searchsorted(rows, np.intersect1d(side, rows)) for side in (fold.train, fold.test))
        return Fold(*sides, fold.name)

    def protocol_of(each: Protocol) -> Protocol:
        inner = None if each.inner_groups is None else each.inner_groups[rows]
        return Protocol(each.name, tuple(fold_of(fold) for fold in each.folds), inner)

    return replace(
        task,
        images=task.images[rows],
        target=task.target[rows],
        sample_ids=task.sample_ids[rows],
        groups={group: names[rows] for group, names in task.groups.items()},
        protocols=tuple(protocol_of(each) for each in task.protocols),
        place_um=task.place_um[rows],
    )


def contexts(
    name: str, task: Task, rows: np.ndarray, encoder: str, options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Circumstances of each context, that of the nucleus alone first, and its vectors float32 [n, W] of the rows."""
    own, own_ms = made_by_image(task, name, encoder, options, lambda network, _, own: network.embed(task.images[own]))
    facts = {"task": name, "encoder": encoder, "cells": len(rows), "among": len(own), "own_ms": round(own_ms, 3)}

    def described(context: str, vectors: np.ndarray, more_ms: float, **more: Any) -> tuple[dict[str, Any], np.ndarray]:
        cost = {"values": vectors.shape[1], "more_ms": round(more_ms, 3)}
        return facts | {"context": context} | more | cost, vectors

    yield described("nucleus", own[rows], 0.0)
    settings = {"k": options.k, "radius_um": options.radius_um}
    for context, beside in (("neighbours", nearest), ("random", at_random)):
        start = time.process_time()
        vectors = by_image(task, own, lambda part, place, beside=beside: beside(part, place, **settings))
        yield described(context, vectors[rows], 1000 * (time.process_time() - start) / len(own), **settings)
    scored, side_px = part_of(task, rows), round(options.um / CELL_MPP)
    reaching = share_reaching(name, scored, side_px=side_px, data=options.data)
    for field in options.fields:
        around, more_ms = made_by_image(
            scored,
            f"{name}-{len(rows)}-{side_px}px",
            field,
            options,
            lambda network, slide, of: fields(name, scored, network, slide, of, side_px=side_px, data=options.data),
        )
        how = {"um": options.um, "field": field, "reaching": reaching}
        yield described("field", with_field(own[rows], around), more_ms, **how)


def opened(encoder: str, options: argparse.Namespace) -> Encoder:
    """An encoder by its name, or by its folder in --weights."""
    if options.weights is None or not (options.weights / encoder).is_dir():
        return lemon.load_encoder(encoder)
    with tempfile.TemporaryDirectory() as folder:
        return lemon.load_encoder(exported_one(options.weights / encoder, Path(folder)))


def made_by_image(
    task: Task,
    name: str,
    encoder: str,
    options: argparse.Namespace,
    make: Callable[[Encoder, str, np.ndarray], Any],
) -> tuple[np.ndarray, float]:
    """Vectors float32 [N, D] that an encoder makes of each image's rows, and ms of CPU a cell; kept in --cache."""
    network, parts, ms = opened(encoder, options), [], 0.0
    owned = rows_by_image(task)
    for slide, rows in owned.items():
        path = options.cache / f"{name}-{encoder}-{slide}.npz"
        if not path.exists():
            start = time.process_time()
            vectors = np.asarray(make(network, slide, rows), np.float32)
            np.savez(path, vectors=vectors, ms=1000 * (time.process_time() - start))
        with np.load(path) as stored:
            parts.append(stored["vectors"])
            ms += float(stored["ms"])
    return np.concatenate(parts)[np.argsort(np.concatenate([*owned.values()]))], ms / len(task.images)


def rows_by_image(task: Task) -> dict[str, np.ndarray]:
    """Rows int [n] of each image."""
    return {str(slide): np.flatnonzero(task.groups["slide"] == slide) for slide in np.unique(task.groups["slide"])}


def by_image(task: Task, vectors: np.ndarray, make: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """What ``make`` gives of the vectors [n, D] and places [n, 2] of each image, in the order of the task."""
    assert task.place_um is not None
    parts = [*rows_by_image(task).values()]
    made = np.concatenate([make(vectors[rows], task.place_um[rows]) for rows in parts])
    return made[np.argsort(np.concatenate(parts))]


def nearest(vectors: np.ndarray, place_um: np.ndarray, *, k: int, radius_um: float) -> np.ndarray:
    """As ``context=neighbours`` has them."""
    return with_neighbours(vectors, cKDTree(place_um), np.arange(len(vectors)), k=k, radius_um=radius_um)


def at_random(vectors: np.ndarray, place_um: np.ndarray, *, k: int, radius_um: float) -> np.ndarray:
    """The same with places that were dealt anew among the image's nuclei, so that neighbours are any of them."""
    dealt = np.random.default_rng(SEED).permutation(place_um)
    return nearest(vectors, dealt, k=k, radius_um=radius_um)


def corners_in(task: Task, rows: np.ndarray, *, side_px: int) -> np.ndarray:
    """Top left px int [n, 2] of the squares around nuclei, at 0.25 um/px."""
    assert task.place_um is not None
    return corners_of(task.place_um[rows] / CELL_MPP - 0.5, side_px=side_px)


def fields(
    name: str, task: Task, encoder: Encoder, slide: str, rows: np.ndarray, *, side_px: int, data: Path
) -> np.ndarray:
    """Vectors float32 [n, F] of the squares around an image's nuclei; beyond its border it is mirrored."""
    margin = side_px // 2 + 1
    image = np.pad(BENCHMARKS[name].image(data, slide), ((margin,) * 2, (margin,) * 2, (0, 0)), mode="symmetric")
    corner = corners_in(task, rows, side_px=side_px) + margin
    at_a_time = max(1, PX_AT_A_TIME // side_px**2)
    parts = np.split(corner, range(at_a_time, len(corner), at_a_time))
    return np.concatenate([encoder.embed_fields(cut_crops(image, part, side_px=side_px)).numpy() for part in parts])


def share_reaching(name: str, task: Task, *, side_px: int, data: Path) -> float:
    """Share of squares that reach over their image's border."""
    over = 0
    for slide, rows in rows_by_image(task).items():
        corner, size = corners_in(task, rows, side_px=side_px), BENCHMARKS[name].image(data, slide).shape[1::-1]
        over += int(((corner < 0) | (corner + side_px > size)).any(axis=1).sum())
    return round(over / len(task.images), 3)


def held_out(task: Task, vectors: np.ndarray) -> metrics.Bootstrapped:
    """Balanced accuracy of the linear probe over the folds by image, and of draws of images."""
    settings = ProbeSettings(protocols=["leak-free"], probes=["linear"], robustness=False, seed=SEED)
    table = score_task(task, vectors, settings).predictions
    predicted = np.stack(table["predicted"].to_numpy(zero_copy_only=False))
    truth = np.stack(table["truth"].to_numpy(zero_copy_only=False))
    fold, cluster = (table[column].to_numpy(zero_copy_only=False) for column in ("fold", "cluster"))
    counts = metrics.counts_of("balanced_accuracy", truth, predicted, fold=fold, cluster=cluster.astype(str))
    return metrics.bootstrap(counts, seed=SEED)


def scores(pooled: metrics.Bootstrapped, alone: metrics.Bootstrapped) -> dict[str, Any]:
    """The score with its interval, and the difference to the nucleus alone."""
    return {"score": rounded(pooled.interval()), "gain": rounded(pooled.less(alone))}


def rounded(values: Iterable[float]) -> list[float]:
    """As they are recorded."""
    return [round(float(each), 4) for each in values]


if __name__ == "__main__":
    main()
