"""Convolutions of few channels, computed on blocks of 2x2 pixels.

Tensor cores multiply tiles of 64 columns or more; a layer of 16 channels leaves most of each empty. With the four
pixels of a block as channels the same layer has 64, at half the resolution: twice the multiplications for kernels of
7 px, but full tiles. Same parameters, same result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemon.nuclei.hoverfast import ConvPair


class BlockedConv2d(nn.Module):
    """A convolution [B, I, H, W] -> [B, O, H, W] of odd kernel, stride 1 and full padding; H and W are even."""

    spread: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        kernel = conv.kernel_size[0]
        radius = kernel // 2
        self.padding = (radius + 1) // 2
        blocks = torch.arange(-self.padding, self.padding + 1)
        phase = torch.arange(2)
        # Tap of the kernel by (phase out, phase in, block): none outside it.
        taps = 2 * blocks[None, None, :] + phase[None, :, None] - phase[:, None, None] + radius
        spread = taps[..., None] == torch.arange(kernel)  # [2, 2, blocks, kernel]
        self.register_buffer("spread", spread.to(conv.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out, inner = self.weight.shape[:2]
        size = 2 * self.padding + 1
        # Channels of blocks are [phase y, phase x, channel], so that a row of two pixels stays together in memory.
        weight = torch.einsum("oikl,pquk,rsvl->proqsiuv", self.weight, self.spread, self.spread)
        weight = weight.reshape(4 * out, 4 * inner, size, size).contiguous(memory_format=torch.channels_last)
        bias = None if self.bias is None else self.bias.repeat(4)
        return _from_blocks(F.conv2d(_to_blocks(x), weight, bias, padding=self.padding))


def _to_blocks(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4 C, H / 2, W / 2], channels last in memory."""
    batch, channels, height, width = x.shape
    blocks = x.permute(0, 2, 3, 1).reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
    return blocks.reshape(batch, height // 2, width // 2, 4 * channels).permute(0, 3, 1, 2)


def _from_blocks(x: Tensor) -> Tensor:
    """[B, 4 C, h, w] -> [B, C, 2 h, 2 w], channels last in memory."""
    batch, channels, height, width = x.shape
    blocks = x.permute(0, 2, 3, 1).reshape(batch, height, width, 2, 2, channels // 4).transpose(2, 3)
    return blocks.reshape(batch, 2 * height, 2 * width, channels // 4).permute(0, 3, 1, 2)


def use_blocks(net: nn.Module, *, max_channels: int, kernels: tuple[int, ...] = (7,)) -> None:
    """Put the convolutions of up to ``max_channels`` outputs and these kernels into blocks, in place.

    The parameters and their names stay.
    """
    for pair in [m for m in net.modules() if isinstance(m, ConvPair)]:
        for i, layer in enumerate(pair.block):
            if isinstance(layer, nn.Conv2d) and layer.out_channels <= max_channels and layer.kernel_size[0] in kernels:
                pair.block[i] = BlockedConv2d(layer)
