"""Small tasks with known answers, for tests of scoring."""

from __future__ import annotations

import numpy as np

from lemon.probe.task import Fold, Protocol, Task


def task_of(
    images: np.ndarray,
    target: np.ndarray,
    slide: np.ndarray,
    *,
    name: str = "made-up",
    hospital: np.ndarray | None = None,
) -> Task:
    """A task with a random protocol (paper) and one by slide (leak-free), three folds each."""
    n = len(images)
    regression = target.ndim == 2
    order = np.random.default_rng(0).permutation(n)
    random = tuple(
        Fold(np.setdiff1d(order, part), np.sort(part), str(i)) for i, part in enumerate(np.array_split(order, 3))
    )
    names = np.unique(slide)
    grouped = []
    for index, part in enumerate(np.array_split(names, 3)):
        test = np.flatnonzero(np.isin(slide, part))
        grouped.append(Fold(np.setdiff1d(np.arange(n), test), test, str(index)))
    return Task(
        name=name,
        kind="regression" if regression else "classification",
        images=images,
        target=target,
        target_names=tuple(f"g{i}" for i in range(target.shape[1])) if regression else tuple(sorted(set(target))),
        sample_ids=np.array([f"cell{i}" for i in range(n)]),
        groups={"slide": slide} | ({} if hospital is None else {"hospital": hospital}),
        protocols=(Protocol("paper", random, None), Protocol("leak-free", tuple(grouped), slide)),
        batch=None if hospital is None else "hospital",
    )


def made_up(n: int = 240, *, seed: int = 0, signal: float = 2.0, per_slide: float = 0.0) -> tuple[Task, np.ndarray]:
    """A task of two classes on twelve slides and two hospitals, and an embedding of its crops.

    ``signal`` is how far classes lie apart; ``per_slide`` how much a slide's own direction tells of its labels.
    """
    generator = np.random.default_rng(seed)
    slide = generator.integers(0, 12, n)
    common = generator.random(12)[slide] < 0.5  # a slide's usual class
    labels = np.where(generator.random(n) < (0.95 if per_slide else 0.5), common, ~common)
    embedding = generator.normal(size=(n, 30))
    embedding[:, 0] += signal * labels
    embedding[np.arange(n), 1 + slide] += per_slide
    images = generator.integers(0, 256, (n, 60, 60, 3), dtype=np.uint8)
    target = np.where(labels, "tumour", "stroma")
    names = np.array([f"s{number:02d}" for number in slide])
    task = task_of(images, target, names, hospital=np.array([f"h{number % 2}" for number in slide]))
    return task, embedding.astype(np.float32)
