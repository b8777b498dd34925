"""Per-sample photometric operations, in torchvision's arithmetic, one kernel for a whole batch.

Images are float in [0, 1], planar: [B, 3, P] where only values matter, [B, 3, H, W] where neighbours do. Parameters are
[B]. Public functions return new tensors; names that end in an underscore write into their first argument.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lemon.views.draws import CONTRAST, HUE, SATURATION

# torchvision's grey (its rgb_to_grayscale), ITU-R 601-2.
_RED, _GREEN, _BLUE = 0.2989, 0.587, 0.114


def luma(images: torch.Tensor) -> torch.Tensor:
    """Grey values, [B, 3, P] -> [B, P]."""
    red, green, blue = images.unbind(1)
    return torch.add(red * _RED, green, alpha=_GREEN).add_(blue, alpha=_BLUE)


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Towards black by ``factor`` [B]; [B, 3, P]."""
    return (images * factor[:, None, None]).clamp_(0, 1)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor, *, reference: slice = slice(None)) -> torch.Tensor:
    """Towards the image's mean grey by ``factor`` [B]; the mean is taken over the ``reference`` pixels of [B, 3, P]."""
    mean = luma(images[:, :, reference]).mean(dim=1)[:, None, None]
    return torch.addcmul((1 - factor)[:, None, None] * mean, images, factor[:, None, None]).clamp_(0, 1)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Towards each pixel's grey by ``factor`` [B]; 0 is grayscale; [B, 3, P]."""
    grey = luma(images).mul_((1 - factor)[:, None])
    return torch.addcmul(grey[:, None], images, factor[:, None, None]).clamp_(0, 1)


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turn the hue of the HSV hexcone by ``shift`` [B] turns; [B, 3, P].

    The same map as RGB -> HSV -> RGB, but without comparisons, which cost more than arithmetic on a CPU. With value v,
    least l and chroma c = v - l, the pixel lies (v + g + b - r - 2 l) / c sixths of a turn from red, towards green if
    g >= b and towards blue otherwise. At hue h in [0, 6) red is l + c * clamp(|h - 3| - 1, 0, 1); green and blue are
    the same with 2 - |h - 2| and 2 - |h - 4|.
    """
    red, green, blue = images.unbind(1)
    value = torch.maximum(red, torch.maximum(green, blue))
    least = torch.minimum(red, torch.minimum(green, blue))
    chroma = value - least
    distance = (value + green).add_(blue).sub_(red).sub_(least, alpha=2)
    # The floor only matters where chroma is 0; there every hue gives grey.
    turns = torch.copysign(distance, green - blue).div_(chroma.clamp_min(1e-12).mul_(6)).add_(shift[:, None])
    hue = turns.sub_(turns.floor()).mul_(6)  # [B, P]
    channel = torch.arange(3, device=images.device)[:, None]
    is_red = (channel == 0).to(images.dtype)
    turned = (hue[:, None] - (2 * channel + 3 * is_red)).abs_()  # |h - 3|, |h - 2|, |h - 4|
    turned = torch.addcmul(2 - 3 * is_red, turned, 2 * is_red - 1).clamp_(0, 1)
    return torch.addcmul(least[:, None], turned, chroma[:, None])


def jitter_(
    images: torch.Tensor,
    *,
    order: torch.Tensor,
    brightness: torch.Tensor,
    contrast: torch.Tensor,
    saturation: torch.Tensor,
    hue: torch.Tensor,
    reference: slice = slice(None),
) -> torch.Tensor:
    """torchvision's ColorJitter with its own factors and its own order of the operations for every sample.

    Brightness, contrast and saturation are one formula, x * f + (1 - f) * other, with other = 0, the mean grey or the
    pixel's grey; so a place in the order costs one blend for the whole batch, and hue its share of samples.

    Args:
        images: [B, 3, P], may be overwritten.
        order: [B, 4] permutations of the operations' numbers (see lemon.views.draws).
        brightness, contrast, saturation: [B] factors, 1 is neutral.
        hue: [B] shifts in turns, 0 is neutral.
        reference: the pixels over which the mean grey of contrast is taken.
    """
    factors = torch.stack([brightness, contrast, saturation], dim=1)  # [B, 3] as numbered
    hue_at = (order == HUE).int().argmax(dim=1, keepdim=True)  # [B, 1]
    for place in range(4):
        images = on_rows_(images, (hue_at[:, 0] == place) & (hue != 0), adjust_hue, hue)
        if place == 3:
            break
        # The operation at this place of the order without hue.
        operation = order.gather(1, place + (hue_at <= place).long())  # [B, 1]
        factor = factors.gather(1, operation)
        rest = 1 - factor
        grey = luma(images)  # [B, P]
        mean = grey[:, reference].mean(dim=1, keepdim=True)
        other = grey.mul_(rest * (operation == SATURATION)).add_(mean * rest * (operation == CONTRAST))
        images = images.mul_(factor[:, :, None]).add_(other[:, None]).clamp_(0, 1)
    return images


def grayscale_(images: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Grey values in all three channels of the samples that ``chosen`` [B] marks; [B, 3, P]."""
    return on_rows_(images, chosen, lambda rows: luma(rows)[:, None].repeat(1, 3, 1))


