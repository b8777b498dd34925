"""HoverFast's multi-scale network on a CPU, in nearly half the time of PyTorch's own convolutions.

Four fifths of the network's arithmetic are 7x7 convolutions of few channels. They run here by the Toom-Cook (Winograd)
algorithm along one axis: six output rows at once from twelve sums of input rows, each convolved by a 1x7 kernel: 14
multiplications a pixel and pair of channels where the plain form takes 49. It is algebra, not approximation; rounding
in fp32 grows to about 1e-4 of a layer's standard deviation, less than fp16 has. One axis only: on both axes rounding
would be squared, and the transforms cost as much as they save.

Everything runs in strips of rows inside buffers that are kept between calls: strips stay in the cache, and fresh pages,
which cost plain PyTorch up to half of its time at 1024 px, are not asked for. Strips are shared out to threads that
compute with one thread each: many small parallel regions would mostly wait, above all on a machine with other work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

TILE_ROWS = 6  # output rows of one Toom-Cook step
_TAPS = 7
_MARGIN = _TAPS // 2  # zero rows above and below an image
_STEPS = TILE_ROWS + _TAPS - 1
# Points of evaluation, to which infinity comes: of the symmetric sets of small fractions tried, the least rounding.
_POINTS = [Fraction(0)] + [sign * point for point in map(Fraction, ("1", "1/2", "3/2", "3/4", "3")) for sign in (1, -1)]
_STRIP_FLOATS = 3 * 2**20  # transformed input of a strip: 12 MB


def toom_cook(points: list[Fraction], *, outputs: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices A, B, G of a correlation: y = A @ ((G @ kernel) * (B @ x)), with len(x) = outputs + taps - 1.

    The transposed Toom-Cook multiplication: Blahut, Fast Algorithms for Signal Processing, 2010, section 5. Built
    in fractions, then rows are scaled to length 1 so that no step is much larger than another.

    Returns:
        A float64 [outputs, n], B [n, n], G [n, taps], n = outputs + taps - 1.

    Raises:
        ValueError: there are not n - 1 distinct points.
    """
    n = outputs + taps - 1
    if len(set(points)) != n - 1 or len(points) != n - 1:
        raise ValueError(f"points: got {len(points)} ({len(set(points))} distinct), expected {n - 1} distinct ones")

    def powers(count: int) -> np.ndarray:
        finite = [[float(p**power) for power in range(count)] for p in points]
        return np.array([*finite, [0.0] * (count - 1) + [1.0]])

    B = np.linalg.inv(powers(n)).T
    B_scale = np.linalg.norm(B, axis=1)
    A = powers(outputs).T
    A_scale = np.linalg.norm(A, axis=0)
    return A / A_scale, B / B_scale[:, None], powers(taps) * (A_scale * B_scale)[:, None]


class _Workers:
    """Threads that work on strips, each with PyTorch's own threads off and with scratch memory of its own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._local = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        if count > 1:
            # set_num_threads is the calling thread's setting, and the default of threads that have not asked yet.
            # All workers have to have made it before the default is put back.
            default = torch.get_num_threads()
            ready = threading.Barrier(count + 1)
            self._pool = ThreadPoolExecutor(
                count, thread_name_prefix="strip", initializer=torch.set_num_threads, initargs=(1,)
            )
            for _ in range(count):
                self._pool.submit(ready.wait)
            ready.wait()
            torch.set_num_threads(default)

    def strips(self, work: Callable[[int, int], None], *, rows: int, most: int, step: int = 1) -> None:
        """Call work(start, stop) over all rows, in strips of a multiple of step and of at most ``most`` rows."""
        share = -(-rows // (2 * self.count)) if self.count > 1 else rows
        size = max(1, min(most, share) // step) * step
        starts = range(0, rows, size)
        if self._pool is None or len(starts) == 1:
            for start in starts:
                self._run(work, start, min(start + size, rows))
            return
        futures = [self._pool.submit(self._run, work, start, min(start + size, rows)) for start in starts]
        for future in futures:
            future.result()

    def scratch(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Uninitialised float32 memory of this thread, kept for the next strip of that shape."""
        held: dict[tuple[int, ...], torch.Tensor] | None = getattr(self._local, "held", None)
        if held is None:
            held = self._local.held = {}
        if shape not in held:
            if sum(t.numel() for t in held.values()) > 16 * _STRIP_FLOATS:
                held.clear()
            held[shape] = torch.empty(shape)
        return held[shape]

    @staticmethod
    def _run(work: Callable[[int, int], None], start: int, stop: int) -> None:
        with torch.inference_mode():  # a setting of the thread
            work(start, stop)


