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


FOLD = np.zeros(600, int)


def counts(truth, guess, slide, *, fold=FOLD, metric: str = "balanced_accuracy") -> metrics.Counts:
    """As of predictions that are sure of ``guess``."""
    return metrics.counts_of(metric, truth[:, None], np.eye(4)[guess], fold=fold[: len(truth)], cluster=slide)


def test_counts_give_scikit_learns_scores(predicted):
    truth, guess, slide = predicted
    for metric, expected in (
        ("balanced_accuracy", balanced_accuracy_score(truth, guess)),
        ("macro_f1", f1_score(truth, guess, average="macro")),
    ):
        assert metrics.bootstrap(counts(truth, guess, slide, metric=metric), seed=0).mean == pytest.approx(expected)


def test_a_score_is_the_mean_over_folds_and_its_interval_is_of_this_mean(predicted):
    truth, guess, slide = predicted
    fold = slide.astype(int) % 5
    by_fold = [balanced_accuracy_score(truth[fold == at], guess[fold == at]) for at in range(5)]
    found = metrics.bootstrap(counts(truth, guess, slide, fold=fold), seed=0).interval()
    assert found.value == pytest.approx(np.mean(by_fold))
    assert found.value != pytest.approx(balanced_accuracy_score(truth, guess), abs=1e-4)
    assert found.low < found.value < found.high


def test_a_draw_of_slides_scores_each_fold_on_its_repeated_nuclei(predicted):
    truth, guess, slide = predicted
    fold = np.arange(600) % 2  # a slide is on both sides, as in random splits
    names = np.unique(slide)
    drawn = metrics.bootstrap(counts(truth, guess, slide, fold=fold), seed=3, draws=5).draws
    for draw, value in zip(metrics.cluster_draws(len(names), seed=3, draws=5), drawn, strict=True):
        rows = np.concatenate([np.tile(np.flatnonzero(slide == name), n) for name, n in zip(names, draw, strict=True)])
        parts = [rows[fold[rows] == at] for at in (0, 1)]
        assert value == pytest.approx(np.mean([balanced_accuracy_score(truth[part], guess[part]) for part in parts]))


def test_correlations_of_a_draw_are_those_of_the_repeated_nuclei(predicted):
    slide = predicted[2]
    generator = np.random.default_rng(1)
    truth = generator.normal(size=(600, 3)) + 50
    guess = truth + generator.normal(size=(600, 3))
    truth[:, 2] = 7.1  # a constant column has no correlation
    fold = (slide.astype(int) % 2).astype(str)
    found = metrics.bootstrap(metrics.counts_of("pearson", truth, guess, fold=fold, cluster=slide), seed=3, draws=4)
    names = np.unique(slide)
    draws = metrics.cluster_draws(len(names), seed=3, draws=4)
    for draw, value in zip([np.ones(len(names), int), *draws], [found.mean, *found.draws], strict=True):
        rows = np.concatenate([np.tile(np.flatnonzero(slide == name), n) for name, n in zip(names, draw, strict=True)])
        parts = [rows[fold[rows] == at] for at in ("0", "1")]
        assert value == pytest.approx(np.mean([metrics.mean_pearson(truth[part], guess[part]) for part in parts]))


def test_one_slide_has_a_score_and_no_interval(predicted):
    truth, guess, _ = predicted
    found = metrics.bootstrap(counts(truth, guess, np.full(600, "s")), seed=0).interval()
    assert found.value == pytest.approx(balanced_accuracy_score(truth, guess))
    assert np.isnan([found.low, found.high]).all()


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered, slide = 0, np.repeat(np.arange(20), 30).astype(str)
    for seed in range(200):
        generator = np.random.default_rng(seed)
        skill = np.repeat(generator.beta(8, 4, 20), 30)  # each slide has its own accuracy, 2/3 on average
        truth = generator.integers(0, 2, 600)
        guess = np.where(generator.random(600) < skill, truth, 1 - truth)
        found = metrics.bootstrap(counts(truth, guess, slide, fold=np.arange(600) // 120), seed=0, draws=300).interval()
        covered += found.low <= 2 / 3 <= found.high
    assert 0.84 <= covered / 200 <= 0.99


def test_an_encoder_against_itself_differs_by_nothing(predicted):
    scored = metrics.bootstrap(counts(*predicted, metric="macro_f1"), seed=0)
    assert scored.less(scored) == (0.0, 0.0, 0.0)


def test_a_paired_difference_is_narrower_than_two_intervals_apart(predicted):
    truth, guess, slide = predicted
    better = guess.copy()
    better[::10] = truth[::10]
    first, second = (metrics.bootstrap(counts(truth, each, slide), seed=0) for each in (better, guess))
    paired, alone = first.less(second), first.interval()
    assert paired.value == pytest.approx(first.mean - second.mean)
    assert paired.low > 0
    assert paired.high - paired.low < alone.high - alone.low


def test_retrieval_counts_the_crops_that_were_found():
    truth, predicted = np.arange(8)[:, None], np.array([0, 1, 2, 3, 0, 0, 0, 0])[:, None].astype(np.float32)
    found = metrics.counts_of("recall_at_1", truth, predicted, fold=np.arange(8) // 4, cluster=np.arange(8) % 4)
    assert metrics.bootstrap(found, seed=0).mean == pytest.approx(0.5)


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
