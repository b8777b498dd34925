"""Training of HoverFast's network on images with instance maps: labelled masks, or the output of a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lemon.nuclei.hoverfast import Architecture, HoverFastNet, save_checkpoint
from lemon.slides.images import read_image

# Weights of the terms (10.21105/joss.07022).
MAPS_WEIGHT, GRADIENTS_WEIGHT, DICE_WEIGHT = 14.0, 0.1, 1 / 6
EDGE_FACTOR = 1.1
GRADIENT_KERNEL_PX = 11


@dataclass(frozen=True)
class Targets:
    """What the network is to say of one tile."""

    mask: np.ndarray  # bool [H, W]
    hv_maps: np.ndarray  # float32 [2, H, W]: horizontal, vertical; -1 to 1 across a nucleus, 0 outside
    weight: np.ndarray  # float32 [H, W]: 0 on nuclei that the tile cuts, whose maps cannot be known; 1 elsewhere
    edge: np.ndarray  # bool [H, W]: background within 2 px of a nucleus


def make_targets(instances: np.ndarray) -> Targets:
    """Targets of an instance map.

    Args:
        instances: integer [H, W], 0 is background.

    Raises:
        ValueError: not a two-dimensional integer array.
    """
    if instances.ndim != 2 or not np.issubdtype(instances.dtype, np.integer):
        raise ValueError(f"instances: got {instances.dtype} {instances.shape}, expected an integer array [H, W]")
    height, width = instances.shape
    hv_maps = np.zeros((2, height, width), np.float32)
    weight = np.ones((height, width), np.float32)
    for label, box in enumerate(ndimage.find_objects(instances), start=1):
        if box is None:
            continue
        nucleus = instances[box] == label
        rows, columns = box
        if rows.start == 0 or columns.start == 0 or rows.stop == height or columns.stop == width:
            weight[box][nucleus] = 0
            continue
        horizontal, vertical = np.broadcast_arrays(_ramp(nucleus.shape[1])[None], _ramp(nucleus.shape[0])[:, None])
        hv_maps[0][box][nucleus] = horizontal[nucleus]
        hv_maps[1][box][nucleus] = vertical[nucleus]
    mask = instances > 0
    edge = (cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0) & ~mask
    return Targets(mask=mask, hv_maps=hv_maps, weight=weight, edge=edge)


def _ramp(size_px: int) -> np.ndarray:
    return np.linspace(-1, 1, size_px, dtype=np.float32) if size_px > 1 else np.zeros(1, np.float32)


class HoverFastLoss(nn.Module):
    """14 MSE(maps) + 0.1 MSE(gradients of the maps) + cross-entropy + dice / 6 (10.21105/joss.07022).

    DEVIATION: the original takes dice of the predicted classes, which has no gradient; here of the probabilities.
    """

    class_weights: torch.Tensor
    kernel: torch.Tensor

    def __init__(self, class_weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("class_weights", torch.tensor(class_weights, dtype=torch.float32))
        self.register_buffer("kernel", gradient_kernel(GRADIENT_KERNEL_PX))

    def forward(
        self, logits: torch.Tensor, hv_maps: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The weighted terms, of which the loss is the sum.

        Args:
            logits: [B, 2, H, W].
            hv_maps: [B, 2, H, W].
            batch: stacked ``Targets``: mask int64 [B, H, W], hv_maps [B, 2, H, W], weight [B, H, W], edge [B, H, W].
        """
        mask, class_weights = batch["mask"], self.class_weights
        known = (class_weights[mask] * batch["weight"])[:, None]  # [B, 1, H, W]
        difference = hv_maps - batch["hv_maps"]
        cross_entropy = F.cross_entropy(logits, mask, weight=class_weights, reduction="none")
        nucleus = logits.softmax(dim=1)[:, 1]
        return {
            "maps": MAPS_WEIGHT * (known * difference.square()).mean(),
            "gradients": GRADIENTS_WEIGHT * (known * self._gradients(difference).square()).mean(),
            "cross_entropy": (cross_entropy * torch.where(batch["edge"], EDGE_FACTOR, 1.0)).mean(),
            "dice": DICE_WEIGHT * _dice(nucleus, mask.to(nucleus.dtype)),
        }

    def _gradients(self, hv_maps: torch.Tensor) -> torch.Tensor:
        """Gradient of the horizontal map along x and of the vertical along y; linear, so of a difference as well."""
        pad = GRADIENT_KERNEL_PX // 2
        kernels = torch.stack((self.kernel, self.kernel.t()))[:, None].to(hv_maps.dtype)  # [2, 1, k, k]
        return F.conv2d(hv_maps, kernels, padding=pad, groups=2)


def gradient_kernel(size_px: int) -> torch.Tensor:
    """float32 [size, size]: x / (x^2 + y^2) about the centre, 0 at the centre; rows are y, columns x."""
    offsets = torch.arange(size_px, dtype=torch.float32) - size_px // 2
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    return x / (x.square() + y.square()).clamp(min=1)


