"""The files that other tools open: their content is that of the tables, cell by cell."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from scipy import sparse

from lemon.cells.names import shard_name
from lemon.embed import job as embedding
from lemon.embed import spatialdata
from lemon.embed.clusters import fit_clusters, palette
from lemon.embed.config import EmbedConfig
from lemon.embed.ledger import EmbeddingSpec
from lemon.embed.slide import EmbeddedSlide
from lemon.errors import ConfigError
from lemon.nuclei.given.tables import read_spatialdata
from lemon.runtime import store as storage
from lemon.runtime.config import load
from lemon.runtime.job import framed
from lemon.runtime.records import ForeignFileError
from lemon.runtime.store import Store
from lemon.schema import CLUSTERS
from lemon.slides import reader
from lemon.slides.synthetic import make_tissue, write_pyramid
from tests.cells_table import write_slide
from tests.embed.tables import WIDTH, write_cells, write_encoder
from tests.s3 import Bucket

pytestmark = pytest.mark.usefixtures("console")

SLIDES = {"a": 40, "b": 30}
K = 3


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("cells"))
    for seed, (slide_id, count) in enumerate(SLIDES.items()):
        write_cells(store, slide_id, count, seed=seed, organ="breast" if slide_id == "a" else None)
    return store


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("model") / "run")


def config_for(model: Path, cells: Store, output: Path, *words: str) -> EmbedConfig:
    given = [f"model={model}", f"cells={cells.uri}", f"output={output}", "device=cpu", f"clusters.k={K}"]
    return load("embed", [*given, *words], EmbedConfig)


@pytest.fixture(scope="module")
def output(model: Path, cells: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "BATCH_ROWS", 16)  # several batches a slide
        assert embedding.main(config_for(model, cells, folder, "format=[parquet,h5ad,geojson]")) == 0
    return folder


def vectors(output: Path, slide_id: str) -> np.ndarray:
    table = pq.read_table(output / "embeddings" / f"{slide_id}.parquet")
    return np.array(table["embedding"].to_pylist(), np.float32)


def test_every_cell_is_in_the_cluster_whose_centre_is_nearest(output: Path) -> None:
    centres = np.array(Store(output).read_json("clusters.json")["centres"])
    assert centres.shape == (K, WIDTH)
    codes = []
    for slide_id in SLIDES:
        table = pq.read_table(output / "clusters" / f"{slide_id}.parquet")
        assert table.schema.equals(CLUSTERS)
        assert table["cell_id"].equals(pq.read_table(output / "embeddings" / f"{slide_id}.parquet")["cell_id"])
        own = vectors(output, slide_id)
        own /= np.linalg.norm(own, axis=1, keepdims=True)
        assert table["cluster"].to_pylist() == np.linalg.norm(own[:, None] - centres, axis=2).argmin(axis=1).tolist()
        codes += table["cluster"].to_pylist()
    sizes = np.bincount(codes, minlength=K)
    assert sizes.min() > 0
    assert sizes.argmax() == 0  # the largest has the first number


def test_clusters_find_groups_and_do_not_depend_on_anything_but_the_seed() -> None:
    generator = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [60, 30, 10])
    points = (np.eye(3)[truth] * 5 + generator.normal(0, 0.1, (100, 3))).astype(np.float16)
    clusters = fit_clusters(points, k=3, seed=0, name="n")
    assert clusters.assign(points).tolist() == truth.tolist()
    assert fit_clusters(points, k=3, seed=0, name="n") == clusters
    assert len(fit_clusters(points[:2], k=8, seed=0, name="n").centres) == 2


def test_colours_differ_however_many_there_are() -> None:
    assert palette(2) == [(63, 144, 218), (255, 169, 14)]
    assert len(set(palette(40))) == 40
    assert all(0 <= value <= 255 for color in palette(40) for value in color)


def test_an_h5ad_file_holds_embeddings_positions_measures_and_clusters(output: Path, cells: Store) -> None:
    data = anndata.read_h5ad(output / "h5ad" / "a.h5ad")
    shard = cells.read_table(shard_name("a"))
    assert data.obs_names.tolist() == shard["cell_id"].to_pylist()
    assert data.obs_names.name == "cell_id"
    np.testing.assert_array_equal(data.obsm["X_lemon"], vectors(output, "a"))
    assert data.obsm["X_lemon"].dtype == np.float32
    np.testing.assert_array_equal(data.obsm["spatial"], np.stack([shard["x_level0_px"], shard["y_level0_px"]], 1))
    for name in ("area_um2", "eccentricity", "solidity", "hematoxylin_od_mean"):
        np.testing.assert_array_equal(data.obs[name], shard[name].to_numpy())
    assert set(data.obs["slide_id"]) == {"a"}
    assert set(data.obs["organ"]) == {"breast"}
    assert sparse.issparse(data.X)
    stored = Store(output).read_json("embed.json")
    assert data.uns["lemon"] == {
        "model": "run",
        "model_fingerprint": stored["model_fingerprint"],
        "context": "nucleus",
        "mpp": 0.25,
    }
    assert data.obs["cluster"].cat.categories.tolist() == ["0", "1", "2"]
    assert (
        data.obs["cluster"].astype(int).tolist()
        == pq.read_table(output / "clusters" / "a.parquet")["cluster"].to_pylist()
    )
    assert data.uns["cluster_colors"].tolist() == ["#3f90da", "#ffa90e", "#bd1f01"]


def test_an_h5ad_file_opens_backed_and_can_be_cut_joined_and_written(output: Path, tmp_path: Path) -> None:
    parts = [anndata.read_h5ad(output / "h5ad" / f"{slide_id}.h5ad", backed="r") for slide_id in SLIDES]
    assert parts[0].isbacked
    np.testing.assert_array_equal(parts[0][5:9].obsm["X_lemon"], vectors(output, "a")[5:9])
    both = anndata.concat([part.to_memory() for part in parts], merge="same")
    assert both.obsm["X_lemon"].shape == (sum(SLIDES.values()), WIDTH)
    assert both.obs["organ"].isna().sum() == SLIDES["b"]
    both[both.obs["cluster"] == "0"].copy().write_h5ad(tmp_path / "both.h5ad")
    assert anndata.read_h5ad(tmp_path / "both.h5ad").X.toarray().shape[1] == 0


def test_a_nucleus_in_qupath_has_the_class_and_the_colour_of_its_cluster(output: Path, cells: Store) -> None:
    with gzip.open(output / "geojson" / "a.geojson.gz") as file:
        features = json.load(file)["features"]
    shard = cells.read_table(shard_name("a"))
    codes = pq.read_table(output / "clusters" / "a.parquet")["cluster"].to_pylist()
    assert [feature["properties"]["name"] for feature in features] == shard["cell_id"].to_pylist()
    for feature, code, polygon in zip(features, codes, shard["polygon"].to_pylist(), strict=True):
        expected = {"name": f"Cluster {code}", "color": list(palette(K)[code])}
        assert feature["properties"]["classification"] == expected
        ring = shapely.Polygon(feature["geometry"]["coordinates"][0])
        assert ring.symmetric_difference(shapely.from_wkb(polygon)).area < 1


def test_another_number_of_clusters_makes_the_files_anew_but_no_embedding(
    model: Path, cells: Store, tmp_path: Path
) -> None:
    embedding.run(config_for(model, cells, tmp_path, "format=[h5ad]"))
    before = (tmp_path / "embeddings" / "a.parquet").stat().st_mtime_ns
    summary = embedding.run(config_for(model, cells, tmp_path, "format=[h5ad]", "clusters.k=5"))
    assert summary.n_skipped == len(SLIDES)
    assert (tmp_path / "embeddings" / "a.parquet").stat().st_mtime_ns == before
    assert len(anndata.read_h5ad(tmp_path / "h5ad" / "a.h5ad").obs["cluster"].cat.categories) == 5
    # Without clusters: every nucleus is a nucleus.
    embedding.run(config_for(model, cells, tmp_path, "format=[h5ad,geojson]", "clusters.k=null"))
    assert "cluster" not in anndata.read_h5ad(tmp_path / "h5ad" / "a.h5ad").obs
    assert not (tmp_path / "clusters").exists()
    with gzip.open(tmp_path / "geojson" / "a.geojson.gz") as file:
        assert json.load(file)["features"][0]["properties"]["classification"]["name"] == "Nucleus"


def test_a_format_that_cannot_be_made_leaves_the_embeddings_and_is_tried_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "cells")
    write_slide(store, "s", np.zeros((20, 60, 60, 3), np.uint8), arrays={"polygon": [b"no polygon"] * 20})
    config = config_for(model, store, tmp_path / "out", "format=[geojson,h5ad]")
    assert embedding.main(config) == 3
    assert "s: partial: geojson: " in capsys.readouterr().out
    assert (tmp_path / "out" / "h5ad" / "s.h5ad").exists()
    assert not (tmp_path / "out" / "geojson" / "s.geojson.gz").exists()
    write_cells(store, "s", 20)
    assert embedding.main(config) == 0
    told = capsys.readouterr().out
    assert "1 slides (1 done, 0 partial, 0 failed; 0 of an earlier run)" in told
    assert (tmp_path / "out" / "geojson" / "s.geojson.gz").exists()


def test_embeddings_that_were_spoilt_since_are_told_and_made_again_once_deleted(
    model: Path, cells: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedding.run(config_for(model, cells, tmp_path))
    (tmp_path / "embeddings" / "a.parquet").write_bytes(b"spoilt")
    without = config_for(model, cells, tmp_path, "clusters.k=null", "format=[h5ad]")
    assert embedding.main(without) == 3
    assert "a: partial: h5ad: embeddings/a.parquet: cannot be read: " in capsys.readouterr().out
    assert framed("embed", lambda: embedding.main(config_for(model, cells, tmp_path, "format=[h5ad]"))) == 3
    assert "embed: stopped: embeddings/a.parquet: cannot be read: " in capsys.readouterr().err
    (tmp_path / "embeddings" / "a.parquet").unlink()
    assert embedding.main(config_for(model, cells, tmp_path, "format=[h5ad]")) == 0


def test_coordinates_count_from_the_scanned_area_where_the_slide_is_at_hand(
    output: Path, cells: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def origin(path: Path | str) -> tuple[int, int]:
        return EmbeddedSlide(
            "a", str(path), cells, Store(output), EmbeddingSpec("m", "f", WIDTH, "float16", "fp32"), None
        ).origin_px()

    write_pyramid(tmp_path / "s.tiff", make_tissue(300, seed=0).image, mpp=0.25)
    assert [origin(path) for path in ("", tmp_path / "gone.svs", tmp_path / "s.tiff")] == [(0, 0)] * 3
    monkeypatch.setattr(reader, "_bounds", lambda *args, **kwargs: (100, 50, 200, 200))
    assert origin(tmp_path / "s.tiff") == (100, 50)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "f").mkdir()
    with pytest.raises(ZeroDivisionError), store.write_path("f/x.zarr") as path:
        path.mkdir()
        raise ZeroDivisionError
    assert list((tmp_path / "f").iterdir()) == []
    for _ in range(2):
        with store.write_path("f/x.zarr") as path:
            path.mkdir()
            (path / "inside").write_text("a")
    assert [found.name for found in (tmp_path / "f").iterdir()] == ["x.zarr"]
    (tmp_path / "f" / "x.zarr" / "mine").write_text("an element that somebody added")
    with pytest.raises(ForeignFileError, match=r"x\.zarr was changed since lemon wrote it"):
        store.delete("f/x.zarr")


def test_a_file_on_object_storage_is_made_here_and_appears_there_when_it_is_whole(bucket: Bucket) -> None:
    store = Store(bucket.uri)
    with pytest.raises(ZeroDivisionError), store.write_path("h5ad/a.h5ad") as path:
        path.write_bytes(b"half")
        raise ZeroDivisionError
    assert not store.exists("h5ad/a.h5ad")
    with store.write_path("h5ad/a.h5ad") as path:
        path.write_bytes(b"whole")
    assert store.read_bytes("h5ad/a.h5ad") == b"whole"
    with pytest.raises(ConfigError, match="expected a local output"):
        spatialdata.check_spatialdata(store)


def test_spatialdata_joins_polygons_and_table_on_the_cells_id(model: Path, cells: Store, tmp_path: Path) -> None:
    sd = pytest.importorskip("spatialdata")
    assert embedding.main(config_for(model, cells, tmp_path, "format=[spatialdata]")) == 0
    data = sd.read_zarr(tmp_path / "spatialdata" / "a.zarr")
    shard = cells.read_table(shard_name("a"))
    ids = shard["cell_id"].to_pylist()
    assert data.shapes["cells"].index.tolist() == ids
    assert shapely.equals_exact(
        data.shapes["cells"].geometry.to_numpy(), shapely.from_wkb(shard["polygon"].to_numpy())
    ).all()
    table = data.tables["cells_features"]
    assert table.obs["cell_id"].tolist() == ids
    np.testing.assert_array_equal(np.asarray(table.obsm["X_lemon"]), vectors(tmp_path, "a"))
    joined, matched = sd.join_spatialelement_table(
        sdata=data, spatial_element_names="cells", table_name="cells_features"
    )
    assert joined["cells"].index.tolist() == matched.obs["cell_id"].tolist() == ids
    assert table.uns["lemon"]["model"] == "run"
    given = read_spatialdata(tmp_path / "spatialdata" / "a.zarr", None)  # type: ignore[arg-type]  # of no slide
    assert given.ids.to_pylist() == ids
    rings = shapely.get_exterior_ring(shapely.from_wkb(shard["polygon"].to_numpy()))
    assert np.array_equal(given.points, shapely.get_coordinates(rings))


def test_spatialdata_is_refused_in_one_line_where_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spatialdata.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; expected pip install 'lemon-nuclei\[spatialdata\]' first"):
        spatialdata.check_spatialdata(Store(tmp_path))
