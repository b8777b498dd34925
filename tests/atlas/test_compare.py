"""Two encoders: the overlap of neighbours is what all distances say, and the page and the sheet show it."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lemon.atlas import job as atlas
from lemon.atlas.cells import read_cells
from lemon.atlas.compare import Comparison, nearest_cells, neighbour_overlap
from lemon.atlas.config import AtlasConfig
from lemon.errors import ConfigError
from lemon.runtime.config import load
from lemon.runtime.store import Store
from tests.atlas.made_up import config_for, write_embedded, write_other


def brute_force(first: np.ndarray, second: np.ndarray, *, k: int) -> np.ndarray:
    """The share of common neighbours, a cell at a time, in float64."""
    near: list[list[list[int]]] = []
    for vectors in (first, second):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        orders = [np.argsort(-(unit @ one), kind="stable").tolist() for one in unit]
        near.append([[other for other in order if other != cell][:k] for cell, order in enumerate(orders)])
    return np.array([len({*one} & {*two}) / k for one, two in zip(*near, strict=True)])


def test_the_overlap_is_that_of_a_computation_by_force() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=(150, 12)) * generator.uniform(0.1, 10, (150, 1))  # length does not count
    second = np.concatenate([first[:, :6], generator.normal(size=(150, 20))], axis=1)
    for k in (1, 7, 20):
        found = neighbour_overlap(first, second, k=k)
        assert (found.dtype, found.shape) == (np.float32, (150,))
        np.testing.assert_allclose(found, brute_force(first, second, k=k), atol=1e-6)
    assert 0.1 < found.mean() < 0.9


def test_the_same_vectors_have_all_neighbours_in_common_and_unrelated_ones_those_of_chance() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(400, 16)).astype(np.float16)
    turned = vectors @ np.linalg.qr(generator.normal(size=(16, 16)))[0]
    assert (neighbour_overlap(vectors, vectors, k=10) == 1).all()
    assert neighbour_overlap(vectors, turned, k=10).mean() > 0.97  # float16 of the first
    chance = neighbour_overlap(vectors, generator.normal(size=(400, 8)), k=40)
    assert chance.mean() == pytest.approx(40 / 399, abs=0.02)
    assert (neighbour_overlap(vectors[:5], turned[:5], k=20) == 1).all()  # as many as there are


def test_a_cell_is_none_of_its_own_neighbours_even_beside_copies_of_it() -> None:
    vectors = np.repeat(np.random.default_rng(0).normal(size=(30, 8)), 3, axis=0)
    near = nearest_cells(vectors, k=2)
    for cell, others in enumerate(near):
        assert {*others} == {*range(cell // 3 * 3, cell // 3 * 3 + 3)} - {cell}


def test_vectors_of_other_numbers_of_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="got vectors of 5 and 6 cells"):
        neighbour_overlap(np.ones((5, 2)), np.ones((6, 2)))


def test_what_is_told_has_the_mean_its_spread_and_chance() -> None:
    overlap = np.arange(101, dtype=np.float32) / 100
    told = Comparison(overlap, 2, ("one", "two")).told
    assert told == (
        "one and two have 0.50 of a cell's 2 nearest in common "
        "(standard deviation 0.29, 5 % to 95 % of cells 0.05 to 0.95; by chance 0.020)"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("against")
    tables = write_embedded(folder)
    other = write_other(folder)
    assert atlas.main(config_for(*tables, folder / "atlas", f"against={other.uri}", "k=7")) == 0
    return folder


def test_an_atlas_against_another_encoder_has_two_maps_a_field_and_a_sheet(folder: Path) -> None:
    config = config_for(Store(folder / "cells"), Store(folder / "embeddings"), folder / "x", f"against={folder}/other")
    cells = read_cells(config)
    assert cells.against is not None
    other = Store(folder / "other")
    expected = {}
    for name in other.list("embeddings"):
        table = other.read_table(name)
        expected |= dict(zip(table["cell_id"].to_pylist(), table["embedding"].to_pylist(), strict=True))
    ids = cells.table["cell_id"].to_pylist()
    np.testing.assert_array_equal(cells.against.vectors, np.array([expected[each] for each in ids]))
    overlap = brute_force(cells.vectors.astype(np.float64), cells.against.vectors.astype(np.float64), k=7)
    with (folder / "atlas" / "disagree.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["common_of_7"]) for row in rows] == sorted(float(row["common_of_7"]) for row in rows)
    found = {row["cell_id"]: float(row["common_of_7"]) for row in rows}
    # float16 vectors make ties, which may go either way.
    assert np.abs(np.array([found[each] for each in ids]) - overlap).mean() < 0.01
    assert Image.open(folder / "atlas" / "disagree.png").width > 800
    maps = [pq.read_table(folder / "atlas" / name) for name in ("map.parquet", "map-against.parquet")]
    assert maps[0]["cell_id"].equals(maps[1]["cell_id"])
    assert not maps[0]["x"].equals(maps[1]["x"])
    page = (folder / "atlas" / "atlas.html").read_text()
    (text,) = re.findall(r'id="facts">(.*?)</script>', page)
    facts = json.loads(text)
    assert f"have {overlap.mean():.2f} of a cell" in facts["against"]["told"]
    assert facts["fields"][-1]["key"] == "overlap"
    assert 'id="data-positions-against"' in page


def test_two_outputs_of_one_encoder_and_of_other_cells_are_refused(folder: Path, tmp_path: Path) -> None:
    tables = Store(folder / "cells"), Store(folder / "embeddings")
    with pytest.raises(ConfigError, match=r"against: got embeddings by .* twice; expected another encoder's"):
        read_cells(config_for(*tables, tmp_path, f"against={folder}/embeddings"))
    with pytest.raises(ConfigError, match=r"against: .* has no embed\.json; expected an output of lemon embed"):
        read_cells(config_for(*tables, tmp_path, f"against={folder}/cells"))
    given = [f"cells={folder}/cells", f"embeddings={folder}/embeddings", f"against={folder}/other", "serve=true"]
    with pytest.raises(ConfigError, match="got 200000 with against=; expected at most 100000"):
        load("atlas", [*given, "n_cells=200000"], AtlasConfig)
