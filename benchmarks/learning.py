"""Is learning real? Pretrain on unlabelled nuclei of several collections, then probe cell types of CoNSeP.

python -m benchmarks.learning [key=value of the job ...] --data FOLDER --work FOLDER [--seeds 0 1 2] [--baselines ...]

FOLDER holds monuseg_train, consep_train, gbm40 and cpm15: images with ``<name>_inst.npz`` instance maps (and the type
map of CoNSeP). Every nucleus becomes a cell; labels are used by the probe alone: the task ``consep-type`` with its
folds by image, logistic regression with C from an inner split by image. Balanced accuracy of each model with classes
weighed alike (as the metric does) and ``plain``, as the mean over folds and pooled. The job's variant is ``laptop``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from skimage.feature import hog
from sklearn.metrics import balanced_accuracy_score

from benchmarks.record import record
from lemon.cells.crop import corners_of, cut_crops
from lemon.cells.ledger import cells_ledger
from lemon.cells.names import shard_name
from lemon.cells.select import rank_of
from lemon.cells.shard import PARQUET_OPTIONS, images_to_arrow
from lemon.encoders.open import load_encoder
from lemon.pretrain import job as pretraining
from lemon.pretrain.config import PretrainConfig
from lemon.probe.config import ProbeSettings
from lemon.probe.score import OVER_FOLDS, Scored, score_task
from lemon.probe.task import Task
from lemon.probe.tasks import consep
from lemon.runtime.config import load
from lemon.runtime.job import framed
from lemon.runtime.shards import write_shard
from lemon.runtime.store import Store
from lemon.schema import CELLS, SlideRow

COLLECTIONS = ("monuseg_train", "consep_train", "gbm40", "cpm15")
BASELINES = ("hog_and_colour", "untrained_vit_s8", "efficientnet_lite0")


def main() -> None:
    """Build the table, pretrain once a seed, probe, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--baselines", nargs="*", default=[], help=f"also probe these: {', '.join(BASELINES)}")
    parser.add_argument("overrides", nargs="*", help="of the pretraining job")
    options = parser.parse_args()
    store = Store(options.work / "cells")
    n_cells = sum(write_collection(options.data / name, store) for name in COLLECTIONS)
    task = consep.load(options.data / "consep_train")
    print(f"{n_cells:,} cells to pretrain on; {len(task.images):,} labelled nuclei of CoNSeP")
    figures: dict[str, Any] = {name: told(name, probe(task, embed(name, task))) for name in options.baselines}
    runs = [pretrained(seed, store, options, task=task) for seed in options.seeds]
    for figure in ("weighted", "plain") if runs else ():
        got = [run[figure] for run in runs]
        spread = np.std(got, ddof=min(1, len(got) - 1))
        print(f"pretrained, {figure}: {np.mean(got):.3f} (s.d. {spread:.3f}) over {len(got)} seeds")
    record(
        "learning",
        {"overrides": options.overrides, "n_cells": n_cells, "baselines": figures, "runs": runs},
        packages=("torch", "timm", "scikit-learn"),
    )


def pretrained(seed: int, store: Store, options: argparse.Namespace, *, task: Task) -> dict[str, Any]:
    """Pretrain with one seed and probe the exported encoder."""
    output = options.work / f"seed{seed}"
    words = [f"cells={store.uri}", f"output={output}", f"cache={options.work / 'cache'}", f"seed={seed}"]
    start = time.monotonic()
    config = load("pretrain", [*words, "variant=laptop", *options.overrides], PretrainConfig)
    if framed("pretrain", lambda: pretraining.main(config)):
        raise SystemExit("pretraining failed")
    minutes = (time.monotonic() - start) / 60
    scores = told(f"seed {seed}", probe(task, embed(str(output), task)))
    return {"seed": seed, **scores, "images": config.total_steps * config.batch, "minutes": minutes}


def embed(name: str, task: Task) -> np.ndarray:
    """Embeddings float32 [N, D] by an encoder, or the classical features."""
    if name == "hog_and_colour":
        return np.stack([hog_and_colour(image) for image in task.images])
    return load_encoder(name).embed(task.images).numpy()


def hog_and_colour(image: np.ndarray) -> np.ndarray:
    """Histogram of gradients, and mean and standard deviation of RGB and LAB, of the central 40 px: float32 [588]."""
    crop = image[10:50, 10:50]
    both = np.concatenate([crop, cv2.cvtColor(crop, cv2.COLOR_RGB2LAB)], axis=2).reshape(-1, 6)
    shape = hog(crop, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=2)
    return np.concatenate([shape, both.mean(axis=0), both.std(axis=0)]).astype(np.float32)


