"""What of its surroundings a vector holds: true neighbours, true fields, and settings that tell them apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy.spatial import cKDTree

import lemon
from lemon.atlas.cells import read_cells as read_atlas_cells
from lemon.atlas.config import AtlasConfig
from lemon.cells import fields
from lemon.cells.ledger import cells_ledger, rows_with_cells
from lemon.cells.names import shard_name
from lemon.classify.config import ClassifyConfig
from lemon.classify.job import main as classify
from lemon.embed import context
from lemon.embed import job as embedding
from lemon.embed.config import EmbedConfig
from lemon.embed.context import nearest_rows, with_field, with_neighbours
from lemon.embed.names import embeddings_name
from lemon.embed.stream import vectors_of
from lemon.errors import ConfigError, FatalError
from lemon.runtime import store as storage
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.slides.reader import SlideReader
from lemon.slides.synthetic import make_tissue, write_pyramid
from tests.cells_table import TISSUE_MPP, TISSUE_PX, table_of_a_slide
from tests.embed.tables import SLIDES, WIDTH, killed_at, write_encoder

pytestmark = pytest.mark.usefixtures("console")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches, blocks and parts of a slide, also of a small one."""
    monkeypatch.setattr(storage, "BATCH_ROWS", 16)
    monkeypatch.setattr(context, "CELLS_AT_A_TIME", 7)
    monkeypatch.setattr(fields, "PX_AT_A_TIME", 5 * 120**2)
    monkeypatch.setattr(fields, "BLOCK_PX", 200)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def config_for(model: Path, cells: Store, output: Path, *words: str) -> EmbedConfig:
    fixed = [f"model={model}", f"cells={cells.uri}", f"output={output}", "device=cpu", "dtype=float32"]
    return load("embed", [*fixed, "clusters.k=2", *words], EmbedConfig)


def stored(output: Path, slide_id: str) -> np.ndarray:
    return vectors_of(Store(output).read_table(embeddings_name(slide_id))["embedding"].combine_chunks())


def by_loop(vectors: np.ndarray, place: np.ndarray, *, k: int, radius: float) -> np.ndarray:
    """With neighbours, one cell after the other."""
    rows = []
    for index, own in enumerate(vectors):
        distance = np.linalg.norm(place - place[index], axis=1)
        distance[index] = np.inf
        near = [row for row in np.argsort(distance, kind="stable")[:k] if distance[row] < radius]
        mean = vectors[near].mean(axis=0) if near else own
        spread = vectors[near].std(axis=0) if near else np.zeros_like(own)
        rows.append(np.concatenate([own, mean, spread]))
    return np.stack(rows)


@pytest.mark.parametrize(
    ("count", "k", "radius"), [(60, 5, 25.0), (60, 1, 8.0), (4, 10, 1e9), (1, 3, 50.0), (2, 1, 1e9)]
)
def test_neighbours_are_those_of_a_plain_loop(count: int, k: int, radius: float) -> None:
    generator = np.random.default_rng(count + k)
    place, vectors = generator.uniform(0, 100, (count, 2)), generator.normal(3, 1, (count, 6)).astype(np.float32)
    got = with_neighbours(vectors, cKDTree(place), np.arange(count), k=k, radius_um=radius)
    np.testing.assert_allclose(got, by_loop(vectors, place, k=k, radius=radius), rtol=1e-5, atol=1e-5)
    assert got.dtype == np.float32


def test_a_lone_nucleus_has_itself_for_a_mean_and_no_deviation() -> None:
    place, vectors = np.array([[0.0, 0], [1, 0], [500, 500]]), np.arange(6, dtype=np.float32).reshape(3, 2)
    got = with_neighbours(vectors, cKDTree(place), np.arange(3), k=4, radius_um=50)
    np.testing.assert_array_equal(got, [[0, 1, 2, 3, 0, 0], [2, 3, 0, 1, 0, 0], [4, 5, 4, 5, 0, 0]])


