"""Is learning real? Pretrain on unlabelled nuclei of several collections, then probe cell types of CoNSeP.

python -m benchmarks.learning --data FOLDER --work FOLDER [--seeds 0 1 2] [key=value of the pretraining job ...]

FOLDER holds monuseg_train, consep_train, gbm40 and cpm15: images with ``<name>_inst.npz`` instance maps (and the type
map of CoNSeP). Every nucleus becomes a cell; labels are used by the probe alone. The probe is logistic regression on
the frozen class token, standardised, folds by image; C is chosen on an inner split by image. Balanced accuracy of four
classes, over the pooled predictions of the held-out images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.record import record
from lemon.cells.crop import cut_crops
from lemon.cells.ledger import Ledger
from lemon.cells.names import shard_name
from lemon.cells.select import rank_of
from lemon.cells.shard import PARQUET_OPTIONS, images_to_arrow
from lemon.config import load
from lemon.encoders.config import LEMON_MEAN, LEMON_STD, VIT_S8
from lemon.encoders.export import load_exported
from lemon.encoders.features import encode_cells
from lemon.encoders.vit import build_vit, seeded
from lemon.pretrain import launch
from lemon.pretrain.config import PretrainConfig
from lemon.schema import CELLS, CROP_PX
from lemon.storage import Store

COLLECTIONS = ("monuseg_train", "consep_train", "gbm40", "cpm15")
FOLDS = 5


def main() -> None:
    """Build the table, pretrain once a seed, probe, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--untrained", action="store_true", help="also probe an untrained ViT-S/8 (minutes on a CPU)")
    parser.add_argument("overrides", nargs="*", help="of the pretraining job")
    options = parser.parse_args()
    store = Store(options.work / "cells")
    n_cells = sum(write_collection(options.data / name, store) for name in COLLECTIONS)
    images, labels, groups = consep(options.data / "consep_train")
    print(f"{n_cells:,} cells to pretrain on, {len(labels):,} labelled nuclei of {len(set(groups))} CoNSeP images")
    scores = {}
    if options.untrained:
        with seeded(0):
            untrained = build_vit(VIT_S8).eval()
        scores["untrained ViT-S/8"] = probe(untrained, images, labels, groups, mean=LEMON_MEAN, std=LEMON_STD)
        print(f"untrained ViT-S/8: {scores['untrained ViT-S/8']:.3f}")
    runs = [pretrained(seed, store, options, images=images, labels=labels, groups=groups) for seed in options.seeds]
    got = [run["balanced_accuracy"] for run in runs]
    if got:
        print(
            f"pretrained: {np.mean(got):.3f} (s.d. {np.std(got, ddof=min(1, len(got) - 1)):.3f}) over {len(got)} seeds"
        )
    record(
        "learning",
        {"overrides": options.overrides, "n_cells": n_cells, **scores, "runs": runs},
        packages=("torch", "timm"),
    )


def pretrained(seed: int, store: Store, options: argparse.Namespace, **labelled: np.ndarray) -> dict[str, Any]:
    """Pretrain with one seed and probe the exported encoder."""
    output = options.work / f"seed{seed}"
    words = [f"cells={store.uri}", f"output={output}", f"cache={options.work / 'cache'}", f"seed={seed}"]
    start = time.monotonic()
    config = load("pretrain", [*words, *options.overrides], PretrainConfig)
    if launch.main(config):
        raise SystemExit("pretraining failed")
    minutes = (time.monotonic() - start) / 60
    encoder, cell_input = load_exported(output / launch.EXPORT)
    score = probe(encoder, *labelled.values(), mean=cell_input.mean, std=cell_input.std)
    print(
        f"seed {seed}: balanced accuracy {score:.3f}, {config.total_steps} steps of {config.batch}, {minutes:.1f} min"
    )
    return {"seed": seed, "balanced_accuracy": score, "steps": config.total_steps, "minutes": minutes}


