"""HoverFast (10.21105/joss.07022): the network, its published checkpoints, and the segmenter built on them.

The network is a U-Net with two decoders: one gives class logits, the other the horizontal and the vertical distance
of a pixel to the centre of its nucleus. Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lemon.nuclei.hoverfast_cpu import RowwiseUNet
from lemon.nuclei.hoverfast_device import DeviceLine, hv_gradients, probability_of
from lemon.nuclei.instances import HVLimits, HVPrediction, calibrate_limits, postprocess_hv
from lemon.nuclei.levels import MIN_AREA_UM2, postprocess_by_level
from lemon.nuclei.released import weights_path
from lemon.nuclei.segmenter import Postprocess
from lemon.runtime.compiling import compile_kept
from lemon.runtime.store import local_copy
from lemon.runtime.tensors import read_metadata, read_weights

WEIGHTS_SOURCE = (
    "HoverFast's repository https://github.com/choosehappy/HoverFast offers hoverfast_crosstissue_best_model.pth "
    "(its releases; its container petroslk/hoverfast holds it in /HoverFast)"
)

PART = 2
"""Regions that a GPU computes on at a time: enough to fill it, few enough that the copies of others hide behind."""


_BOUNDS = {"n_classes": (1, 256), "in_channels": (3, 3), "depth": (1, 8), "wf": (1, 8)}
"""What a network can be that takes regions; beyond, a checkpoint would ask for any amount of memory."""


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint says of its network; the defaults are those of the published ones."""

    n_classes: int = 2
    in_channels: int = 3
    padding: bool = True
    depth: int = 3  # levels
    wf: int = 4  # level i has 2 ** (wf + i) channels
    up_mode: str = "upconv"  # or "upsample": bilinear, then a 1x1 convolution
    batch_norm: bool = True
    conv_block: str = "msunet"  # or "unet"

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            if not (isinstance(value := getattr(self, name), int) and least <= value <= most):
                raise ValueError(f"{name}: got {value!r}, expected {least} to {most}")
        if self.up_mode not in ("upconv", "upsample"):
            raise ValueError(f"up_mode: got {self.up_mode!r}, expected 'upconv' or 'upsample'")
        if self.conv_block not in ("msunet", "unet"):
            raise ValueError(f"conv_block: got {self.conv_block!r}, expected 'msunet' or 'unet'")
        if not self.padding:
            raise ValueError("padding: got False, expected True: without it the network shrinks the region")


class ConvPair(nn.Module):
    """Twice convolution, batch norm (optional) and ReLU, at one kernel size; the size of the image is kept."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers.append(nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU())
        self.block = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, C, H, W] -> [B, C', H, W]
        return self.block(x)


class MultiScaleBlock(nn.Module):
    """Two pairs of convolutions side by side, kernels 3 and 7, joined by a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.conv_3 = ConvPair(in_channels, out_channels, kernel=3, batch_norm=batch_norm)
        self.conv_7 = ConvPair(in_channels, out_channels, kernel=7, batch_norm=batch_norm)
        self.conv = nn.Conv2d(2 * out_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, C, H, W] -> [B, C', H, W]
        return self.conv(torch.cat((self.conv_3(x), self.conv_7(x)), dim=1))


def _block(in_channels: int, out_channels: int, architecture: Architecture) -> nn.Module:
    if architecture.conv_block == "msunet":
        return MultiScaleBlock(in_channels, out_channels, batch_norm=architecture.batch_norm)
    return ConvPair(in_channels, out_channels, kernel=3, batch_norm=architecture.batch_norm)


class UpBlock(nn.Module):
    """Doubles the size, joins what the encoder had at that level, and convolves."""

    def __init__(self, in_channels: int, out_channels: int, architecture: Architecture) -> None:
        super().__init__()
        if architecture.up_mode == "upconv":
            self.up: nn.Module = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        else:
            self.up = nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(in_channels, out_channels, 1)
            )
        self.conv_block = _block(in_channels, out_channels, architecture)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        # x [B, 2C, H, W], skip [B, C, 2H, 2W] -> [B, C, 2H, 2W]
        return self.conv_block(torch.cat((self.up(x), skip), dim=1))


