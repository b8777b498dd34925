"""Each data set in miniature, as it lies on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from lemon.nuclei.instances import polygons_from_labels
from lemon.nuclei.scores import scores
from lemon.nuclei.training.images import Labelled
from lemon.nuclei.training.layouts import read_folder
from tests.nuclei.training.made_up import labelled


def picture(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def rings(image: Labelled) -> list[list[list[float]]]:
    return [(n.contour_px + 0.5).tolist() for n in polygons_from_labels(image.instances, min_area_px=1)]


def beside_mat(folder: Path, image: Labelled) -> None:
    picture(folder / "0.png", image.image)
    savemat(folder / "0_inst.mat", {"inst_map": image.instances.astype(np.float64)})


def beside_npy(folder: Path, image: Labelled) -> None:
    picture(folder / "0.png", image.image)
    np.save(folder / "0_inst.npy", image.instances)


def beside_png(folder: Path, image: Labelled) -> None:
    picture(folder / "0.tif", image.image)
    picture(folder / "0_inst.png", image.instances.astype(np.uint16))


def geojson(folder: Path, image: Labelled) -> None:
    picture(folder / "0.png", image.image)
    features = [{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}} for ring in rings(image)]
    (folder / "0.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def monuseg(folder: Path, image: Labelled) -> None:
    picture(folder / "Tissue Images/0.tif", image.image)
    vertices = ["".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in ring) for ring in rings(image)]
    regions = "".join(f'<Region Id="{i}"><Vertices>{v}</Vertices></Region>' for i, v in enumerate(vertices))
    (folder / "Annotations").mkdir()
    text = f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>"
    (folder / "Annotations/0.xml").write_text(text)


def consep(folder: Path, image: Labelled) -> None:
    picture(folder / "Train/Images/0.png", image.image)
    (folder / "Train/Labels").mkdir()
    savemat(folder / "Train/Labels/0.mat", {"inst_map": image.instances.astype(np.float64), "type_map": 0})


def nuinsseg(folder: Path, image: Labelled) -> None:
    organ = folder / "human bladder"
    picture(organ / "tissue images/0.png", image.image)
    picture(organ / "label masks/0.tif", np.zeros(image.instances.shape, np.uint16))
    picture(organ / "label masks modify/0.tif", image.instances.astype(np.uint16))


def bowl(folder: Path, image: Labelled) -> None:
    picture(folder / "0/images/0.png", image.image)
    for number in np.unique(image.instances[image.instances > 0]):
        picture(folder / f"0/masks/{number}.png", 255 * (image.instances == number).astype(np.uint8))


def pannuke(folder: Path, image: Labelled) -> None:
    masks = np.zeros((1, *image.instances.shape, 6))
    even = image.instances % 2 == 0
    masks[0, ..., 0], masks[0, ..., 3] = image.instances * even, image.instances * ~even
    for name, values in (("images", image.image[None].astype(np.float64)), ("masks", masks)):
        (folder / f"Fold 1/{name}/fold1").mkdir(parents=True)
        np.save(folder / f"Fold 1/{name}/fold1/{name}.npy", values)


def nucls(folder: Path, image: Labelled) -> None:
    kind = np.where(image.instances > 0, 1, 253)  # nuclei, and the field of view around them
    mask = np.stack([kind, image.instances, np.where(image.instances > 0, 1, 0)], axis=-1).astype(np.uint8)
    for name, values, beyond in (("rgb", image.image, 200), ("mask", mask, 0)):
        framed = np.full((image.instances.shape[0] + 30, image.instances.shape[1] + 30, 3), beyond, np.uint8)
        framed[10:-20, 20:-10] = values
        picture(folder / name / "TCGA-A2-A0SX-DX1_id-5_left-1.png", framed)


LAYOUTS = [beside_mat, beside_npy, beside_png, geojson, monuseg, consep, nuinsseg, bowl, pannuke, nucls]


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_a_data_set_is_read_as_it_lies_on_disk(write: Callable[[Path, Labelled], None], tmp_path: Path) -> None:
    made = labelled()
    (read,) = read_folder(_written(tmp_path / "set", write, made))
    assert read.source == "set"
    assert np.array_equal(read.image, made.image)
    result = scores(read.instances, made.instances)
    assert result["f1_iou"] == 1
    assert result["pq"] > 0.97


def test_of_tnbc_the_connected_pieces_are_the_nuclei(tmp_path: Path) -> None:
    made = labelled()
    apart = np.where(cv2.erode(made.instances.astype(np.float32), np.ones((3, 3))) == made.instances, made.instances, 0)
    picture(tmp_path / "set/Slide_01/01_1.png", made.image)
    picture(tmp_path / "set/GT_01/01_1.png", 255 * (apart > 0).astype(np.uint8))
    (read,) = read_folder(tmp_path / "set")
    assert np.array_equal(read.instances > 0, apart > 0)


def test_of_nucls_a_nucleus_that_only_has_a_box_is_the_ellipse_in_it(tmp_path: Path) -> None:
    instances = np.zeros((64, 64), np.int32)
    instances[10:30, 20:36], instances[40:50, 5:25] = 7, 9
    instances[44:46, 5:8] = 0  # an outline, which fills no box
    made = Labelled("set", "0", np.full((64, 64, 3), 128, np.uint8), instances)
    (read,) = read_folder(_written(tmp_path / "set", nucls, made))
    assert (read.instances == 7).sum() == pytest.approx(np.pi * 10 * 8, rel=0.05)
    assert np.array_equal(read.instances == 9, instances == 9)
    assert not read.instances[10, 20]


def test_a_mask_of_nucls_without_a_field_of_view_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "set/rgb/a.png", np.zeros((8, 8, 3), np.uint8))
    picture(tmp_path / "set/mask/a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"a\.png: has no pixel of class 253, the field of view"):
        read_folder(tmp_path / "set")


def test_another_resolution_is_brought_to_a_quarter_of_a_micrometre(tmp_path: Path) -> None:
    (read,) = read_folder(_written(tmp_path / "set", beside_npy, labelled()), mpp=0.5)
    assert read.instances.shape == (192, 192)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("0_inst.npy", np.array([{1, 2}], dtype=object), "allow_pickle"),
        ("0.geojson", "{}", "set/0: KeyError: 'features'"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(name: str, content: object, told: str, tmp_path: Path) -> None:
    picture(tmp_path / "set/0.png", labelled().image)
    if isinstance(content, str):
        (tmp_path / "set" / name).write_text(content)
    else:
        np.save(tmp_path / "set" / name, content, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=told):
        read_folder(tmp_path / "set")


def _written(folder: Path, write: Callable[[Path, Labelled], None], image: Labelled) -> Path:
    folder.mkdir()
    write(folder, image)
    return folder
