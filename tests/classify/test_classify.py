"""A few labels to a class for every nucleus: right, sure as it says, and honest about what it does not know."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import anndata
import numpy as np
import pytest
from PIL import Image

from lemon.classify.choose import choose_next, unsureness
from lemon.classify.config import ClassifyConfig
from lemon.classify.head import cooled, fit_head, nearest_others, score_of, temperature_of
from lemon.classify.job import main as classify
from lemon.classify.spatial import count_rows, neighbour_counts, neighbourhood_rows, tissue_mm2
from lemon.embed import job as embedding
from lemon.embed.config import EmbedConfig
from lemon.errors import ConfigError
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.runtime.verify import VerifyConfig
from lemon.runtime.verify import main as verify
from lemon.schema import CLASSES
from tests.embed.tables import write_cells, write_encoder

COUNTS = {"A": 60, "B": 50}


def blobs(count: int, *, seed: int = 0, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float32 [N, 8] of three classes in turn, and their classes."""
    generator = np.random.default_rng(seed)
    codes = np.arange(count) % 3
    centres = np.random.default_rng(9).normal(0, 1, (3, 8))
    return (centres[codes] + generator.normal(0, spread, (count, 8))).astype(np.float32), codes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides, embedded."""
    folder = tmp_path_factory.mktemp("classify")
    for seed, (slide_id, count) in enumerate(COUNTS.items()):
        write_cells(Store(folder / "cells"), slide_id, count, seed=seed)
    write_encoder(folder / "run")
    words = [f"model={folder / 'run'}", f"cells={folder / 'cells'}", f"output={folder / 'e'}", "device=cpu"]
    assert embedding.main(load("embed", [*words, "clusters.k=2"], EmbedConfig)) == 0
    return folder


def config(folder: Path, labels: Path | str, output: Path, *words: str) -> ClassifyConfig:
    given = [f"labels={labels}", f"embeddings={folder / 'e'}", f"cells={folder / 'cells'}", f"output={output}"]
    return load("classify", [*given, *words], ClassifyConfig)


def sheet(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def write_labels(path: Path, labels: dict[str, str], *, key: str = "cell_id") -> Path:
    path.write_text("\n".join([f"{key},label", *(f"{each},{name}" for each, name in labels.items())]) + "\n")
    return path


LABELS = {f"{slide}_{number}_{number}": "immune" if number % 2 else "tumour" for slide in "AB" for number in range(8)}


def test_every_cell_has_a_class_in_every_format(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = write_labels(tmp_path / "labels.csv", LABELS)
    with caplog.at_level("INFO"):
        assert classify(config(folder, labels, tmp_path / "out", "format=[h5ad,geojson]", "next=5")) == 0
    assert "16 labels (immune 8, tumour 8); balanced accuracy" in caplog.text
    assert "by cross-validation, whole slides held out" in caplog.text
    out = Store(tmp_path / "out")
    table = out.read_table("classes/A.parquet")
    assert table.schema.equals(CLASSES)
    assert len(table) == 60
    assert {row["cell_id"]: row["label"] for row in table.to_pylist() if row["given"]} == {
        cell: name for cell, name in LABELS.items() if cell[0] == "A"
    }
    features = json.loads(gzip.decompress((tmp_path / "out/geojson/A.geojson.gz").read_bytes()))["features"]
    shown = {each["properties"]["name"]: each["properties"]["classification"]["name"] for each in features}
    assert shown == dict(zip(table["cell_id"].to_pylist(), table["label"].to_pylist(), strict=True))
    colors = {
        each["properties"]["classification"]["name"]: tuple(each["properties"]["classification"]["color"])
        for each in features
    }
    assert len({*colors.values()}) == len(colors)
    annotated = anndata.read_h5ad(tmp_path / "out/h5ad/A.h5ad")
    assert annotated.obs["label"].astype(str).to_dict() == shown
    assert annotated.obs["confidence"].between(0.5, 1).all()
    counts = sheet(tmp_path / "out/counts.csv")
    assert sum(int(row["n_cells"]) for row in counts if row["slide_id"] == "A") == 60
    for row in counts:
        assert float(row["per_mm2"]) == pytest.approx(int(row["n_cells"]) / float(row["area_mm2"]))
    assert verify(VerifyConfig(output=str(tmp_path / "out"))) == 0


def test_the_next_sheet_names_unlabelled_cells_and_can_be_given_back(folder: Path, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.csv", LABELS)
    assert classify(config(folder, labels, tmp_path / "out", "next=6")) == 0
    rows = sheet(tmp_path / "out/next/after_16.csv")
    assert len({row["cell_id"] for row in rows} - LABELS.keys()) == 6
    assert Image.open(tmp_path / "out/next/after_16.png").width > 1000
    assert {row["cell_id"]: row["label"] for row in sheet(tmp_path / "out/given.csv")} == LABELS
    filled = tmp_path / "out/next/after_16.csv"  # in place, as people do
    with filled.open("w") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows([row | {"label": "stroma" if index < 4 else ""} for index, row in enumerate(rows)])
    before = (tmp_path / "out/classes/A.parquet").read_bytes()
    text = filled.read_text()
    assert classify(config(folder, f"[{labels},{filled}]", tmp_path / "out")) == 0
    assert (tmp_path / "out/next/after_20.csv").exists()
    assert classify(config(folder, labels, tmp_path / "out")) == 0
    assert filled.read_text() == text
    assert classify(config(folder, f"[{labels},{filled}]", tmp_path / "out")) == 0
    score = json.loads((tmp_path / "out/score.json").read_text())
    assert score["labels"] == {"immune": 8, "stroma": 4, "tumour": 8}
    assert (tmp_path / "out/classes/A.parquet").read_bytes() != before


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of given nuclei: their ids are the same numbers on both, but for two UUIDs of QuPath on A."""
    folder = tmp_path_factory.mktemp("given")
    for slide_id, count in COUNTS.items():
        ids = [*(QUPATH if slide_id == "A" else "01"), *(str(index) for index in range(2, count))]
        write_cells(Store(folder / "cells"), slide_id, count, foreign_ids=ids)
    write_encoder(folder / "run")
    words = [f"model={folder / 'run'}", f"cells={folder / 'cells'}", f"output={folder / 'e'}", "device=cpu"]
    assert embedding.main(load("embed", [*words, "clusters.k=null"], EmbedConfig)) == 0
    return folder


