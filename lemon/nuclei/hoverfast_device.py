"""HoverFast's network host to host on a GPU: while it computes on some regions, the next go up and the last come down.

Copies run beside the network only between pinned memory and on streams of their own. Results are small: a byte a pixel
for the probability and two 16-bit numbers for the maps' gradients, computed on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lemon.nuclei.instances import GRADIENT_SCALE, HALF, NOT_FINITE

Network = Callable[[Tensor], tuple[Tensor, Tensor]]
AHEAD = 2
"""Parts that are on their way at a time, besides those that wait on the host."""


def probability_of(logits: Tensor) -> Tensor:
    """How probable it is that a pixel is nucleus: logits [B, classes, H, W], background first -> uint8 [B, H, W].

    In 255ths, by the logit of the likeliest other class less that of the background; more than ``HALF`` exactly where
    that class wins.
    """
    lead = (logits[:, 1:].amax(dim=1) - logits[:, 0]).float()
    scaled = 255 * lead.sigmoid()
    return torch.where(lead > 0, scaled.clamp(min=HALF + 1), scaled.clamp(max=HALF)).to(torch.uint8)


def hv_gradients(maps: Tensor) -> Tensor:
    """Sobel responses (5 x 5) of the horizontal map along x and of the vertical map along y.

    The original first stretches each map to [0, 1]; as the responses are stretched again afterwards and Sobel is
    linear and blind to a constant, that step changes nothing but rounding, and is left out.

    Args:
        maps: float [B, 2, H, W], horizontal and vertical, in about [-1, 1]; any float type, sides of 3 or more.

    Returns:
        int16 [B, 2, H, W] on the same device: responses times ``GRADIENT_SCALE``, ``NOT_FINITE`` where they are not.
    """
    # OpenCV takes a tenth of the convolution's time on a CPU.
    responses = (sobel_on_cpu if maps.device.type == "cpu" else sobel_as_convolution)(maps.float())
    largest = torch.iinfo(torch.int16).max
    held = torch.where(responses.isfinite(), responses.clamp(-largest, largest).round_(), NOT_FINITE)
    return held.to(torch.int16, memory_format=torch.contiguous_format)


def sobel_on_cpu(maps: Tensor) -> Tensor:
    """float32 [B, 2, H, W] on a CPU -> responses times ``GRADIENT_SCALE``, by OpenCV."""
    responses = torch.empty(maps.shape)
    for pair, out in zip(maps.contiguous().numpy(), responses.numpy(), strict=True):
        for i, image in enumerate(pair):
            cv2.Sobel(image, cv2.CV_32F, 1 - i, i, dst=out[i], ksize=5, scale=GRADIENT_SCALE)
    return responses


def sobel_as_convolution(maps: Tensor) -> Tensor:
    """float32 [B, 2, H, W] on any device -> the same responses, rounded as the device's convolutions are."""
    taps = ([-1.0, -2.0, 0.0, 2.0, 1.0], [1.0, 4.0, 6.0, 4.0, 1.0])
    along, across = (torch.tensor(each, device=maps.device) for each in taps)
    kernels = GRADIENT_SCALE * torch.stack((torch.outer(across, along), torch.outer(along, across)))[:, None]
    padded = F.pad(maps, (2, 2, 2, 2), mode="reflect").contiguous(memory_format=torch.channels_last)
    return F.conv2d(padded, kernels, groups=2)


class DeviceLine:
    """Runs parts of an array through a network on a GPU, in order, with copies beside the computation.

    Args:
        network: uint8 [b, H, W, 3] on the device -> two tensors with as many rows.
        device: a CUDA device.
    """

    def __init__(self, network: Network, device: torch.device) -> None:
        self._network, self._device = network, device
        self._up, self._compute, self._down = (torch.cuda.Stream(device) for _ in range(3))
        self._staged: list[tuple[Tensor, torch.cuda.Event]] = []

    def run(self, regions: np.ndarray, *, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The network's two results for ``rows`` regions at a time; their memory is the caller's."""
        waiting: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []
        for start in range(0, len(regions), rows):
            waiting.append(self._start(regions[start : start + rows]))
            if len(waiting) > AHEAD:
                yield _finish(*waiting.pop(0))
        for part in waiting:
            yield _finish(*part)

    def _start(self, part: np.ndarray) -> tuple[Tensor, Tensor, torch.cuda.Event]:
        """Queue a part; returns host tensors that are filled once the event has happened."""
        with torch.cuda.stream(self._up):
            pixels = self._upload(part)
        self._compute.wait_stream(self._up)
        with torch.cuda.stream(self._compute):
            pixels.record_stream(self._compute)
            results = self._network(pixels)
        self._down.wait_stream(self._compute)
        with torch.cuda.stream(self._down):
            probability, gradients = (self._download(result) for result in results)
            done = torch.cuda.Event()
            done.record()
        return probability, gradients, done

    def _upload(self, part: np.ndarray) -> Tensor:
        """Through one of a few pinned buffers, which is free again once its last copy has ended."""
        if self._staged and self._staged[0][0].shape[1:] != part.shape[1:]:
            self._staged.clear()
        if len(self._staged) < AHEAD:
            buffer, copied = torch.empty(part.shape, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()
        else:
            buffer, copied = self._staged.pop(0)
            copied.synchronize()
        if len(buffer) < len(part):
            buffer = torch.empty(part.shape, dtype=torch.uint8, pin_memory=True)
        np.copyto(buffer.numpy()[: len(part)], part)
        pixels = buffer[: len(part)].to(self._device, non_blocking=True)
        copied.record()
        self._staged.append((buffer, copied))
        return pixels

    def _download(self, result: Tensor) -> Tensor:
        result.record_stream(self._down)
        # Fresh memory each time, because the caller keeps it; torch's pinned memory is cached.
        return torch.empty(result.shape, dtype=result.dtype, pin_memory=True).copy_(result, non_blocking=True)


def _finish(probability: Tensor, gradients: Tensor, done: torch.cuda.Event) -> tuple[np.ndarray, np.ndarray]:
    done.synchronize()
    return probability.numpy(), gradients.numpy()
