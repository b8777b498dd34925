from __future__ import annotations

import numpy as np
import pytest
import torch

from lemon.nuclei.training.images import Labelled
from lemon.nuclei.training.windows import MARGIN_PX, Bank, Geometry, draw
from tests.nuclei.training.made_up import labelled

INNER = slice(MARGIN_PX, -MARGIN_PX)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_plain_windows_are_pixels_of_the_image_turned_or_mirrored() -> None:
    image = labelled(size_px=100)
    bank = Bank.of([image], device="cpu")
    windows = draw(bank, batch=32, size_px=64, geometry=Geometry(plain_share=1.0), generator=generator())
    found = set()
    for picture in (windows.images * 255).round().byte().permute(0, 2, 3, 1).numpy():
        for turn in range(8):
            upright = np.rot90(picture, turn)[:, :: 1 if turn < 4 else -1]
            views = np.lib.stride_tricks.sliding_window_view(image.image[..., 0], (64, 64))
            if (views == upright[..., 0]).all((2, 3)).any():
                found.add(turn)
                break
        else:
            pytest.fail("a window is none of the image's")
    assert len(found) == 8


def test_labels_lie_on_their_nuclei_however_a_window_is_turned() -> None:
    bank = Bank.of([labelled(size_px=200, seed=s) for s in range(2)], device="cpu")
    windows = draw(bank, batch=16, size_px=64, geometry=Geometry(plain_share=0.3), generator=generator())
    dark = windows.images[:, 0] < 0.65  # between (110 + 20) / 255 and 225 / 255
    nucleus = windows.labels[:, INNER, INNER] > 0
    assert (dark == nucleus).float().mean() > 0.97  # edges are interpolated
    assert 0.3 < nucleus.float().mean() < 0.9


def test_the_scale_enlarges_nuclei() -> None:
    instances = np.zeros((256, 256), np.int32)
    instances[118:138, 118:138] = 1
    bank = Bank.of([Labelled("", "", np.zeros((256, 256, 3), np.uint8), instances)], device="cpu")

    def area(scale: float) -> float:
        geometry = Geometry(scale=(scale, scale), plain_share=0.0)
        windows = draw(bank, batch=16, size_px=192, geometry=geometry, generator=generator())
        return float((windows.labels > 0).sum((1, 2)).float().mean())

    assert area(1.0) == pytest.approx(400, rel=0.05)
    assert area(1.4) == pytest.approx(1.96 * 400, rel=0.05)


def test_beyond_an_image_pixels_are_mirrored_and_not_known() -> None:
    image = labelled(size_px=48)
    windows = draw(Bank.of([image], device="cpu"), batch=2, size_px=96, geometry=None, generator=generator())
    known = windows.known
    assert known.sum((1, 2)).tolist() == [48 * 48] * 2
    assert (windows.labels[:, INNER, INNER][~known] == 0).all()
    assert windows.images[0][:, ~known[0]].std() > 0.05


def test_sources_are_drawn_by_their_odds_and_images_by_their_size() -> None:
    def plain(value: int, size: int, source: str) -> Labelled:
        return Labelled(source, str(value), np.full((size, size, 3), value, np.uint8), np.zeros((size, size), np.int32))

    images = [plain(10, 64, "a"), plain(20, 128, "a"), plain(30, 64, "b")]
    bank = Bank.of(images, device="cpu", odds={"a": 3.0, "b": 1.0})
    drawn = draw(bank, batch=2000, size_px=2, geometry=None, generator=generator()).images[:, 0, 0, 0]
    shares = [float(((drawn * 255).round() == value).float().mean()) for value in (10, 20, 30)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.05)


def test_windows_repeat_for_a_seed() -> None:
    bank = Bank.of([labelled(size_px=128)], device="cpu")
    one, two, other = (
        draw(bank, batch=4, size_px=32, geometry=Geometry(), generator=generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.labels, two.labels)
    assert not torch.equal(one.images, other.images)


def test_instances_need_not_be_numbered_without_gaps() -> None:
    image = labelled()
    gaps = Labelled("", "", image.image, np.where(image.instances > 0, image.instances * 70_000, 0).astype(np.int32))
    assert torch.equal(Bank.of([image], device="cpu").labels > 0, Bank.of([gaps], device="cpu").labels > 0)
    assert Bank.of([gaps], device="cpu").labels.max() < 100


def test_a_bank_needs_images() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Bank.of([], device="cpu")
