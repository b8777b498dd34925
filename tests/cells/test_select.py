from __future__ import annotations

import numpy as np

from lemon.cells.select import rank_of

IDS = [f"slide_{index}_{index * 7}" for index in range(20_000)]


def test_ranks_are_uniform_in_the_unit_interval() -> None:
    counts, _ = np.histogram(rank_of(IDS), bins=20, range=(0, 1))
    expected = len(IDS) / 20
    # Chi-square with 19 degrees of freedom stays below 43.8 with probability 0.999.
    assert ((counts - expected) ** 2 / expected).sum() < 43.8


def test_a_rank_depends_on_the_id_alone() -> None:
    assert (rank_of(IDS[::-1])[::-1] == rank_of(IDS)).all()
    assert rank_of(["a"])[0] == rank_of(["b", "a"])[1]


def test_ranks_of_neighbours_are_unrelated() -> None:
    ranks = rank_of(IDS)
    assert abs(np.corrcoef(ranks[:-1], ranks[1:])[0, 1]) < 0.03


def test_a_rank_never_changes_between_versions() -> None:
    """Selections of earlier runs rest on it: the first 53 bits of BLAKE2b-64 of the id."""
    assert rank_of(["CMU-1_100_200"])[0] == 0.5980936144350337
