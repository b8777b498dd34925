"""Accuracy and calibration on hospitals that a probe has not seen."""

from __future__ import annotations

import numpy as np
import pytest

from lemon.probe.unseen import BINS, Scored, calibration_error, confidence_bins, leave_each_batch_out, unseen_batches
from tests.probe.made_up_nuclei import nuclei


def test_a_probe_drops_on_a_hospital_whose_stain_mimics_the_other_class() -> None:
    alike, mimicked = (unseen_batches(nuclei(300, of_class=3, mimicry=by), seed=0, draws=100) for by in (0, 3))
    assert abs(alike["performance_drop"].value) < 0.04
    assert mimicked["performance_drop"].low > 0.05
    assert abs(alike["calibration_shift"].value) < 0.05
    assert mimicked["calibration_shift"].low > 0.03
    shift = mimicked["ece_unseen"].value - mimicked["ece_seen"].value
    assert mimicked["calibration_shift"].value == pytest.approx(shift)


def test_an_error_lies_within_its_own_interval_though_chance_enlarges_that_of_each_draw() -> None:
    found = unseen_batches(nuclei(300, of_class=3), seed=0, draws=200)
    for name in ("ece_seen", "ece_unseen", "calibration_shift"):
        assert found[name].low < found[name].value < found[name].high, name


def test_each_hospital_is_left_out_once_and_scored_slides_never_train() -> None:
    given = nuclei(120, of_class=3)
    hospital = dict(zip(given.slide, given.batch, strict=True))
    parts = list(leave_each_batch_out(given, seed=0))
    assert [{hospital[slide] for slide in unseen.slide} for _, unseen in parts] == [{"h0"}, {"h1"}, {"h2"}]
    for seen, unseen in parts:
        assert not {hospital[slide] for slide in seen.slide} & {hospital[slide] for slide in unseen.slide}
        assert len(np.unique(seen.slide)) == 4  # half of the eight slides of the other two


def test_the_calibration_error_is_the_mean_gap_of_confidence_and_hits() -> None:
    """Ten nuclei at 0.9 of which six are right, and ten at 0.6 of which six are: gaps 0.3 and 0."""
    confidence = np.repeat([0.9, 0.6], 10)
    hits = np.tile(np.arange(10) < 6, 2)
    scored = Scored(np.where(hits, 0, 1), np.stack([confidence, 1 - confidence], axis=1), np.tile(["a", "b"], 10))
    bins = confidence_bins(scored)
    assert bins.shape == (20, BINS, 3)
    assert calibration_error(bins.sum(axis=0)) == pytest.approx(0.15)


def test_a_sure_probe_falls_into_the_last_bin() -> None:
    sure = Scored(np.zeros(3, int), np.tile([1.0, 0.0], (3, 1)), np.array(["a"] * 3))
    assert confidence_bins(sure)[:, -1].tolist() == [[1, 1, 1]] * 3
    assert calibration_error(confidence_bins(sure).sum(axis=0)) == 0
