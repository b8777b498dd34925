from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lemon.nuclei.training.images import Labelled, split
from lemon.nuclei.training.layouts import read_folder
from tests.nuclei.training.made_up import labelled, stored


def test_a_folder_of_images_and_maps_is_read_in_order(tmp_path: Path) -> None:
    made = [labelled(seed=seed, name=name) for seed, name in enumerate("ba")]
    for image in made:
        stored(tmp_path / "set", image)
    images = read_folder(tmp_path / "set")
    assert [(i.source, i.name) for i in images] == [("set", "a"), ("set", "b")]
    assert np.array_equal(images[1].image, made[0].image)
    assert np.array_equal(images[1].instances, made[0].instances)


def test_images_at_20x_are_enlarged(tmp_path: Path) -> None:
    for name in "ab":
        stored(tmp_path / "set", labelled(name=name))
    (tmp_path / "set/images.csv").write_text("image,objective_power\na,20\nb,40\n")
    coarse, fine = read_folder(tmp_path / "set")
    assert (coarse.source, fine.source) == ("set_20x", "set")
    assert coarse.instances.shape == (192, 192)
    assert coarse.image.shape == (192, 192, 3)
    assert fine.instances.shape == (96, 96)
    assert set(np.unique(coarse.instances)) == set(np.unique(fine.instances))


def test_a_map_of_another_size_than_its_image_is_named(tmp_path: Path) -> None:
    stored(tmp_path / "set", labelled(name="odd"))
    np.savez_compressed(tmp_path / "set/odd_inst.npz", inst_map=np.zeros((5, 5), np.uint16))
    with pytest.raises(ValueError, match="set/odd"):
        read_folder(tmp_path / "set")
    np.savez_compressed(tmp_path / "set/odd_inst.npz", other=np.zeros((5, 5), np.uint16))
    with pytest.raises(ValueError, match="inst_map"):
        read_folder(tmp_path / "set")
    (tmp_path / "set/odd.png").unlink()
    np.savez_compressed(tmp_path / "set/odd_inst.npz", inst_map=np.zeros((5, 5), np.uint16))
    with pytest.raises(ValueError, match="no labelled images"):
        read_folder(tmp_path / "set")


def test_each_source_has_images_held_out_and_always_the_same() -> None:
    images = [
        Labelled(source, f"{n}", np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.int32))
        for source, count in (("a", 20), ("b", 3), ("c", 1))
        for n in range(count)
    ]
    kept, held_out = split(images, held_out_share=0.2)
    assert [sum(i.source == s for i in held_out) for s in "abc"] == [4, 1, 0]
    assert len(kept) + len(held_out) == len(images)
    again = split(images[::-1], held_out_share=0.2)[1]
    assert {(i.source, i.name) for i in again} == {(i.source, i.name) for i in held_out}
    assert split(images, held_out_share=0.0)[1] == []