def probe(task: Task, embedding: np.ndarray) -> dict[str, float]:
    """Balanced accuracy over folds by image: classes weighed alike or plain, mean over folds or pooled."""
    found = {}
    for figure, weight in (("weighted", "balanced"), ("plain", "none")):
        settings = ProbeSettings(probes=["linear"], class_weight=weight, robustness=False, bootstrap=100)  # type: ignore[arg-type]
        scored = score_task(task, embedding, settings)
        (mean,) = [
            each.value for each in scored.scores if (each.metric, each.fold) == ("balanced_accuracy", OVER_FOLDS)
        ]
        found |= {f"{figure}_pooled": pooled(scored), figure: mean}
    return found


def pooled(scored: Scored) -> float:
    """Balanced accuracy over all held-out nuclei together."""
    table = scored.predictions
    truth, predicted = (np.stack(table[name].to_numpy()) for name in ("truth", "predicted"))
    return float(balanced_accuracy_score(truth[:, 0], predicted.argmax(axis=1)))


def told(name: str, scores: dict[str, float]) -> dict[str, float]:
    """The scores, printed."""
    print(f"{name}: balanced accuracy", ", ".join(f"{key} {value:.3f}" for key, value in scores.items()), flush=True)
    return scores


def write_collection(folder: Path, store: Store, *, most: int | None = None, **slide: str) -> int:
    """Every nucleus of a collection as a cell, an image a slide; returns how many there are.

    ``most``: cells of an image, taken evenly from all of it. ``slide``: what is known of all slides, as organ and site.
    """
    done = set(store.list("slides"))
    total = 0
    for path in sorted(folder.glob("*_inst.npz")):
        slide_id = f"{folder.name}-{path.name.removesuffix('_inst.npz')}"
        image, inst = read_pair(path)
        crops = crops_of(image, inst)
        if most is not None and len(crops) > most:
            crops = crops[np.linspace(0, len(crops) - 1, most).astype(int)]
        total += len(crops)
        if not any(slide_id in name for name in done) and len(crops):
            write_slide(store, slide_id, crops, **slide)
    return total


def read_pair(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [H, W, 3] and instance map [H, W]; both at 0.25 um/px (cpm15 tells which images are at 0.5)."""
    inst = np.load(path)["inst_map"]
    image = cv2.imread(str(path).replace("_inst.npz", ".jpg"))[..., ::-1]
    table = path.parent / "images.csv"
    if table.exists() and magnification(table, path.name.removesuffix("_inst.npz")) == "20":
        image = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
        inst = cv2.resize(inst, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    return np.ascontiguousarray(image), inst


def magnification(table: Path, name: str) -> str:
    """What images.csv (image, objective_power, ...) says of an image."""
    powers = dict(line.split(",")[:2] for line in table.read_text().splitlines()[1:])
    return powers[name]


def crops_of(image: np.ndarray, inst: np.ndarray) -> np.ndarray:
    """Crops uint8 [N, 60, 60, 3] centred on the centroids of instances; white beyond the image."""
    numbers, counts = np.unique(inst[inst > 0], return_counts=True)
    y, x = np.nonzero(inst)
    owner = np.searchsorted(numbers, inst[y, x])
    centroid = (
        np.stack([np.bincount(owner, weights=axis, minlength=len(numbers)) for axis in (x, y)], 1) / counts[:, None]
    )
    return cut_crops(image, corners_of(centroid))


def write_slide(store: Store, slide_id: str, crops: np.ndarray, **slide: str) -> None:
    """A shard of cells in rank order, and its row in the ledger."""
    ids = np.array([f"{slide_id}_{index}" for index in range(len(crops))], object)
    rank = rank_of(ids)
    order = np.argsort(rank)
    values: dict[str, Any] = {"cell_id": ids[order], "rank": rank[order], "image": images_to_arrow(crops[order])}
    values |= {"slide_id": [slide_id] * len(ids), "polygon": [b""] * len(ids)}
    known: dict[str, Any] = {name: [slide.get(name)] * len(ids) for name in ("patient_id", "organ", "site")}
    columns = {name: values.get(name, known.get(name, np.zeros(len(ids)))) for name in CELLS.names}
    table = pa.table({name: pa.array(column) for name, column in columns.items()}).cast(CELLS)
    with write_shard(store, shard_name(slide_id), CELLS, **PARQUET_OPTIONS) as shard:
        shard.write(table)
    counts = {"n_cells": len(ids), "n_nuclei": len(ids)}
    cells_ledger(store, config_fingerprint="masks").commit(
        SlideRow(slide_id, "", status="done", cells_digest=shard.digest, **counts, **slide)  # type: ignore[arg-type]
    )


if __name__ == "__main__":
    main()
