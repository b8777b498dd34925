"""Linear and nearest-neighbour probes."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegressionCV, Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from lemon.probe import linear
from tests.probe.made_up import made_up


def blobs(n: int = 400, *, width: int = 12, noise: float = 2.0, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Embedding float32, labels of three classes, slides."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, n)
    centers = generator.normal(size=(3, width)) * 1.5
    embedding = centers[labels] + generator.normal(size=(n, width)) * noise
    return embedding.astype(np.float32), labels, generator.integers(0, 10, n).astype(str)


def test_the_search_finds_the_c_of_scikit_learns_full_grid():
    embedding, labels, slides = blobs()
    grid = tuple(10.0 ** np.arange(-4.0, 3.0))
    fitted = linear.fit_classifier(embedding, labels, groups=slides, seed=0, grid=grid, class_weight="none")
    splits = linear.inner_splits(labels, slides, seed=0, classify=True)
    scaled = StandardScaler().fit_transform(embedding)
    full = LogisticRegressionCV(Cs=grid, cv=splits, scoring="balanced_accuracy", max_iter=500, l1_ratios=(0,))
    full.fit(scaled, labels)
    by_c = full.scores_ if not isinstance(full.scores_, dict) else next(iter(full.scores_.values()))
    means = np.asarray(by_c).reshape(linear.INNER_FOLDS, len(grid)).mean(axis=0)
    ours = fitted.inner_scores[fitted.chosen]
    assert ours == pytest.approx(means.max(), abs=0.015)  # scaling is inside the inner fold here, not there


def test_the_search_ends_soon_after_its_best():
    embedding, labels, slides = blobs(noise=4.0)
    fitted = linear.fit_classifier(embedding, labels, groups=slides, seed=0)
    tried = list(fitted.inner_scores)
    assert tried == list(linear.C_GRID[: len(tried)])
    assert tried.index(fitted.chosen) <= len(tried) - 1 - linear.PATIENCE
    assert len(tried) < len(linear.C_GRID)


def test_the_search_does_not_end_among_penalties_so_strong_that_fits_differ_by_accident(monkeypatch):
    embedding, labels, slides = blobs(200)
    met = dict(zip(linear.C_GRID, (0.537, 0.5366, 0.533, 0.536, 0.56, 0.6, 0.604, 0.602, 0.591), strict=False))
    monkeypatch.setattr(linear._Path, "score", lambda self, c: met[c])  # as on CoNSeP's types, where it once ended
    fitted = linear.fit_classifier(embedding, labels, groups=slides, seed=0)
    assert fitted.inner_scores == met
    assert fitted.inner_scores[fitted.chosen] == 0.604


def test_the_search_gets_past_a_penalty_so_strong_that_one_class_takes_all():
    embedding, labels, slides = blobs(noise=1.0)
    kept = (labels == 0) | (np.arange(len(labels)) % 5 == 0)  # unbalanced: the plateau is the share of one class
    fitted = linear.fit_classifier(embedding[kept], labels[kept], groups=slides[kept], seed=0, class_weight="none")
    assert fitted.inner_scores[linear.C_GRID[0]] == pytest.approx(1 / 3)
    assert fitted.inner_scores[fitted.chosen] > 0.8


def test_the_search_does_not_end_where_one_class_takes_all_after_a_lucky_start():
    task, embedding = made_up(480, signal=0.0, per_slide=8.0)
    train = task.protocols[0].folds[1].train
    labels = (task.target[train] == "tumour").astype(int)
    fitted = linear.fit_classifier(embedding[train], labels, groups=None, seed=0, class_weight="none")
    scores = list(fitted.inner_scores.values())
    assert scores[0] > 0.9
    assert min(scores[1:4]) == 0.5
    assert fitted.inner_scores[fitted.chosen] > 0.9
    assert fitted.chosen > 1e-6
    assert fitted.model.score(embedding[train], labels) > 0.9  # with the first C alone, one class takes all


def test_inner_splits_never_divide_a_slide():
    _, labels, slides = blobs()
    for train, test in linear.inner_splits(labels, slides, seed=1, classify=True):
        assert not set(slides[train]) & set(slides[test])
    for train, test in linear.inner_splits(np.zeros((400, 2)), slides, seed=1, classify=False):
        assert not set(slides[train]) & set(slides[test])


def test_a_scale_of_the_embedding_changes_nothing():
    embedding, labels, slides = blobs()
    stretched = embedding * np.geomspace(0.01, 100, embedding.shape[1], dtype=np.float32) + 5
    one, other = (linear.fit_classifier(each, labels, groups=slides, seed=0) for each in (embedding, stretched))
    assert np.mean(one.model.predict(embedding) == other.model.predict(stretched)) > 0.99


def test_a_class_without_training_crops_has_probability_zero():
    embedding, labels, slides = blobs()
    fitted = linear.fit_classifier(embedding, labels, groups=slides, seed=0)
    probability = linear.class_probabilities(fitted.model, embedding, classes=5)
    assert probability.shape == (400, 5)
    assert not probability[:, 3:].any()
    assert probability.sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_ridge_chooses_more_penalty_where_there_is_more_noise():
    generator = np.random.default_rng(0)
    embedding = generator.normal(size=(300, 60)).astype(np.float32)
    signal = embedding @ generator.normal(size=(60, 4))
    groups = generator.integers(0, 6, 300)
    chosen = [
        linear.fit_regressor(embedding, signal + generator.normal(size=signal.shape) * s, groups=groups, seed=0).chosen
        for s in (0.1, 60)
    ]
    assert chosen[0] < chosen[1]


def test_hest_benchs_regressor_is_pca_and_ridge_with_its_alpha():
    generator = np.random.default_rng(0)
    embedding, targets = generator.normal(size=(500, 300)), generator.normal(size=(500, 7))
    fitted = linear.fit_hest_bench(embedding, targets)
    assert fitted.chosen == pytest.approx(100 / (256 * 7))
    scaled = StandardScaler().fit_transform(embedding)
    reduced = PCA(256, random_state=0).fit_transform(scaled)
    expected = Ridge(fitted.chosen).fit(reduced, targets).predict(reduced)
    assert fitted.model.predict(embedding) == pytest.approx(expected, abs=1e-6)


def test_pca_is_left_out_for_narrow_embeddings():
    assert len(linear.preprocessing("pca256", np.zeros((500, 192)))) == 1
    assert len(linear.preprocessing("pca256", np.zeros((500, 384)))) == 2


def test_neighbours_find_blobs():
    embedding, labels, slides = blobs(noise=1.0)
    train, test = next(GroupKFold(4).split(embedding, groups=slides))
    model = linear.fit_neighbours(embedding[train], labels[train]).model
    assert np.mean(model.predict(embedding[test]) == labels[test]) > 0.8
