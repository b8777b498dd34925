from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from lemon.probe.config import ProbeSettings
from lemon.probe.folds import check_folds
from lemon.probe.task import Task, TaskError
from lemon.probe.tasks import hest
from lemon.probe.tasks.catalogue import counts_table, open_task
from lemon.probe.tasks.hest import SLIDES, common_genes
from lemon.probe.tasks.xenium import count_transcripts, is_control, read_centroids
from lemon.slides.reader import RegionError, SlideReader
from lemon.slides.synthetic import write_pyramid
from tests.conftest import shared
from tests.probe.tasks.discs import assert_centred, field

GENES = ("EPCAM", "CD3E", "COL1A1", "MS4A1", "ACTA2", "KRT8")
CONTROLS = (
    "NegControlProbe_00042",
    "NegControlCodeword_0500",
    "BLANK_0006",
    "antisense_PROKR2",
    "UnassignedCodeword_0003",
)
SIDE_UM = 142.0
PITCH_UM = 22.0
# Ids of an instrument's software over the years, for the same cells: text, integers, bytes.
ID_KINDS = {
    "text": lambda at: f"aaaa{at:04d}-1",
    "integer": lambda at: at + 1,
    "bytes": lambda at: f"aaaa{at:04d}-1".encode(),
}
UNASSIGNED = {"text": "UNASSIGNED", "integer": -1, "bytes": b"UNASSIGNED"}


def centres_um() -> np.ndarray:
    """Cells on a grid, the outermost too near the edge for a crop: float [36, 2]."""
    along = 5.0 + PITCH_UM * np.arange(7)
    return np.stack(np.meshgrid(along, along), -1).reshape(-1, 2)


def expected_count(at: int, gene: int) -> int:
    """Transcripts of a gene in a cell of the made-up slides."""
    return (at * (gene + 2)) % 11 + (3 if gene == 0 else 0)


def write_slide(
    folder: Path,
    slide_id: str,
    *,
    mpp: float = 0.2125,
    embedded_mpp: float | None = None,
    ids: str = "text",
    genes: tuple[str, ...] = GENES,
    flag: bool = False,
) -> None:
    """The four files of one slide, with every kind of transcript that does not count."""
    for name in ("wsis", "metadata", "transcripts", "xenium_seg", "st"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    centre_px = centres_um() / mpp
    side_px = round(SIDE_UM / mpp)
    image = field(side_px, side_px, centre_px, mpp=mpp)
    write_pyramid(folder / "wsis" / f"{slide_id}.tif", image, mpp=embedded_mpp or mpp, levels=2)
    meta = {"patient": "Patient 1", "pixel_size_um_embedded": embedded_mpp, "pixel_size_um_estimated": mpp}
    (folder / "metadata" / f"{slide_id}.json").write_text(json.dumps(meta))
    write_segmentation(folder / "xenium_seg" / f"{slide_id}_xenium_cell_seg.parquet", centre_px, ids=ids)
    path = folder / "transcripts" / f"{slide_id}_transcripts.parquet"
    pq.write_table(transcripts(len(centre_px), ids=ids, genes=genes, flag=flag), path, row_group_size=400)


def write_segmentation(path: Path, centre_px: np.ndarray, *, ids: str) -> None:
    """GeoParquet as geopandas writes it: WKB, the cell's id as the index, the geometry's name in the metadata."""
    shapes = shapely.buffer(shapely.points(centre_px), 20.0)
    frame = pd.DataFrame(
        {"geometry": shapely.to_wkb(shapes)}, index=[ID_KINDS[ids](at) for at in range(len(centre_px))]
    )
    frame.index.name = "cell_id"
    table = pa.Table.from_pandas(frame)
    geo = {"version": "1.0.0", "primary_column": "geometry", "columns": {"geometry": {"encoding": "WKB"}}}
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"geo": json.dumps(geo).encode()}), path)


