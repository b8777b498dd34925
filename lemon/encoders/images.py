"""What users give as images of cells, as encoders take it: uint8 [N, 60, 60, 3]. The one place that converts it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lemon.schema import CELL_PX

CHUNK = 1024  # images whose values are looked at, or converted, at a time

_EXPECTED = f"expected RGB images of {CELL_PX} x {CELL_PX} px at 0.25 um/px, uint8 [N, {CELL_PX}, {CELL_PX}, 3]"
_OF_16_BITS = "16-bit images: (images // 257).astype('uint8') where they use the whole range"
_ALIKE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint32, torch.uint64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def cell_images(images: Any) -> Tensor:
    """Images as uint8 [N, 60, 60, 3], on the device that they are on.

    Taken, because it can mean one thing only:

    - arrays, tensors, Pillow images, and sequences of them, with any strides; none at all is [0, 60, 60, 3];
    - one image without its axis N, [60, 60, 3];
    - channels first, [N, 3, 60, 60]; not [3, 60, 60], which may be one image or three grey ones;
    - a fourth channel that is opaque throughout (RGBA), which is dropped;
    - floats in [0, 1], which are scaled by 255 and rounded, and floats or integers that are whole numbers up to 255.

    Raises:
        ValueError: anything else, with what was got and what is expected: other sizes (their scale is not known), grey
            images, 16-bit values, values that are negative, not finite, or of neither scale.
    """
    tensor = _channels_last(_tensor(images))
    if tensor.dtype != torch.uint8:
        tensor = _bytes(tensor)
    if tensor.shape[3] == 4:
        if not all(bool((part[..., 3] == 255).all()) for part in tensor.split(CHUNK)):
            raise ValueError(_error_line("a fourth channel that is not opaque", "lay the images on white, and drop it"))
        tensor = tensor[..., :3]
    return tensor


def _error_line(got: str, remedy: str = "") -> str:
    return f"images: got {got}; {_EXPECTED}{f'; {remedy}' if remedy else ''}"


def _tensor(images: Any) -> Tensor:
    """What was given as one tensor, with its values as they are."""
    if isinstance(images, Tensor):
        return images.detach()
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        if not len(images):
            return torch.empty((0, CELL_PX, CELL_PX, 3), dtype=torch.uint8)
        if any(isinstance(image, Tensor) for image in images):
            return _stacked([_tensor(image) for image in images])
    try:
        array = np.asarray(images)
    except (ValueError, TypeError):  # as of images of several sizes
        raise ValueError(
            _error_line(f"a {type(images).__name__} that is no array: images of several shapes, or none")
        ) from None
    if array.dtype.kind not in "iufb":
        raise ValueError(_error_line(f"{type(images).__name__} of {array.dtype}"))
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    if not array.flags.c_contiguous or not array.dtype.isnative:  # torch knows no negative strides, no other byte order
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an array may be read-only: it is only read
        return torch.from_numpy(array)


def _stacked(images: list[Tensor]) -> Tensor:
    kinds = {(tuple(image.shape), image.dtype, image.device) for image in images}
    if len(kinds) > 1:
        got = " and ".join(sorted(f"{dtype} {list(shape)}" for shape, dtype, _ in kinds)[:3])
        raise ValueError(_error_line(f"images that differ ({got})"))
    return torch.stack(images)


def _channels_last(images: Tensor) -> Tensor:
    """[N, 60, 60, C], C being 3 or 4."""
    shape, side = tuple(images.shape), (CELL_PX, CELL_PX)
    if shape == (0,):
        return images.new_empty((0, *side, 3))
    if len(shape) == 3 and shape[:2] == side and shape[2] in (3, 4):
        return images[None]
    if len(shape) == 4 and shape[1:3] == side and shape[3] in (3, 4):
        return images
    if len(shape) == 4 and shape[2:] == side and shape[1] in (3, 4):
        return images.movedim(1, -1)
    raise ValueError(_error_line(f"shape {list(shape)}", _shape_remedy(shape)))


def _shape_remedy(shape: tuple[int, ...]) -> str:
    """What is most likely the matter with a shape."""
    side = (CELL_PX, CELL_PX)
    if shape in ((3, *side), (4, *side)):
        return f"of one image with its channels first, give images[None], [1, {shape[0]}, {CELL_PX}, {CELL_PX}]"
    if side in (shape, shape[1:], shape[1:3], shape[2:], shape[:2]) and len(shape) <= 4:
        return "grey images are none that the encoder knows: stain is colour"
    if len(shape) in (3, 4) and {3, 4} & {shape[-1], shape[-3]}:
        return (
            "cut them from the slide around the nucleus, or resample them to 0.25 um/px first: their scale is not known"
        )
    return ""


def _bytes(images: Tensor) -> Tensor:
    """Other types of numbers as bytes, [N, 60, 60, C]."""
    if images.dtype not in (*_ALIKE, *_FLOATS):
        raise ValueError(_error_line(f"values of {images.dtype}", _OF_16_BITS if images.dtype == torch.uint16 else ""))
    if not len(images):
        return images.to(torch.uint8)
    scale = _scale([_seen(part.float()) for part in images.split(CHUNK)], floats=images.is_floating_point())
    return torch.cat([(part.float() * scale).round().to(torch.uint8) for part in images.split(CHUNK)])


def _seen(part: Tensor) -> tuple[float, float, bool]:
    """Least value, largest value, and whether all are whole numbers."""
    if not bool(torch.isfinite(part).all()):
        raise ValueError(_error_line("values that are not finite (NaN or infinity)"))
    return float(part.amin()), float(part.amax()), bool((part == part.round()).all())


def _scale(seen: list[tuple[float, float, bool]], *, floats: bool) -> int:
    """What makes values bytes: 1, or 255 for floats in [0, 1]."""
    low, high = min(each[0] for each in seen), max(each[1] for each in seen)
    if floats and low >= 0 and high <= 1:
        return 255
    if low >= 0 and high <= 255 and all(each[2] for each in seen):
        return 1
    remedy = "floats are taken in [0, 1]" if floats else _OF_16_BITS
    if low < 0:
        remedy = "give images as they were before normalisation"
    raise ValueError(_error_line(f"values from {low:g} to {high:g}", remedy))
