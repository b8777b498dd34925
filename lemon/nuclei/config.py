"""Settings of the segmenters, each of which builds its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lemon.errors import ConfigError
from lemon.nuclei.released import weights_path
from lemon.runtime.config import AnyPath, Choice, Frozen
from lemon.runtime.registry import Registry
from lemon.runtime.store import file_fingerprint, local_copy

if TYPE_CHECKING:
    from lemon.nuclei.segmenter import Segmenter


class SegmenterConfig(Frozen):
    """Settings of a segmenter: what a new one derives its own from, with a ``name`` to be chosen by."""

    name: str

    @property
    def uses_gpu(self) -> bool:
        """Whether it computes on a GPU where there is one."""
        return False

    def build(self) -> Segmenter:
        """The segmenter. Raises ConfigError where its weights or its device are not there."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises ConfigError for what can be known to be wrong before work begins, as weights that are absent."""

    def result_settings(self) -> dict[str, Any]:
        """The settings that change which nuclei are found, weights by their content."""
        return self.model_dump()


class HematoxylinConfig(SegmenterConfig):
    """Classical segmentation by colour deconvolution and watershed; needs no weights."""

    name: Literal["hematoxylin"] = "hematoxylin"
    min_area_um2: float = Field(5.0, gt=0, description="smaller objects are dropped")

    def build(self) -> Segmenter:
        """The segmenter."""
        from lemon.nuclei.hematoxylin import Hematoxylin

        return Hematoxylin(min_area_um2=self.min_area_um2)


class HoverFastConfig(SegmenterConfig):
    """HoverFast's network, with LEMON's weights (research only, see their card) or those of a file."""

    name: Literal["hoverfast"] = "hoverfast"
    checkpoint: AnyPath | None = Field(
        None, description="path of a HoverFast checkpoint (.pth) or of .safetensors; null: the weights of LEMON"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    batch: int = Field(4, ge=1, description="regions a forward pass")
    min_area_um2: float | None = Field(
        None, gt=0, description="smaller nuclei are dropped; null: 2, or with markers=range 5, as HoverFast"
    )
    markers: Literal["level", "range"] = Field(
        "level", description="where the maps fall at all, or as HoverFast: by the range of a slide's gradients"
    )

    @property
    def uses_gpu(self) -> bool:
        """Whether it computes on a GPU where there is one."""
        return self.device != "cpu"

    def build(self) -> Segmenter:
        """The segmenter. Raises ConfigError where the device is not there."""
        from lemon.nuclei.hoverfast import HoverFast  # imports torch

        return HoverFast(
            self.checkpoint,
            device=self.device,
            precision=self.precision,
            batch=self.batch,
            min_area_um2=self.min_area_um2,
            markers=self.markers,
        )

    def check(self) -> None:
        """Raises ConfigError for a checkpoint that is absent or none."""
        from lemon.nuclei.hoverfast import load_checkpoint  # imports torch

        try:
            load_checkpoint(weights_path(self.checkpoint))
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(f"segmenter.checkpoint: {error}") from None

    def result_settings(self) -> dict[str, Any]:
        """Without what only changes the speed."""
        from lemon.nuclei.levels import MIN_AREA_UM2  # imports OpenCV

        with local_copy(weights_path(self.checkpoint)) as checkpoint:
            digest = file_fingerprint(checkpoint)
        least = self.min_area_um2 or MIN_AREA_UM2[self.markers]
        return self.model_dump(exclude={"device", "batch"}) | {"checkpoint": digest, "min_area_um2": least}


class AutoConfig(SegmenterConfig):
    """HoverFast's network with LEMON's weights (research only) where there is a GPU, hematoxylin elsewhere."""

    name: Literal["auto"] = "auto"
    min_area_um2: float | None = Field(
        None, gt=0, description="smaller nuclei are dropped; null: as the segmenter that is chosen does"
    )

    def chosen(self, *, has_gpu: bool) -> HoverFastConfig | HematoxylinConfig:
        """What it stands for."""
        given = {} if self.min_area_um2 is None else {"min_area_um2": self.min_area_um2}
        return HoverFastConfig.model_validate(given) if has_gpu else HematoxylinConfig.model_validate(given)

    def chosen_here(self) -> HoverFastConfig | HematoxylinConfig:
        """What it stands for in this process; curation chooses by its cluster and its output (``lemon.curate.job``)."""
        import torch

        return self.chosen(has_gpu=torch.cuda.is_available())

    def build(self) -> Segmenter:
        """The segmenter for this process."""
        return self.chosen_here().build()

    def result_settings(self) -> dict[str, Any]:
        """Those of the segmenter for this process."""
        return self.chosen_here().result_settings()


class ForeignConfig(SegmenterConfig):
    """A network of others by its file, see ``lemon.nuclei.foreign``."""

    checkpoint: AnyPath = Field(description="path of the network's file: TorchScript of InstanSeg, ONNX of the others")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    min_area_um2: float = Field(5.0, gt=0, description="smaller nuclei are dropped")

    @property
    def uses_gpu(self) -> bool:
        """Whether it computes on a GPU where there is one."""
        return self.device != "cpu"

    def check(self) -> None:
        """Raises ConfigError for a file that is absent or not what it should be."""
        self.build()

    def result_settings(self) -> dict[str, Any]:
        """Without what only changes the speed."""
        with local_copy(self.checkpoint) as checkpoint:
            digest = file_fingerprint(checkpoint)
        return self.model_dump(exclude={"device"}) | {"checkpoint": digest}


class InstanSegConfig(ForeignConfig):
    """InstanSeg by its TorchScript, as ``brightfield_nuclei``."""

    name: Literal["instanseg"] = "instanseg"
    mpp: float = Field(0.5, gt=0, description="um/px that the network was trained at")

    def build(self) -> Segmenter:
        """The segmenter. Raises ConfigError for a file that is absent or none."""
        from lemon.nuclei.foreign import InstanSeg  # imports torch

        return InstanSeg(self.checkpoint, device=self.device, mpp=self.mpp, min_area_um2=self.min_area_um2)


class CellViTConfig(ForeignConfig):
    """CellViT by an ONNX file."""

    name: Literal["cellvit"] = "cellvit"

    def build(self) -> Segmenter:
        """The segmenter. Raises ConfigError for a file that is absent or none, and without ONNX Runtime."""
        from lemon.nuclei.foreign import CellViT  # imports torch

        return CellViT(self.checkpoint, device=self.device, min_area_um2=self.min_area_um2)


class StarDistConfig(ForeignConfig):
    """StarDist by an ONNX file."""

    name: Literal["stardist"] = "stardist"

    def build(self) -> Segmenter:
        """The segmenter. Raises ConfigError for a file that is absent or none, and without ONNX Runtime."""
        from lemon.nuclei.foreign import StarDist  # imports torch

        return StarDist(self.checkpoint, device=self.device, min_area_um2=self.min_area_um2)


SEGMENTERS = Registry(
    "lemon.segmenters",
    {
        "auto": AutoConfig,
        "hematoxylin": HematoxylinConfig,
        "hoverfast": HoverFastConfig,
        "instanseg": InstanSegConfig,
        "cellvit": CellViTConfig,
        "stardist": StarDistConfig,
    },
    kind=SegmenterConfig,
)
SegmenterChoice = Annotated[SegmenterConfig, Choice("segmenter", "auto", registry=SEGMENTERS)]
