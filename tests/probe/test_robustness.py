"""Robustness over hospitals: neighbours, and how well the hospital is told."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import StandardScaler

from lemon.probe.nuclei import Nuclei
from lemon.probe.robustness import (
    NEIGHBOURS,
    balanced_sample,
    batch_accuracy,
    neighbour_chance,
    neighbour_measures,
    neighbourhoods,
    robustness,
)
from tests.probe.made_up_nuclei import nuclei

SITE_FREE = {"of_class": 12}
MIXED = {"of_class": 3, "of_batch": 1.5}
SITE_NOISE = {"of_class": 0, "of_batch": 6}


def test_an_encoder_of_site_noise_is_the_worst_and_one_that_knows_no_site_the_best() -> None:
    found = [neighbour_measures(nuclei(360, **of), seed=0, draws=50) for of in (SITE_FREE, MIXED, SITE_NOISE)]
    chance = neighbour_chance(nuclei(360, **MIXED), seed=0)
    for measure in ("robustness_index", "croma", "croma_tail"):
        best, middle, worst = (each[measure] for each in found)
        assert worst.value < middle.value < best.value
        assert worst.high < chance[measure] < best.low
        assert all(low <= value <= high for value, low, high in (best, middle, worst))


def test_chance_is_what_an_embedding_without_information_gets() -> None:
    """Of three batches and two classes it is above 0.5: 1/2 * 2/3 for, 1/2 * 1/3 * 3/4 against, on other slides."""
    chance, blind = neighbour_chance(nuclei(600, **SITE_FREE), seed=0), nuclei(600, seed=1)
    found = neighbour_measures(blind, seed=0, draws=20)
    assert chance["robustness_index"] == pytest.approx(0.727, abs=0.02)
    assert found["robustness_index"].value == pytest.approx(0.727, abs=0.02)
    assert found["croma"].value == pytest.approx(neighbour_chance(blind, seed=1)["croma"], abs=0.03)
    two = blind.take(blind.batch != "h2")
    assert neighbour_chance(two, seed=0)["robustness_index"] == pytest.approx(0.25 / (0.25 + 0.25 * 3 / 4), abs=0.02)


def test_a_slides_own_nuclei_are_no_neighbours() -> None:
    """Copies of a slide's nuclei within the slide are the nearest of all, and change nothing."""
    once = nuclei(300, **MIXED)
    twice = Nuclei(*(np.concatenate([column, column]) for column in vars(once).values()))
    alone, doubled = neighbourhoods(once, k=10, nearest=2), neighbourhoods(twice, k=20, nearest=4)
    assert np.array_equal(doubled.of_class[:300], 2 * alone.of_class)
    assert np.allclose(doubled.margin[:300], alone.margin)


def test_a_nucleus_without_neighbours_of_a_kind_has_no_margin_and_spoils_none() -> None:
    given = nuclei(300, **MIXED)
    given.labels[:] = np.where(given.batch == "h2", 0, given.labels)  # h2 holds no other class
    found = neighbourhoods(given)
    assert np.array_equal(np.isnan(found.margin), given.batch == "h2")
    assert np.isfinite(neighbour_measures(given, seed=0, draws=20)["croma"]).all()


def test_a_collapsed_embedding_has_no_margin_either_way() -> None:
    given = nuclei(120)
    flat = Nuclei(np.ones_like(given.embedding), given.labels, given.batch, given.slide)
    assert neighbour_measures(flat, seed=0, draws=20)["croma"] == (0, 0, 0)


def test_the_site_is_told_from_site_noise_and_not_from_a_site_free_embedding() -> None:
    free, noise = (batch_accuracy(nuclei(240, **of), seed=0, draws=100) for of in (SITE_FREE, SITE_NOISE))
    assert free.value == pytest.approx(1 / 3, abs=0.08)
    assert noise.low > 0.9


def test_a_slides_own_look_is_not_counted_as_site() -> None:
    """Slides differ, hospitals do not: on slides that it has not seen the probe is at chance."""
    given = nuclei(480, of_slide=4, slides=60, width=32)
    assert batch_accuracy(given, seed=0, draws=100).value < 0.5


def test_pairs_of_class_and_hospital_weigh_alike() -> None:
    given = nuclei()
    rare = np.flatnonzero((given.batch == "h2") & (given.labels == 1))[20:]
    kept = given.take(np.setdiff1d(np.arange(900), rare))
    chosen = kept.take(balanced_sample(kept, seed=0))
    pairs = list(zip(chosen.labels, chosen.batch, strict=True))
    assert {pairs.count(pair) for pair in set(pairs)} == {20}


def test_a_hospital_of_one_slide_is_left_out_and_one_hospital_has_no_robustness() -> None:
    given = nuclei()
    single = given.take((given.batch != "h2") | (given.slide == "2"))
    assert set(single.batch[balanced_sample(single, seed=0)]) == {"h0", "h1"}
    assert robustness(given.take(given.batch == "h0"), seed=0) is None


def test_all_measures_are_there_with_the_chance_of_those_that_have_one() -> None:
    found = robustness(nuclei(120, **MIXED), seed=0, draws=50)
    assert found is not None
    assert list(found.measures) == [
        *("robustness_index", "croma", "croma_tail", "batch_accuracy"),
        *("performance_drop", "ece_seen", "ece_unseen", "calibration_shift", "nipd"),
    ]
    assert found.n_batches == 3
    assert set(found.chance) == {"robustness_index", "croma", "croma_tail", "batch_accuracy"}


# --- the package croma, which computes the same for patches ----------------------------------------------------------


def manifest(given: Nuclei) -> tuple[np.ndarray, pd.DataFrame]:
    """What croma takes; embeddings are standardised here, as ours are."""
    columns = {"label": given.labels, "center": given.batch, "group_id": given.slide}
    ids = [str(number) for number in range(len(given.labels))]
    table = pd.DataFrame({"sample_id": ids, "image_path": ids, **columns})
    return StandardScaler().fit_transform(given.embedding.astype(np.float64)), table


@pytest.mark.parametrize("strengths", [SITE_FREE, MIXED, SITE_NOISE], ids=["site-free", "mixed", "site noise"])
def test_index_and_margin_agree_with_the_package_croma(strengths: dict[str, float]) -> None:
    croma = pytest.importorskip("croma")
    given = nuclei(300, **strengths)
    features, table = manifest(given)
    ours = neighbour_measures(given, seed=0, draws=20)
    index = croma.RI.compute_curve(features, table, confounder_column="center", k_values=[NEIGHBOURS])[NEIGHBOURS]
    margin = croma.CRoMa.compute(features, table, confounder_column="center")
    assert ours["robustness_index"].value == pytest.approx(index, abs=1e-9)
    assert np.allclose(neighbourhoods(given).margin, margin.sample_values)
    assert ours["croma"].value == pytest.approx(margin.value)
    assert ours["croma_tail"].value == pytest.approx(margin.ltm_alpha)


def test_the_package_croma_refuses_a_set_in_which_some_nuclei_lack_neighbours() -> None:
    """Why it is not used; ours leaves such nuclei out."""
    croma = pytest.importorskip("croma")
    given = nuclei(300, **MIXED)
    given.labels[:] = np.where(given.batch == "h2", 0, given.labels)
    with pytest.raises(RuntimeError, match="scoreable"):
        croma.CRoMa.compute(*manifest(given), confounder_column="center")