def test_of_many_nuclei_at_one_place_none_is_its_own_neighbour() -> None:
    place = np.zeros((9, 2))
    nearest = nearest_rows(cKDTree(place), np.arange(9), k=3, radius_um=1)
    assert nearest.shape == (9, 3)
    assert (nearest >= 0).all()
    assert all(row not in others for row, others in enumerate(nearest.tolist()))
    assert all(len(set(others)) == 3 for others in nearest.tolist())


def test_a_field_counts_as_much_as_the_nucleus_in_a_cosine() -> None:
    generator = np.random.default_rng(0)
    own, field = generator.normal(0, 2, (2, 5)).astype(np.float32), generator.normal(0, 900, (2, 7)).astype(np.float32)

    def cosine(pair: np.ndarray) -> float:
        return float(pair[0] @ pair[1] / np.linalg.norm(pair[0]) / np.linalg.norm(pair[1]))

    both = with_field(own, field)
    np.testing.assert_array_equal(both[:, :5], own)
    assert cosine(both) == pytest.approx((cosine(own) + cosine(field)) / 2, abs=1e-6)
    assert np.isfinite(with_field(own, np.zeros_like(field))).all()


def test_stored_neighbours_are_of_the_slide_and_in_um(model: Path, cells: Store, tmp_path: Path) -> None:
    embedding.run(config_for(model, cells, tmp_path / "alone"))
    words = ["context=neighbours", "context.k=3", "context.radius_um=120"]
    summary = embedding.run(config_for(model, cells, tmp_path / "out", *words))
    assert [row.status for row in summary.rows] == ["done"] * 3
    lone = 0
    for slide_id in SLIDES:
        shard = cells.read_table(shard_name(slide_id))
        place = np.stack([shard["x_level0_px"], shard["y_level0_px"]], axis=1) * 0.25
        expected = by_loop(stored(tmp_path / "alone", slide_id), place, k=3, radius=120)
        np.testing.assert_allclose(stored(tmp_path / "out", slide_id), expected, rtol=1e-4, atol=1e-5)
        lone += int((expected[:, 2 * WIDTH :] == 0).all(axis=1).sum())
    assert lone >= 1  # slide d


def test_settings_tell_contexts_apart(
    model: Path, cells: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prints = set()
    for number, words in enumerate([[], ["context=neighbours"], ["context=neighbours", "context.k=3"]]):
        config = config_for(model, cells, tmp_path / f"{number}", *words)
        spec = embedding.run(config).spec
        assert embedding.run(config).n_skipped == 3
        prints.add(spec.model_fingerprint)
        row = Store(tmp_path / f"{number}").read_table(embeddings_name("a"))
        assert set(row["model_fingerprint"].to_pylist()) == {spec.model_fingerprint}
        assert spec.width == WIDTH * (3 if words else 1)
    assert len(prints) == 3
    assert json.loads(row.schema.metadata[b"context"]) == {"name": "neighbours", "k": 3, "radius_um": 50.0}
    assert "96 values each by run, context=neighbours" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"begun with other settings \(context\.k 3 then, 10 now"):
        embedding.run(config_for(model, cells, tmp_path / "2", "context=neighbours"))
    with pytest.raises(ConfigError, match="begun with other settings"):
        embedding.run(config_for(model, cells, tmp_path / "0", "context=neighbours"))


def test_an_output_from_before_there_were_contexts_goes_on(model: Path, cells: Store, tmp_path: Path) -> None:
    config = config_for(model, cells, tmp_path / "out")
    embedding.run(config)
    store = Store(tmp_path / "out")
    store.write_json(
        "embed.json", {key: value for key, value in store.read_json("embed.json").items() if key != "context"}
    )
    assert embedding.run(config).n_skipped == 3
    assert embedding.open_ledger(store, embedding.run(config).spec, overwrite=False).spec.context_name == "nucleus"


