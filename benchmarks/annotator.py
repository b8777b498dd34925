"""A simulated annotator: how good is a head after 10, 30 and 100 labels, chosen by ``lemon classify`` or at random?

python -m benchmarks.annotator --data FOLDER [--weights FOLDER] [--cache FOLDER] [--seeds 20] [--encoders NAME ...]

FOLDER has masks/consep_train and nucls15 as their tasks read them (lemon.probe.tasks). For each seed a third of the
images is kept aside, and the annotator labels cells of the others (2,000 at most) ten at a time, with their true class.
No cell is labelled before. Score: balanced accuracy on up to 1,000 cells of the images kept aside. Values are means
over seeds with bootstrap intervals; differences are over the same seeds. Also, with 100 labels at random, the expected
calibration error, and how well distance tells cells of a class of which no label was given (area under the curve).

Embeddings are made once and kept in --cache. Encoders beside lemon_mini are folders in --weights; ``hog`` is a
histogram of gradients with means and deviations of colours. The others were trained, without labels, on CoNSeP too.
NuCLS-15 is an excerpt, of 275 nuclei of three classes in 15 tiles: its intervals tell of these tiles alone.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from skimage.feature import hog
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.pipeline import Pipeline

import lemon
from benchmarks.record import record
from lemon.classify.choose import choose_next
from lemon.classify.head import fit_head, fit_model
from lemon.embed.stream import directions
from lemon.probe.linear import class_probabilities
from lemon.probe.metrics import interval
from lemon.probe.task import Task
from lemon.probe.tasks import consep, nucls15

BUDGETS = (10, 30, 100)
STEP = 10
POOL, TEST = 2000, 1000
CROPS = 3000  # of a set, drawn at random: the encoders' time on two cores
TASKS: dict[str, Callable[[Path], Task]] = {
    "CoNSeP": lambda data: consep.load(data / "masks" / "consep_train"),
    "NuCLS-15": lambda data: nucls15.load(data / "nucls15"),
}


def main() -> None:
    """Simulate, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "annotator")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--encoders", nargs="+", default=["lemon_mini", "hog"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    options = parser.parse_args()
    for name in options.tasks:
        for encoder in options.encoders:
            vectors, labels, slides = embedded(name, encoder, options)
            row = simulated(vectors, labels, slides, seeds=options.seeds)
            print(name, encoder, *(f"{key} {value}" for key, value in row.items()), sep="\n  ", flush=True)
            circumstances = {"task": name, "encoder": encoder, "cells": len(labels), "seeds": options.seeds}
            record("annotator", circumstances | row, packages=("numpy", "scikit-learn"))


