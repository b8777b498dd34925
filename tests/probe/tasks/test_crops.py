from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lemon.probe.task import TaskError
from lemon.probe.tasks.crops import cut_by_image, cut_cells, cut_patches, to_crop_mpp
from tests.probe.tasks.discs import assert_centred, field

CENTRES = np.array([[150.0, 140.3], [201.6, 260.0], [330.5, 99.25]])


@pytest.mark.parametrize("mpp", [0.1375, 0.2, 0.2125, 0.25, 0.2738, 0.3639])
def test_a_crop_is_centred_and_at_a_quarter_micrometre_whatever_the_image_has(mpp: float) -> None:
    centre = CENTRES * 0.25 / mpp
    side = round(450 * 0.25 / mpp)
    images, kept = cut_cells(field(side, side, centre, mpp=mpp), centre, mpp=mpp)
    assert kept.all()
    assert_centred(images)


def test_at_a_quarter_micrometre_pixels_are_copied() -> None:
    image = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
    images, _ = cut_cells(image, np.array([[49.5, 39.5]]), mpp=0.25)
    assert (images[0] == image[10:70, 20:80]).all()
    assert to_crop_mpp(image, mpp=0.25) is image


def test_a_nucleus_whose_crop_reaches_over_the_edge_is_left_out() -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    centre = np.array([[29.5, 50], [28, 50], [100, 69.5], [100, 71], [-4, 50], [169.5, 50], [171, 50]])
    images, kept = cut_cells(image, centre, mpp=0.25)
    assert kept.tolist() == [True, False, True, False, False, True, False]
    assert len(images) == 3


def test_no_nucleus_gives_no_crop() -> None:
    images, kept = cut_cells(np.zeros((80, 80, 3), np.uint8), np.empty((0, 2)), mpp=0.2)
    assert images.shape == (0, 60, 60, 3)
    assert kept.shape == (0,)


def test_crops_of_several_images_come_in_the_order_of_the_points() -> None:
    centre = np.array([[80.0, 80.0], [5.0, 80.0], [90.0, 70.0], [80.0, 80.0]])
    names = np.array(["b", "a", "a", "b"])
    shade = {"a": 10, "b": 20}
    images, kept = cut_by_image(
        names, centre, lambda name: (np.full((200, 200, 3), shade[name], np.uint8), 0.25), desc="test"
    )
    assert kept.tolist() == [True, False, True, True]
    assert images[:, 0, 0, 0].tolist() == [20, 10, 20]


def test_a_patch_with_a_black_margin_or_too_small_is_left_out(tmp_path: Path) -> None:
    whole = field(64, 64, [[31.5, 31.5]], mpp=0.25)
    padded = whole.copy()
    padded[:, :10] = 0
    for name, image in {"whole": whole, "padded": padded, "small": whole[:50]}.items():
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    images, kept = cut_patches([tmp_path / f"{name}.png" for name in ("padded", "whole", "small")], desc="test")
    assert kept.tolist() == [False, True, False]
    assert_centred(images)


def test_an_image_that_is_absent_or_broken_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(TaskError, match=r"^.*absent\.png: no such image; expected .*$"):
        cut_patches([tmp_path / "absent.png"], desc="test")
    with pytest.raises(TaskError, match=r"^.*broken\.png: no image that can be read; expected .*$"):
        cut_patches([tmp_path / "broken.png"], desc="test")