@pytest.mark.parametrize("at", [2, 5])
def test_a_job_killed_while_vectors_wait_for_their_neighbours_loses_and_leaves_nothing(
    model: Path, cells: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    config = config_for(model, cells, tmp_path / "out", "context=neighbours")
    with killed_at(at), pytest.raises(KeyboardInterrupt):
        embedding.run(config)
    assert Store(tmp_path / "out").list("embeddings") == ([embeddings_name("a")] if at == 5 else [])
    assert embedding.main(config) == 0
    whole = embedding.run(config_for(model, cells, tmp_path / "whole", "context=neighbours"))
    assert whole.n_embedded == 71
    for slide_id in SLIDES:
        np.testing.assert_array_equal(stored(tmp_path / "out", slide_id), stored(tmp_path / "whole", slide_id))
    assert list(tmp_path.glob("lemon-scratch-*")) == []


def test_neighbours_in_a_sample_of_nuclei_are_refused_before_anything_is_written(
    model: Path, cells: Store, tmp_path: Path
) -> None:
    ledger = cells_ledger(cells, config_fingerprint="test")
    ledger.commit(replace(next(row for row in rows_with_cells(cells) if row.slide_id == "a"), n_nuclei=3985))
    with pytest.raises(ConfigError, match=r"hold 40 of 3985 nuclei of a .*cells_per_slide=null"):
        embedding.run(config_for(model, cells, tmp_path / "out", "context=neighbours"))
    assert Store(tmp_path / "out").list("") == []
    words = [f"model={model}", "slides=x.svs", f"output={tmp_path / 'o'}", "context=neighbours"]
    with pytest.raises(ConfigError, match=r"curation\.cells_per_slide=100, a sample"):
        load("embed", [*words, "variant=smoke"], EmbedConfig)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["context=neighbors"], "did you mean neighbours"),
        (["context=neighbours", "context.k=0"], "context.k"),
        (["context=field"], "context.model"),
        (["context=field", "context.model=lemon_mini", "context.um=2"], "context.um"),
    ],
)
def test_a_context_that_cannot_be_is_told_at_once(
    model: Path, cells: Store, tmp_path: Path, words: Sequence[str], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        config_for(model, cells, tmp_path / "out", *words)


def test_a_field_encoder_that_is_not_there_is_told_before_work_begins(
    model: Path, cells: Store, tmp_path: Path
) -> None:
    config = config_for(model, cells, tmp_path / "out", "context=field", "context.model=uni3")
    with pytest.raises(ConfigError, match="uni3: no such file"):
        config.check_inputs()


def test_a_full_scratch_disk_stops_the_job_with_where_it_is(tmp_path: Path) -> None:
    vectors = context._Kept(tmp_path / "gone" / "own", WIDTH)
    with pytest.raises(FatalError, match=r"cannot keep vectors in .*TMPDIR"):
        vectors.append(np.zeros((1, WIDTH), np.float32))


# --- fields -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slide_cells(tmp_path: Path) -> Store:
    return table_of_a_slide(tmp_path)


def test_stored_fields_are_what_the_slide_shows_around_each_nucleus(
    model: Path, slide_cells: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_encoder(tmp_path / "field", seed=7)
    words = ["context=field", f"context.model={other}", "context.um=30"]
    assert embedding.main(config_for(model, slide_cells, tmp_path / "out", *words)) == 0
    assert "context.model: field was trained on crops of 10 um and sees 30 um here" in capsys.readouterr().out
    embedding.run(config_for(model, slide_cells, tmp_path / "alone"))
    own, got = stored(tmp_path / "alone", "s"), stored(tmp_path / "out", "s")
    shard = slide_cells.read_table(shard_name("s"))
    shown = []
    with SlideReader(tmp_path / "s.tiff") as reader:
        for x, y in zip(shard["x_level0_px"].to_pylist(), shard["y_level0_px"].to_pylist(), strict=True):
            corner = [round(each * TISSUE_MPP / 0.25 - 0.5 - 119 / 2) for each in (x, y)]
            shown.append(reader.region(*corner, width_px=120, height_px=120))
    at_corner = shown[int(np.argmax(shard["x_level0_px"].to_numpy() + shard["y_level0_px"].to_numpy()))]
    assert (at_corner == 255).all(axis=2).mean() > 0.7  # three quarters of it lie beyond the slide
    field = lemon.load_encoder(other).embed_fields(np.stack(shown)).numpy()
    np.testing.assert_allclose(got, with_field(own, field), rtol=1e-3, atol=1e-4)
    assert Store(tmp_path / "out").read_json("embed.json")["context"]["model"] == "field"


def test_fields_seen_by_other_weights_are_another_fingerprint(model: Path, slide_cells: Store, tmp_path: Path) -> None:
    prints = []
    for seed, name in ((7, "x"), (7, "y"), (8, "z")):
        words = ["context=field", f"context.model={write_encoder(tmp_path / name, seed=seed)}", "context.um=30"]
        prints.append(
            embedding.run(config_for(model, slide_cells, tmp_path / f"o{name}", *words)).spec.model_fingerprint
        )
    assert prints[0] == prints[1] != prints[2]  # the same weights by another name


@pytest.mark.parametrize(("fault", "reason"), [("gone", "file not found"), ("other", "another file than its cells")])
def test_a_slide_whose_file_is_not_that_of_its_cells_is_a_failed_row(
    model: Path, slide_cells: Store, tmp_path: Path, fault: str, reason: str
) -> None:
    (tmp_path / "s.tiff").unlink()
    if fault == "other":
        write_pyramid(tmp_path / "s.tiff", make_tissue(TISSUE_PX, seed=2).image, mpp=TISSUE_MPP)
    words = ["context=field", f"context.model={model}"]
    summary = embedding.run(config_for(model, slide_cells, tmp_path / "out", *words))
    (row,) = summary.rows
    assert row.status == "failed"
    assert reason in str(row.error)
    assert str(tmp_path / "s.tiff") in str(row.error)
    assert summary.exit_code == 3


# --- what goes on with such vectors -----------------------------------------------------------------------------------


def test_annotated_data_classes_and_the_map_take_wider_vectors(model: Path, cells: Store, tmp_path: Path) -> None:
    words = ["context=neighbours", "context.k=4", "format=[h5ad]"]
    assert embedding.main(config_for(model, cells, tmp_path / "out", *words)) == 0
    data = anndata.read_h5ad(tmp_path / "out" / "h5ad" / "a.h5ad")
    assert data.obsm["X_lemon"].shape == (40, 3 * WIDTH)
    assert data.uns["lemon"]["context"] == "neighbours"
    given = [f"embeddings={tmp_path / 'out'}", f"cells={cells.uri}"]
    labels = tmp_path / "labels.csv"
    labels.write_text("cell_id,label\n" + "".join(f"a_{n}_{n},{'even' if n % 2 else 'odd'}\n" for n in range(20)))
    words = [*given, f"labels={labels}", f"output={tmp_path / 'classes'}", "next=0"]
    assert classify(load("classify", words, ClassifyConfig)) == 0
    assert len(Store(tmp_path / "classes").read_table("classes/a.parquet")) == 40
    shown = read_atlas_cells(load("atlas", [*given, f"output={tmp_path / 'atlas'}"], AtlasConfig))
    assert shown.vectors.shape == (71, 3 * WIDTH)
    assert shown.model == "run, context=neighbours"


def test_like_nuclei_are_found_by_cell_and_a_picture_without_context_is_refused(
    model: Path, cells: Store, tmp_path: Path
) -> None:
    pytest.importorskip("faiss", reason="the extra find is not installed")
    assert embedding.main(config_for(model, cells, tmp_path / "out", "context=neighbours")) == 0
    assert len(lemon.find_neighbours(str(tmp_path / "out"), cell="a_3_3", k=5)) == 5
    with pytest.raises(ConfigError, match=r"context=neighbours, which a picture of a nucleus lacks; expected cell="):
        lemon.find_neighbours(str(tmp_path / "out"), image=str(tmp_path / "crop.png"))