def embedded(task: str, encoder: str, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors float32 [N, D], codes of classes int [N], names of images [N]; from the cache where they are there."""
    path = options.cache / f"{task}-{encoder}.npz"
    if not path.exists():
        read = TASKS[task](options.data)
        chosen = np.sort(np.random.default_rng(0).permutation(len(read.images))[:CROPS])
        codes = np.searchsorted(np.unique(read.target), read.target[chosen])
        vectors = vectors_of(encoder, read.images[chosen], weights=options.weights)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, vectors=vectors, codes=codes, slides=read.groups["slide"][chosen])
    with np.load(path) as kept:
        return kept["vectors"], kept["codes"], kept["slides"]


def vectors_of(encoder: str, images: np.ndarray, *, weights: Path | None) -> np.ndarray:
    """Vectors float32 [N, D] of crops uint8 [N, 60, 60, 3]."""
    if encoder == "hog":
        return np.stack([hog_and_color(image) for image in images])
    if weights is None or not (weights / encoder).is_dir():
        opened = lemon.load_encoder(encoder)
        return opened.embed(images).numpy()
    with tempfile.TemporaryDirectory() as folder:  # weights in float16, as they are kept
        values = {
            key: value.astype(np.float32)
            for key, value in load_file(weights / encoder / "model.half.safetensors").items()
        }
        save_file(values, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_bytes((weights / encoder / "config.json").read_bytes())
        return lemon.load_encoder(folder).embed(images).numpy()


def hog_and_color(image: np.ndarray) -> np.ndarray:
    """A histogram of gradients of the middle 40 px, with mean and deviation of each colour."""
    middle = image[10:50, 10:50]
    shape = hog(middle, pixels_per_cell=(10, 10), cells_per_block=(2, 2), channel_axis=-1)
    return np.concatenate([shape, middle.mean(axis=(0, 1)) / 255, middle.std(axis=(0, 1)) / 255]).astype(np.float32)


def simulated(vectors: np.ndarray, codes: np.ndarray, slides: np.ndarray, *, seeds: int) -> dict[str, Any]:
    """Scores after each budget, of both ways of choosing, and their difference."""
    curves: dict[str, list[list[float]]] = {"active": [], "random": []}
    errors, areas = [], []
    for seed in range(seeds):
        pool, test = split(slides, seed=seed)
        for way, runs in curves.items():
            runs.append(annotated(way, vectors, codes, slides, pool, test, seed=seed))
        rows = pool[: BUDGETS[-1]]
        options: dict[str, Any] = {
            "groups": slides[rows],
            "n_classes": int(codes.max()) + 1,
            "seed": seed,
            "unknown": None,
        }
        head, _ = fit_head(vectors[rows], codes[rows], **options)
        errors.append(calibration_error(codes[test], head.probabilities(vectors[test])))
        areas.append(unseen_area(vectors, codes, pool, test))
    active, at_random = (np.array(curves[way]) for way in ("active", "random"))  # [S, budgets]
    row: dict[str, Any] = {}
    for place, budget in enumerate(BUDGETS):
        named = {"active": active, "random": at_random, "difference": active - at_random}
        row |= {f"{name}_{budget}": mean_over(values[:, place]) for name, values in named.items()}
    return row | {
        "calibration_error_100": mean_over(np.array(errors)),
        "unseen_class_auc_100": mean_over(np.array(areas)),
    }


def split(slides: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells that may be labelled and cells to score on, of other images: rows."""
    generator = np.random.default_rng(seed)
    names = generator.permutation(np.unique(slides))
    aside = np.isin(slides, names[: max(1, len(names) // 3)])
    rows = [generator.permutation(np.flatnonzero(side)) for side in (~aside, aside)]
    return rows[0][:POOL], rows[1][:TEST]


def annotated(
    way: str,
    vectors: np.ndarray,
    codes: np.ndarray,
    slides: np.ndarray,
    pool: np.ndarray,
    test: np.ndarray,
    *,
    seed: int,
) -> list[float]:
    """Balanced accuracy after each budget; chance as long as all labels are of one class."""
    order = np.random.default_rng(seed).permutation(len(pool)).tolist()
    classes = int(codes.max()) + 1
    labelled: list[int] = []
    head: Pipeline | None = None  # on the labels so far; the next ones are chosen by it, and it is scored
    scores = []
    for size in BUDGETS if way == "random" else range(STEP, BUDGETS[-1] + 1, STEP):
        if way == "random":
            labelled = order[:size]
        else:
            probability = None if head is None else class_probabilities(head, vectors[pool], classes=classes)
            labelled += choose_next(vectors[pool], labelled, probability, count=STEP, seed=seed)
        rows = pool[labelled]
        if len(np.unique(codes[rows])) > 1:
            head = fit_model(vectors[rows], codes[rows], groups=slides[rows], seed=seed)
        if size in BUDGETS:
            guess = np.full(len(test), codes[rows[0]]) if head is None else head.predict(vectors[test])
            with warnings.catch_warnings():  # an image kept aside may lack a class
                warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
                scores.append(float(balanced_accuracy_score(codes[test], guess)))
    return scores


def calibration_error(truth: np.ndarray, probability: np.ndarray, *, bins: int = 10) -> float:
    """Mean difference of confidence and accuracy over bins of confidence, by their size."""
    confidence, right = probability.max(axis=1), probability.argmax(axis=1) == truth
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(confidence[place == each].mean() - right[place == each].mean()) * (place == each).sum()
        for each in np.unique(place)
    ]
    return float(sum(gaps) / len(truth))


def unseen_area(vectors: np.ndarray, codes: np.ndarray, pool: np.ndarray, test: np.ndarray) -> float:
    """How well distance to 100 labels of the other classes tells cells of a class without labels, mean over classes."""
    areas = []
    for hidden in np.unique(codes[test]):
        known = directions(vectors[pool[codes[pool] != hidden][: BUDGETS[-1]]])
        distance = 1 - (directions(vectors[test]) @ known.T).max(axis=1)
        areas.append(roc_auc_score(codes[test] == hidden, distance))
    return float(np.mean(areas))


def mean_over(values: np.ndarray) -> list[float]:
    """Mean with the bounds of its 95 % interval over seeds."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
    return [round(float(each), 4) for each in interval(float(values.mean()), draws)]


if __name__ == "__main__":
    main()
