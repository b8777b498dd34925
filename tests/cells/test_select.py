from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lemon.cells.ledger import cells_ledger
from lemon.cells.names import shard_name
from lemon.cells.select import _prefixes, rank_of, select_cells
from lemon.errors import ConfigError
from lemon.runtime.store import Store
from lemon.schema import SlideRow
from tests.cells_table import small_table

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


def test_all_cells_are_selected_without_reading_a_shard(tmp_path: Path) -> None:
    store, _ = small_table(tmp_path)
    for file in (tmp_path / "cells").iterdir():
        file.unlink()
    assert select_cells(store).n_cells == 150


def test_the_lowest_ranks_of_all_slides_are_selected(tmp_path: Path) -> None:
    store, _ = small_table(tmp_path)
    ranks = np.sort(pq.read_table(tmp_path / "cells", columns=["rank"])["rank"].to_numpy())
    for n_cells in (1, 37, 150, 1000):
        selection = select_cells(store, n_cells=n_cells)
        assert selection.n_cells == min(n_cells, 150)
        chosen = [
            store.read_table(part.name, columns=["rank"])["rank"].to_numpy()[: part.n_rows] for part in selection.parts
        ]
        assert (np.sort(np.concatenate(chosen)) == ranks[:n_cells]).all()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("statistics", [True, False])
def test_the_lowest_ranks_are_found_from_footers_and_a_few_row_groups(
    tmp_path: Path, seed: int, statistics: bool
) -> None:
    rng, store, shards = np.random.default_rng(seed), Store(tmp_path), {}
    for index in range(int(rng.integers(1, 6))):
        # Some slides kept all of their cells and some those of low rank, so that shards end at different ranks.
        ranks = np.sort(rng.random(int(rng.integers(1, 300))) * rng.choice([0.05, 0.5, 1.0]))
        shards[f"s{index}"] = ranks
        options = {"row_group_size": int(rng.integers(1, 80)), "write_statistics": statistics}
        store.write_table(shard_name(f"s{index}"), pa.table({"rank": ranks}), **options)
    whole = np.sort(np.concatenate(list(shards.values())))
    for n_cells in {1, len(whole), *rng.integers(1, len(whole) + 1, 8).tolist()}:
        wanted = [int((ranks <= whole[n_cells - 1]).sum()) for ranks in shards.values()]
        assert _prefixes(store, list(shards), n_cells=n_cells) == wanted


def test_a_smaller_selection_lies_inside_a_larger_one(tmp_path: Path) -> None:
    store, _ = small_table(tmp_path)
    small, large = ({part.name: part.n_rows for part in select_cells(store, n_cells=n).parts} for n in (30, 90))
    assert all(large[name] >= rows for name, rows in small.items())
    one, two = ({part.slide_id for part in select_cells(store, n_slides=n).parts} for n in (1, 2))
    assert one < two


def test_slides_are_chosen_by_organ_id_and_patient(tmp_path: Path) -> None:
    store, _ = small_table(tmp_path)

    def chosen(**options: object) -> list[str]:
        return [part.slide_id for part in select_cells(store, **options).parts]  # type: ignore[arg-type]

    assert chosen(organs=["lung"]) == ["b", "c"]
    assert chosen(slides=["a", "c"]) == ["a", "c"]
    assert chosen(exclude_patients=["p2"]) == ["a", "c"]
    assert chosen(organs=["lung"], exclude_patients=["p3"]) == ["b"]


@pytest.mark.parametrize("name", ["p2", " p2\u00a0", "P2"])
def test_a_patient_is_left_out_however_the_name_is_typed(tmp_path: Path, name: str) -> None:
    store, _ = small_table(tmp_path)
    assert [part.slide_id for part in select_cells(store, exclude_patients=[name]).parts] == ["a", "c"]


@pytest.mark.parametrize("name", ["TCGA-A2-A0SX", "tcga-a2-a0sx ", "TCGA-A2-A0SX-01Z-00-DX1", "TCGA-A2-A0SX-01A"])
@pytest.mark.parametrize("patient", ["NA", "unknown", None, "TCGA-A2-A0SX", "TCGA-A2-A0SX-01"])
def test_a_barcode_excludes_its_slides_whatever_the_table_calls_the_patient(
    tmp_path: Path, name: str, patient: str | None
) -> None:
    store, _ = small_table(tmp_path)
    barcode = "TCGA-A2-A0SX-01Z-00-DX1.8B4F6C1A"
    store.write_table(shard_name(barcode), pa.table({"rank": [0.1]}))
    cells_ledger(store, config_fingerprint="x").commit(SlideRow(barcode, "", patient, status="done", n_cells=1))
    assert {part.slide_id for part in select_cells(store).parts} == {"a", "b", "c", barcode}
    assert {part.slide_id for part in select_cells(store, exclude_patients=[name]).parts} == {"a", "b", "c"}


def test_patients_that_match_nothing_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, _ = small_table(tmp_path)
    select_cells(store, exclude_patients=["p1", "p9", "TCGA-A2-A0SX"])
    assert caplog.messages == ["select.exclude_patients: 2 of 3 match no patient (TCGA-A2-A0SX, p9)"]


def test_failed_slides_have_no_cells(tmp_path: Path) -> None:
    store, _ = small_table(tmp_path)
    cells_ledger(store, config_fingerprint="x").commit(SlideRow("d", "", status="failed", n_cells=0))
    assert {part.slide_id for part in select_cells(store).parts} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"organs": ["colon"]}, "select.organs: got 'colon'.*breast, lung"),
        ({"slides": ["z"]}, "select.slides: got 'z'"),
        ({"organs": ["breast"], "exclude_patients": ["p1"]}, "no slide is left"),
    ],
)
def test_a_selection_of_nothing_is_told_in_one_line(tmp_path: Path, options: dict, part: str) -> None:
    store, _ = small_table(tmp_path)
    with pytest.raises(ConfigError, match=part):
        select_cells(store, **options)
    with pytest.raises(ConfigError, match="holds no cells"):
        select_cells(Store(tmp_path / "empty"))
