from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from lemon.probe.folds import check_folds
from lemon.probe.task import Task, TaskError
from lemon.probe.tasks import midog
from lemon.probe.tasks.crops import corners, is_whole
from tests.conftest import shared
from tests.probe.tasks.discs import assert_centred, field

SIDE = 600
POINTS = [(100 + 100 * column, 100 + 100 * row) for row in range(4) for column in range(5)]
SCANNERS = ("Hamammatsu XR", "Hamamatsu XR", "Aperio CS2")


def count(task: Task, what: str) -> int:
    return next(count.n for count in task.counts if count.what == what)


# --- MIDOG++ ---------------------------------------------------------------------------------------------------------


def write_midogpp(folder: Path, *, mpp: dict[int, float | None] | None = None) -> Path:
    """Six slides of 600 px with 20 figures each, two more boxes over the edge, and an image without boxes."""
    (folder / "databases").mkdir(parents=True)
    (folder / "images").mkdir()
    images, boxes, slides = [], [], ["Slide;Dataset;Tumor;Scanner;Origin;Species"]
    for number in range(1, 8):
        name = f"{number:03d}.tiff"
        images.append(
            {
                "license": 1,
                "file_name": name,
                "id": number,
                "width": SIDE,
                "height": SIDE,
                "tumor_type": "human melanoma",
            }
        )
        if number == 7:
            continue  # 50 of the real images have no box, no row, and need no file
        slides.append(f"{number};train;human melanoma;{SCANNERS[number % 3]};UMC Utrecht;Human")
        write_tiff(folder / "images" / name, (mpp or {}).get(number))
        for at, (x, y) in enumerate([*POINTS, (10, 300), (595, 20)]):
            box = [x - 25, y - 25, x + 25, y + 25]  # x1, y1, x2, y2: negative over the edge
            boxes.append({"bbox": box, "category_id": 1 + at % 2, "image_id": number, "labels": [1], "id": len(boxes)})
    boxes.reverse()  # nothing says that boxes of an image are neighbours
    categories = [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "not mitotic figure"}]
    found: dict[str, Any] = {
        "info": {},
        "licenses": [],
        "images": images,
        "categories": categories,
        "annotations": boxes,
    }
    (folder / midog.BOXES).write_text(json.dumps(found))
    (folder / midog.SLIDES).write_text("\n".join(slides) + "\n")
    return folder


def write_tiff(path: Path, mpp: float | None) -> None:
    image = field(SIDE, SIDE, POINTS, mpp=mpp or 0.25)
    if mpp is None:  # as an editor writes it: 72 dots an inch
        tifffile.imwrite(path, image, photometric="rgb", resolution=(72, 72), resolutionunit="INCH")
    else:
        tifffile.imwrite(path, image, photometric="rgb", resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit="CENTIMETER")


