from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from lemon.nuclei.hoverfast import Architecture, HoverFast, load_checkpoint
from lemon.nuclei.released import weights_path
from lemon.runtime.store import file_fingerprint
from lemon.slides.synthetic import make_tissue

WEIGHTS = Path(weights_path(None))


def test_the_network_that_comes_with_lemon_is_small_and_opens_without_a_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", refused)
    net = load_checkpoint(WEIGHTS)
    assert net.architecture == Architecture()
    assert all(value.dtype == torch.float32 for value in net.parameters())
    assert all(bool(torch.isfinite(value).all()) for value in net.state_dict().values())
    assert WEIGHTS.stat().st_size < 2_000_000


def test_its_card_is_of_these_weights() -> None:
    card = WEIGHTS.with_name("README.md").read_text()
    assert file_fingerprint(WEIGHTS) in card


@pytest.mark.slow
def test_without_a_checkpoint_nuclei_are_found_where_they_are() -> None:
    tissue = make_tissue(384, seed=5)
    segmenter = HoverFast(device="cpu", batch=1)
    (prediction,) = segmenter.predict(tissue.image[None])
    nuclei = segmenter.postprocess(tissue.image, prediction, segmenter.calibrate([tissue.image]))
    distance, _ = cKDTree([nucleus.centroid_px for nucleus in nuclei]).query(tissue.center_px)
    assert (distance < 6).mean() > 0.9
    assert len(nuclei) < 1.1 * len(tissue.center_px)


def test_on_glass_nothing_is_found() -> None:
    segmenter = HoverFast(device="cpu", batch=1)
    glass = np.full((256, 256, 3), 243, np.uint8)
    (prediction,) = segmenter.predict(glass[None])
    assert segmenter.postprocess(glass, prediction, None) == []