def transcripts(n_cells: int, *, ids: str, genes: tuple[str, ...], flag: bool) -> pa.Table:
    rows: list[tuple[Any, str, float, bool]] = []
    for at in range(n_cells):
        cell = ID_KINDS[ids](at)
        for gene, name in enumerate(genes):
            rows += [(cell, name, 40.0, True)] * expected_count(at, gene)
        rows += [(cell, genes[0], 12.0, True)]  # of low quality
        rows += [(cell, name, 40.0, False) for name in CONTROLS]
    rows += [(UNASSIGNED[ids], genes[0], 40.0, True)] * 50  # in no cell
    if flag:
        rows += [(ID_KINDS[ids](0), "Custom_Control_1", 40.0, False)] * 500  # only the flag tells
    order = np.random.default_rng(0).permutation(len(rows))
    cell, name, qv, is_gene = (list(column) for column in zip(*(rows[at] for at in order), strict=True))
    columns: dict[str, Any] = {"transcript_id": np.arange(len(rows)), "cell_id": cell, "qv": np.float32(qv)}
    columns["feature_name"] = pa.array([word.encode() for word in name]) if ids == "bytes" else name
    columns["x_location"] = np.zeros(len(rows))
    return pa.table({**columns, **({"is_gene": is_gene} if flag else {})})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bowel's five slides, with three of one patient, every kind of id and several resolutions."""
    data = tmp_path_factory.mktemp("hest") / "hest"
    kinds = ("text", "integer", "bytes", "text", "text")
    resolutions = (0.274, 0.274, 0.2497, 0.2738, 0.2125)
    for slide_id, ids, mpp in zip(SLIDES["bowel"], kinds, resolutions, strict=True):
        write_slide(data, slide_id, ids=ids, mpp=mpp, flag=slide_id == "TENX111")
    return data


@pytest.fixture(scope="module")
def task(folder: Path) -> Task:
    return hest.load(folder, organ="bowel", target="counts")


def count(task: Task, what: str) -> int:
    return next(count.n for count in task.counts if count.what == what)


def test_crops_are_centred_whatever_the_slides_resolution(task: Task) -> None:
    assert_centred(task.images[::4])


def test_cells_at_the_edge_are_left_out_and_counted(task: Task) -> None:
    assert count(task, "cells with a transcript") == 5 * 49
    assert count(task, "whole crop inside the slide") == len(task.images) == 5 * 25
    assert count(task, "cells of TENX139") == 25


def test_counts_leave_out_controls_low_quality_and_transcripts_in_no_cell(task: Task) -> None:
    at = {name: row for row, name in enumerate(task.sample_ids.tolist())}
    for slide_id, cell, name in (("TENX149", 24, "aaaa0024-1"), ("TENX148", 24, "25"), ("TENX147", 16, "aaaa0016-1")):
        got = dict(zip(task.target_names, task.target[at[f"{slide_id}_{name}"]].tolist(), strict=True))
        assert got == {gene: expected_count(cell, number) for number, gene in enumerate(GENES)}
    assert task.target.dtype == np.float32


def test_the_target_is_the_logarithm_unless_told_otherwise(folder: Path, task: Task) -> None:
    default = hest.load(folder, organ="bowel")
    assert np.allclose(default.target, np.log1p(task.target))
    assert "target: log(1 + count) of transcripts in the cell" in default.notes


