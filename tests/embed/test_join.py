"""Vectors, clusters and measures go back under the ids that another program gave its nuclei."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import lemon
from lemon.embed.config import EmbedConfig
from lemon.embed.job import run
from lemon.errors import ConfigError
from lemon.runtime.store import Store
from tests.cells_table import synthetic_crops, write_slide
from tests.embed.tables import WIDTH, write_encoder

COUNT = 24


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Embeddings and cells of one slide whose nuclei have the ids n0, n1, ... in the order of its shard."""
    folder = tmp_path_factory.mktemp("join")
    store = Store(folder / "cells")
    names = [f"n{index}" for index in range(COUNT - 1)] + ["n0"]  # the last is a second nucleus of n0, a smaller one
    arrays = {"foreign_id": pa.array(names), "foreign_class": pa.array(["A", "B"] * (COUNT // 2))}
    arrays |= {"area_um2": np.arange(COUNT, 0, -1.0), "mpp": np.full(COUNT, 0.25)}
    write_slide(store, "s", synthetic_crops(COUNT), arrays=arrays)
    model = write_encoder(folder / "run")
    run(EmbedConfig(model=str(model), cells=store.uri, output=str(folder / "out"), clusters={"k": 2}, dtype="float32"))
    return str(folder / "out"), store.uri


def test_an_anndata_gets_vectors_and_clusters_under_its_own_names(outputs: tuple[str, str]) -> None:
    embeddings, cells = outputs
    data = anndata.AnnData(np.zeros((4, 2)), obs=pd.DataFrame(index=["n7", "other", "n0", "n3"]))
    joined = lemon.join_embeddings(data, embeddings, cells=cells)
    assert joined is data
    own = lemon_vectors(embeddings)
    vectors = data.obsm["X_lemon"]
    assert (vectors.shape, vectors.dtype) == ((4, WIDTH), np.float32)
    assert np.isnan(vectors[1]).all()
    assert np.array_equal(vectors[[0, 2, 3]], np.stack([own[7], own[0], own[3]]))
    assert data.obs["lemon_foreign_class"].tolist()[0] == "B"
    assert set(data.obs["lemon_cluster"].dropna()) <= {"0", "1"}
    assert data.obs["lemon_area_um2"].tolist()[2] == COUNT  # of two nuclei of one cell the larger
    assert data.obs["lemon_cell_id"].isna().tolist() == [False, True, False, False]


def lemon_vectors(embeddings: str) -> list[np.ndarray]:
    table = Store(embeddings).read_table("embeddings/s.parquet")
    return [np.array(each.as_py(), np.float32) for each in table["embedding"]]


def test_a_joined_anndata_can_be_written_and_joined_again(tmp_path: Path, outputs: tuple[str, str]) -> None:
    embeddings, cells = outputs
    data = anndata.AnnData(np.zeros((3, 2)), obs=pd.DataFrame(index=["n1", "n2", "x"]))
    for _ in range(2):
        lemon.join_embeddings(data, embeddings, cells=cells)
    data.write_h5ad(tmp_path / "a.h5ad")
    again = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert np.array_equal(again.obsm["X_lemon"], data.obsm["X_lemon"], equal_nan=True)
    assert again.obs["lemon_cluster"].tolist()[:2] == data.obs["lemon_cluster"].tolist()[:2]


def test_a_table_of_xenium_is_joined_by_its_column_of_ids(outputs: tuple[str, str]) -> None:
    embeddings, cells = outputs
    table = pd.DataFrame({"cell_id": [b"n5", b"n2"], "transcript_counts": [10, 20]})
    joined = lemon.join_embeddings(table, embeddings, cells=cells, on="cell_id")
    assert joined["lemon_area_um2"].tolist() == [COUNT - 5, COUNT - 2]
    assert list(table) == ["cell_id", "transcript_counts"]
    assert lemon.join_embeddings(joined, embeddings, cells=cells, on="cell_id").equals(joined)


def test_what_cannot_be_joined_is_one_line(tmp_path: Path, outputs: tuple[str, str]) -> None:
    embeddings, cells = outputs
    table = pd.DataFrame({"cell_id": ["n5"]})
    with pytest.raises(ConfigError, match=r"the index has none of the ids.*give on='cell_id', which has them"):
        lemon.join_embeddings(table, embeddings, cells=cells)
    with pytest.raises(ConfigError, match="no column 'id'"):
        lemon.join_embeddings(table, embeddings, cells=cells, on="id")
    with pytest.raises(ConfigError, match=r"slide_id: got 't'; expected one of s"):
        lemon.join_embeddings(table, embeddings, cells=cells, slide_id="t", on="cell_id")
    with pytest.raises(ConfigError, match=r"holds no cells; .*give cells="):
        lemon.join_embeddings(table, embeddings, on="cell_id")
    with pytest.raises(ConfigError, match=r"has no embed.json"):
        lemon.join_embeddings(table, str(tmp_path), on="cell_id")
