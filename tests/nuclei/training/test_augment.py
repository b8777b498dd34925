from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from lemon.nuclei.training.augment import Appearance, _blurred, _jpeg, vary
from tests.nuclei.training.made_up import labelled

NOTHING = Appearance(
    **{f.name: f.default if f.name in ("low_sides", "jpeg_quality") else 0.0 for f in fields(Appearance)}
)


def images(count: int = 8) -> torch.Tensor:
    picture = cv2.GaussianBlur(labelled(size_px=64).image, (3, 3), 0)
    return (torch.from_numpy(picture).permute(2, 0, 1).float() / 255).expand(count, 3, 64, 64)


def varied(appearance: Appearance, *, seed: int = 0, count: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return vary(images(count), appearance, generator=generator, host=np.random.default_rng(seed))


def test_without_any_variation_windows_stay() -> None:
    assert torch.allclose(varied(NOTHING), images(), atol=5e-3)


@pytest.mark.parametrize(
    "changed",
    [
        {"stain": 0.35},
        {"stain_offset": 0.06},
        {"channel": 0.1},
        {"contrast": 0.2},
        {"brightness": 0.1},
        {"blur_share": 1.0, "blur_px": 2.0},
        {"sharpen_share": 1.0},
        {"low_share": 1.0},
        {"noise": 0.05},
        {"jpeg_share": 1.0},
    ],
)
def test_each_variation_changes_windows_and_stays_in_range(changed: dict[str, Any]) -> None:
    result = varied(replace(NOTHING, **changed))
    assert result.shape == images().shape
    assert result.min() >= 0
    assert result.max() <= 1
    assert (result - images()).abs().mean() > 3e-3
    if "low_share" not in changed:
        assert (result[0] - result[1]).abs().mean() > 1e-3  # each window has its own


def test_windows_at_20x_lose_what_is_finer_than_two_pixels() -> None:
    lines = (torch.arange(64) % 2).float().expand(4, 3, 64, 64)
    generator, host = torch.Generator().manual_seed(0), np.random.default_rng(0)
    result = vary(lines, replace(NOTHING, low_share=0.5), generator=generator, host=host)
    assert result[:2].std() < 0.1
    assert result[2:].std() > 0.45


def test_blur_is_gaussian() -> None:
    picture = labelled(size_px=64).image.astype(np.float32)
    ours = _blurred(torch.from_numpy(picture).permute(2, 0, 1)[None], torch.tensor([1.2]))[0].permute(1, 2, 0).numpy()
    theirs = cv2.GaussianBlur(picture, (9, 9), 1.2, borderType=cv2.BORDER_REFLECT_101)
    assert np.abs(ours - theirs).max() < 0.01


@pytest.mark.parametrize("quality", [40, 70, 90])
def test_jpeg_is_near_to_the_real_one(quality: int) -> None:
    picture = (images(1)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    _, coded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    theirs = cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32)
    ours = (_jpeg(images(1), torch.tensor([float(quality)]))[0].permute(1, 2, 0).numpy() * 255).clip(0, 255)
    lost = np.abs(theirs - picture).mean()
    assert np.abs(ours - picture).mean() == pytest.approx(lost, rel=0.35)
    assert np.abs(ours - theirs).mean() < lost


def test_variations_repeat_for_a_seed() -> None:
    assert torch.equal(varied(Appearance(), seed=3), varied(Appearance(), seed=3))
    assert not torch.equal(varied(Appearance(), seed=3), varied(Appearance(), seed=4))
