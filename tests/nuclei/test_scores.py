from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lemon.nuclei.instances import polygons_from_labels
from lemon.nuclei.scores import labels_of, scores
from tests.nuclei.training.made_up import blobs

MAPS = arrays(np.int32, (7, 9), elements=st.integers(0, 4))


def squares(*corners: tuple[int, int], side: int = 10) -> np.ndarray:
    labels = np.zeros((64, 64), np.int32)
    for number, (y, x) in enumerate(corners, start=1):
        labels[y : y + side, x : x + side] = number
    return labels


def test_the_same_map_scores_one_however_it_is_numbered() -> None:
    drawn = squares((2, 2), (2, 12), (30, 40))
    renumbered = np.array([0, 90, 7, 3], np.int32)[drawn]
    result = scores(renumbered, drawn)
    assert {k: result[k] for k in ("f1", "precision", "recall", "f1_iou", "pq", "aji", "dice")} == pytest.approx(
        dict.fromkeys(("f1", "precision", "recall", "f1_iou", "pq", "aji", "dice"), 1.0)
    )
    assert (result["found"], result["drawn"]) == (3, 3)


@pytest.mark.parametrize(
    ("found", "drawn", "expected"),
    [
        # A shift by 2 of 10: IoU 8 / 12.
        (squares((2, 4)), squares((2, 2)), {"f1": 1, "f1_iou": 1, "pq": 8 / 12, "aji": 8 / 12, "dice": 0.8}),
        # By 5: IoU 5 / 15 is no match, the centroids are.
        (squares((2, 7)), squares((2, 2)), {"f1": 1, "f1_iou": 0, "pq": 0, "aji": 5 / 15, "dice": 0.5}),
        # By 13: too far for centroids.
        (squares((2, 15)), squares((2, 2)), {"f1": 0, "f1_iou": 0, "pq": 0, "aji": 0, "dice": 0}),
        # Two drawn as one: the pair is half of the found one, which is not more than half.
        (
            (squares((2, 2), (2, 12)) > 0).astype(np.int32),
            squares((2, 2), (2, 12)),
            {"f1": 2 / 3, "precision": 1, "recall": 0.5, "f1_iou": 0, "aji": 200 / 400, "dice": 1},
        ),
        # One that is right, one that is not there.
        (squares((2, 2), (40, 40)), squares((2, 2)), {"f1": 2 / 3, "precision": 0.5, "pq": 2 / 3, "aji": 0.5}),
        (squares(), squares((2, 2)), {"f1": 0, "pq": 0, "aji": 0, "dice": 0, "found": 0, "drawn": 1}),
        (squares(), squares(), {"f1": 0, "pq": 0, "aji": 0, "dice": 0, "found": 0, "drawn": 0}),
    ],
)
def test_scores_are_those_by_hand(found: np.ndarray, drawn: np.ndarray, expected: dict[str, float]) -> None:
    result = scores(found, drawn)
    assert {name: result[name] for name in expected} == pytest.approx(expected)


def test_two_centroids_are_not_matched_with_the_same_one() -> None:
    result = scores(squares((2, 2), (2, 8), side=5), squares((2, 5), side=5))
    assert (result["precision"], result["recall"]) == (0.5, 1.0)


@given(MAPS, MAPS)
def test_figures_of_overlap_are_those_of_masks_compared_one_by_one(found: np.ndarray, drawn: np.ndarray) -> None:
    a, b = ([labels == i for i in np.unique(labels[labels > 0])] for labels in (found, drawn))
    iou = np.array([[(x & y).sum() / (x | y).sum() for x in a] for y in b]).reshape(len(b), len(a))
    hits = iou[iou > 0.5]
    result = scores(found, drawn)
    assert result["f1_iou"] == pytest.approx(2 * len(hits) / max(len(a) + len(b), 1))
    assert result["pq"] == pytest.approx(2 * hits.sum() / max(len(a) + len(b), 1))
    assert (result["found"], result["drawn"]) == (len(a), len(b))
    assert 0 <= result["aji"] <= 1


def test_maps_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the shape of drawn"):
        scores(np.zeros((4, 4), np.int32), np.zeros((4, 5), np.int32))


def test_polygons_of_a_map_give_the_map_back() -> None:
    labels = blobs(size_px=96)
    again = labels_of(polygons_from_labels(labels, min_area_px=20), shape=labels.shape)
    assert scores(again, labels)["pq"] > 0.95
