from __future__ import annotations

import numpy as np
import torch

from lemon.nuclei.training.images import Labelled
from lemon.nuclei.training.targets import Targets, make_targets
from lemon.nuclei.training.windows import Bank, Geometry, draw, whole
from tests.nuclei.training.made_up import blobs, labelled


def of(instances: np.ndarray) -> Targets:
    image = np.zeros((*instances.shape, 3), np.uint8)
    return make_targets(whole(Labelled("", "", image, instances)))


def by_hand(instances: np.ndarray) -> np.ndarray:
    """Maps as the reference makes them, nucleus by nucleus."""
    maps = np.zeros((2, *instances.shape), np.float32)
    height, width = instances.shape
    for label in set(np.unique(instances)) - {0}:
        rows, columns = np.nonzero(instances == label)
        top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
        if top == 0 or left == 0 or bottom == height - 1 or right == width - 1:
            continue
        maps[0, rows, columns] = np.linspace(-1, 1, right - left + 1)[columns - left]
        maps[1, rows, columns] = np.linspace(-1, 1, bottom - top + 1)[rows - top]
    return maps


def test_maps_run_from_minus_one_to_one_across_each_whole_nucleus() -> None:
    for seed in range(3):
        instances = blobs(seed=seed)
        assert np.allclose(of(instances).hv_maps[0].numpy(), by_hand(instances), atol=1e-6)


def test_a_nucleus_of_one_pixel_has_no_sides() -> None:
    instances = np.zeros((11, 11), np.int32)
    instances[5, 5] = 1
    targets = of(instances)
    assert (targets.hv_maps == 0).all()
    assert targets.edge.sum() == 24
    assert targets.mask.sum() == 1


def test_nuclei_that_the_image_cuts_weigh_nothing_in_the_maps() -> None:
    instances = blobs()
    border = np.concatenate([instances[0], instances[-1], instances[:, 0], instances[:, -1]])
    cut = np.isin(instances, list(set(border.tolist()) - {0}))
    targets = of(instances)
    assert cut.any()
    assert np.array_equal(targets.map_weight[0].numpy() == 0, cut)
    assert (targets.mask_weight == 1).all()


def test_maps_of_a_nucleus_that_only_the_window_cuts_are_those_of_the_whole() -> None:
    instances = np.zeros((256, 256), np.int32)
    instances[118:139, 118:139] = 1
    bank = Bank.of([Labelled("", "", np.zeros((256, 256, 3), np.uint8), instances)], device="cpu")
    windows = draw(bank, batch=64, size_px=128, geometry=None, generator=torch.Generator().manual_seed(0))
    targets = make_targets(windows)
    cut = (targets.mask[:, :, -1].any(1) & (targets.mask.any(1).sum(1) < 21)).nonzero()[:, 0]
    assert len(cut)
    assert (targets.map_weight == 1).all()
    for index in cut:
        first = int(targets.mask[index].any(0).nonzero()[0])
        assert targets.hv_maps[index, 0, :, first].min() == -1
        assert targets.hv_maps[index, 0].max() < 1


def test_maps_are_made_for_the_nucleus_as_it_lies_in_the_window() -> None:
    bank = Bank.of([labelled(size_px=256)], device="cpu")
    generator = torch.Generator().manual_seed(1)
    windows = draw(bank, batch=8, size_px=64, geometry=Geometry(plain_share=0.0), generator=generator)
    maps = make_targets(windows).hv_maps.numpy()
    for one, labels, cut in zip(maps, windows.labels.numpy(), windows.cut.numpy(), strict=True):
        expected = by_hand(labels) * ~np.isin(labels, np.flatnonzero(cut))
        assert np.allclose(one, expected[:, 32:-32, 32:-32], atol=1e-6)


def test_edges_are_the_background_around_nuclei() -> None:
    targets = of(blobs())
    assert targets.edge.any()
    assert not (targets.edge & targets.mask.bool()).any()