class _ToomCookConv:
    """A 7x7 convolution with its ReLU, over rows of a zero-padded image."""

    def __init__(self, conv: nn.Conv2d) -> None:
        A, B, G = toom_cook(_POINTS, outputs=TILE_ROWS, taps=_TAPS)
        kernels = torch.einsum("py,oiyx->poix", torch.from_numpy(G), conv.weight.double()).float()
        self.A, self.B = torch.from_numpy(A).float(), torch.from_numpy(B).float()
        self.kernels = [k[:, :, None].contiguous(memory_format=torch.channels_last) for k in kernels]
        self.bias = _bias(conv)

    def __call__(self, rows: torch.Tensor, *, out: torch.Tensor, workers: _Workers) -> None:
        """From rows [6 t + 6, W, C] of an image into out [6 t, W, C']; row 0 of out lies 3 below row 0 of rows."""
        # Every call of PyTorch gives up Python's lock and takes it back, so that few and large ones count when threads
        # work side by side: views are taken once a strip, not once a tile.
        width, channels = rows.shape[1:]
        tiles, row = len(out) // TILE_ROWS, width * channels
        windows = rows.as_strided((tiles, _STEPS, row), (TILE_ROWS * row, row, 1))
        transformed = workers.scratch((_STEPS, tiles, row))
        for window, target in zip(windows.unbind(0), transformed.unbind(1), strict=True):
            torch.mm(self.B, window, out=target)
        images = transformed.view(_STEPS, 1, tiles, width, channels).permute(0, 1, 4, 2, 3)
        products = [
            F.conv2d(image, kernel, padding=(0, _MARGIN))
            for image, kernel in zip(images.unbind(0), self.kernels, strict=True)
        ]  # [1, C', tiles, W] each, channels last
        stacked = workers.scratch((_STEPS, tiles, width * out.shape[2]))
        torch.stack(products, out=stacked.view(_STEPS, 1, tiles, width, -1).permute(0, 1, 4, 2, 3))
        bias = self.bias.repeat(width)
        for product, target in zip(stacked.unbind(1), out.view(tiles, TILE_ROWS, -1).unbind(0), strict=True):
            torch.addmm(bias, self.A, product, out=target)
        out.relu_()


class _DirectConv:
    """A convolution of any odd kernel with its ReLU, over the rows of an image that is zero-padded above and below."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.weight = conv.weight.contiguous(memory_format=torch.channels_last)
        self.bias = _bias(conv)
        self.halo = conv.kernel_size[0] // 2

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:  # [n + 2 * halo, W, C] -> [n, W, C']
        image = rows.permute(2, 0, 1)[None]
        return F.conv2d(image, self.weight, self.bias, padding=(0, self.halo))[0].permute(1, 2, 0).relu_()


def _bias(conv: nn.Conv2d | nn.ConvTranspose2d) -> torch.Tensor:
    return conv.bias if conv.bias is not None else torch.zeros(conv.out_channels)


class _Image:
    """Rows [H, W, C] inside a buffer whose rows above and below are zero, with room for a last, partial tile."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        tiles = -(-height // TILE_ROWS)
        self.padded = torch.zeros(_MARGIN + tiles * TILE_ROWS + _MARGIN, width, channels)
        self.rows = self.padded[_MARGIN : _MARGIN + height]
        self.tiles = self.padded[_MARGIN : _MARGIN + tiles * TILE_ROWS]

    def clear_below(self) -> None:
        self.padded[_MARGIN + len(self.rows) :].zero_()


