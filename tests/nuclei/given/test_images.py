"""Label images of every kind that programs write give the same nuclei, also piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from scipy import io

from lemon.nuclei.given import images
from lemon.nuclei.given.nuclei import GivenError
from lemon.nuclei.given.read import read_given
from lemon.slides.reader import SlideReader
from tests.nuclei.given.made_up import COUNT, SIDE, agrees, label_image

LABELS = label_image()


def write_npy(path: Path) -> Path:
    np.save(path / "s.npy", LABELS.astype(np.uint16))
    return path / "s.npy"


def write_npz(path: Path) -> Path:
    np.savez_compressed(path / "s.npz", inst_map=LABELS, more=np.zeros(3))
    return path / "s.npz"


def write_tiff(path: Path) -> Path:
    tifffile.imwrite(path / "s.tif", LABELS, compression="zlib", tile=(256, 256))
    return path / "s.tif"


def write_ome_tiff(path: Path) -> Path:
    axes = {"axes": "ZCYX"}
    tifffile.imwrite(path / "s.ome.tif", LABELS[None, None].astype(np.uint32), metadata=axes)
    return path / "s.ome.tif"


def write_zarr(path: Path) -> Path:
    zarr.save(str(path / "s.zarr"), LABELS)
    return path / "s.zarr"


def write_ome_zarr(path: Path) -> Path:
    group = zarr.open_group(str(path / "s.zarr"), mode="w")
    group.create_array("0", data=LABELS[None, None, None])
    return path / "s.zarr"


def write_hovernet(path: Path) -> Path:
    types = np.arange(COUNT) % 3
    mat = {"inst_map": LABELS, "inst_uid": np.arange(1, COUNT + 1)[:, None], "inst_type": types[:, None]}
    io.savemat(path / "s.mat", mat | {"inst_centroid": np.zeros((COUNT, 2))})
    return path / "s.mat"


WRITERS = (write_npy, write_npz, write_tiff, write_ome_tiff, write_zarr, write_ome_zarr, write_hovernet)


@pytest.mark.parametrize("write", WRITERS)
def test_a_label_image_gives_the_nuclei_with_its_numbers_as_ids(
    tmp_path: Path, reader: SlideReader, write: Any
) -> None:
    nuclei = read_given(write(tmp_path), reader)
    order = np.argsort([int(each) for each in nuclei.ids.to_pylist()])
    assert [nuclei.ids[int(index)].as_py() for index in order] == [str(index + 1) for index in range(COUNT)]
    assert agrees(nuclei, among=[int(each) - 1 for each in nuclei.ids.to_pylist()])
    assert (nuclei.unit, nuclei.centred) == ("px of level 0", True)


def test_types_of_hovernet_are_classes_and_its_zero_is_none(tmp_path: Path, reader: SlideReader) -> None:
    nuclei = read_given(write_hovernet(tmp_path), reader)
    classes = dict(zip(nuclei.ids.to_pylist(), nuclei.classes.to_pylist(), strict=True))
    assert [classes[str(index + 1)] for index in range(6)] == [None, "1", "2", None, "1", "2"]


def test_types_of_consep_are_in_the_order_of_its_labels(tmp_path: Path, reader: SlideReader) -> None:
    labels = LABELS.astype(float) * 2  # MATLAB's numbers are doubles, and a label may be missing
    io.savemat(tmp_path / "s.mat", {"inst_map": labels, "inst_type": (np.arange(COUNT) % 2 + 1)[:, None]})
    nuclei = read_given(tmp_path / "s.mat", reader)
    classes = dict(zip(nuclei.ids.to_pylist(), nuclei.classes.to_pylist(), strict=True))
    assert [classes[str(2 * index + 2)] for index in range(4)] == ["1", "2", "1", "2"]


def test_windows_give_the_same_outlines_as_the_whole(
    tmp_path: Path, reader: SlideReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_given(write_npy(tmp_path), reader)
    monkeypatch.setattr(images, "WINDOW_PX", 96)
    monkeypatch.setattr(images, "MARGIN_PX", 48)
    pieces = read_given(write_npy(tmp_path), reader)
    first, second = ({name.as_py(): points.tolist() for name, points in named(each)} for each in (whole, pieces))
    assert first == second


def named(nuclei: Any) -> Any:
    return zip(nuclei.ids, np.split(nuclei.points, nuclei.starts[1:-1]), strict=True)


@pytest.mark.parametrize(
    ("side", "unit"), [(400, "px of level 1"), (200, "px of level 2"), (600, "px of the whole slide at 0.3333 um/px")]
)
def test_the_size_of_a_label_image_tells_its_resolution(
    tmp_path: Path, reader: SlideReader, side: int, unit: str
) -> None:
    np.save(tmp_path / "s.npy", label_image((side, side)))
    nuclei = read_given(tmp_path / "s.npy", reader)
    assert nuclei.unit == unit
    assert agrees(nuclei, within=2 * SIDE / side, among=[int(each) - 1 for each in nuclei.ids.to_pylist()])


def test_large_numbers_are_labels_too(tmp_path: Path, reader: SlideReader) -> None:
    labels = np.where(LABELS > 0, LABELS.astype(np.int64) + 3_000_000_000, 0)
    np.save(tmp_path / "s.npy", labels)
    ids = read_given(tmp_path / "s.npy", reader).ids.to_pylist()
    assert {int(each) for each in ids} == {3_000_000_001 + index for index in range(COUNT)}


def far_apart() -> np.ndarray:
    labels = np.zeros((SIDE, SIDE), int)
    labels[::700, ::700] = 5
    return np.kron(labels[::100, ::100], np.ones((100, 100), int))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((SIDE, SIDE), int), "holds no nuclei"),
        (np.zeros((SIDE, SIDE)), "expected labels, integers"),
        (np.zeros((3, SIDE, SIDE), int), "expected labels, integers"),
        (np.ones((SIDE, SIDE), int), "not each class"),
        (far_apart(), "span over 512 px|far apart"),
        (np.ones((100, 300), int), "of another shape than the slide"),
    ],
)
def test_what_is_no_label_image_of_the_slide_is_one_line(
    tmp_path: Path, reader: SlideReader, array: np.ndarray, reason: str
) -> None:
    np.save(tmp_path / "s.npy", array)
    with pytest.raises(GivenError, match=reason):
        read_given(tmp_path / "s.npy", reader)


@pytest.mark.parametrize("name", ["s.npy", "s.npz", "s.tif", "s.mat"])
def test_a_damaged_file_is_one_line(tmp_path: Path, reader: SlideReader, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x93NUMPY damaged")
    with pytest.raises(GivenError, match=r"cannot be read as|MATLAB 7.3"):
        read_given(tmp_path / name, reader)


def test_a_mat_file_without_instances_and_a_folder_that_is_no_zarr_are_one_line(
    tmp_path: Path, reader: SlideReader
) -> None:
    io.savemat(tmp_path / "s.mat", {"type_map": LABELS})
    with pytest.raises(GivenError, match="holds type_map; expected inst_map"):
        read_given(tmp_path / "s.mat", reader)
    (tmp_path / "s.zarr").mkdir()
    with pytest.raises(GivenError, match="no zarr array"):
        read_given(tmp_path / "s.zarr", reader)
