"""Settings of the segmenters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lemon.runtime.config import AnyPath, Frozen


class HematoxylinConfig(Frozen):
    """Classical segmentation by colour deconvolution and watershed; needs no weights."""

    name: Literal["hematoxylin"]
    min_area_um2: float = Field(5.0, gt=0, description="smaller objects are dropped")


class HoverFastConfig(Frozen):
    """HoverFast's network, with LEMON's weights (research only, see their card) or those of a file."""

    name: Literal["hoverfast"]
    checkpoint: AnyPath | None = Field(
        None, description="path of a HoverFast checkpoint (.pth) or of .safetensors; null: the weights of LEMON"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    batch: int = Field(4, ge=1, description="regions a forward pass")
    min_area_um2: float = Field(5.0, gt=0, description="smaller nuclei are dropped")


SegmenterConfig = Annotated[HematoxylinConfig | HoverFastConfig, Field(discriminator="name")]
