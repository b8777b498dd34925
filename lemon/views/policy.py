"""View policies: typed fields, one small YAML each in ``conf/presets/views``.

The policies a0, a1, a1_gray, a1_gmm1 and a1_gmm10 are those of the LEMON paper's appendix (arXiv 2603.25802);
``moco_asymmetric`` has MoCo v3's two different views. Where the appendix is silent or says two things, a field holds
the choice: the probability of blur (0.5), its kernel (9 px), grayscale inside a1 (none), the mixture's colour space
(LAB) and probability (1), and what a0's crop is taken from (the 40x40 px crop, as for a1).
"""

from __future__ import annotations

import os
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from lemon.encoders.config import LEMON_MEAN, LEMON_STD
from lemon.errors import ConfigError
from lemon.runtime.config import AnyPath, Settings, preset_names, read_preset, validate

N = TypeVar("N", int, float)


def ordered(limits: tuple[N, N]) -> tuple[N, N]:
    """Limits as they are; raises ValueError for [high, low]."""
    if limits[0] > limits[1]:
        raise ValueError(f"expected [low, high] with low <= high, got {list(limits)}")
    return limits


Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Range = Annotated[tuple[float, float], AfterValidator(ordered)]
ShareRange = Annotated[tuple[Share, Share], AfterValidator(ordered)]
Ratio = Annotated[float, Field(ge=1 / 40, le=40)]
"""Of a box's sides: beyond, it would be thinner than a pixel of the 40x40 px crop."""
RatioRange = Annotated[tuple[Ratio, Ratio], AfterValidator(ordered)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(ordered)]


class Crop(Settings):
    """RandomResizedCrop of the 40x40 px crop."""

    scale: ShareRange = Field((1.0, 1.0), description="share of the 40x40 px area that is kept")
    ratio: RatioRange = Field((3 / 4, 4 / 3), description="width / height")


class Jitter(Settings):
    """ColorJitter; the four operations come in an order drawn for each sample."""

    p: Probability = 0.0
    brightness: float = Field(0.0, ge=0, description="factor in [max(0, 1 - x), 1 + x]")
    contrast: float = Field(0.0, ge=0, description="factor in [max(0, 1 - x), 1 + x]")
    saturation: float = Field(0.0, ge=0, description="factor in [max(0, 1 - x), 1 + x]")
    hue: float = Field(0.0, ge=0, le=0.5, description="shift in [-x, x], in turns")


class Blur(Settings):
    """GaussianBlur."""

    p: Probability = 0.0
    sigma: PositiveRange = Field((0.1, 2.0), description="standard deviation in px of the view")
    kernel_px: int = Field(9, ge=3, description="side of the kernel, odd")

    @model_validator(mode="after")
    def _odd(self) -> Self:
        if self.kernel_px % 2 == 0:
            raise ValueError(f"kernel_px={self.kernel_px}: expected an odd number")
        return self


class Solarize(Settings):
    """Inversion of the values at or above a threshold."""

    p: Probability = 0.0
    threshold: float = Field(128 / 255, ge=0, le=1, description="share of the brightest grey level")


class Erasing(Settings):
    """RandomErasing, to black before normalisation."""

    p: Probability = 0.0
    scale: ShareRange = Field((0.1, 0.3), description="share of the view that is erased")
    ratio: RatioRange = Field((0.8, 1.2), description="height / width")


class ViewRecipe(Settings):
    """How one of the two views is made; every default is off."""

    rotation_degrees: float = Field(0.0, ge=0, le=360, description="RotationCrop: angle in [0, x); 0 is a centre crop")
    crop: Crop = Crop()
    flip_p: Probability = Field(0.0, description="horizontal flip")
    jitter: Jitter = Jitter()
    grayscale_p: Probability = 0.0
    blur: Blur = Blur()
    solarize: Solarize = Solarize()
    erasing: Erasing = Erasing()


class LocalCrops(Settings):
    """What DINOv2's local crops change in the recipe of view A."""

    scale: ShareRange = Field((0.05, 0.32), description="share of the 40x40 px area that is kept")
    blur_p: Probability = 0.5


class Stain(Settings):
    """Stain augmentation of the stored cell, before everything else; both views draw their own."""

    kind: Literal["none", "gmm", "macenko"] = "none"
    p: Probability = 1.0
    space: Literal["lab", "hsv", "hed"] = Field("lab", description="gmm: colour space of the statistics")
    components: int = Field(1, ge=1, description="gmm: Gaussians in the mixture")
    statistics: AnyPath | None = Field(None, description="gmm: the file that lemon fit-stain wrote")
    alpha: PositiveRange = Field((0.8, 1.2), description="macenko: factor of a concentration")
    beta: Range = Field((-0.1, 0.1), description="macenko: shift of a concentration")


class Policy(Settings):
    """A pair of view recipes, what precedes them (stain) and what follows them (normalisation)."""

    name: str
    view_a: ViewRecipe
    view_b: ViewRecipe | None = Field(None, description="null: as view_a")
    local: LocalCrops = LocalCrops()
    stain: Stain = Stain()
    mean: tuple[float, float, float] = LEMON_MEAN
    std: tuple[Positive, Positive, Positive] = LEMON_STD

    @property
    def recipes(self) -> tuple[ViewRecipe, ViewRecipe]:
        """The recipes of views A and B."""
        return self.view_a, self.view_b or self.view_a

    @property
    def local_recipe(self) -> ViewRecipe:
        """View A's recipe with the crop and blur of DINOv2's local crops, and no solarisation."""
        crop = self.view_a.crop.model_copy(update={"scale": self.local.scale})
        blur = self.view_a.blur.model_copy(update={"p": self.local.blur_p})
        return self.view_a.model_copy(update={"crop": crop, "blur": blur, "solarize": Solarize()})

    def with_stain_statistics(self, path: str | os.PathLike[str]) -> Policy:
        """The same policy with the fitted mixture at ``path`` (read when views are made)."""
        return self.model_copy(update={"stain": self.stain.model_copy(update={"statistics": str(path)})})


def policy_names() -> list[str]:
    """Names of the policies in ``conf/presets/views``."""
    return preset_names("views")


def load_policy(name_or_path: str | os.PathLike[str]) -> Policy:
    """The policy of a preset, or of the YAML file at a path (which ends in .yaml or .yml).

    Raises ConfigError for an unknown name (with the known ones) and for a wrong field.
    """
    try:
        return validate(read_preset("views", str(name_or_path)), Policy)
    except ValueError as error:
        raise ConfigError(*(f"view policy {name_or_path}: {line}" for line in str(error).splitlines())) from None