def test_crops_may_be_centred_on_the_nucleus_of_cells_that_have_one(tmp_path: Path) -> None:
    for slide_id in ("TENX111", "TENX139"):
        write_slide(tmp_path, slide_id, mpp=0.25)
        path = tmp_path / "xenium_seg" / f"{slide_id}_xenium_nucleus_seg.parquet"
        write_segmentation(path, centres_um()[:30] / 0.25 + (8, 0), ids="text")  # 8 px to the right; 19 have none
    slides = ["TENX111", "TENX139"]
    cell = hest.load(tmp_path, organ="bowel", slides=slides, target="counts")
    nucleus = hest.load(tmp_path, organ="bowel", slides=slides, target="counts", centre="nucleus")
    assert count(nucleus, "cells with a nucleus") == 2 * 30
    at = {name: row for row, name in enumerate(cell.sample_ids.tolist())}
    known = [(row, at[name]) for row, name in enumerate(nucleus.sample_ids.tolist()) if name in at]
    assert len(known) > 20
    for row, other in known:
        shifts = itertools.product((-1, 0, 1), (7, 8, 9))  # centres of the made-up cells lie between two pixels
        moved = [cell.images[other][2 + y : 58 + y, 2 + x : 50 + x] for y, x in shifts]
        assert any(np.array_equal(nucleus.images[row][2:58, 2:50], each) for each in moved)
    genes = [cell.target_names.index(name) for name in nucleus.target_names]
    np.testing.assert_array_equal(
        nucleus.target[[row for row, _ in known]], cell.target[[o for _, o in known]][:, genes]
    )
    assert "crops are centred on the centroid of the nucleus" in nucleus.notes


def test_the_options_are_settings_of_the_probe_and_reach_the_loader(tmp_path: Path, folder: Path) -> None:
    settings = ProbeSettings.model_validate({"hest": {"target": "counts"}})
    assert settings.task_options("nucls-super") == {}
    (tmp_path / "hest").symlink_to(folder)
    task = open_task("hest-bowel", tmp_path, **settings.task_options("hest-bowel"))
    assert "target: count of transcripts in the cell" in task.notes
    text = counts_table(task)
    assert "note: inferred of the paper: target: log(1 + count)" in text
    assert "note: inferred of the paper: middle of a crop: " in text


def test_slides_of_one_patient_are_one_donor(task: Task) -> None:
    paper, leak_free = task.protocols
    assert (paper.name, leak_free.name) == ("paper", "leak-free")
    assert [fold.name for fold in paper.folds] == sorted(SLIDES["bowel"])
    assert [fold.name for fold in leak_free.folds] == ["TENX111", "TENX139", "TENX147-149"]
    assert task.cluster == "patient"
    assert check_folds(task) == ()


def test_where_each_slide_has_its_donor_there_is_one_protocol(folder: Path) -> None:
    task = hest.load(folder, organ="bowel", slides=["TENX111", "TENX139"])
    assert [protocol.name for protocol in task.protocols] == ["leak-free"]


def test_lungs_donors_are_those_of_the_slides_names() -> None:
    table = pd.read_csv(shared("data/tables/HEST_v1_1_0.csv")).set_index("id")
    assert all((table.loc[list(names), "st_technology"] == "Xenium").all() for names in SLIDES.values())
    assert all((table.loc[list(SLIDES[organ]), "organ"] == organ.title()).all() for organ in SLIDES)
    subject = {name: re.sub("[A-Z]+$", "", table.loc[name, "subseries"]) for name in SLIDES["lung"]}  # VUILD96LF
    assert all(hest.DONORS.get(name, of) == of for name, of in subject.items())
    assert sum(name in hest.DONORS for name in subject) == 10
    assert len(set(subject.values())) == 15
    assert set(table.loc[["TENX147", "TENX148", "TENX149"], "patient"]) == {"Patient 1"}


def test_a_sample_is_nested_in_a_larger_one_and_depends_on_the_seed(folder: Path) -> None:
    def drawn(**options: Any) -> set[str]:
        return set(hest.load(folder, organ="bowel", slides=SLIDES["bowel"][2:4], **options).sample_ids.tolist())

    few, more, other = drawn(n_cells=5), drawn(n_cells=9), drawn(n_cells=5, seed=1)
    assert (len(few), len(more)) == (10, 18)
    assert few < more
    assert few != other
    assert few == drawn(n_cells=5)


