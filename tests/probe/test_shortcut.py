"""nIPD: training parts in which class and hospital go together."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats.contingency import association

from lemon.probe.shortcut import REPEATS, STRENGTHS, biased_splits, degradation, shortcut_loss
from tests.probe.made_up_nuclei import nuclei


def test_training_parts_have_the_association_that_they_stand_for_and_one_size() -> None:
    given = nuclei(1200)
    splits = list(biased_splits(given, seed=0))
    assert len(splits) == REPEATS
    for split in splits:
        for strength, rows in zip(STRENGTHS, split.training, strict=True):
            counts = np.zeros((3, 2), int)
            np.add.at(counts, (np.unique(given.batch, return_inverse=True)[1][rows], given.labels[rows]), 1)
            counts = counts[counts.any(axis=1)]  # two of the hospitals, one for each class
            assert association(counts, method="cramer") == pytest.approx(strength, abs=0.03)
            assert len(rows) == pytest.approx(len(split.training[0]), abs=2)


def test_the_test_part_is_even_and_of_slides_that_never_train() -> None:
    given = nuclei(300)
    for split in biased_splits(given, seed=0):
        pairs = list(zip(given.labels[split.test], given.batch[split.test], strict=True))
        assert len({pairs.count(pair) for pair in pairs}) == 1
        assert all(not set(given.slide[rows]) & set(given.slide[split.test]) for rows in split.training)


def test_a_site_free_encoder_loses_nothing_and_one_of_sites_falls_to_chance() -> None:
    free, mixed = (shortcut_loss(nuclei(240, **of), seed=0) for of in ({"of_class": 6}, {"of_class": 2, "of_batch": 6}))
    assert abs(free) < 0.03
    assert mixed < -0.25


def test_an_encoder_at_chance_has_nothing_to_lose() -> None:
    assert np.isnan(degradation(np.full((5, 3), 0.5), STRENGTHS, chance=0.5))
    assert np.isnan(shortcut_loss(nuclei(120, of_batch=6), seed=0))


def test_a_straight_fall_to_chance_is_one_half() -> None:
    fall = 0.5 + 0.4 * (1 - np.array(STRENGTHS))[:, None]
    assert degradation(np.repeat(fall, 2, axis=1), STRENGTHS, chance=0.5) == pytest.approx(-0.5)


def test_degradation_agrees_with_the_package_croma() -> None:
    croma = pytest.importorskip("croma")
    accuracies = np.random.default_rng(0).uniform(0.4, 1, (5, 7))
    expected = croma.nipd(accuracies, STRENGTHS, chance=1 / 3)
    assert degradation(accuracies, STRENGTHS, chance=1 / 3) == pytest.approx(expected)


def test_too_few_nuclei_have_no_loss() -> None:
    assert np.isnan(shortcut_loss(nuclei(40, slides=6), seed=0))