class HoverFastNet(nn.Module):
    """float [B, 3, H, W] in [0, 1] -> (logits [B, classes, H, W], maps [B, 2, H, W]: horizontal, vertical)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        widths = [2 ** (architecture.wf + level) for level in range(architecture.depth)]
        inputs = [architecture.in_channels, *widths[:-1]]
        self.down_path = nn.ModuleList(_block(i, o, architecture) for i, o in zip(inputs, widths, strict=True))
        for suffix, outputs in (("", architecture.n_classes), ("_m", 2)):
            ups = (UpBlock(2 * width, width, architecture) for width in reversed(widths[:-1]))
            self.add_module(f"up_path{suffix}", nn.ModuleList(ups))
            self.add_module(f"last{suffix}", nn.Conv2d(widths[0], outputs, 1))

    @property
    def multiple_px(self) -> int:
        """Height and width are padded to a multiple of this inside the network."""
        return 2 ** (self.architecture.depth - 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = x.shape[-2:]
        skips = []
        x = pad_to_multiple(x, self.multiple_px)
        for level, block in enumerate(self.down_path):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        outputs = []
        for path, last in ((self.up_path, self.last), (self.up_path_m, self.last_m)):
            y = skips[-1]
            for up, skip in zip(path, reversed(skips[:-1]), strict=True):  # type: ignore[arg-type]
                y = up(y, skip)
            outputs.append(last(y)[..., :height, :width])  # type: ignore[operator]
        return outputs[0], outputs[1]


def pad_to_multiple(x: torch.Tensor, multiple_px: int) -> torch.Tensor:
    """Repeat the last row and column of [B, C, H, W] until both sizes are multiples; black would look like stain."""
    height, width = x.shape[-2:]
    pad = (0, -width % multiple_px, 0, -height % multiple_px)
    return F.pad(x, pad, mode="replicate") if any(pad) else x


def load_checkpoint(path: str | Path) -> HoverFastNet:
    """The network of a checkpoint in HoverFast's format, or of ``save_half``, in fp32 and evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: there is no such file; the message says where the published weights come from.
        ValueError: the file is no checkpoint, lacks a key, or its weights do not fit the network that it names.
    """
    with local_copy(path) as file:
        checkpoint = _read_checkpoint(file, path)
    missing = [k for k in ("model_dict", *(f.name for f in fields(Architecture))) if k not in checkpoint]
    if missing:
        raise ValueError(f"checkpoint {path}: lacks {', '.join(missing)}; expected HoverFast's format")
    try:
        net = HoverFastNet(Architecture(**{f.name: checkpoint[f.name] for f in fields(Architecture)}))
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from None
    expected, got = net.state_dict(), checkpoint["model_dict"]
    if not isinstance(got, Mapping) or not all(isinstance(value, torch.Tensor) for value in got.values()):
        raise ValueError(f"checkpoint {path}: model_dict is not tensors by name; expected HoverFast's format")
    absent, foreign = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    misfits = [k for k in expected.keys() & got.keys() if expected[k].shape != got[k].shape]
    for what, names in (
        ("lacks weights", absent),
        ("has unknown weights", foreign),
        ("has misshapen weights", misfits),
    ):
        if names:
            raise ValueError(f"checkpoint {path}: {what}: {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}")
    net.load_state_dict(got)
    return net.eval()


def save_checkpoint(net: HoverFastNet, path: str | Path, **extra: Any) -> None:
    """Write a network in HoverFast's format; ``extra`` holds plain values such as ``epoch``."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    torch.save({**extra, "model_dict": state, **asdict(net.architecture)}, path)


def save_half(net: HoverFastNet, path: str | Path) -> None:
    """Write a network as safetensors, its convolutions in float16: half the size, and nothing in it can be run."""
    state = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    state = {name: (t.half() if t.ndim > 1 else t).contiguous() for name, t in state.items()}
    save_file(state, str(path), metadata={"architecture": json.dumps(asdict(net.architecture))})


