from __future__ import annotations

import pickle

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.segmentation import watershed

from lemon.nuclei import levels
from lemon.nuclei.hoverfast_device import hv_gradients
from lemon.nuclei.instances import GRADIENT_SCALE, HALF, HVPrediction, polygons_from_labels
from lemon.nuclei.levels import postprocess_by_level
from lemon.nuclei.scores import labels_of, scores
from lemon.nuclei.training.targets import make_targets
from lemon.nuclei.training.windows import whole
from tests.nuclei.test_instances import golden
from tests.nuclei.training.made_up import blobs, labelled


def maps_of(size_px: int = 160, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drawn instances, and the mask and the maps that a network without error would give."""
    targets = make_targets(whole(labelled(size_px=size_px, seed=seed)))
    return blobs(size_px=size_px, seed=seed), targets.mask[0].numpy(), targets.hv_maps[0].numpy()


def gradients_of(maps: np.ndarray) -> np.ndarray:
    return hv_gradients(torch.from_numpy(maps)[None])[0].numpy()


def labels_by_level(probability: np.ndarray, maps: np.ndarray, **options: float) -> np.ndarray:
    nuclei = levels.find_nuclei_by_level(probability, gradients_of(maps), min_area_px=20, **options)
    return labels_of(nuclei, shape=probability.shape)


def label_by_level(mask: np.ndarray, maps: np.ndarray, *, min_area_px: float) -> np.ndarray:
    """The nuclei as an instance map; the network is sure of all that is in the mask."""
    probability = 255 * (mask > 0).astype(np.uint8)
    nuclei = levels.find_nuclei_by_level(probability, gradients_of(maps), min_area_px=min_area_px)
    return labels_of(nuclei, shape=mask.shape)


def plainly(
    probability: np.ndarray, steps: np.ndarray, *, min_area_px: float, min_probability: float = levels.MIN_PROBABILITY
) -> np.ndarray:
    """Instance map by one watershed over the whole region, step by step as the method is described."""
    slope = np.minimum(*steps) / (128 * GRADIENT_SCALE)
    opened = cv2.morphologyEx((probability > HALF).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    core = cv2.morphologyEx(
        ((slope > -0.02) & (opened > 0)).astype(np.uint8), cv2.MORPH_OPEN, cv2.getStructuringElement(1, (3, 3))
    )
    markers, _ = ndimage.label(core)
    markers[np.isin(markers, np.flatnonzero(np.bincount(markers.ravel()) < 10))] = 0
    labels = watershed(np.maximum(-slope, 0), markers=markers, mask=opened > 0)
    n_px, total = np.bincount(labels.ravel()), np.bincount(labels.ravel(), weights=probability.ravel())
    labels[np.isin(labels, np.flatnonzero((n_px < min_area_px) | (total < 255 * min_probability * n_px)))] = 0
    return labels


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_nuclei_that_touch_are_divided_however_strong_the_maps_are(strength: float) -> None:
    drawn, mask, maps = maps_of()
    inner = drawn[1:-1, 1:-1]
    whole_ones = ~np.isin(drawn, np.setdiff1d(drawn, inner[inner > 0]))
    found = label_by_level(mask, strength * maps, min_area_px=20)
    assert scores(found * whole_ones, drawn * whole_ones)["f1"] > 0.95


def test_one_steep_place_does_not_change_how_others_are_divided() -> None:
    _, mask, maps = maps_of()
    before = label_by_level(mask, maps, min_area_px=20)
    maps[:, :6, :6] *= 40
    after = label_by_level(mask, maps, min_area_px=20)
    assert np.array_equal(before[32:, 32:] > 0, after[32:, 32:] > 0)
    assert len(np.unique(before[32:, 32:])) == len(np.unique(after[32:, 32:]))


def test_a_part_of_a_region_gives_the_nuclei_that_the_region_has_there() -> None:
    _, mask, maps = maps_of(size_px=192)
    all_of_it = label_by_level(mask, maps, min_area_px=20)[48:144, 48:144]
    part = label_by_level(mask[24:168, 24:168], maps[:, 24:168, 24:168], min_area_px=20)[24:120, 24:120]
    assert scores(part, all_of_it)["pq"] > 0.99


def test_small_ones_are_dropped_and_an_empty_mask_has_none() -> None:
    drawn, mask, maps = maps_of()
    assert label_by_level(mask, maps, min_area_px=drawn.size).max() == 0
    assert label_by_level(np.zeros_like(mask), maps, min_area_px=20).max() == 0


def test_nuclei_are_those_of_one_watershed_over_the_region() -> None:
    regions = [golden(), *((maps_of(seed=seed)[1], gradients_of(maps_of(seed=seed)[2])) for seed in (1, 2))]
    for mask, steps in regions:
        sure = cv2.GaussianBlur((mask > 0).astype(np.float32), (0, 0), 2)  # least at the edges: small nuclei go
        probability = np.where(mask > 0, 128 + 127 * sure, 0).astype(np.uint8)
        expected = polygons_from_labels(plainly(probability, steps, min_area_px=80), min_area_px=80, simplify=0.006)
        found = levels.find_nuclei_by_level(probability, steps, min_area_px=80)
        polygons = {n.contour_px.tobytes() for n in expected}
        assert len(found) == len(expected)
        # Where fronts meet on a plain, which comes first depends on the order of the queue.
        assert sum(n.contour_px.tobytes() in polygons for n in found) >= 0.98 * len(found)


def test_a_nucleus_that_the_network_is_not_sure_of_is_dropped() -> None:
    drawn, mask, maps = maps_of()
    inner = drawn[20:-20, 20:-20]
    doubted = drawn == int(np.unique(inner[inner > 0])[0])
    probability = np.where(mask > 0, 230, 20).astype(np.uint8)
    before = labels_by_level(probability, maps)
    probability[doubted & (mask > 0)] = 160  # still nucleus, pixel by pixel
    after = labels_by_level(probability, maps)
    assert before[doubted].any()
    assert np.mean(after[doubted] > 0) < 0.2
    assert scores(after * ~doubted, before * ~doubted)["pq"] > 0.9
    kept = labels_by_level(probability, maps, min_probability=0.5)
    assert np.array_equal(kept, before)


def test_a_small_nucleus_of_two_square_micrometres_is_found() -> None:
    y, x = np.indices((40, 40)) - 20
    mask = np.hypot(x, y) < 3.6  # 37 px
    maps = np.stack([np.where(mask, axis / 3.5, 0) for axis in (x, y)]).astype(np.float32)
    assert label_by_level(mask, maps, min_area_px=16 * levels.MIN_AREA_UM2["level"]).max() == 1


def test_polygons_are_those_of_the_labels_and_the_function_travels() -> None:
    drawn, mask, maps = maps_of()
    region = np.zeros((*mask.shape, 3), np.uint8)
    prediction = HVPrediction(255 * (mask > 0).astype(np.uint8), gradients_of(maps))
    nuclei = pickle.loads(pickle.dumps(postprocess_by_level))(region, prediction, None, min_area_px=20)  # noqa: S301
    found = plainly(prediction.probability, gradients_of(maps), min_area_px=20)
    assert scores(labels_of(nuclei, shape=drawn.shape), found)["pq"] > 0.9
    with pytest.raises(ValueError, match="for a region"):
        postprocess_by_level(region[:-1], prediction, None, min_area_px=20)


def test_maps_of_another_size_and_maps_that_are_not_finite_are_refused() -> None:
    _, mask, maps = maps_of()
    with pytest.raises(ValueError, match="expected \\[2, H, W\\]"):
        label_by_level(mask[1:], maps, min_area_px=20)
    with pytest.raises(ValueError, match="precision=fp32"):
        label_by_level(mask, np.full_like(maps, np.nan), min_area_px=20)
