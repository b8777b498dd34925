"""Images as users have them: those that can mean one thing give the same features, all others are one clear line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some
from PIL import Image

from lemon import load_encoder
from lemon.encoders.features import encode_cells
from lemon.encoders.images import cell_images
from lemon.encoders.open import Encoder
from tests.cells_table import synthetic_crops

CELLS = np.ascontiguousarray(synthetic_crops(7))
OPAQUE = np.full((7, 60, 60, 1), 255, np.uint8)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("untrained_vit_tiny8")


TAKEN: dict[str, Callable[[np.ndarray], Any]] = {
    "uint8": lambda cells: cells,
    "a tensor": torch.tensor,
    "a tensor with a gradient": lambda cells: torch.tensor(cells / 255, requires_grad=True),
    "a read-only array": lambda cells: np.frombuffer(cells.tobytes(), np.uint8).reshape(cells.shape),
    "a list of arrays": list,
    "a tuple of tensors": lambda cells: tuple(map(torch.tensor, cells)),
    "a list of arrays and tensors": lambda cells: [torch.tensor(cells[0]), *cells[1:]],
    "a list of numbers": lambda cells: cells.tolist(),
    "a list of Pillow images": lambda cells: [Image.fromarray(cell) for cell in cells],
    "a list of RGBA Pillow images": lambda cells: [Image.fromarray(cell).convert("RGBA") for cell in cells],
    "channels first": lambda cells: cells.transpose(0, 3, 1, 2),
    "channels first, a tensor": lambda cells: torch.tensor(cells).permute(0, 3, 1, 2).contiguous(),
    "channels first, floats, a tensor": lambda cells: torch.tensor(cells).permute(0, 3, 1, 2) / 255,
    "float16 in [0, 1]": lambda cells: (cells / 255).astype(np.float16),
    "float32 in [0, 1]": lambda cells: (cells / 255).astype(np.float32),
    "float64 in [0, 1]": lambda cells: cells / 255,
    "big-endian floats": lambda cells: (cells / 255).astype(">f4"),
    "float32 to 255": lambda cells: cells.astype(np.float32),
    "int16": lambda cells: cells.astype(np.int16),
    "int32": lambda cells: cells.astype(np.int32),
    "int64": lambda cells: cells.astype(np.int64),
    "uint32": lambda cells: cells.astype(np.uint32),
    "every second": lambda cells: np.repeat(cells, 2, axis=0)[::2],
    "Fortran's order": np.asfortranarray,
    "reversed twice": lambda cells: cells[::-1].copy()[::-1],
    "BGR turned round": lambda cells: cells[..., ::-1].copy()[..., ::-1],
    "cut from larger ones": lambda cells: np.pad(cells, ((0, 0), (4, 9), (3, 1), (0, 0)))[:, 4:64, 3:63],
    "opaque RGBA": lambda cells: np.concatenate([cells, OPAQUE], axis=3),
    "opaque RGBA, floats": lambda cells: np.concatenate([cells, OPAQUE], axis=3) / 255,
    "opaque RGBA, channels first": lambda cells: np.concatenate([cells, OPAQUE], axis=3).transpose(0, 3, 1, 2),
}


@pytest.mark.parametrize("form", TAKEN)
def test_what_can_mean_one_thing_only_gives_the_same_features(encoder: Encoder, form: str) -> None:
    given_images = TAKEN[form](CELLS)
    assert torch.equal(cell_images(given_images), torch.from_numpy(CELLS))
    torch.testing.assert_close(encoder.embed(given_images), encoder.embed(CELLS), rtol=0, atol=0)


ONE: dict[str, Callable[[np.ndarray], Any]] = {
    "without N": lambda cell: cell,
    "a tensor without N": torch.tensor,
    "floats without N": lambda cell: cell / 255,
    "a Pillow image": Image.fromarray,
    "RGBA without N": lambda cell: np.dstack([cell, OPAQUE[0]]),
    "channels first with N": lambda cell: cell.transpose(2, 0, 1)[None],
    "a list of one": lambda cell: [cell],
}


@pytest.mark.parametrize("form", ONE)
def test_one_image_is_a_batch_of_one(encoder: Encoder, form: str) -> None:
    torch.testing.assert_close(encoder.embed(ONE[form](CELLS[3])), encoder.embed(CELLS[3:4]), rtol=0, atol=0)


@pytest.mark.parametrize(
    "none", [[], (), CELLS[:0], torch.tensor(CELLS)[:0], np.array([]), (CELLS / 255)[:0], np.zeros((0, 3, 60, 60))]
)
def test_no_image_has_no_features(encoder: Encoder, none: Any) -> None:
    assert encoder.embed(none).shape == (0, 192)


def with_value(value: float) -> np.ndarray:
    images = CELLS / 255
    images[3, 5, 7, 1] = value
    return images


REFUSED: dict[str, tuple[Any, str]] = {
    "48 px": (CELLS[:, :48, :48], r"shape \[7, 48, 48, 3\].*their scale is not known"),
    "224 px": (np.zeros((2, 224, 224, 3), np.uint8), "their scale is not known"),
    "40 px": (CELLS[:, 10:50, 10:50], "their scale is not known"),
    "224 px, channels first": (torch.zeros(2, 3, 224, 224), "their scale is not known"),
    "one of 48 px": (CELLS[0, :48, :48], "their scale is not known"),
    "60 x 48 px": (CELLS[:, :, :48], r"shape \[7, 60, 48, 3\]"),
    "sizes that differ": ([CELLS[0], CELLS[0, :48]], "several shapes"),
    "tensors that differ": ([torch.zeros(60, 60, 3), torch.zeros(48, 48, 3)], "images that differ"),
    "types that differ": ([torch.tensor(CELLS[0]), torch.tensor(CELLS[0] / 255)], "images that differ"),
    "grey": (CELLS[..., 0], "stain is colour"),
    "one grey": (CELLS[0, ..., 0], "stain is colour"),
    "grey with its channel": (CELLS[..., :1], "stain is colour"),
    "grey, channels first": (CELLS[..., :1].transpose(0, 3, 1, 2), "stain is colour"),
    "a grey Pillow image": (Image.fromarray(CELLS[0]).convert("L"), "stain is colour"),
    "three grey, or one with channels first": (CELLS[:3, ..., 0], r"images\[None\]"),
    "one tensor with channels first": (torch.tensor(CELLS[0]).permute(2, 0, 1), r"images\[None\]"),
    "two channels": (CELLS[..., :2], r"shape \[7, 60, 60, 2\]"),
    "five channels": (np.zeros((7, 60, 60, 5), np.uint8), r"shape \[7, 60, 60, 5\]"),
    "transparent RGBA": (np.concatenate([CELLS, OPAQUE // 2], axis=3), "not opaque"),
    "CMYK": (Image.fromarray(CELLS[0]).convert("CMYK"), "not opaque"),
    "uint16": (CELLS.astype(np.uint16) * 257, "16-bit"),
    "uint16 up to 255": (CELLS.astype(np.uint16), "16-bit"),
    "a uint16 tensor": (torch.tensor(CELLS.astype(np.uint16)), "16-bit"),
    "int32 up to 65535": (CELLS.astype(np.int32) * 257, "values from .*; .*16-bit"),
    "negative": (CELLS.astype(np.int16) - 128, "before normalisation"),
    "normalised": ((CELLS / 255 - 0.5) / 0.2, "before normalisation"),
    "between the scales": (CELLS * 0.7, "values from"),
    "a little over 1": (with_value(1.01), "values from 0.* to 1.01"),
    "NaN": (with_value(float("nan")), "not finite"),
    "infinity": (with_value(float("inf")), "not finite"),
    "minus infinity": (with_value(float("-inf")), "not finite"),
    "bool": (CELLS > 128, "values of torch.bool"),
    "complex": (CELLS.astype(np.complex64), "complex64"),
    "objects": (CELLS.astype(object), "object"),
    "None": (None, "NoneType"),
    "a path": ("cells.png", "str"),
    "paths": (["a.png", "b.png"], "list of <U5"),
    "a number": (3, r"shape \[\]"),
    "numbers": ([1, 2, 3], r"shape \[3\]"),
    "a dictionary": ({"image": CELLS}, "dict"),
    "a generator": ((cell for cell in CELLS), "generator"),
    "five axes": (CELLS[None], r"shape \[1, 7, 60, 60, 3\]"),
    "flat": (CELLS.reshape(7, -1), r"shape \[7, 10800\]"),
    "none of 48 px": (np.zeros((0, 48, 48, 3), np.uint8), r"shape \[0, 48, 48, 3\]"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_may_mean_another_thing_is_one_line_with_what_is_expected(encoder: Encoder, form: str) -> None:
    images, part = REFUSED[form]
    of = encoder.cell_input
    for embed in (
        encoder.embed,
        lambda given: encode_cells(encoder.model, given, mean=of.mean, std=of.std, crop_px=of.crop_px),
    ):
        with pytest.raises(ValueError, match=part) as told:
            embed(images)
        assert "\n" not in str(told.value)
        assert "expected RGB images of 60 x 60 px at 0.25 um/px, uint8 [N, 60, 60, 3]" in str(told.value)


def test_a_batch_of_none_and_images_that_are_not_normalised_are_told(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="batch: got 0"):
        encoder.embed(CELLS, batch=0)
    for images in (torch.zeros(2, 60, 60, 3), torch.zeros(2, 3, 40, 40, dtype=torch.uint8), torch.zeros(3, 40, 40)):
        with pytest.raises(ValueError, match=r"expected normalised floats \[B, 3, 40, 40\]"):
            encoder(images)


@settings(max_examples=300, deadline=None)
@given(
    images=some.arrays(
        some.scalar_dtypes(),
        st.lists(st.sampled_from([0, 1, 2, 3, 4, 48, 60]), max_size=5)
        .map(tuple)
        .filter(lambda shape: np.prod(shape) < 1e5),
    )
)
def test_any_array_is_taken_or_refused_in_one_line(images: np.ndarray) -> None:
    try:
        cells = cell_images(images)
    except ValueError as error:
        told = str(error)
    else:
        told = ""
        assert cells.dtype == torch.uint8
        assert cells.shape[1:] == (60, 60, 3)
    assert "\n" not in told