class _Block:
    """A folded multi-scale block; what follows its 1x1 convolution linearly may be merged into that."""

    def __init__(self, block: Any, *, then: nn.Conv2d | None = None) -> None:
        pairs = {k: [m for m in getattr(block, f"conv_{k}").block if isinstance(m, nn.Conv2d)] for k in (3, 7)}
        self.small = [_DirectConv(conv) for conv in pairs[3]]
        # Toom-Cook pays from 8 channels on; the RGB input is better convolved as it is.
        first, second = pairs[7]
        self.large_first = _ToomCookConv(first) if first.in_channels >= 8 else _DirectConv(first)
        self.large_second = _ToomCookConv(second)
        self.channels = second.out_channels
        weight, bias = block.conv.weight.flatten(1), _bias(block.conv)  # [O, 2C], [O]
        if then is not None:
            after = then.weight.flatten(1)
            weight, bias = after @ weight, after @ bias + _bias(then)
        self.out_channels = len(bias)
        self.join_small, self.join_large = (w.t().contiguous() for w in weight.split(self.channels, dim=1))
        self.join_bias = bias

    def __call__(self, image: _Image, *, middle: _Image, out: torch.Tensor, workers: _Workers) -> None:
        """From image (C) by way of middle (C') into out [H, W, O], which may be a slice of wider rows."""
        height, width = image.rows.shape[:2]
        most = TILE_ROWS * max(1, _STRIP_FLOATS // (_STEPS * width * max(image.padded.shape[2], self.channels)))

        def first_half(start: int, stop: int) -> None:
            rows, target = image.padded[start : stop + 2 * _MARGIN], middle.tiles[start:stop]
            if isinstance(self.large_first, _ToomCookConv):
                self.large_first(rows, out=target, workers=workers)
            else:
                target.copy_(self.large_first(rows))

        def second_half(start: int, stop: int) -> None:
            large = workers.scratch((stop - start, width, self.channels))
            self.large_second(middle.padded[start : stop + 2 * _MARGIN], out=large, workers=workers)
            stop = min(stop, height)
            small = self._small(image, start=start, stop=stop).reshape(-1, self.channels)
            joined = out[start:stop].view(-1, self.out_channels)
            torch.addmm(self.join_bias, small, self.join_small, out=joined)
            joined.addmm_(large[: stop - start].view(-1, self.channels), self.join_large)

        workers.strips(first_half, rows=len(image.tiles), most=most, step=TILE_ROWS)
        middle.clear_below()
        workers.strips(second_half, rows=len(image.tiles), most=most, step=TILE_ROWS)

    def _small(self, image: _Image, *, start: int, stop: int) -> torch.Tensor:
        """The 3x3 branch of rows start..stop: [stop - start, W, C']."""
        first = self.small[0](image.padded[start + _MARGIN - 2 : stop + _MARGIN + 2])  # rows start - 1 .. stop + 1
        if start == 0:
            first[0] = 0
        if stop == len(image.rows):
            first[-1] = 0
        return self.small[1](first)


class _Up:
    """Twice the size: a transposed convolution, or a 1x1 convolution that is then interpolated."""

    def __init__(self, up: Any) -> None:
        self.bilinear = not isinstance(up, nn.ConvTranspose2d)
        conv = up[1] if self.bilinear else up
        self.bias = _bias(conv)
        self.out_channels = conv.out_channels
        # [Cin, O] or [Cin, (y, x, O)]
        weight = conv.weight[:, :, 0, 0].t() if self.bilinear else conv.weight.permute(0, 2, 3, 1).flatten(1)
        self.weight = weight.contiguous()

    def __call__(self, low: torch.Tensor, *, out: torch.Tensor, workers: _Workers) -> None:
        """From low [h, w, C] into out [2h, 2w, O], a slice of wider rows."""
        height, width, channels = low.shape
        if self.bilinear:
            # A 1x1 convolution and an interpolation are linear and change places freely; the small image comes first.
            mixed = torch.addmm(self.bias, low.view(-1, channels), self.weight).view(height, width, -1)
            image = F.interpolate(mixed.permute(2, 0, 1)[None], scale_factor=2, mode="bilinear")
            out.copy_(image[0].permute(1, 2, 0))
            return
        quads = out.unflatten(0, (height, 2)).unflatten(2, (width, 2))  # [h, 2, w, 2, O]
        bias = self.bias.repeat(4)

        def part(start: int, stop: int) -> None:
            mixed = torch.addmm(bias, low[start:stop].view(-1, channels), self.weight)
            quads[start:stop].copy_(mixed.view(stop - start, width, 2, 2, -1).permute(0, 2, 1, 3, 4))

        workers.strips(part, rows=height, most=max(1, _STRIP_FLOATS // (4 * width * self.out_channels)))


class _Workspace:
    """Buffers of one image size: per level the joined input of the decoders, its middle, and the encoder's input."""

    def __init__(self, height: int, width: int, *, in_channels: int, widths: list[int]) -> None:
        sizes = [(height >> level, width >> level) for level in range(len(widths))]
        inputs = [in_channels, *widths[:-1]]
        self.inputs = [_Image(*size, channels) for size, channels in zip(sizes, inputs, strict=True)]
        self.middles = [_Image(*size, channels) for size, channels in zip(sizes, widths, strict=True)]
        self.joined = [_Image(*size, 2 * channels) for size, channels in zip(sizes[:-1], widths[:-1], strict=True)]
        self.decoded = [torch.empty(*size, channels) for size, channels in zip(sizes, widths, strict=True)]
        self.skips = [j.rows[..., channels:] for j, channels in zip(self.joined, widths[:-1], strict=True)]
        self.skips.append(torch.empty(*sizes[-1], widths[-1]))


class RowwiseUNet(nn.Module):
    """A folded ``HoverFastNet`` of multi-scale blocks: float32 [B, 3, H, W] -> (logits, maps), on the CPU.

    Images of a batch run one after the other. Buffers of the last image size are kept (about 450 MB at 1024 px), so
    calls from several threads wait for each other. ``threads`` defaults to PyTorch's own number.
    """

    def __init__(self, net: Any, *, threads: int | None = None) -> None:
        super().__init__()
        self.workers = _Workers(threads or torch.get_num_threads())
        self.multiple_px: int = net.multiple_px
        self.encoder = [_Block(block) for block in net.down_path]
        self.widths = [block.out_channels for block in self.encoder]
        self.in_channels: int = net.architecture.in_channels
        self.decoders = []
        for path, last in ((net.up_path, net.last), (net.up_path_m, net.last_m)):
            blocks = list(path)
            merged = [_Block(b.conv_block, then=last if b is blocks[-1] else None) for b in blocks]
            self.decoders.append(list(zip([_Up(b.up) for b in blocks], merged, strict=True)))
        self.lasts = [net.last, net.last_m]
        self._workspace: tuple[tuple[int, int], _Workspace] | None = None
        self._lock = threading.Lock()

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = x.shape[-2:]
        full = (height + -height % self.multiple_px, width + -width % self.multiple_px)
        with self._lock:
            if self._workspace is None or self._workspace[0] != full:
                self._workspace = full, _Workspace(*full, in_channels=self.in_channels, widths=self.widths)
            images = [self._one(image, self._workspace[1]) for image in x]
        logits, maps = (
            torch.stack(outputs).permute(0, 3, 1, 2)[..., :height, :width] for outputs in zip(*images, strict=True)
        )
        return logits, maps

    def _one(self, image: torch.Tensor, space: _Workspace) -> list[torch.Tensor]:
        """[C, H, W] -> [logits [H', W', classes], maps [H', W', 2]], padded sizes."""
        height, width = image.shape[-2:]
        rows = space.inputs[0].rows
        rows[:height, :width] = image.permute(1, 2, 0)
        rows[:height, width:] = rows[:height, width - 1 : width]
        rows[height:] = rows[height - 1 : height]
        for level, block in enumerate(self.encoder):
            if level:
                _max_pool(space.skips[level - 1], out=space.inputs[level].rows)
            block(space.inputs[level], middle=space.middles[level], out=space.skips[level], workers=self.workers)
        outputs = []
        for decoder, last in zip(self.decoders, self.lasts, strict=True):
            low = space.skips[-1]
            for level, (up, block) in zip(range(len(decoder) - 1, -1, -1), decoder, strict=True):
                joined = space.joined[level]
                up(low, out=joined.rows[..., : up.out_channels], workers=self.workers)
                size = joined.rows.shape[:2]
                low = space.decoded[level] if level else torch.empty(*size, block.out_channels)
                block(joined, middle=space.middles[level], out=low, workers=self.workers)
            if not decoder:
                low = low @ last.weight.flatten(1).t() + last.bias
            outputs.append(low)
        return outputs


def _max_pool(image: torch.Tensor, *, out: torch.Tensor) -> None:
    """Largest of 2x2 pixels: [H, W, C] -> out [H / 2, W / 2, C]."""
    torch.maximum(image[0::2, 0::2], image[0::2, 1::2], out=out)
    torch.maximum(out, image[1::2, 0::2], out=out)
    torch.maximum(out, image[1::2, 1::2], out=out)
