from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from lemon.probe.folds import check_folds
from lemon.probe.task import TaskError
from lemon.probe.tasks.catalogue import open_task
from tests.probe.tasks.discs import assert_centred, field


def write_crops(
    data: Path, *, columns: str = "", values: tuple[str, ...] = ("",), side: int = 64, mpp: float = 0.25
) -> Path:
    """Sixty crops of two classes and six slides in ``data/mine``; ``columns`` and ``values`` come behind the slide."""
    folder = data / "mine"
    (folder / "crops").mkdir(parents=True)
    middle = (side - 1) / 2
    image = Image.fromarray(field(side, side, [[middle, middle]], mpp=mpp))
    lines = [f"image,label,slide{columns}"]
    for at in range(60):
        image.save(folder / "crops" / f"{at}.png")
        lines.append(f"crops/{at}.png,{'ab'[at % 2]},s{at // 10}{values[at // 10 % len(values)]}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_folder_of_labelled_crops_is_a_task_with_folds_by_slide(tmp_path: Path) -> None:
    write_crops(tmp_path)
    task = open_task("folder:mine", tmp_path)
    assert (task.name, task.target_names, len(task.images)) == ("folder:mine", ("a", "b"), 60)
    assert (task.cluster, task.batch) == ("slide", None)
    assert_centred(task.images[:3])
    assert check_folds(task) == ()


def test_folds_are_by_patient_where_it_is_known_and_hospitals_are_batches(tmp_path: Path) -> None:
    write_crops(tmp_path, columns=",patient,hospital", values=(",p1,h1", ",p1,h2", ",p2,h1", ",p3,h2"))
    task = open_task("folder:mine", tmp_path)
    (protocol,) = task.protocols
    assert protocol.inner_groups is not None
    assert protocol.inner_groups.tolist() == task.groups["patient"].tolist()
    assert len(protocol.folds) == 3
    assert (task.cluster, task.batch) == ("patient", "hospital")


@pytest.mark.parametrize(("mpp", "side"), [(0.5, 40), (0.125, 140)])
def test_crops_of_another_resolution_are_resampled(tmp_path: Path, mpp: float, side: int) -> None:
    write_crops(tmp_path, columns=",mpp", values=(f",{mpp}",), side=side, mpp=mpp)
    assert_centred(open_task("folder:mine", tmp_path).images[:3])


def test_small_crops_are_set_on_white_and_counted(tmp_path: Path) -> None:
    write_crops(tmp_path, side=40)
    task = open_task("folder:mine", tmp_path)
    assert (task.images[0, :10] == 255).all()
    assert not (task.images[0, 10:50, 10:50] == 255).all(axis=2).any()
    assert_centred(task.images[:1])
    assert "60 crops are smaller than 60 px and set on white" in task.notes


def test_crops_smaller_than_the_view_are_one_line(tmp_path: Path) -> None:
    write_crops(tmp_path, side=32)
    with pytest.raises(
        TaskError, match=r"0\.png: 32x32 px of 0\.25 um/px are 32 px at 0\.25 um/px; expected 40 px or more"
    ):
        open_task("folder:mine", tmp_path)


def test_unlabelled_rows_are_left_out_and_a_small_class_too(tmp_path: Path) -> None:
    folder = write_crops(tmp_path)
    path = folder / "labels.csv"
    text = path.read_text().replace("crops/0.png,a,", "crops/0.png,,").replace("crops/2.png,a,", "crops/2.png,rare,")
    path.write_text(text)
    task = open_task("folder:mine", tmp_path)
    assert task.target_names == ("a", "b")
    assert "rare is left out: 1 crops of 1 groups; expected 20 of two or more" in task.notes
    assert {count.what: count.n for count in task.counts}["with a label"] == 59


def test_what_cannot_be_scored_is_one_line(tmp_path: Path) -> None:
    folder = write_crops(tmp_path)
    path = folder / "labels.csv"
    text = path.read_text()
    for changed, line in {
        text.replace("slide\n", "wsi\n"): r"labels\.csv: no column 'slide'; it has image, label, wsi; expected image,",
        text.replace(",b,", ",a,"): r"^folder:mine: only the class a is left of 60 crops; expected two or more",
        text.replace("crops/1.png", "crops/0.png"): r"^folder:mine: 'crops/0\.png' names several crops",
        "": r"labels\.csv: empty; expected a CSV or Parquet file with image, label, slide",
    }.items():
        path.write_text(changed)
        with pytest.raises(TaskError, match=line) as error:
            open_task("folder:mine", tmp_path)
        assert "\n" not in str(error.value)


def test_one_slide_cannot_be_split(tmp_path: Path) -> None:
    folder = write_crops(tmp_path)
    path = folder / "labels.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(line.rsplit(",", 1)[0] + ",s0" for line in lines[1:])]))
    with pytest.raises(TaskError, match=r"no class is left of 60 crops; .*a is left out: 30 crops of 1 groups"):
        open_task("folder:mine", tmp_path)


def test_images_keep_the_order_of_the_table(tmp_path: Path) -> None:
    folder = write_crops(tmp_path)
    for at in range(60):
        Image.fromarray(np.full((60, 60, 3), at + 10, np.uint8)).save(folder / "crops" / f"{at}.png")
    task = open_task("folder:mine", tmp_path)
    assert task.images[:, 0, 0, 0].tolist() == list(range(10, 70))
    assert task.sample_ids[3] == "crops/3.png"


def test_a_table_of_any_separator_encoding_and_line_end_is_the_same_task(tmp_path: Path) -> None:
    path = write_crops(tmp_path, columns=",patient,mpp", values=(",001,0.25", ",1e5,0.25", ",x,0.25")) / "labels.csv"
    text = path.read_text()
    groups = open_task("folder:mine", tmp_path).groups["patient"].tolist()
    for content in (
        text.replace("\n", "\r").encode(),
        text.replace(",", ";").replace("0.25", "0,25").encode("utf-16"),
        text.replace(",", "\t").replace("label", "Label ").encode("utf-8-sig"),
    ):
        path.write_bytes(content)
        assert open_task("folder:mine", tmp_path).groups["patient"].tolist() == groups


def test_two_spellings_of_a_slide_are_on_one_side(tmp_path: Path) -> None:
    path = write_crops(tmp_path) / "labels.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line + " " * (at % 2) for at, line in enumerate(lines)))
    task = open_task("folder:mine", tmp_path)
    assert len(np.unique(task.groups["slide"])) == 6
    for fold in task.protocols[0].folds:
        assert not set(task.groups["slide"][fold.train]) & set(task.groups["slide"][fold.test])


def test_slides_that_look_alike_are_a_note(tmp_path: Path) -> None:
    path = write_crops(tmp_path) / "labels.csv"
    path.write_text(path.read_text().replace(",s1", ",S0"))
    assert any("'S0' and 's0' look alike" in note for note in open_task("folder:mine", tmp_path).notes)


def test_a_crop_without_a_patient_takes_its_slides_or_is_of_its_slide(tmp_path: Path) -> None:
    path = write_crops(tmp_path) / "labels.csv"
    lines = path.read_text().splitlines()
    patients = ["p0", "NA", "p1", "", "p2", "None"]  # by slide
    rows = [
        f"{line},{patients[at // 10] if at % 10 else patients[0] if at == 0 else ''}"
        for at, line in enumerate(lines[1:])
    ]
    path.write_text("\n".join([f"{lines[0]},patient", *rows]))
    task = open_task("folder:mine", tmp_path)
    assert task.groups["patient"][::10].tolist() == ["p0", "slide s1", "p1", "slide s3", "p2", "slide s5"]
    assert [len(set(task.groups["patient"][at : at + 10])) for at in range(0, 60, 10)] == [1] * 6
    assert any(note.startswith("32 crops have no patient") for note in task.notes)


def test_a_slide_of_two_patients_with_crops_of_none_is_one_line(tmp_path: Path) -> None:
    path = write_crops(tmp_path, columns=",patient", values=(",p",)) / "labels.csv"
    text = (
        path.read_text()
        .replace("crops/1.png,b,s0,p", "crops/1.png,b,s0,q")
        .replace("crops/2.png,a,s0,p", "crops/2.png,a,s0,")
    )
    path.write_text(text)
    with pytest.raises(TaskError, match=r"labels\.csv: s0 has crops of p, q and crops without a patient; expected"):
        open_task("folder:mine", tmp_path)


def test_a_hospital_that_some_crops_lack_is_no_batch(tmp_path: Path) -> None:
    write_crops(tmp_path, columns=",hospital,scanner", values=(",h1,x", ",h2,y", ",NA,x"))
    task = open_task("folder:mine", tmp_path)
    assert task.batch == "scanner"
    assert "hospital is no batch: 20 crops have none" in task.notes


@pytest.mark.parametrize("mpp", ["25", "inf", "nan", "0.01", "", "0.25um"])
def test_a_resolution_that_no_microscope_has_is_one_line(tmp_path: Path, mpp: str) -> None:
    write_crops(tmp_path, columns=",mpp", values=(",0.25", f",{mpp}"))
    with pytest.raises(TaskError, match=r"labels\.csv, line 12, column mpp: got .*; expected 0\.05 to 20 um/px"):
        open_task("folder:mine", tmp_path)


def test_classes_of_plus_and_minus_are_classes(tmp_path: Path) -> None:
    path = write_crops(tmp_path) / "labels.csv"
    path.write_text(path.read_text().replace(",a,", ",+,").replace(",b,", ",-,"))
    assert open_task("folder:mine", tmp_path).target_names == ("+", "-")


def test_crops_of_16_bit_are_those_of_8_bit_and_of_12_bit_are_refused(tmp_path: Path) -> None:
    folder = write_crops(tmp_path)
    expected = open_task("folder:mine", tmp_path).images
    for at in range(60):
        crop = cv2.imread(str(folder / "crops" / f"{at}.png")).astype(np.uint16)
        cv2.imwrite(str(folder / "crops" / f"{at}.png"), crop * 257)
    np.testing.assert_array_equal(open_task("folder:mine", tmp_path).images, expected)
    cv2.imwrite(str(folder / "crops" / "7.png"), crop * 16)
    with pytest.raises(TaskError, match=r"7\.png: 16-bit with values of .* so what is white cannot be told"):
        open_task("folder:mine", tmp_path)


def test_grey_crops_are_counted(tmp_path: Path) -> None:
    folder = write_crops(tmp_path)
    Image.open(folder / "crops" / "0.png").convert("L").save(folder / "crops" / "0.png")
    assert "1 images are grey: their stain's colours are lost" in open_task("folder:mine", tmp_path).notes
