"""Export in timm's layout: config.json and model.safetensors, which ``timm.create_model("local-dir:...")`` opens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import timm
import torch
from pydantic import Field
from timm.layers import LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lemon.encoders.config import CONFIG, WEIGHTS
from lemon.encoders.finite import not_finite
from lemon.encoders.int8 import dequantise, quantise
from lemon.encoders.vit import CellTransformer, initialise_patches_and_positions, load_strictly
from lemon.errors import ConfigError
from lemon.runtime.store import locate, parse_json
from lemon.runtime.tensors import read_or_damaged_error, read_weights
from lemon.schema import CELL_PX

ARCHITECTURES = {192: "vit_tiny_patch16_224", 384: "vit_small_patch8_224", 768: "vit_base_patch8_224"}
"""timm's entry point by width; every size is spelled out in model_args besides."""


class NotFiniteError(ValueError):
    """Weights or features are not numbers; the message is one line."""


Finite = Annotated[float, Field(allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Side = Annotated[int, Field(ge=1, le=4096)]
"""What config.json may say; checked where it is read."""


@dataclass(frozen=True)
class CellInput:
    """What an encoder expects: RGB / 255, centre crop, resized to ``input_px`` (None: not resized), normalisation."""

    mean: tuple[Finite, Finite, Finite]
    std: tuple[Above0, Above0, Above0]
    um_per_px: Above0 = 0.25
    crop_px: Side = 40
    input_px: Side | None = None

    @property
    def px(self) -> int:
        """Side of the image that the network sees."""
        return self.input_px or self.crop_px


def export_encoder(
    encoder: VisionTransformer,
    destination: str | Path,
    *,
    cell_input: CellInput,
    facts: Mapping[str, Any] | None = None,
    int8: bool = False,
) -> None:
    """Write an encoder so that timm opens it with the same output.

    Args:
        encoder: what ``encoders.vit.build_vit`` makes, trained or loaded.
        destination: a folder or an s3:// prefix. config.json is written last: a folder that has it is whole.
        cell_input: kept in config.json, for timm as ``pretrained_cfg``, and under ``lemon``.
        facts: anything else to keep under ``lemon`` (name, run, fingerprint, licence); JSON values.
        int8: a quarter of the size, see ``encoders.int8``; ``load_exported`` opens it, timm does not.

    Raises:
        ValueError: crop_px (or input_px, where cells are resized) is not the encoder's.
        NotFiniteError: a weight, or a feature of a test image, is not finite; nothing was written then.
    """
    if encoder.patch_embed.img_size != (cell_input.px, cell_input.px):
        size_key = "input_px" if cell_input.input_px else "crop_px"
        raise ValueError(
            f"{size_key}={cell_input.px}: expected the encoder's input size, {encoder.patch_embed.img_size[0]}"
        )
    weights = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    check_finite(weights, source="the encoder")
    check_finite({"a feature of a test image": _tried(encoder, px=cell_input.px)}, source="the encoder")
    store, folder = locate(destination)
    with store.write(f"{folder}/{WEIGHTS}") as stream:
        stored = quantise(weights) if int8 else weights
        stream.write(safetensors.torch.save(stored, metadata={"format": "pt"}))
    with store.write(f"{folder}/{CONFIG}") as stream:
        stream.write(json.dumps(timm_config(encoder, cell_input=cell_input, facts=facts or {}), indent=2).encode())


def check_finite(weights: Mapping[str, Tensor], *, source: str) -> None:
    """Raise NotFiniteError, with the first names, for NaN or infinity among weights."""
    if wrong := list(not_finite(weights)):
        problem = f"{len(wrong)} of {len(weights)} tensors hold values that are not finite ({', '.join(wrong[:3])})"
        raise NotFiniteError(f"{source}: {problem}; expected finite weights: train again, or use an earlier checkpoint")


@torch.no_grad()
def _tried(encoder: VisionTransformer, *, px: int) -> Tensor:
    """Features of two images, a ramp from -2 to 2 and its mirror, in evaluation mode; the mode is left as it was."""
    training, weight = encoder.training, encoder.patch_embed.proj.weight
    ramp = torch.linspace(-2, 2, 3 * px * px, device=weight.device, dtype=weight.dtype).view(1, 3, px, px)
    try:
        return encoder.eval()(torch.cat([ramp, ramp.flip(-1)]))
    finally:
        encoder.train(training)


def timm_config(encoder: VisionTransformer, *, cell_input: CellInput, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json, in timm's layout, with LEMON's own keys under ``lemon``."""
    px = cell_input.px
    return {
        "architecture": ARCHITECTURES.get(encoder.embed_dim, "vit_base_patch8_224"),
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": encoder.global_pool,
        "model_args": model_args(encoder),
        "pretrained_cfg": {
            "input_size": [3, px, px],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            # timm resizes to px / crop_pct before its centre crop; for a stored image of 60 px that crops crop_px.
            "crop_pct": cell_input.crop_px / CELL_PX,
            "crop_mode": "center",
            "mean": list(cell_input.mean),
            "std": list(cell_input.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "lemon": {**facts, **asdict(cell_input)},
    }


def model_args(encoder: VisionTransformer) -> dict[str, Any]:
    """The arguments that rebuild the encoder, read from its modules."""
    block: Any = encoder.blocks[0]
    args: dict[str, Any] = {
        "img_size": encoder.patch_embed.img_size[0],
        "patch_size": encoder.patch_embed.patch_size[0],
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / encoder.embed_dim,
        "num_classes": 0,
        "global_pool": encoder.global_pool,
    }
    if isinstance(block.ls1, LayerScale):
        args["init_values"] = 1e-5  # any number: it makes timm build LayerScale, and the weights overwrite it
    return args


def as_cell_transformer(model: VisionTransformer) -> CellTransformer:
    """The same network, with weights of its own, as LEMON computes it; ``model_args`` must say all of it."""
    cells = CellTransformer(**model_args(model))
    cells.pretrained_cfg = model.pretrained_cfg
    return cells


def untrained_vit(model: VisionTransformer) -> CellTransformer:
    """The same network with random weights: those of ``build_vit`` for its sizes, drawn by torch's global generator."""
    fresh = CellTransformer(**model_args(model), weight_init="moco")
    initialise_patches_and_positions(fresh)
    return fresh


def load_exported(directory: str | Path) -> tuple[nn.Module, CellInput]:
    """Open an exported encoder: the timm model in evaluation mode, and what it expects.

    Raises:
        FileNotFoundError: the folder has no config.json or no weights.
        ConfigError: one of them is damaged; config.json has no ``lemon`` section, so scale and crop size are unknown.
    """
    folder = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; expected a folder written by lemon's export")
    label = f"{folder / CONFIG}"
    content = parse_json((folder / CONFIG).read_bytes(), dict[str, Any], label=label)
    section = content.get("lemon")
    if not isinstance(section, Mapping):
        raise ConfigError(f"{label}: got no section lemon; expected a folder written by lemon's export")
    cell_input = parse_json(json.dumps(section).encode(), CellInput, label=f"{label}: lemon")
    # Not with pretrained=True: the file says of itself which weights timm should take, and from where.
    model = read_or_damaged_error(lambda: timm.create_model(f"local-dir:{folder}", pretrained=False), label=label)
    if type(model) is VisionTransformer and content.get("model_args") == model_args(model):
        model = as_cell_transformer(model)
    source = f"{folder / WEIGHTS}"
    load_strictly(model, dequantise(read_weights(source, label=source), source=source), source=source)
    return model.eval(), cell_input