def blur_basis(*, kernel_px: int, side_px: int) -> torch.Tensor:
    """For each distance d up to half the kernel: which pixels lie d away from which, [kernel_px // 2 + 1, s * s].

    Row i of matrix d counts the pixels i - d and i + d, reflected at the border as torchvision's blur pads.
    """
    reach = kernel_px // 2
    if reach >= side_px:
        raise ValueError(
            f"blur: got kernel_px={kernel_px} for a view of {side_px} px; expected less than twice the view"
        )
    basis = torch.zeros(reach + 1, side_px, side_px)
    for distance in range(reach + 1):
        for row in range(side_px):
            for column in {row - distance, row + distance} if distance else {row}:
                reflected = abs(column) if column < side_px else 2 * (side_px - 1) - column
                basis[distance, row, reflected] += 1
    return basis.flatten(1)


def gaussian_blur_(images: torch.Tensor, *, sigma: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """torchvision's ``gaussian_blur`` with one sigma [B] a sample, reflected borders; 0 leaves a sample as it is.

    Along each axis the blur of a sample is a matrix product with its own band matrix (borders included), which is fast
    on CPU and GPU alike. [B, 3, s, s]; ``basis`` is that of ``blur_basis``.
    """
    return on_rows_(images, sigma > 0, lambda rows, width: _blur(rows, sigma=width, basis=basis), sigma)


def _blur(images: torch.Tensor, *, sigma: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    count, _, side, _ = images.shape
    distance = torch.arange(basis.shape[0], device=images.device)  # [r + 1]
    weight = torch.exp(-0.5 * (distance / sigma.clamp_min(1e-3)[:, None]) ** 2)  # [B, r + 1]
    weight = weight / (2 * weight.sum(dim=1, keepdim=True) - 1)  # all distances but 0 come twice
    band = (weight @ basis).view(count, side, side)
    along_rows = torch.bmm(images.reshape(count, 3 * side, side), band.transpose(1, 2)).view_as(images)
    return torch.matmul(band[:, None], along_rows)


def solarize_(images: torch.Tensor, *, threshold: torch.Tensor) -> torch.Tensor:
    """1 - x where x >= ``threshold`` [B]; a threshold above 1 leaves a sample as it is; [B, 3, s, s]."""
    return on_rows_(
        images,
        threshold <= 1,
        lambda rows, limit: torch.where(rows >= limit[:, None, None, None], 1 - rows, rows),
        threshold,
    )


def erase_(images: torch.Tensor, *, box: torch.Tensor) -> torch.Tensor:
    """Black inside each sample's box, [B, 4] top, left, height, width in px; [B, 3, s, s]."""
    at = torch.arange(images.shape[-1], device=images.device)
    top, left, height, width = box[:, :, None].unbind(1)  # [B, 1] each
    rows, columns = (at >= top) & (at < top + height), (at >= left) & (at < left + width)  # [B, s]
    inside = rows[:, None, :, None].to(images.dtype) * columns[:, None, None, :]  # [B, 1, s, s]
    return images.mul_(1 - inside)


def on_rows_(
    images: torch.Tensor, chosen: torch.Tensor, operation: Callable[..., torch.Tensor], *parameters: torch.Tensor
) -> torch.Tensor:
    """``operation(images, *parameters)`` for the samples that ``chosen`` [B] marks, the others unchanged.

    On a CPU only those samples are computed. Elsewhere, and under torch.compile, all are and the result is selected:
    counting them would make the host wait for the device.
    """
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        keep = chosen.view(-1, *(1,) * (images.ndim - 1))
        return torch.where(keep, operation(images, *parameters), images)
    rows = chosen.nonzero().squeeze(1)
    if len(rows) == 0:
        return images
    if len(rows) == len(images):
        return operation(images, *parameters)
    selected = operation(images.index_select(0, rows), *(p.index_select(0, rows) for p in parameters))
    return images.index_copy_(0, rows, selected)
