"""Sizes of encoders, files of an export, the released normalisation. Imports no torch, and is quick to import."""

from __future__ import annotations

from pydantic import Field

from lemon.runtime.config import Settings

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""Files of an exported encoder."""

LEMON_MEAN = (0.5626308917999268, 0.3856308162212372, 0.5453570485115051)
LEMON_STD = (0.1810322254896164, 0.16682660579681396, 0.13694559037685394)
"""Normalisation of the released checkpoint (its mean_std.json): means over images of each image's mean and std."""


class EncoderConfig(Settings):
    """Size of a vision transformer; the self-supervised method decides on positions and initialisation."""

    name: str = Field(min_length=1, description="name in tables and exports")
    dim: int = Field(ge=4, multiple_of=4, description="width of a token")
    depth: int = Field(ge=1, description="transformer blocks")
    heads: int = Field(ge=1, description="attention heads; DINOv2 sets its own (ssl.head_dim)")
    patch_px: int = Field(8, ge=1, description="side of a patch")
    crop_px: int = Field(40, ge=8, description="side of a crop at 0.25 um/px")


VIT_S8 = EncoderConfig(name="vit_s8", dim=384, depth=12, heads=12)
VIT_B8 = EncoderConfig(name="vit_b8", dim=768, depth=12, heads=12)
VIT_TINY8 = EncoderConfig(name="vit_tiny8", dim=192, depth=6, heads=3)
"""For laptops: 2.7 M parameters, an eighth of ViT-S/8."""
VIT_MINI8 = EncoderConfig(name="vit_mini8", dim=192, depth=4, heads=3)
"""For two cores: 1.8 M parameters. As wide as a patch has values, so a frozen projection of patches loses nothing."""