def _read_checkpoint(file: Path, path: str | Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file; {WEIGHTS_SOURCE}")
    if file.suffix == ".safetensors":
        return _read_safetensors(file, label=f"checkpoint {path}")
    # HoverFast's trainer stores the best loss as a NumPy array of no dimensions, under NumPy 1's module name.
    rebuild = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    harmless = [rebuild, (rebuild, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype]
    harmless += [type(np.dtype(kind)) for kind in (np.float32, np.float64)]
    checkpoint = read_weights(file, label=f"checkpoint {path}", safe=harmless)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"checkpoint {path}: got a {type(checkpoint).__name__}, expected a dict in HoverFast's format")
    return checkpoint


def _read_safetensors(file: Path, *, label: str) -> dict[str, Any]:
    """A file of ``save_half`` as the dict that HoverFast's format is."""
    notes = read_metadata(file, label=label)
    try:
        architecture = json.loads(notes.get("architecture", "{}"))
    except ValueError as error:
        raise ValueError(f"{label}: its architecture is no JSON ({error})") from None
    if not isinstance(architecture, dict):
        raise ValueError(f"{label}: its architecture is a {type(architecture).__name__}, expected an object")
    return {**architecture, "model_dict": read_weights(file, label=label)}


def fold_batch_norm(net: HoverFastNet) -> HoverFastNet:
    """A copy whose batch norms are folded into the convolutions before them: the same function, fewer passes."""
    net = copy.deepcopy(net).eval()
    for pair in [m for m in net.modules() if isinstance(m, ConvPair)]:
        layers = list(pair.block)
        for i, (layer, after) in enumerate(itertools.pairwise(layers)):
            if isinstance(layer, nn.Conv2d) and isinstance(after, nn.BatchNorm2d):
                pair.block[i], pair.block[i + 1] = fuse_conv_bn_eval(layer, after), nn.Identity()
    return net


def optimise(net: HoverFastNet, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """The network in the form that is fastest on a device; same inputs (of the given dtype) and outputs.

    On a CPU in fp32, networks of multi-scale blocks run row by row (see ``hoverfast_cpu``). Everywhere else: batch
    norm folded, channels last, the given precision.
    """
    device = torch.device(device)
    folded = fold_batch_norm(net).requires_grad_(False)
    if device.type == "cpu" and dtype == torch.float32 and net.architecture.conv_block == "msunet":
        return RowwiseUNet(folded)
    return folded.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def choose_precision(precision: str, *, device: torch.device) -> torch.dtype:
    """fp16 on a GPU and fp32 on a CPU unless told otherwise: plain AVX2 has no arithmetic in 16 bits."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if precision not in dtypes:
        raise ValueError(f"precision: got {precision!r}, expected auto, fp32, bf16 or fp16")
    return dtypes[precision]


class HoverFast:
    """The segmenter (see ``segmenter.Segmenter``) on HoverFast's network.

    Its weights are those of LEMON, or of a checkpoint. Predictions are ``HVPrediction``. Nuclei are divided by
    ``lemon.nuclei.levels``, or with ``markers="range"`` as HoverFast does; then the calibration of a slide is the range
    of its maps' gradients, ``HVLimits``. ``compiled`` takes a fifth off a region's time on a GPU, and half a
    minute at the first region of each size.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        batch: int,
        min_area_um2: float | None = None,
        um_per_px: float = 0.25,
        markers: str = "level",
        compiled: bool = False,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch: got {batch}, expected 1 or more regions")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.dtype = choose_precision(precision, device=self.device)
        self.batch = batch
        self.net = optimise(load_checkpoint(weights_path(checkpoint)), device=self.device, dtype=self.dtype)
        self.min_area_px = (MIN_AREA_UM2[markers] if min_area_um2 is None else min_area_um2) / um_per_px**2
        self.markers = markers
        run = compile_kept(self._run, dynamic=False) if compiled else self._run
        self._line = DeviceLine(run, self.device) if self.device.type == "cuda" else None

    def calibrate(self, samples: Sequence[np.ndarray]) -> HVLimits | None:
        """Limits of a slide: medians over its regions (uint8 [H, W, 3]) of what each region alone would take.

        DEVIATION: the original stretches the gradients to each region's own range, so that a nucleus on a seam is
        divided in one region and whole in the next; one range a slide mends that. None where no sample has nuclei, and
        for markers by level, which need none.
        """
        if self.markers == "level":
            return None
        return calibrate_limits([self.predict(np.asarray(sample)[None])[0] for sample in samples])

    @torch.inference_mode()
    def predict(self, regions: np.ndarray) -> list[HVPrediction]:
        """Masks and gradients of the maps of uint8 [B, H, W, 3] at 0.25 um/px, ``batch`` regions at a time."""
        if regions.ndim != 4 or regions.shape[-1] != 3 or regions.dtype != np.uint8:
            raise ValueError(f"regions: got {regions.dtype} {regions.shape}, expected uint8 [B, H, W, 3]")
        if self._line is not None:
            parts: Iterable[tuple[np.ndarray, np.ndarray]] = self._line.run(regions, rows=min(self.batch, PART))
        else:
            parts = self._one_after_another(regions)
        return [HVPrediction(*result) for part in parts for result in zip(*part, strict=True)]

    def _one_after_another(self, regions: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(regions), self.batch):
            pixels = torch.from_numpy(np.ascontiguousarray(regions[start : start + self.batch])).to(self.device)
            probability, gradients = self._run(pixels)
            yield probability.cpu().numpy(), gradients.cpu().numpy()

    def _run(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [B, H, W, 3] -> what ``HVPrediction`` holds: uint8 [B, H, W] and int16 [B, 2, H, W]."""
        images = pixels.permute(0, 3, 1, 2).to(self.dtype).div_(255)  # [B, 3, H, W], channels last in memory
        logits, maps = self.net(images)
        return probability_of(logits), hv_gradients(maps)

    @property
    def postprocess(self) -> Postprocess:
        """(region, HVPrediction, HVLimits or None) -> nuclei; picklable, and free of PyTorch."""
        by = postprocess_by_level if self.markers == "level" else postprocess_hv
        return functools.partial(by, min_area_px=self.min_area_px)
