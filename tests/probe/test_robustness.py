"""Robustness over hospitals."""

from __future__ import annotations

import numpy as np

from lemon.probe.robustness import balanced_sample, robustness


def embedded(
    *, class_strength: float, batch_strength: float, mimicry: float = 0, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """Embedding, labels, hospital and slide of 900 nuclei: three hospitals with four slides each."""
    generator = np.random.default_rng(seed)
    labels, slide = generator.integers(0, 2, 900), generator.integers(0, 12, 900)
    hospital = slide % 3
    embedding = generator.normal(size=(900, 8))
    embedding[:, 0] += class_strength * labels
    embedding[:, 1:5] += batch_strength * hospital[:, None]
    embedding[:, 0] += mimicry * (hospital == 1)  # its stain looks like the other class
    return embedding.astype(np.float32), labels, np.array(["h0", "h1", "h2"])[hospital], slide.astype(str)


def test_an_embedding_of_classes_is_robust_and_one_of_hospitals_is_not():
    of_class = embedded(class_strength=12, batch_strength=0)
    of_batch = embedded(class_strength=0.5, batch_strength=6)
    good = robustness(*of_class[:3], slide=of_class[3], seed=0)
    bad = robustness(*of_batch[:3], slide=of_batch[3], seed=0)
    assert good.index > 0.95
    assert bad.index < 0.2
    assert abs(good.drop) < 0.05


def test_a_probe_drops_on_a_hospital_whose_stain_mimics_the_other_class():
    embedding, labels, hospital, slide = embedded(class_strength=3, batch_strength=0, mimicry=3)
    assert robustness(embedding, labels, hospital, slide=slide, seed=0).drop > 0.1


def test_pairs_of_class_and_hospital_weigh_alike():
    _, labels, hospital, _ = embedded(class_strength=1, batch_strength=1)
    rare = np.flatnonzero((hospital == "h2") & (labels == 1))[20:]
    kept = np.setdiff1d(np.arange(900), rare)
    chosen = balanced_sample(labels[kept], hospital[kept], seed=0)
    pairs = list(zip(labels[kept][chosen], hospital[kept][chosen], strict=True))
    assert {pairs.count(pair) for pair in set(pairs)} == {20}


def test_one_hospital_has_no_robustness():
    embedding, labels, _, slide = embedded(class_strength=1, batch_strength=1)
    assert robustness(embedding, labels, np.full(900, "only"), slide=slide, seed=0) is None
