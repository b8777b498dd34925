"""A crop that several tasks hold is encoded once."""

from __future__ import annotations

import numpy as np

from lemon.probe import embedding
from lemon.probe.embedding import SharedEmbeddings
from tests.cells_table import numbered


def test_each_distinct_crop_is_encoded_once_and_every_row_is_of_its_own_crop(monkeypatch) -> None:
    monkeypatch.setattr(embedding, "CROPS_A_TICK", 7)
    seen: list[np.ndarray] = []

    def embed(images: np.ndarray) -> np.ndarray:
        seen.append(images)
        return images[:, 0, 0, :2].astype(np.float32)

    shared, images = SharedEmbeddings(embed), numbered(20)
    first, second = images[[3, 1, 3, 0, 9]], images[[12, 9, 1, *range(20)]]
    for wanted in (first, second, first):
        np.testing.assert_array_equal(shared.of(wanted), wanted[:, 0, 0, :2])
    assert sum(map(len, seen)) == 20
    assert max(map(len, seen)) <= 7