QUPATH = ["a1b2c3d4-0000-4000-8000-000000000001", "a1b2c3d4-0000-4000-8000-000000000002"]


def test_labels_and_classes_go_by_the_ids_of_another_program(given: Path, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.csv", dict(zip(QUPATH, "xy", strict=True)), key="foreign_id")
    assert classify(config(given, labels, tmp_path / "out", "format=geojson", "next=0")) == 0
    rows = Store(tmp_path / "out").read_table("classes/A.parquet").to_pylist()
    assert {row["foreign_id"]: row["label"] for row in rows if row["given"]} == dict(zip(QUPATH, "xy", strict=True))
    known = Store(given / "cells").read_table("cells/A.parquet")
    assert [row["foreign_id"] for row in rows] == known["foreign_id"].to_pylist()
    features = json.loads(gzip.decompress((tmp_path / "out/geojson/A.geojson.gz").read_bytes()))["features"]
    assert [each["id"] for each in features[:2]] == QUPATH
    shown = [each["properties"]["measurements"]["Class confidence"] for each in features]
    assert shown == pytest.approx([row["confidence"] for row in rows], abs=1e-4)


@pytest.mark.parametrize(
    ("ids", "line"),
    [
        (
            [QUPATH[0], "nobody"],
            r"1 of 2 foreign ids are not among those of .*\(nobody\); expected ids of the nuclei given",
        ),
        ([QUPATH[0], "7"], r"foreign_id 7 is of 2 slides \(A, B\); expected ids of one slide each: give cell_id"),
    ],
)
def test_foreign_ids_that_name_no_nucleus_or_several_are_one_line(
    given: Path, tmp_path: Path, ids: list[str], line: str
) -> None:
    labels = write_labels(tmp_path / "labels.csv", dict(zip(ids, "xy", strict=True)), key="foreign_id")
    with pytest.raises(ConfigError, match=line):
        classify(config(given, labels, tmp_path / "out"))


def test_clusters_alone_are_no_labels_for_the_atlas(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lemon.classify.labels.CELLS_A_CLUSTER", 10)
    clusters = write_labels(tmp_path / "clusters.csv", {"0": "tumour", "1": "stroma"}, key="cluster")
    with caplog.at_level("INFO"):
        assert classify(config(folder, clusters, tmp_path / "out", "next=3")) == 0
    (command,) = [line for line in caplog.messages if "lemon atlas" in line]
    assert command.endswith(f" output={tmp_path}/out/atlas show={tmp_path}/out/next/after_20.csv")


def test_named_clusters_are_a_start_that_labels_of_cells_correct(folder: Path, tmp_path: Path) -> None:
    clusters = write_labels(tmp_path / "clusters.csv", {"0": "tumour", "1": "stroma"}, key="cluster")
    assert classify(config(folder, clusters, tmp_path / "out", "unknown=null", "next=0")) == 0
    known = Store(folder / "e").read_table("clusters/A.parquet")
    named = Store(tmp_path / "out").read_table("classes/A.parquet")
    agree = np.array(named["label"].to_pylist()) == np.array(["tumour", "stroma"])[known["cluster"].to_numpy()]
    assert agree.mean() > 0.9
    assert "only clusters are named" in json.loads((tmp_path / "out/score.json").read_text())["line"]
    cell = known["cell_id"][0].as_py()
    fixed = write_labels(tmp_path / "fixed.csv", {cell: "immune"})
    assert classify(config(folder, f"[{clusters},{fixed}]", tmp_path / "out")) == 0
    corrected = {
        row["cell_id"]: row["label"] for row in Store(tmp_path / "out").read_table("classes/A.parquet").to_pylist()
    }
    assert corrected[cell] == "immune"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("cell_id,label\nA_1_1,x\nA_2_2,x\n", r"2 cells, all x; expected cells of two classes"),
        ("cell_id,label\nA_1_1,x\nnobody,y\n", r"1 of 2 labelled cells are not among the 110 .*nobody"),
        ("cell_id,label\nA_1_1,\nA_2_2,\n", r"no cell has a label"),
        ("cell_id,label\nA_1_1,x\nA_1_1,y\n", r"line 3: cell_id A_1_1 has two labels, x and y"),
        ("cell_id,label\nA_1_1,x\nA_2_2,Unknown\n", r"'unknown' is no class"),
        ("cell_id,kind\nA_1_1,x\n", r"has no label; expected cell_id,label or foreign_id,label or cluster"),
        ("cluster,label\n0,x\n7,y\n", r"no cell is in cluster 7"),
        ("", r"labels: .*labels\.csv"),
    ],
)
def test_bad_labels_are_one_line(folder: Path, tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ConfigError, match=line) as raised:
        classify(config(folder, tmp_path / "labels.csv", tmp_path / "out"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_head_is_right_and_as_sure_as_it_is_right() -> None:
    vectors, codes = blobs(240, spread=1.1)
    slides = (np.arange(240) % 4).astype(str)
    head, held_out = fit_head(vectors, codes, groups=slides, n_classes=3, seed=0, unknown=0.99)
    fresh, truth = blobs(900, seed=1, spread=1.1)
    probability = head.probabilities(fresh)
    accuracy = (probability.argmax(axis=1) == truth).mean()
    assert accuracy > 0.8
    assert probability.max(axis=1).mean() == pytest.approx(accuracy, abs=0.07)
    score = score_of(held_out, codes, slides, seed=0)
    assert held_out.by_slide
    assert score.low <= score.value <= score.high
    assert score.value == pytest.approx(accuracy, abs=0.12)


def test_cells_of_one_slide_are_held_out_one_by_one() -> None:
    vectors, codes = blobs(30)
    _, held_out = fit_head(vectors, codes, groups=np.zeros(30), n_classes=3, seed=0, unknown=None)
    assert not held_out.by_slide
    assert sorted(held_out.rows) == list(range(30))


def test_two_labels_are_enough_to_start_and_have_no_score() -> None:
    vectors, codes = blobs(2)
    head, held_out = fit_head(vectors, codes, groups=np.zeros(2), n_classes=3, seed=0, unknown=0.99)
    assert len(held_out.rows) == 0
    assert head.temperature == 1.0
    assert head.probabilities(vectors).argmax(axis=1).tolist() == codes.tolist()


def test_a_cell_unlike_all_labels_is_beyond_the_limit() -> None:
    vectors, codes = blobs(60)
    head, _ = fit_head(vectors, codes, groups=np.zeros(60), n_classes=3, seed=0, unknown=0.99)
    fresh, _ = blobs(300, seed=2)
    assert head.limit is not None
    assert (head.distances(fresh) <= head.limit).mean() > 0.9
    assert (head.distances(-fresh) > head.limit).mean() > 0.9


def test_probabilities_that_are_too_sure_are_cooled_and_those_that_are_not_stay() -> None:
    generator = np.random.default_rng(0)
    right = generator.uniform(size=4000) < 0.7
    sure = np.where(right[:, None], [[0.99, 0.01]], [[0.01, 0.99]])
    temperature = temperature_of(np.zeros(4000, int), sure)
    assert cooled(sure, temperature).max(axis=1).mean() == pytest.approx(0.74, abs=0.04)  # the search's bound
    honest = np.where(right[:, None], [[0.7, 0.3]], [[0.3, 0.7]])
    assert temperature_of(np.zeros(4000, int), honest) == pytest.approx(1, abs=0.1)


def test_distance_to_the_nearest_other_is_that_of_all_pairs() -> None:
    unit = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    np.fill_diagonal(distance, np.inf)
    np.testing.assert_allclose(nearest_others(unit), distance.min(axis=1), atol=1e-6)


def test_the_first_cells_to_label_are_of_every_group() -> None:
    vectors, codes = blobs(300)
    chosen = choose_next(vectors, [], None, count=3, seed=0)
    assert sorted(codes[chosen]) == [0, 1, 2]


def test_the_next_cells_are_new_differ_and_are_of_what_has_no_label() -> None:
    vectors, codes = blobs(300)
    labelled = [*np.flatnonzero(codes == 0)[:5], *np.flatnonzero(codes == 1)[:5]]
    probability = np.full((300, 3), 0.01)
    probability[np.arange(300), codes] = 0.98
    probability[codes == 2] = [0.5, 0.49, 0.01]
    chosen = choose_next(vectors, labelled, probability, count=4, seed=0)
    assert len({*chosen} - {*labelled}) == 4
    assert (codes[chosen] == 2).all()  # 40 candidates are of the 100 unsure ones
    assert len(choose_next(vectors[:6], [0, 1], None, count=10, seed=0)) == 4
    np.testing.assert_allclose(unsureness(np.array([[0.5, 0.5, 0], [0.9, 0.1, 0]])), [1, 0.2])


def test_densities_count_the_squares_that_hold_nuclei() -> None:
    place = np.array([[10.0, 10], [20, 20], [150, 10], [1000, 1000]])
    assert tissue_mm2(place) == pytest.approx(0.03)
    rows = count_rows("s", np.array([0, 0, 1, 0]), ("a", "b"), area_mm2=0.03)
    assert [(row.label, row.n_cells, row.share, round(row.per_mm2 or 0)) for row in rows] == [
        ("a", 3, 0.75, 100),
        ("b", 1, 0.25, 33),
    ]


def test_the_neighbourhood_is_of_the_nearest_within_the_radius_without_the_cell_itself() -> None:
    place = np.array([[0.0, 0], [10, 0], [11, 0], [500, 500], [500, 500]])
    codes = np.array([0, 1, 1, 0, 1])
    pairs = neighbour_counts(place, codes, n_classes=2, neighbours=2, radius_um=50)
    assert pairs.tolist() == [[0, 3], [3, 2]]
    rows = neighbourhood_rows("s", pairs, codes, ("a", "b"))
    assert [(row.label, row.neighbour, row.n_neighbours) for row in rows] == [
        ("a", "a", 0),
        ("a", "b", 3),
        ("b", "a", 3),
        ("b", "b", 2),
    ]
    assert rows[1].ratio == pytest.approx(1 / 0.6)
