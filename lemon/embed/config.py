"""Settings of embedding. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from lemon.cells.config import CellsConfig
from lemon.curate.config import CELLS_FOLDER, CurateConfig, nested_curate_config
from lemon.nuclei.config import SegmenterChoice
from lemon.runtime.config import AnyPath, AnyPaths, Choice, Frozen, NameOrPath
from lemon.runtime.registry import Registry

if TYPE_CHECKING:
    from lemon.embed.context import Context

IN_PROCESS_SLIDES = 16  # up to here the 10 s that Ray takes to start are not won back on one machine


class ClusterConfig(Frozen):
    """Groups of like nuclei: k-means on the cells of lowest rank over all slides."""

    k: int | None = Field(8, ge=2, description="clusters; null: none")
    n_cells: int = Field(50_000, ge=2, description="cells of lowest rank that the centres are fitted on")
    seed: int = Field(0, ge=0)


class ContextConfig(Frozen):
    """Settings of what of its surroundings a vector holds: what a new one derives its own from."""

    name: str
    needs_all_nuclei: ClassVar[bool] = False
    """Whether a sample of a slide's nuclei does not do."""

    def open(self) -> Context:
        """The context, on the CPU. Raises ConfigError where what it needs is not there."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises ConfigError for what can be known to be wrong before work begins; imports no torch."""


class NucleusConfig(ContextConfig):
    """The vector of the nucleus's own crop."""

    name: Literal["nucleus"] = "nucleus"

    def open(self) -> Context:
        """The context."""
        from lemon.embed.context import Nucleus  # imports torch

        return Nucleus()


class NeighboursConfig(ContextConfig):
    """The own vector, then mean and standard deviation of those of the nearest nuclei of the slide."""

    name: Literal["neighbours"] = "neighbours"
    needs_all_nuclei: ClassVar[bool] = True
    k: int = Field(10, ge=1, le=1000, description="nearest nuclei that count, at most")
    radius_um: float = Field(50.0, gt=0, description="farther nuclei are no neighbours")

    def open(self) -> Context:
        """The context."""
        from lemon.embed.context import Neighbours  # imports torch

        return Neighbours(k=self.k, radius_um=self.radius_um)


class FieldConfig(ContextConfig):
    """The own vector, then that of the tissue around the nucleus, read from the slide, by another encoder."""

    name: Literal["field"] = "field"
    model: NameOrPath = Field(
        description="encoder of the field: a name as uni2-h or uni:weights.bin, or a path, as of model"
    )
    um: float = Field(56.0, ge=15, le=512, description="side of the field; 56 um are 224 px at 0.25 um/px")

    def open(self) -> Context:
        """The context. Raises ConfigError where there is no such encoder."""
        from lemon.embed.context import Field as FieldOfTissue  # imports torch
        from lemon.embed.encode import open_encoder

        return FieldOfTissue(open_encoder(self.model, key="context.model", of_cells=False), um=self.um)

    def check(self) -> None:
        """Raises ConfigError where ``model`` is no name and no path to an encoder."""
        from lemon.encoders.registry import check_name

        check_name(self.model)


CONTEXTS = Registry(
    "lemon.contexts",
    {"nucleus": NucleusConfig, "neighbours": NeighboursConfig, "field": FieldConfig},
    kind=ContextConfig,
)
ContextChoice = Annotated[ContextConfig, Choice("context", "nucleus", registry=CONTEXTS)]


class EmbedWorkers(Frozen):
    """Resources of the actors that embed; few slides on one machine are embedded in the job's own process."""

    actors: int | None = Field(None, ge=1, description="actors in the pool; null: as many as the cluster allows")
    cpus: int = Field(2, ge=1, description="CPUs of an actor")
    gpus: float | None = Field(None, ge=0, description="GPUs of an actor; null: one, where the cluster has any")
    launcher: Literal["auto", "process", "ray"] = Field(
        "auto", description=f"auto: ray on a cluster, for several actors, for more than {IN_PROCESS_SLIDES} slides"
    )

    def in_process(self, n_slides: int, *, cluster: bool) -> bool:
        """Whether the job's own process embeds; ``cluster``: whether there is a Ray cluster to join."""
        few = n_slides <= IN_PROCESS_SLIDES and not cluster and self.actors in (None, 1)
        return self.launcher == "process" or (self.launcher == "auto" and few)


class EmbedConfig(CellsConfig):
    """``lemon embed``: cells -> embeddings, and the files that other tools open."""

    model: NameOrPath = Field(
        description="output of lemon pretrain, an exported encoder, or a name that load_encoder knows"
    )
    context: ContextChoice = Field({}, validate_default=True)
    output: AnyPath = Field(description="folder or s3:// prefix of embeddings/ and of the formats")
    cells: AnyPath | None = Field(None, description="output of lemon curate; this or slides")
    slides: AnyPaths | None = Field(
        None, description="glob, folder, slide file or cohort, curated into <output>/cells first; this or cells"
    )
    segmenter: SegmenterChoice = Field({}, validate_default=True)
    curation: dict[str, Any] = Field(
        {}, description="with slides: other keys of lemon curate, as curation.region_px=512; all cells are kept"
    )
    format: list[Literal["parquet", "h5ad", "geojson", "spatialdata"]] = Field(
        ["parquet"], description="files of each slide, as [parquet,h5ad,geojson,spatialdata]; parquet is always written"
    )
    morphometry: bool = Field(
        False, description="also measure shape, stain, texture and neighbourhood of each nucleus, into .h5ad too"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="of stored embeddings")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the encoder's arithmetic")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    clusters: ClusterConfig = ClusterConfig()
    workers: EmbedWorkers = EmbedWorkers()
    max_attempts: int = Field(3, ge=1, description="crashes of an actor on one slide before it is given up")
    max_failed_share: float = Field(
        0.1, ge=0, le=1, description="share of failed or partial slides above which the exit code is 3"
    )
    overwrite: bool = Field(False, description="discard the embeddings that an earlier run left in output")

    @field_validator("format", mode="before")
    @classmethod
    def _wrap_single_value(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> EmbedConfig:
        if (self.cells is None) == (self.slides is None):
            got = "neither cells=... nor slides=..." if self.cells is None else "cells=... and slides=..."
            raise ValueError(f"got {got}; expected exactly one of the two")
        if self.slides is not None:
            kept = self.curate_config().cells_per_slide
            if kept is not None and self.context.needs_all_nuclei:
                raise ValueError(
                    f"context: got {self.context.name} with curation.cells_per_slide={kept}, a sample; "
                    "expected all nuclei: curation.cells_per_slide=null"
                )
        return self

    def check_inputs(self) -> None:
        """Raises ConfigError where ``cells`` is no cells table, or ``model`` no name and no path to an encoder."""
        super().check_inputs()
        from lemon.encoders.registry import check_name

        check_name(self.model)
        self.context.check()

    def curate_config(self) -> CurateConfig:
        """The settings of the curation that ``slides=`` asks for. Raises ValueError."""
        reserved = {"slides": "slides", "output": "output", "segmenter": "segmenter"}
        values = {
            "slides": self.slides,
            "output": f"{self.output.rstrip('/')}/{CELLS_FOLDER}",
            "segmenter": self.segmenter,
            "cells_per_slide": None,
        }
        return nested_curate_config(self.curation, reserved=reserved, values=values)
