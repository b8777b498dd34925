from __future__ import annotations

from pathlib import Path

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