def test_the_estimated_resolution_counts_not_the_embedded_one(tmp_path: Path) -> None:
    for slide_id in ("TENX94", "TENX95"):
        write_slide(tmp_path, slide_id, mpp=0.2125, embedded_mpp=1.0)
    assert_centred(hest.load(tmp_path, organ="breast", slides=["TENX94", "TENX95"]).images[::5])


def test_genes_are_those_of_all_panels_ranked_within_each_slide(tmp_path: Path) -> None:
    write_slide(tmp_path, "NCBI783", genes=GENES)
    write_slide(tmp_path, "NCBI785", genes=(*GENES[:2], "ONLY785", *GENES[2:5]))
    task = hest.load(tmp_path, organ="breast", slides=["NCBI783", "NCBI785"], n_genes=3)
    assert set(task.target_names) <= set(GENES[:5])
    assert len(task.target_names) == 3
    assert task.target_names[0] == "EPCAM"  # the first gene of both


def test_ranks_are_summed_over_slides_and_ties_go_by_name() -> None:
    def sample(genes: str, mean: list[float]) -> hest.Sample:
        none: np.ndarray = np.empty(0)
        return hest.Sample("s", 0.25, none, none, none, np.array(list(genes)), np.array(mean), {})

    samples = [sample("ABCD", [5, 9, 7, 1]), sample("ABC", [8, 6, 7])]  # ranks: B C A, and A C B
    assert common_genes(samples, n_genes=2).tolist() == ["A", "B"]
    assert common_genes(samples, n_genes=50).tolist() == ["A", "B", "C"]
    with pytest.raises(TaskError, match=r"^no gene is on the panels of s, s alike; expected"):
        common_genes([sample("A", [1]), sample("B", [1])])


def test_a_big_slide_is_read_in_blocks_around_its_cells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hest.load(folder, organ="bowel", slides=["TENX149", "TENX111"])
    read: list[int] = []
    region = SlideReader.region

    def noted(self: SlideReader, x: int, y: int, *, width_px: int, height_px: int) -> np.ndarray:
        read.append(width_px * height_px)
        return region(self, x, y, width_px=width_px, height_px=height_px)

    monkeypatch.setattr(SlideReader, "region", noted)
    monkeypatch.setattr(hest, "BLOCK_PX", 128)
    in_blocks = hest.load(folder, organ="bowel", slides=["TENX149", "TENX111"])
    assert len(read) > 8
    assert max(read) == (128 + 60) ** 2
    assert (in_blocks.images == whole.images).mean() > 0.999  # resampling differs in the last digit


def test_cells_of_a_block_that_cannot_be_read_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    region = SlideReader.region

    def broken(self: SlideReader, x: int, y: int, *, width_px: int, height_px: int) -> np.ndarray:
        if "TENX139" in self.path:
            raise RegionError("bad tile")
        return region(self, x, y, width_px=width_px, height_px=height_px)

    monkeypatch.setattr(SlideReader, "region", broken)
    task = hest.load(folder, organ="bowel")
    assert count(task, "cells of TENX139") == 0
    assert len(task.images) == len(task.target) == len(task.sample_ids) == 4 * 25


@pytest.mark.parametrize("ids", ["text", "integer", "bytes"])
def test_ids_of_every_kind_find_their_cell(tmp_path: Path, ids: str) -> None:
    write_slide(tmp_path, "S", ids=ids)
    names, centre = read_centroids(tmp_path / "xenium_seg" / "S_xenium_cell_seg.parquet")
    assert names.tolist() == sorted(str(ID_KINDS["text" if ids == "bytes" else ids](at)) for at in range(49))
    expression = count_transcripts(tmp_path / "transcripts" / "S_transcripts.parquet", names)
    assert expression.genes.tolist() == sorted(GENES)
    assert expression.counts.sum() == sum(expected_count(at, gene) for at in range(49) for gene in range(6))
    assert np.allclose(sorted(centre[:, 0])[::7], np.unique(centres_um()[:, 0]) / 0.2125, atol=1e-3)