def _dice(probability: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    smooth = 1e-3
    overlap = (probability * truth).sum()
    return 1 - (2 * overlap + smooth) / (probability.sum() + truth.sum() + smooth)


class Tiles(Dataset):
    """One random window of each image, turned and mirrored at random; the same for the same seed and epoch.

    Args:
        pairs: (image file, instance map file) each; the map is an .npz with ``inst_map``, or an .npy, integer [H, W].
        size_px: windows are square; images must not be smaller.
        seed: of the windows.
        vary: False takes the middle of each image as it is.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], *, size_px: int, seed: int, vary: bool = True) -> None:
        self.pairs, self.size_px, self.seed, self.vary = list(pairs), size_px, seed, vary
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, instances = read_pair(*self.pairs[index])
        height, width = instances.shape
        size = self.size_px
        if min(height, width) < size:
            raise ValueError(f"{self.pairs[index][0]}: {width}x{height} px, smaller than the window of {size} px")
        if self.vary:
            rng = np.random.default_rng((self.seed, self.epoch, index))
            y, x = rng.integers(height - size + 1), rng.integers(width - size + 1)
            turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
        else:
            y, x, turns, mirrored = (height - size) // 2, (width - size) // 2, 0, False
        image, instances = (np.rot90(a[y : y + size, x : x + size], turns) for a in (image, instances))
        if mirrored:
            image, instances = image[:, ::-1], instances[:, ::-1]
        targets = make_targets(np.ascontiguousarray(instances))  # after turning, because the maps have directions
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255,  # [3, H, W]
            "mask": torch.from_numpy(targets.mask).long(),
            "hv_maps": torch.from_numpy(targets.hv_maps),
            "weight": torch.from_numpy(targets.weight),
            "edge": torch.from_numpy(targets.edge),
        }


def read_pair(image_path: Path, instances_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [H, W, 3] and int32 [H, W].

    Raises:
        ValueError: the sizes differ, or the .npz has no ``inst_map``.
    """
    image = read_image(image_path)
    stored = np.load(instances_path, allow_pickle=False)
    if isinstance(stored, np.lib.npyio.NpzFile):
        if "inst_map" not in stored:
            raise ValueError(f"{instances_path}: got arrays {sorted(stored)}, expected inst_map")
        stored = stored["inst_map"]
    if stored.shape != image.shape[:2]:
        raise ValueError(f"{instances_path}: got {stored.shape}, expected the size of its image, {image.shape[:2]}")
    return image, stored.astype(np.int32)


def class_weights_of(pairs: Sequence[tuple[Path, Path]]) -> tuple[float, float]:
    """Inverse frequencies of background and nuclei over all instance maps, that sum to 1."""
    nucleus = total = 0
    for pair in pairs:
        instances = read_pair(*pair)[1]
        nucleus, total = nucleus + int(np.count_nonzero(instances)), total + instances.size
    if nucleus in (0, total):
        raise ValueError(f"instance maps: {nucleus} of {total} px are nuclei, expected both nuclei and background")
    return nucleus / total, 1 - nucleus / total


def train(
    pairs: Sequence[tuple[Path, Path]],
    *,
    output: Path,
    validation: Sequence[tuple[Path, Path]] = (),
    architecture: Architecture | None = None,
    epochs: int = 100,
    batch: int = 16,
    tile_px: int = 1024,
    learning_rate: float = 1e-3,
    device: str = "auto",
    workers: int = 0,
    seed: int = 0,
    on_epoch: Callable[[int, float, float], None] | None = None,
) -> list[float]:
    """Train a network and write it in HoverFast's format, for ``load_checkpoint``.

    The checkpoint of the least validation loss is kept; without validation images, that of the least training loss.

    Args:
        pairs: files, see ``Tiles``; an epoch sees one window of each.
        output: checkpoint file; replaced whenever the loss is at a new low.
        workers: processes that read images.
        on_epoch: told (epoch from 1, training loss, loss by which checkpoints are kept).

    Returns:
        Mean training loss of each epoch.
    """
    if not pairs:
        raise ValueError("pairs: got none, expected at least one image with its instance map")
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    torch.manual_seed(seed)  # the network's initial weights
    net = HoverFastNet(architecture or Architecture()).to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    criterion = HoverFastLoss(class_weights_of(pairs)).to(where)
    optimiser = torch.optim.Adam(net.parameters(), lr=learning_rate)
    tiles = Tiles(pairs, size_px=tile_px, seed=seed)
    checks = Tiles(validation, size_px=tile_px, seed=seed, vary=False)
    order = torch.Generator().manual_seed(seed)
    losses, least = [], math.inf
    for epoch in range(1, epochs + 1):
        tiles.epoch = epoch
        loader = DataLoader(tiles, batch_size=batch, shuffle=True, generator=order, num_workers=workers)
        losses.append(_one_pass(net, loader, criterion=criterion, device=where, optimiser=optimiser))
        loss = losses[-1]
        if validation:
            loss = _one_pass(net, DataLoader(checks, batch_size=batch), criterion=criterion, device=where)
        if loss < least:
            least = loss
            _replace_checkpoint(net, output, epoch=epoch, loss=loss)
        if on_epoch is not None:
            on_epoch(epoch, losses[-1], loss)
    return losses


def _one_pass(
    net: HoverFastNet,
    loader: DataLoader,
    *,
    criterion: HoverFastLoss,
    device: torch.device,
    optimiser: torch.optim.Optimizer | None = None,
) -> float:
    """Mean loss over all tiles; without an optimiser the network is left as it is."""
    net.train(optimiser is not None)
    total, count = 0.0, 0
    for tensors in loader:
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        with torch.set_grad_enabled(optimiser is not None):
            logits, hv_maps = net(batch["image"].contiguous(memory_format=torch.channels_last))
            loss = torch.stack(list(criterion(logits, hv_maps, batch).values())).sum()
        if optimiser is not None:
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        total, count = total + loss.item() * len(logits), count + len(logits)
    return total / count


def _replace_checkpoint(net: HoverFastNet, output: Path, *, epoch: int, loss: float) -> None:
    """Write beside the file, then rename: a reader sees the old checkpoint or the new one."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    save_checkpoint(net, partial, epoch=epoch, best_loss_on_test=loss)
    partial.replace(output)