def write_collection(folder: Path, store: Store) -> int:
    """Every nucleus of a collection as a cell, an image a slide; returns how many there are."""
    done = set(store.list("slides"))
    total = 0
    for path in sorted(folder.glob("*_inst.npz")):
        slide_id = f"{folder.name}-{path.name.removesuffix('_inst.npz')}"
        image, inst = read_pair(path)
        _, crops = crops_of(image, inst)
        total += len(crops)
        if not any(slide_id in name for name in done) and len(crops):
            write_slide(store, slide_id, crops)
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


def crops_of(image: np.ndarray, inst: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Instance numbers [N] and crops uint8 [N, 60, 60, 3] centred on their centroids."""
    numbers, counts = np.unique(inst[inst > 0], return_counts=True)
    y, x = np.nonzero(inst)
    owner = np.searchsorted(numbers, inst[y, x])
    centroid = (
        np.stack([np.bincount(owner, weights=axis, minlength=len(numbers)) for axis in (x, y)], 1) / counts[:, None]
    )
    return numbers, cut_crops(image, np.round(centroid - (CROP_PX - 1) / 2).astype(int))


def write_slide(store: Store, slide_id: str, crops: np.ndarray) -> None:
    """A shard of cells in rank order, and its row in the ledger."""
    ids = np.array([f"{slide_id}_{index}" for index in range(len(crops))], object)
    rank = rank_of(ids)
    order = np.argsort(rank)
    values: dict[str, Any] = {"cell_id": ids[order], "rank": rank[order], "image": images_to_arrow(crops[order])}
    values |= {"slide_id": [slide_id] * len(ids), "polygon": [b""] * len(ids)}
    absent: dict[str, Any] = dict.fromkeys(("patient_id", "organ", "site"), [None] * len(ids))
    columns = {name: values.get(name, absent.get(name, np.zeros(len(ids)))) for name in CELLS.names}
    table = pa.table({name: pa.array(column) for name, column in columns.items()}).cast(CELLS)
    store.write_table(shard_name(slide_id), table, **PARQUET_OPTIONS)
    counts = {"n_cells": len(ids), "n_nuclei": len(ids)}
    Ledger(store, config_fingerprint="masks").commit({"slide_id": slide_id, "path": "", "status": "done", **counts})


def consep(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labelled nuclei of CoNSeP: crops [N, 60, 60, 3], classes [N] 1 to 4, image numbers [N]."""
    images, labels, groups = [], [], []
    for group, path in enumerate(sorted(folder.glob("*_inst.npz"))):
        image, inst = read_pair(path)
        types = np.load(path)["type_map"]
        numbers, crops = crops_of(image, inst)
        label = np.zeros(inst.max() + 1, int)
        label[inst.ravel()] = types.ravel()  # a nucleus has one type
        images.append(crops)
        labels.append(label[numbers])
        groups.append(np.full(len(numbers), group))
    kept = np.concatenate(labels) > 0
    return np.concatenate(images)[kept], np.concatenate(labels)[kept], np.concatenate(groups)[kept]


def probe(
    encoder: torch.nn.Module, images: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, mean: Any, std: Any
) -> float:
    """Balanced accuracy over the pooled predictions of held-out images."""
    with torch.inference_mode():
        features = encode_cells(encoder, torch.from_numpy(images), mean=mean, std=std, crop_px=40).numpy()
    predicted = np.empty_like(labels)
    for train, test in GroupKFold(FOLDS).split(features, groups=groups):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, class_weight="balanced"))
        grid = {"logisticregression__C": [1e-4, 1e-3, 1e-2, 1e-1]}
        search = GridSearchCV(model, grid, cv=GroupKFold(3), scoring="balanced_accuracy", n_jobs=-1)
        search.fit(features[train], labels[train], groups=groups[train])
        predicted[test] = search.predict(features[test])
    return float(balanced_accuracy_score(labels, predicted))


if __name__ == "__main__":
    main()
