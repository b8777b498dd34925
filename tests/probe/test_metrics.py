"""Scores and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from lemon.probe import metrics


@pytest.fixture
def predicted() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, prediction and slide of 600 nuclei of four classes, right in about 70 %."""
    generator = np.random.default_rng(0)
    truth = generator.choice(4, 600, p=[0.5, 0.3, 0.15, 0.05])
    guess = np.where(generator.random(600) < 0.7, truth, generator.integers(0, 4, 600))
    return truth, guess, generator.integers(0, 12, 600).astype(str)


def test_confusion_counts_give_scikit_learns_scores(predicted):
    truth, guess, slide = predicted
    confusion = metrics.confusion_by_cluster(truth, guess, slide, classes=4).sum(axis=0)
    assert metrics.balanced_accuracy_of(confusion) == pytest.approx(balanced_accuracy_score(truth, guess))
    assert metrics.macro_f1_of(confusion) == pytest.approx(f1_score(truth, guess, average="macro"))


def test_a_draw_of_slides_equals_the_score_of_the_repeated_nuclei(predicted):
    truth, guess, slide = predicted
    names = np.unique(slide)
    draws = metrics.cluster_draws(len(names), seed=3, draws=5)
    confusion = metrics.confusion_by_cluster(truth, guess, slide, classes=4)
    by_counts = metrics.balanced_accuracy_of(np.tensordot(draws, confusion, axes=(1, 0)))
    for draw, value in zip(draws, by_counts, strict=True):
        rows = np.concatenate([np.tile(np.flatnonzero(slide == name), n) for name, n in zip(names, draw, strict=True)])
        assert value == pytest.approx(balanced_accuracy_score(truth[rows], guess[rows]))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        skill = np.repeat(generator.beta(8, 4, 20), 30)  # each slide has its own accuracy, 2/3 on average
        truth = generator.integers(0, 2, 600)
        guess = np.where(generator.random(600) < skill, truth, 1 - truth)
        confusion = metrics.confusion_by_cluster(truth, guess, np.repeat(np.arange(20), 30).astype(str), classes=2)
        found = metrics.interval(confusion, metrics.cluster_draws(20, seed=0, draws=300), metric="balanced_accuracy")
        covered += found.low <= 2 / 3 <= found.high
    assert 0.86 <= covered / 200 <= 0.99


def test_an_encoder_against_itself_differs_by_nothing(predicted):
    truth, guess, slide = predicted
    confusion = metrics.confusion_by_cluster(truth, guess, slide, classes=4)
    draws = metrics.cluster_draws(len(confusion), seed=0)
    assert metrics.paired_difference(confusion, confusion, draws, metric="macro_f1") == (0.0, 0.0, 0.0)


def test_a_paired_difference_is_narrower_than_two_intervals_apart(predicted):
    truth, guess, slide = predicted
    better = guess.copy()
    better[::10] = truth[::10]
    first, second = (metrics.confusion_by_cluster(truth, each, slide, classes=4) for each in (better, guess))
    draws = metrics.cluster_draws(len(first), seed=0)
    paired = metrics.paired_difference(first, second, draws, metric="balanced_accuracy")
    alone = metrics.interval(first, draws, metric="balanced_accuracy")
    assert paired.low > 0
    assert paired.high - paired.low < alone.high - alone.low


def test_pearson_agrees_with_numpy_and_skips_constant_genes():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=(50, 3)).astype(np.float32)
    guess = truth + generator.normal(size=(50, 3)).astype(np.float32)
    truth[:, 2] = 1.0
    found = metrics.pearson(truth, guess)
    assert found[:2] == pytest.approx([np.corrcoef(truth[:, g], guess[:, g])[0, 1] for g in (0, 1)], rel=1e-5)
    assert np.isnan(found[2])


def test_a_fold_of_one_class_has_no_auroc_but_a_balanced_accuracy():
    scores = metrics.classification_scores(np.zeros(5, int), np.tile([0.9, 0.1], (5, 1)))
    assert scores["balanced_accuracy"] == 1.0
    assert np.isnan(scores["auroc"])
