"""True neighbours: what is found is what all distances say; the index is made again only for what changed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow.csv
import pytest
from PIL import Image

pytest.importorskip("faiss", reason="the extra find is not installed")

import lemon
from lemon.embed import job as embedding
from lemon.embed.config import EmbedConfig
from lemon.embed.read import open_embeddings
from lemon.embed.stream import vectors_of
from lemon.errors import ConfigError
from lemon.find.config import FindConfig
from lemon.find.index import IndexedSlide, Segment, n_lists_for, open_index, plan_segments
from lemon.find.job import find_neighbours
from lemon.find.job import main as find
from lemon.find.query import read_crop
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.runtime.verify import VerifyConfig
from lemon.runtime.verify import main as verify
from lemon.schema import NEIGHBOURS
from tests.cells_table import synthetic_crops, write_slide
from tests.embed.tables import write_encoder

COUNTS = {"TCGA-A": 60, "TCGA-B": 50}


def embed(folder: Path) -> Path:
    words = [f"model={folder / 'run'}", f"cells={folder / 'cells'}", f"output={folder / 'e'}", "device=cpu"]
    assert embedding.main(load("embed", [*words, "clusters.k=null"], EmbedConfig)) == 0
    return folder / "e"


def made(folder: Path) -> Path:
    """Cells of two slides and their embeddings."""
    for seed, (slide_id, count) in enumerate(COUNTS.items()):
        write_slide(Store(folder / "cells"), slide_id, synthetic_crops(count, seed=seed))
    write_encoder(folder / "run")
    return embed(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("find")
    made(folder)
    return folder


def all_cells(embeddings: Path) -> tuple[list[str], np.ndarray]:
    opened = open_embeddings(str(embeddings))
    batches = [batch for slide in opened.rows for batch in opened.batches(slide, ["cell_id", "embedding"])]
    ids = [each for batch in batches for each in batch["cell_id"].to_pylist()]
    vectors = np.concatenate([vectors_of(batch["embedding"]) for batch in batches]).astype(float)
    return ids, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_neighbours_are_those_of_all_distances_over_all_slides_and_never_the_cell_itself(folder: Path) -> None:
    ids, vectors = all_cells(folder / "e")
    found = find_neighbours(str(folder / "e"), cell=[ids[3], ids[100]], k=8)
    assert found.schema.equals(NEIGHBOURS)
    for query in (3, 100):
        rows = [row for row in found.to_pylist() if row["query"] == ids[query]]
        distances = 1 - vectors @ vectors[query]
        distances[query] = np.inf
        assert [row["position"] for row in rows] == list(range(1, 9))
        assert [row["distance"] for row in rows] == pytest.approx(np.sort(distances)[:8], abs=2e-4)
        for row in rows:
            assert row["distance"] == pytest.approx(distances[ids.index(row["cell_id"])], abs=2e-4)
            assert row["cell_id"].startswith(row["slide_id"])


def test_the_picture_of_a_cell_finds_the_cell(folder: Path, tmp_path: Path) -> None:
    crop = np.asarray(synthetic_crops(COUNTS["TCGA-B"], seed=1))[7]
    large = np.full((100, 90, 3), 255, np.uint8)
    large[20:80, 15:75] = crop
    Image.fromarray(large).save(tmp_path / "crop.png")
    found = find_neighbours(str(folder / "e"), image=str(tmp_path / "crop.png"), model=str(folder / "run"), k=1)
    assert found["cell_id"].to_pylist() == ["TCGA-B_7_7"]
    assert found["distance"].to_pylist() == pytest.approx([0], abs=1e-3)


def test_a_picture_at_another_resolution_is_brought_to_that_of_cells(tmp_path: Path) -> None:
    Image.fromarray(np.full((30, 30, 3), 90, np.uint8)).save(tmp_path / "half.png")
    assert read_crop(str(tmp_path / "half.png"), mpp=0.5).shape == (60, 60, 3)
    with pytest.raises(ConfigError, match=r"got 30 x 30 px; expected at least 60 x 60 px"):
        read_crop(str(tmp_path / "half.png"), mpp=0.25)


def test_the_command_writes_a_table_a_sheet_and_a_picture(folder: Path, tmp_path: Path) -> None:
    words = [f"embeddings={folder / 'e'}", f"cells={folder / 'cells'}", "cell=TCGA-A_5_5", "k=12"]
    assert find(load("find", [*words, f"output={tmp_path}"], FindConfig)) == 0
    assert len(pyarrow.csv.read_csv(tmp_path / "neighbours.csv")) == 12
    picture = np.asarray(Image.open(tmp_path / "neighbours.png"))
    assert picture.shape[1] > 1500
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 100
    assert verify(VerifyConfig(output=str(folder / "e"))) == 0  # the index in it is in order too


def test_bad_queries_are_one_line(folder: Path, tmp_path: Path) -> None:
    embeddings = str(folder / "e")
    with pytest.raises(ConfigError, match=r"cell: got 'nobody', which is none of the 110 cells"):
        find_neighbours(embeddings, cell="nobody")
    with pytest.raises(ConfigError, match=r"embeddings: .* expected an output of lemon embed"):
        find_neighbours(str(tmp_path), cell="nobody")
    with pytest.raises(ConfigError, match=r"vectors: got float64 \[1, 3\]; expected finite float \[N, 32\]"):
        find_neighbours(embeddings, vectors=np.zeros((1, 3)))
    with pytest.raises(ConfigError, match="expected exactly one of the two"):
        load("find", [f"embeddings={embeddings}"], FindConfig)
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(ConfigError, match=r"image: .*no\.png: cannot be read"):
        find_neighbours(embeddings, image=str(tmp_path / "no.png"))
    write_encoder(tmp_path / "other", seed=1)
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(tmp_path / "crop.png")
    with pytest.raises(ConfigError, match=r"the embeddings are by run, expected model=where it is"):
        find_neighbours(embeddings, image=str(tmp_path / "crop.png"))
    with pytest.raises(ConfigError, match=r"model: .* but the embeddings are by"):
        find_neighbours(embeddings, image=str(tmp_path / "crop.png"), model=str(tmp_path / "other"))
    assert lemon.find_neighbours is find_neighbours


def test_only_segments_of_slides_that_changed_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lemon.find.index.SEGMENT_CELLS", 60)
    embeddings = made(tmp_path)
    index = Path(embeddings) / "index"
    open_index(open_embeddings(str(embeddings)), None)
    before = {path.name: path.stat().st_mtime_ns for path in (index / "segments").iterdir()}
    assert len(before) == 2
    open_index(open_embeddings(str(embeddings)), None)
    assert {path.name: path.stat().st_mtime_ns for path in (index / "segments").iterdir()} == before
    write_slide(Store(tmp_path / "cells"), "TCGA-B", synthetic_crops(50, seed=9))
    embed(tmp_path)
    found = find_neighbours(str(embeddings), cell="TCGA-B_4_4", k=5)
    after = {path.name: path.stat().st_mtime_ns for path in (index / "segments").iterdir()}
    assert len(before.items() & after.items()) == 1
    assert len(after) == 2
    ids, vectors = all_cells(embeddings)
    distances = np.sort(1 - vectors @ vectors[ids.index("TCGA-B_4_4")])[1:6]
    assert found["distance"].to_pylist() == pytest.approx(distances, abs=2e-4)


def test_an_index_that_is_cut_short_is_one_line_and_is_made_again_without_it(tmp_path: Path) -> None:
    embeddings = str(made(tmp_path))
    expected = find_neighbours(embeddings, cell="TCGA-A_3_3", k=4)
    (segment,) = (tmp_path / "e/index/segments").iterdir()
    os.truncate(segment, 100)
    with pytest.raises(ConfigError, match=r"segments/.* was changed since lemon wrote it; move it away"):
        find_neighbours(embeddings, cell="TCGA-A_3_3", k=4)
    segment.unlink()
    assert find_neighbours(embeddings, cell="TCGA-A_3_3", k=4).equals(expected)


def test_small_segments_are_joined_when_slides_are_added() -> None:
    slides = {name: IndexedSlide(name, "d", 30) for name in "abcde"}
    full, small = Segment("x", [slides["a"], slides["b"]]), Segment("y", [slides["c"]])
    planned = plan_segments([full, small], slides, centres="", size=70)
    assert planned[0] == full
    assert [[slide.slide_id for slide in segment.slides] for segment in planned[1:]] == [["c", "d"], ["e"]]
    assert plan_segments([full, small], {name: slides[name] for name in "abc"}, centres="", size=70) == [full, small]
    changed = plan_segments([full], {"a": slides["a"], "b": IndexedSlide("b", "new", 30)}, centres="", size=70)
    assert [segment.slides for segment in changed] == [[slides["a"], IndexedSlide("b", "new", 30)]]


@pytest.mark.parametrize(("n_cells", "n_lists"), [(10, 1), (20_000, 1), (1_000_000, 2048), (100_000_000, 16_384)])
def test_lists_grow_with_the_root_of_the_cells(n_cells: int, n_lists: int) -> None:
    assert n_lists_for(n_cells) == n_lists
