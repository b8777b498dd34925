"""AMi-Br, CoNSeP and the NuCLS excerpt: made-up folders of their layout, and the real sets where they are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from lemon.probe.folds import check_folds
from lemon.probe.task import Task, TaskError
from lemon.probe.tasks import amibr, consep, nucls15
from tests.conftest import shared
from tests.probe.tasks.discs import assert_centred, field


def counts(task: Task) -> dict[str, int]:
    return {count.what: count.n for count in task.counts}


# --- AMi-Br ----------------------------------------------------------------------------------------------------------


def write_amibr(folder: Path) -> Path:
    """Two collections that name their slides alike; every tenth crop is black where it lies over the edge."""
    (folder / "crops64").mkdir(parents=True)
    head = "slide,dataset,uid,x,y,expert1_label,expert2_label,expert1_atypical,expert2_atypical,expert3_atypical"
    lines = [f"{head},majority_atypical,file"]
    crop = field(64, 64, [[31.5, 31.5]], mpp=0.25)
    cut = crop.copy()
    cut[:, -20:] = 0
    for dataset in ("MIDOG21", "TUPAC16"):
        for at in range(60):
            name = f"{dataset}_{at}.webp"
            atypical = at % 3 == 0
            expert = "NMF anaphase-telophase,AMF segregation,True,False"
            lines.append(f"{at // 10:03d}.tiff,{dataset},{at},16,900,{expert},{atypical},{atypical},{name}")
            Image.fromarray(cut if at % 10 == 9 else crop).save(folder / "crops64" / name, lossless=True)
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_amibr_has_the_majoritys_label_and_drops_crops_cut_at_an_edge(tmp_path: Path) -> None:
    task = amibr.load(write_amibr(tmp_path))
    assert counts(task)["crops"] - counts(task)["not cut at a slide's edge"] == 12
    assert (task.target == "atypical").sum() == 36
    assert len(set(task.groups["slide"])) == 12  # a slide of one name in two collections is two
    assert set(task.groups["source"]) == {"MIDOG21", "TUPAC16"}
    assert set(task.groups["scanner"]) == {"Hamamatsu XR", "MIDOG21", "TUPAC16"}  # of 001.tiff on; of 000.tiff unknown
    assert [protocol.name for protocol in task.protocols] == ["paper", "leak-free"]
    assert check_folds(task) == ()
    assert_centred(task.images[::9])


@pytest.mark.slow
def test_the_real_amibr_has_its_counts() -> None:
    task = amibr.load(shared("data/amibr"))
    assert counts(task)["crops"] == 3_206
    assert counts(task)["not cut at a slide's edge"] == len(task.images) == 3_178
    assert (counts(task)["class normal"], counts(task)["class atypical"]) == (2_468, 710)
    assert len(set(task.groups["slide"])) == 162
    assert set(task.groups["scanner"]) == {*amibr.SCANNERS, "TUPAC16"}
    assert check_folds(task) == ()
    # The figure is the darkest thing in a crop, and in its middle.
    mean = task.images.mean(axis=(0, 3))
    assert mean[25:35, 25:35].mean() < 0.75 * mean[:8].mean()


# --- CoNSeP ----------------------------------------------------------------------------------------------------------

PLACES = [(80 + 80 * column, 80 + 80 * row) for row in range(4) for column in range(4)]


def consep_maps(*, n_types: int) -> tuple[np.ndarray, np.ndarray]:
    """Instance and type map of 400 px: discs of every type, instances numbered with gaps, one at the border."""
    y, x = np.mgrid[:400, :400]
    inst, types = np.zeros((2, 400, 400), np.int32)
    for at, (cx, cy) in enumerate([*PLACES, (5, 200)]):
        inside = (x - cx) ** 2 + (y - cy) ** 2 <= 12**2
        inst[inside], types[inside] = 3 * at + 2, 1 + at % n_types
    return inst, types


def write_consep(folder: Path, *, downloaded: bool) -> Path:
    n_types = 7 if downloaded else 4
    inst, types = consep_maps(n_types=n_types)
    image = Image.fromarray(field(400, 400, PLACES, mpp=0.25))
    for number in range(1, 9):
        if downloaded:
            side = folder / ("Train" if number < 6 else "Test")
            for name in ("Labels", "Images"):
                (side / name).mkdir(parents=True, exist_ok=True)
            stem = f"{side.name.lower()}_{number}"
            savemat(side / "Labels" / f"{stem}.mat", {"inst_map": inst.astype(float), "type_map": types.astype(float)})
            image.save(side / "Images" / f"{stem}.png")
        else:
            folder.mkdir(exist_ok=True)
            np.savez(
                folder / f"train_{number}_inst.npz", inst_map=inst.astype(np.uint16), type_map=types.astype(np.uint8)
            )
            image.save(folder / f"train_{number}.png")
    return folder


@pytest.mark.parametrize("downloaded", [False, True])
def test_consep_reads_both_layouts_and_centres_on_the_instance(tmp_path: Path, downloaded: bool) -> None:
    task = consep.load(write_consep(tmp_path / "consep", downloaded=downloaded))
    assert task.target_names == consep.CLASSES
    assert counts(task)["nuclei"] == 8 * 17
    assert counts(task)["whole crop inside the image"] == 8 * 16
    assert_centred(task.images[::5])
    assert [protocol.name for protocol in task.protocols] == ["leak-free"]
    assert check_folds(task) == ()
    assert task.place_um is not None
    found = {tuple(place) for place in task.place_um[task.groups["slide"] == task.groups["slide"][0]].tolist()}
    assert found == {((x + 0.5) * 0.25, (y + 0.5) * 0.25) for x, y in PLACES}
    # 16 nuclei an image: 4 of each of four types, or types 1 to 7, 1 and 2 once more: 3, 4 and 5, 6, 7 are one class.
    of_class = [counts(task)[f"class {name}"] // 8 for name in consep.CLASSES]
    assert of_class == ([3, 3, 4, 6] if downloaded else [4, 4, 4, 4])


def test_consep_files_that_are_not_as_expected_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"neither \*_inst\.npz nor \*/Labels/\*\.mat; expected CoNSeP"):
        consep.load(tmp_path)
    folder = write_consep(tmp_path / "consep", downloaded=False)
    inst, types = consep_maps(n_types=4)
    np.savez(folder / "train_1_inst.npz", inst_map=inst, type_map=types + 4)
    with pytest.raises(TaskError, match=r"train_1_inst\.npz: unknown class 8 in type_map; expected 0 to 4"):
        consep.load(folder)
    np.savez(folder / "train_1_inst.npz", inst_map=inst)
    with pytest.raises(TaskError, match=r"train_1_inst\.npz: no type_map; it has inst_map"):
        consep.load(folder)
    (folder / "train_1.png").unlink()
    with pytest.raises(TaskError, match=r"train_1_inst\.npz: no image .*train_1\.png or \.jpg"):
        consep.load(folder)


@pytest.mark.slow
def test_the_real_consep_has_its_counts() -> None:
    task = consep.load(shared("data/masks/consep_train"))
    assert counts(task)["nuclei"] == counts(task)["nuclei with a type"] == 15_555
    assert len(task.images) == 13_679
    assert (task.target == "miscellaneous").sum() == 350
    assert check_folds(task) == ()


# --- NuCLS excerpt ---------------------------------------------------------------------------------------------------


def write_nucls15(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    places = [(60 + 70 * column, 60 + 70 * row) for row in range(3) for column in range(3)]
    kinds = ("sTIL", "nonTIL_stromal", "tumor_any", "other_nucleus")
    lines = ["split,image,x,y,label"]
    for number in range(1, 13):
        name = f"train_{number}"
        lines += [f"train,{name},{x},{y},{kinds[(at + number) % 4]}" for at, (x, y) in enumerate(places)]
        lines.append(f"train,{name},286,257,sTIL")
        Image.fromarray(field(288, 260, places, mpp=0.2)).save(folder / f"{name}.png")
    (folder / "nuclei.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_the_excerpt_is_resampled_and_other_nuclei_are_dropped(tmp_path: Path) -> None:
    task = nucls15.load(write_nucls15(tmp_path))
    assert counts(task)["nuclei"] == 120
    assert counts(task)["of a super class"] == 120 - 27
    assert counts(task)["whole crop inside the tile"] == 120 - 27 - 12
    assert task.place_um is not None
    assert {*np.round(task.place_um / 0.2 - 0.5).ravel().tolist()} == {60, 130, 200}  # px of the tile
    assert set(task.target) == set(nucls15.CLASSES)
    assert_centred(task.images[::5])
    assert check_folds(task) == ()


def test_an_excerpt_with_another_class_or_no_number_is_one_line(tmp_path: Path) -> None:
    path = write_nucls15(tmp_path) / "nuclei.csv"
    text = path.read_text()
    path.write_text(text.replace("tumor_any", "tumour_any", 1))
    with pytest.raises(
        TaskError, match=r"nuclei\.csv: unknown class 'tumour_any'; expected one of .* rename tumor_any\?"
    ):
        nucls15.load(tmp_path)
    path.write_text(text.replace(",60,60,", ",,60,", 1))
    with pytest.raises(TaskError, match=r"nuclei\.csv, line 2, column x: got nothing; expected a number"):
        nucls15.load(tmp_path)


def test_the_real_excerpt_has_its_counts() -> None:
    task = nucls15.load(shared("data/nucls15"))
    assert (counts(task)["tiles"], counts(task)["nuclei"], counts(task)["of a super class"]) == (15, 584, 507)
    assert len(task.images) == 275
    assert check_folds(task) == ()
