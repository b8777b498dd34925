"""Time of the linear probe: 5 folds with the inner search of C, against scikit-learn's plain LogisticRegressionCV.

python -m benchmarks.probe [--rows 40000] [--width 384] [--classes 3] [--no-peer]

Both do the same work on the same made-up embeddings: for each of five folds by slide, C out of 15 values by balanced
accuracy on three inner folds by slide, then a fit with it. The peer fits every C of its grid (it, too, starts each from
the one before); ours ends its path after the best C, and runs the folds in processes. The classes overlap so that the
best C is in the middle of the grid. Balanced accuracies of both are printed: they must agree.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.record import record
from lemon.probe import linear
from lemon.probe.config import ProbeSettings
from lemon.probe.folds import grouped_folds
from lemon.probe.score import fold_means, score_task
from lemon.probe.task import Protocol, Task
from lemon.schema import CELL_PX

SLIDES = 60


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    task, embedding, labels = made_up(options.rows, width=options.width, classes=options.classes)
    figures: dict[str, Any] = dict(vars(options))
    start = time.perf_counter()
    settings = ProbeSettings(probes=["linear"], robustness=False, class_weight="none")
    scored = score_task(task, embedding, settings)
    figures["ours_s"] = time.perf_counter() - start
    means = {metric: mean for _, metric, mean, _ in fold_means(scored.scores)}
    figures["ours_balanced_accuracy"] = means["balanced_accuracy"]
    if not options.no_peer:
        start = time.perf_counter()
        figures["peer_balanced_accuracy"] = peer(task, embedding, labels)
        figures["peer_s"] = time.perf_counter() - start
        figures["ratio"] = figures["peer_s"] / figures["ours_s"]
    for name, value in figures.items():
        print(f"{name:>24} {value:,.3f}" if isinstance(value, float) else f"{name:>24} {value}")
    record("probe", figures, packages=("scikit-learn", "numpy"))


def made_up(rows: int, *, width: int, classes: int) -> tuple[Task, np.ndarray, np.ndarray]:
    """A task, its embedding with a spectrum that falls as those of encoders do, and the labels as numbers."""
    generator = np.random.default_rng(0)
    labels = generator.choice(classes, rows, p=np.array([0.5, 0.35, 0.15]) if classes == 3 else None)
    spectrum = 1 / np.sqrt(np.arange(1, width + 1))
    mixing = np.linalg.qr(generator.normal(size=(width, width)))[0]
    latent = generator.normal(size=(rows, width)) * spectrum
    latent += (generator.normal(size=(classes, width)) * spectrum * 0.12)[labels]
    slide = generator.integers(0, SLIDES, rows)
    latent += (generator.normal(size=(SLIDES, width)) * spectrum * 0.3)[slide]
    names = np.array([f"s{number:02d}" for number in slide])
    target = np.array([f"class{number}" for number in labels])
    task = Task(
        name="made-up",
        kind="classification",
        images=np.broadcast_to(np.zeros((1, CELL_PX, CELL_PX, 3), np.uint8), (rows, CELL_PX, CELL_PX, 3)),  # not used
        target=target,
        target_names=tuple(f"class{number}" for number in range(classes)),
        sample_ids=np.arange(rows).astype(str),
        groups={"slide": names},
        protocols=(Protocol("leak-free", grouped_folds(names, labels=target, n_folds=5), names),),
    )
    return task, (latent @ mixing).astype(np.float32), labels


def peer(task: Task, embedding: np.ndarray, labels: np.ndarray) -> float:
    """Mean balanced accuracy over the folds by LogisticRegressionCV on all cores."""
    scores = []
    for fold in task.protocols[0].folds:
        inner = linear.inner_splits(labels[fold.train], task.groups["slide"][fold.train], seed=0, classify=True)
        search = LogisticRegressionCV(
            Cs=linear.C_GRID, cv=inner, scoring="balanced_accuracy", max_iter=linear.MAX_ITER, n_jobs=-1
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = make_pipeline(StandardScaler(), search).fit(embedding[fold.train], labels[fold.train])
        scores.append(balanced_accuracy_score(labels[fold.test], model.predict(embedding[fold.test])))
    return float(np.mean(scores))


if __name__ == "__main__":
    main()