@pytest.fixture(scope="module")
def mitosis(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return midog.load_mitosis(write_midogpp(tmp_path_factory.mktemp("midog") / "midogpp"))


def test_boxes_become_centred_crops_and_those_over_the_edge_are_counted(mitosis: Task) -> None:
    assert (count(mitosis, "images"), count(mitosis, "images with boxes")) == (7, 6)
    assert (count(mitosis, "boxes"), count(mitosis, "whole crop inside the image")) == (132, 120)
    assert_centred(mitosis.images[::5])


def test_category_one_is_a_mitotic_figure(mitosis: Task) -> None:
    assert mitosis.target_names == ("mitotic figure", "not mitotic figure")
    at = dict(zip(mitosis.sample_ids.tolist(), mitosis.target.tolist(), strict=True))
    assert at["box_0"] == "mitotic figure"
    assert at["box_1"] == "not mitotic figure"


def test_a_scanner_that_is_spelled_in_two_ways_is_one(mitosis: Task) -> None:
    assert set(mitosis.groups["scanner"]) == {"Hamamatsu XR", "Aperio CS2"}
    assert mitosis.batch == "scanner"


def test_folds_by_slide_are_the_one_protocol(mitosis: Task) -> None:
    assert [protocol.name for protocol in mitosis.protocols] == ["leak-free"]
    assert check_folds(mitosis) == ()


def test_the_resolution_is_that_of_the_tags_where_a_microscope_can_have_it(tmp_path: Path) -> None:
    # 0.2 um/px: six of the twenty figures would lie elsewhere at another scale.
    task = midog.load_mitosis(write_midogpp(tmp_path, mpp={1: 0.2, 2: 0.25}))
    assert count(task, "images whose file states its resolution") == 2
    assert_centred(task.images[np.isin(task.groups["slide"], ["001.tiff", "003.tiff"])])


def test_an_image_of_another_size_than_the_table_has_is_one_line(tmp_path: Path) -> None:
    folder = write_midogpp(tmp_path)
    Image.fromarray(np.zeros((SIDE, 500, 3), np.uint8)).save(folder / "images" / "004.tiff")
    with pytest.raises(TaskError, match=r"004\.tiff: 500x600 px; expected 600x600 as databases/MIDOG\+\+\.json has it"):
        midog.load_mitosis(folder)


def test_a_box_of_an_image_that_no_row_describes_is_one_line(tmp_path: Path) -> None:
    folder = write_midogpp(tmp_path)
    path = folder / midog.SLIDES
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(TaskError, match=r"datasets_xvalidation\.csv: no row of 006\.tiff; expected"):
        midog.load_mitosis(folder)


def test_another_category_or_form_of_the_json_is_one_line(tmp_path: Path) -> None:
    path = write_midogpp(tmp_path) / midog.BOXES
    found = json.loads(path.read_text())
    found["annotations"][5]["category_id"] = 3
    path.write_text(json.dumps(found))
    with pytest.raises(TaskError, match=r"unknown class '3'; expected one of 1, 2"):
        midog.load_mitosis(tmp_path)
    path.write_text(json.dumps({"images": []}))
    with pytest.raises(TaskError, match=r"MIDOG\+\+\.json: no .*; expected images and annotations"):
        midog.load_mitosis(tmp_path)
    path.write_text("{")
    with pytest.raises(TaskError, match=r"MIDOG\+\+\.json: no JSON"):
        midog.load_mitosis(tmp_path)
    path.unlink()
    with pytest.raises(TaskError, match=r"MIDOG\+\+\.json: no such file; expected the boxes of MIDOG\+\+"):
        midog.load_mitosis(tmp_path)


def test_the_real_boxes_have_the_published_counts() -> None:
    images, boxes = midog.read_boxes(shared("data/tables/MIDOG++.json.gz"))
    assert (len(images), len(boxes), boxes["image_id"].nunique()) == (553, 26_286, 503)
    assert boxes["label"].value_counts().to_dict() == midog.MITOSIS_CLASSES
    path = shared("data/tables/MIDOG++.json.gz")
    corner = [box["bbox"] for box in json.loads(gzip.decompress(path.read_bytes()))["annotations"]]
    assert sum(min(box) < 0 for box in corner) == 169


def test_the_border_policy_drops_the_real_boxes_within_thirty_px_of_a_border() -> None:
    images, boxes = midog.read_boxes(shared("data/tables/MIDOG++.json.gz"))
    sized = boxes.merge(images, on="image_id")
    x, y, wide, high = (sized[name].to_numpy(float) for name in ("x", "y", "width", "height"))
    border_px = np.minimum.reduce([x, y, wide - x, high - y])
    assert (border_px < 30).sum() == 337
    corner = corners(np.stack([x, y], axis=1), mpp=0.25)
    dropped = np.zeros(len(sized), bool)
    for size, indices in sized.groupby(["width", "height"]).indices.items():
        dropped[indices] = ~is_whole(corner[indices], width_px=size[0], height_px=size[1])
    assert dropped[border_px < 29].all()
    assert not dropped[border_px > 30].any()


def test_the_real_slides_have_a_row_for_each_image_with_boxes() -> None:
    slides = midog.read_slides(shared("data/tables/MIDOGpp_datasets_xvalidation.csv"))
    _, boxes = midog.read_boxes(shared("data/tables/MIDOG++.json.gz"))
    assert set(slides["image_id"]) == set(boxes["image_id"])
    assert slides["scanner"].nunique() == 4  # five spellings


# --- MIDOG 2025 ------------------------------------------------------------------------------------------------------


def write_midog25(folder: Path) -> Path:
    """Eight slides with 15 patches, three of each atypical, one cut at an edge."""
    (folder / midog.ATYPICAL_IMAGES).mkdir(parents=True)
    lines = ["image_id,filename,coordinateX,coordinateY,Tumor,Tissue,Species,expert1,expert2,expert3,majority"]
    patch = field(128, 128, [[63.5, 63.5]], mpp=0.25)
    cut = patch.copy()
    cut[:50] = 0
    for slide in range(1, 9):
        for at in range(15):
            label = "AMF" if at % 5 == 0 else "NMF"
            name = f"{slide}_{at}.png"
            lines.append(f"{name},{slide:03d}.tiff,{at},{at},canine lymphoma,lymph node,canine,{label},NMF,AMF,{label}")
            Image.fromarray(cut if at == 14 else patch).save(folder / midog.ATYPICAL_IMAGES / name)
    (folder / midog.ATYPICAL_TABLE).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def midog25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_midog25(tmp_path_factory.mktemp("midog25") / "midog25")


def test_patches_have_the_majoritys_label_and_the_papers_counts_beside(midog25: Path) -> None:
    task = midog.load_atypical(midog25)
    assert task.name == "midog25-atypical"
    assert task.target_names == ("normal", "atypical")
    assert count(task, "patches") - count(task, "of 60 px, not cut at an edge") == 8
    assert {count.what: count.paper for count in task.counts}["class atypical"] == 1_748
    assert (task.target == "atypical").sum() == 24
    assert_centred(task.images[::9])


def test_the_paper_splits_patches_and_the_leak_free_protocol_slides(midog25: Path) -> None:
    paper, leak_free = midog.load_atypical(midog25).protocols
    assert (paper.name, leak_free.name) == ("paper", "leak-free")
    assert paper.inner_groups is None
    assert leak_free.inner_groups is not None
    slides = leak_free.inner_groups
    assert any(len(np.intersect1d(slides[fold.train], slides[fold.test])) for fold in paper.folds)
    assert not any(len(np.intersect1d(slides[fold.train], slides[fold.test])) for fold in leak_free.folds)
    assert len(paper.folds) == len(leak_free.folds) == 5


def test_a_seed_changes_the_folds_and_nothing_else(midog25: Path) -> None:
    one, same, other = (midog.load_atypical(midog25, seed=seed) for seed in (1, 1, 2))
    assert (one.protocols[0].folds[0].test == same.protocols[0].folds[0].test).all()
    assert not np.array_equal(one.protocols[0].folds[0].test, other.protocols[0].folds[0].test)
    assert (one.images == other.images).all()


def test_a_wrong_label_or_an_absent_column_or_patch_is_one_line(midog25: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(midog25, tmp_path / "midog25")
    path = folder / midog.ATYPICAL_TABLE
    text = path.read_text()
    path.write_text(text.replace("AMF,NMF,AMF,AMF\n", "AMF,NMF,AMF,AMV\n", 1))
    with pytest.raises(TaskError, match=r"unknown class 'AMV'; expected one of AMF, NMF; did the set rename"):
        midog.load_atypical(folder)
    path.write_text(text.replace(",majority\n", ",vote\n"))
    with pytest.raises(
        TaskError, match=r"Train_Set\.csv: no column 'majority'; it has image_id, .*; expected image_id"
    ):
        midog.load_atypical(folder)
    path.write_text(text)
    (folder / midog.ATYPICAL_IMAGES / "3_3.png").unlink()
    with pytest.raises(TaskError, match=r"3_3\.png: no such image"):
        midog.load_atypical(folder)
