"""Does an embedding hold the class of a nucleus, or the hospital (scanner) that its slide comes from?

The paper leaves this open. Two measures of PathoROB (arXiv 2507.17845), made for patches, are ported to nuclei:

- robustness index: among the k nearest neighbours of a nucleus, those of its class from another batch against those of
  another class from its batch;
- average performance drop: how much worse a probe does on batches that it has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from lemon.probe.linear import class_probabilities, fit_classifier
from lemon.probe.metrics import classification_scores

NEIGHBOURS = 50
MAX_A_CELL = 200
"""Nuclei of one class and batch that are compared at most: classes and batches then weigh alike."""


@dataclass(frozen=True)
class Robustness:
    """``index`` in [0, 1], 1 for an embedding that knows classes only; ``drop`` is a share of balanced accuracy."""

    index: float
    drop: float
    n: int
    n_batches: int


def robustness(
    embedding: np.ndarray, labels: np.ndarray, batch: np.ndarray, *, slide: np.ndarray, seed: int
) -> Robustness | None:
    """Both measures; None where fewer than two batches hold two classes each.

    Args:
        embedding: float32 [N, D].
        labels: int [N], indices of classes.
        batch: str [N], hospital or scanner.
        slide: str [N]; a neighbour from the same slide says nothing of batches, and is left out.
        seed: of the sample.
    """
    chosen = balanced_sample(labels, batch, seed=seed)
    if len(chosen) == 0:
        return None
    embedding, labels, batch, slide = embedding[chosen], labels[chosen], batch[chosen], slide[chosen]
    return Robustness(
        index=robustness_index(embedding, labels, batch, slide=slide),
        drop=performance_drop(embedding, labels, batch, slide=slide, seed=seed),
        n=len(chosen),
        n_batches=len(np.unique(batch)),
    )


def balanced_sample(labels: np.ndarray, batch: np.ndarray, *, seed: int, most: int = MAX_A_CELL) -> np.ndarray:
    """Indices with the same number of nuclei in each pair of class and batch.

    Batches that lack a class of those that most batches hold are left out; then the smallest pair sets the number.
    """
    names, member = np.unique(batch, return_inverse=True)
    counts = np.zeros((len(names), labels.max() + 1), int)
    np.add.at(counts, (member, labels), 1)
    classes = np.flatnonzero((counts > 0).mean(axis=0) > 0.5)
    enough = 5  # nuclei of a pair below which a batch tells nothing
    batches = np.flatnonzero((counts[:, classes] >= enough).all(axis=1))
    if len(classes) < 2 or len(batches) < 2:
        return np.empty(0, np.int64)
    n = min(most, int(counts[np.ix_(batches, classes)].min()))
    generator = np.random.default_rng(seed)
    pairs = [np.flatnonzero((member == b) & (labels == k)) for b in batches for k in classes]
    return np.sort(np.concatenate([generator.choice(pair, n, replace=False) for pair in pairs]))


def robustness_index(
    embedding: np.ndarray, labels: np.ndarray, batch: np.ndarray, *, slide: np.ndarray, k: int = NEIGHBOURS
) -> float:
    """Share of (same class, other batch) among the neighbours that are that or (other class, same batch).

    Neighbours by cosine of standardised embeddings; those of the nucleus' own slide are skipped. 0.5 is an embedding
    that mixes both alike.
    """
    values = StandardScaler().fit_transform(embedding)
    _, slide_number, slide_size = np.unique(slide, return_inverse=True, return_counts=True)
    asked = min(len(values) - 1, k + int(slide_size.max()))  # enough to leave k after the own slide is skipped
    search = NearestNeighbors(n_neighbors=asked, metric="cosine", algorithm="brute").fit(values)
    near = search.kneighbors(return_distance=False)  # [N, asked], without the nucleus itself
    other_slide = slide_number[near] != slide_number[:, None]
    counted = other_slide & (np.cumsum(other_slide, axis=1) <= k)
    same_class, same_batch = labels[near] == labels[:, None], batch[near] == batch[:, None]
    good, bad = (counted & same_class & ~same_batch).sum(), (counted & ~same_class & same_batch).sum()
    return float(good / (good + bad)) if good + bad else float("nan")


def performance_drop(
    embedding: np.ndarray, labels: np.ndarray, batch: np.ndarray, *, slide: np.ndarray, seed: int
) -> float:
    """1 - (balanced accuracy on an unseen batch / on unseen slides of seen batches), averaged over batches.

    For each batch in turn half of the slides of the others train a probe, which is scored on their other half and on
    the batch left out. 0: the batch costs nothing.
    """
    generator, drops = np.random.default_rng(seed), []
    for left_out in np.unique(batch):
        seen = np.unique(slide[batch != left_out])
        training = np.isin(slide, generator.choice(seen, (len(seen) + 1) // 2, replace=False)) & (batch != left_out)
        known, unknown = (batch != left_out) & ~training, batch == left_out
        if not known.any() or len(np.unique(labels[training])) < 2:
            continue
        fitted = fit_classifier(embedding[training], labels[training], groups=slide[training], seed=seed)
        inside, outside = (
            classification_scores(
                labels[rows], class_probabilities(fitted.model, embedding[rows], classes=labels.max() + 1)
            )["balanced_accuracy"]
            for rows in (known, unknown)
        )
        drops.append(1 - outside / inside)
    return float(np.mean(drops)) if drops else float("nan")