def test_an_index_without_a_name_and_a_geometry_of_another_name_are_read(tmp_path: Path) -> None:
    path = tmp_path / "seg.parquet"
    shapes = shapely.to_wkb(shapely.buffer(shapely.points([[10.0, 20.0], [30.0, 40.0]]), 3))
    table = pa.Table.from_pandas(pd.DataFrame({"combined": shapes}, index=["b", "a"]))
    assert "__index_level_0__" in table.column_names
    geo = json.dumps({"primary_column": "combined"}).encode()
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"geo": geo}), path)
    names, centre = read_centroids(path)
    assert names.tolist() == ["a", "b"]
    assert np.allclose(centre, [[30, 40], [10, 20]])


@pytest.mark.parametrize(
    "name", [*CONTROLS, "DeprecatedCodeword_0334", "Intergenic_Region_12", "GenomicControl_00001", "Blank-1"]
)
def test_controls_are_no_genes(name: str) -> None:
    assert is_control(name)


@pytest.mark.parametrize("name", ["EPCAM", "NEGR1", "UNC5B", "DEPDC1", "BLNK", "INTS1", "GENE_NEG"])
def test_genes_are_no_controls(name: str) -> None:
    assert not is_control(name)


def test_files_that_are_absent_or_of_another_form_are_one_line(tmp_path: Path) -> None:
    slide_id = "TENX94"
    for name in (slide_id, "TENX95"):
        write_slide(tmp_path, name)

    def fails(line: str) -> None:
        with pytest.raises(TaskError, match=line) as error:
            hest.load(tmp_path, organ="breast", slides=[slide_id, "TENX95"])
        assert "\n" not in str(error.value)

    path = tmp_path / "transcripts" / f"{slide_id}_transcripts.parquet"
    table = pq.read_table(path)
    pq.write_table(table.rename_columns({"qv": "quality"}), path)
    fails(r"transcripts\.parquet: no column 'qv'; it has transcript_id, cell_id, .*; expected a Xenium table")
    pq.write_table(table.set_column(1, "cell_id", pa.array(["zzz-1"] * len(table))), path)
    fails(r"no transcript counts: its cells are like 'zzz-1', those of the segmentation 'aaaa0000-1'")
    path.write_bytes(b"no parquet")
    fails(r"transcripts\.parquet: cannot be read .*; expected a Parquet file")
    segmentation = tmp_path / "xenium_seg" / f"{slide_id}_xenium_cell_seg.parquet"
    pq.write_table(pa.table({"geometry": [b""]}), segmentation)
    fails(r"cell_seg\.parquet: it has geometry; expected polygons in 'geometry' and cell ids in the index")
    (tmp_path / "wsis" / f"{slide_id}.tif").write_bytes(b"no slide")
    fails(r"TENX94\.tif: not a slide .*; expected the tiled TIFF of HEST-1k")
    (tmp_path / "metadata" / f"{slide_id}.json").write_text("{}")
    fails(r"TENX94\.json: pixel_size_um_estimated=None; expected um/px")


def test_absent_files_and_a_single_donor_are_told_before_anything_is_read(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hest, "take_cells", None)
    with pytest.raises(TaskError, match=r"^hest-bowel: TENX147, TENX148 are of one donor; expected two or more"):
        hest.load(folder, organ="bowel", slides=["TENX147", "TENX148"])
    with pytest.raises(TaskError, match=r"NCBI783\.tif: no such file; expected the files of NCBI783, .*HEST-1k"):
        hest.load(tmp_path, organ="breast")
    with pytest.raises(TaskError, match=r"^target: got 'cpm'; expected log1p or counts"):
        hest.load(folder, organ="bowel", target="cpm")  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"^centre: got 'membrane'; expected cell or nucleus"):
        hest.load(folder, organ="bowel", centre="membrane")  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"TENX149_xenium_nucleus_seg\.parquet: no such file"):
        hest.load(folder, organ="bowel", centre="nucleus")
