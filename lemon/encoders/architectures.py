"""The networks of the registry, with random weights: timm's, transformers' DINOv2, and VOLTA's ResNet."""

from __future__ import annotations

import pkgutil
from typing import Any

import timm
import torch
from timm.layers import SwiGLUPacked
from torch import Tensor, nn

from lemon.encoders import config
from lemon.encoders.preact import PreActResNet
from lemon.encoders.registry import CLASS_AND_MEAN, EncoderEntry
from lemon.encoders.vit import build_vit, seeded
from lemon.encoders.weights import MissingWeightsError

LEMON_SIZES = {size.name: size for size in (config.VIT_S8, config.VIT_B8, config.VIT_TINY8, config.VIT_MINI8)}


class TokenPool(nn.Module):
    """The embedding from the tokens of a transformer: the class token, with the mean of the patches behind it if asked.

    Args:
        backbone: images -> tokens [B, T, D], or what transformers returns.
        prefix: tokens before the patches: the class token and the registers, which are left out.
        with_mean: add the mean of the patches.
    """

    def __init__(self, backbone: nn.Module, *, prefix: int, with_mean: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.prefix = prefix
        self.with_mean = with_mean

    def forward(self, images: Tensor) -> Tensor:
        """Normalised [B, 3, px, px] -> [B, D], or [B, 2 * D] with the mean."""
        output = self.backbone(images)
        tokens = output if isinstance(output, Tensor) else output.last_hidden_state  # [B, T, D]
        if not self.with_mean:
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, self.prefix :].mean(dim=1)], dim=1)


def build(entry: EncoderEntry, *, device: str = "cpu") -> nn.Module:
    """An encoder with random weights: normalised [B, 3, input_px, input_px] -> [B, width], in evaluation mode.

    Args:
        entry: of the registry.
        device: where it is built; ``meta`` for one without memory.

    Raises:
        MissingWeightsError: transformers is needed and absent.
    """
    with torch.device(device), seeded(0):
        if entry.source == "transformers":
            model: nn.Module = pool(dinov2_of_transformers(entry), entry)
        elif entry.architecture == "preact_resnet18":
            model = PreActResNet()
        elif entry.architecture in LEMON_SIZES:
            model = build_vit(LEMON_SIZES[entry.architecture])
        elif ":" in entry.architecture:
            model = pkgutil.resolve_name(entry.architecture)(**entry.args)
        else:
            model = timm_model(entry)
    return model.eval()


def timm_model(entry: EncoderEntry) -> nn.Module:
    """A network of timm without class head, pooled as the entry says."""
    args: dict[str, Any] = dict(entry.args)
    if args.pop("swiglu", False):
        args.update(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU)
    if entry.pooling == CLASS_AND_MEAN:
        return pool(timm.create_model(entry.architecture, num_classes=0, global_pool="", **args), entry)
    return timm.create_model(entry.architecture, num_classes=0, **args)


def pool(backbone: nn.Module, entry: EncoderEntry) -> TokenPool:
    """Add the entry's pooling to a network that returns tokens."""
    prefix = 1 + entry.args.get("reg_tokens", 0)
    return TokenPool(backbone, prefix=prefix, with_mean=entry.pooling == CLASS_AND_MEAN)


def dinov2_of_transformers(entry: EncoderEntry) -> nn.Module:
    """DINOv2 in the layout of transformers, which is an optional dependency."""
    transformers = import_transformers(entry)
    return transformers.AutoModel.from_config(transformers.Dinov2Config(image_size=entry.input_px, **entry.args))


def import_transformers(entry: EncoderEntry) -> Any:
    """The transformers library, or the line that says how to install it."""
    try:
        import transformers
    except ImportError:
        raise MissingWeightsError(
            f"{entry.name}: the package transformers is not installed; pip install 'lemon-nuclei[transformers]'"
        ) from None
    return transformers
