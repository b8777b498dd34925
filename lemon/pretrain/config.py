"""Settings of pretraining. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from lemon.cells.config import CellsConfig
from lemon.encoders.config import EncoderConfig
from lemon.errors import Fault
from lemon.probe.config import EXCLUDE_BENCHMARKS, BenchmarkNames, check_benchmarks, check_tasks
from lemon.runtime.config import AnyPath, Choice, LocalPath, Settings, raise_faults
from lemon.runtime.registry import Registry
from lemon.schema import VIEW_PX
from lemon.views.policy import Policy, Positive, Probability, ordered

if TYPE_CHECKING:
    from lemon.pretrain.schedules import Method

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Of a running mean, as AdamW's betas."""

NonNegative = Annotated[float, Field(ge=0)]
ProbabilityRange = Annotated[tuple[Probability, Probability], AfterValidator(ordered)]

DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"

Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
"""What torch takes as one."""

REGISTERED = r"""^[^\s/:.%"'\\][^\x00-\x1f/:.%"'\\]{0,199}$"""
"""Names that MLflow takes for a registered model and for the model of a run (MLflow 3)."""

LOCAL_STEP_PX = 8
"""Sides of local views are multiples of this: patches of 8 px."""

FULL_EPOCHS = 150
"""Of the recipe that the methods' own warmups are of."""

MIN_CELLS = 4
"""The features of fewer cells lie on a line or in a plane: every run would be reported as collapsed."""


class MethodConfig(Settings):
    """Settings of a self-supervised method: what a new one derives its own from, with a ``name`` to be chosen by."""

    durations: ClassVar[tuple[str, ...]] = ()
    """Settings in epochs of a run of FULL_EPOCHS, which shrink with a shorter one unless they are given."""

    name: str
    warmup_epochs: float = 0.0

    def fitted(self, epochs: float) -> Self:
        """The same with the durations that nobody gave shortened to a run's epochs."""
        share = min(1.0, epochs / FULL_EPOCHS)
        defaults = {name: getattr(self, name) for name in self.durations if name not in self.model_fields_set}
        return self.model_copy(update={name: value * share for name, value in defaults.items()}) if share < 1 else self

    def head_weights(self, encoder: EncoderConfig) -> tuple[int, int]:  # noqa: ARG002
        """About how many weights the heads of student and of teacher have, to estimate what a checkpoint takes."""
        return 0, 0

    def build(self, encoder: EncoderConfig, *, seed: int) -> Method:
        """The method with student and teacher of an encoder, on the CPU."""
        raise NotImplementedError

    def faults(self, encoder: EncoderConfig, policy: Policy) -> Iterator[Fault]:  # noqa: ARG002
        """What does not fit to an encoder and to views."""
        yield from ()

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name


class MoCoV3Config(MethodConfig):
    """MoCo v3 for vision transformers; the LEMON paper states no other values."""

    durations = ("warmup_epochs",)

    name: Literal["mocov3"] = "mocov3"
    hidden_dim: int = Field(4096, ge=1, description="width of projector and predictor")
    out_dim: int = Field(256, ge=1, description="width of queries and keys")
    temperature: float = Field(0.2, gt=0)
    momentum: float = Field(0.99, ge=0, le=1, description="of the teacher at the start; rises to 1 (cosine)")
    base_lr: float = Field(1.5e-4, gt=0, description="learning rate a 256 cells of batch")
    warmup_epochs: float = Field(
        40, ge=0, description=f"linear warmup, then cosine to 0; shrinks by itself in runs below {FULL_EPOCHS} epochs"
    )
    weight_decay: float = Field(0.1, ge=0, description="on all parameters")
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    freeze_patch_projection: bool = True
    chunk: int | None = Field(
        None, ge=1, description="crops whose activations are kept at a time: less memory, the same loss; null: all"
    )

    def head_weights(self, encoder: EncoderConfig) -> tuple[int, int]:
        """Projector and predictor; projector."""
        projector = self.hidden_dim * (encoder.dim + self.hidden_dim + self.out_dim)
        return projector + 2 * self.hidden_dim * self.out_dim, projector

    def build(self, encoder: EncoderConfig, *, seed: int) -> Method:
        """MoCo v3 of an encoder, on the CPU."""
        from lemon.pretrain.mocov3 import MoCoV3  # imports torch

        return MoCoV3(self, encoder, seed=seed)

    @property
    def label(self) -> str:
        """The row of the paper's Table 5."""
        return "MoCo v3"

    def faults(self, encoder: EncoderConfig, policy: Policy) -> Iterator[Fault]:  # noqa: ARG002
        """What does not fit to an encoder and to views."""
        if encoder.dim % encoder.heads:
            yield Fault("encoder.heads", encoder.heads, f"a divisor of encoder.dim={encoder.dim}")


class DINOv2Config(MethodConfig):
    """DINOv2 with its default settings; weights and ablations as in the LEMON paper."""

    durations = ("warmup_epochs", "teacher_temperature_epochs", "freeze_last_layer_epochs")

    name: Literal["dinov2"] = "dinov2"

    local_to_global: bool = Field(True, description="the local term; without it no local view is made")
    local_crops: int = Field(8, ge=0, description="local views a cell")
    local_crop_px: int = Field(24, ge=1, description="side of a local view; a multiple of encoder.patch_px")
    global_weight: float | None = Field(
        None, ge=0, description="weight of the mean of the global terms; null: their share of all view pairs"
    )
    local_weight: float | None = Field(None, ge=0, description="weight of the mean of the local terms; null: as above")

    ibot_weight: float = Field(1.0, ge=0)
    mask_probability: float = Field(0.5, ge=0, le=1, description="share of global views that are masked")
    mask_ratio: ProbabilityRange = Field((0.1, 0.5), description="least and largest share of masked patches")
    separate_ibot_head: bool = False

    regulariser: Literal["koleo", "kde", "none"] = "koleo"
    koleo_weight: float = Field(0.1, ge=0)
    kde_weight: float = Field(0.05, ge=0)
    kde_kappa: float = Field(5.0, gt=0)

    prototypes: int = Field(65536, ge=2)
    hidden_dim: int = Field(2048, ge=1, description="width of the head's layers")
    bottleneck_dim: int = Field(256, ge=1)
    chunk_rows: int = Field(2048, ge=1, description="rows whose logits over the prototypes exist at a time")
    chunk: int | None = Field(
        None, ge=1, description="crops whose activations are kept at a time: less memory, the same loss; null: all"
    )

    centering: Literal["softmax", "sinkhorn"] = "softmax"
    center_momentum: float = Field(0.9, ge=0, le=1)
    sinkhorn_iterations: int = Field(3, ge=1)
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: tuple[Positive, Positive] = Field((0.04, 0.07), description="at the start, after the warmup")
    teacher_temperature_epochs: float = Field(30, ge=0, description="shrinks as the warmup does")
    momentum: float = Field(0.992, ge=0, le=1, description="of the teacher at the start; rises to 1 (cosine)")

    base_lr: float = Field(4e-3, gt=0, description="learning rate at a batch of 1024; scaled by the square root")
    min_lr: float = Field(1e-6, ge=0)
    warmup_epochs: float = Field(10, ge=0, description=f"shrinks by itself in runs below {FULL_EPOCHS} epochs")
    weight_decay: tuple[NonNegative, NonNegative] = Field((0.04, 0.4), description="at the start, at the end (cosine)")
    layer_decay: float = Field(0.9, gt=0, le=1, description="factor of the learning rate a block, from the top")
    patch_embed_lr: float = Field(0.2, ge=0, description="further factor of the patch projection")
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    clip_norm: float | None = Field(3.0, gt=0, description="of backbone and of heads, each; null: none")
    freeze_last_layer_epochs: float = Field(1, ge=0, description="shrinks as the warmup does")

    drop_path: float = Field(0.3, ge=0, lt=1)
    layer_scale: float | None = Field(1e-5, gt=0)
    head_dim: int | None = Field(64, ge=1, description="width of an attention head: 6 heads in ViT-S; null: encoder's")

    def head_weights(self, encoder: EncoderConfig) -> tuple[int, int]:
        """Of each, one head or two."""
        head = self.hidden_dim * (encoder.dim + self.hidden_dim) + self.bottleneck_dim * (
            self.hidden_dim + self.prototypes
        )
        heads = 2 * head if self.separate_ibot_head else head
        return heads, heads

    def build(self, encoder: EncoderConfig, *, seed: int) -> Method:
        """DINOv2 of an encoder, on the CPU."""
        from lemon.pretrain.dinov2 import DINOv2  # imports torch

        return DINOv2(self, encoder, seed=seed)

    def heads(self, encoder: EncoderConfig) -> int:
        """Attention heads of an encoder."""
        return encoder.heads if self.head_dim is None else max(encoder.dim // self.head_dim, 1)

    def faults(self, encoder: EncoderConfig, policy: Policy) -> Iterator[Fault]:
        """What does not fit to an encoder and to views, and terms that leave nothing to learn."""
        if encoder.dim % (heads := self.heads(encoder)):
            key_and_value = ("encoder.heads", heads) if self.head_dim is None else ("ssl.head_dim", self.head_dim)
            yield Fault(
                *key_and_value, f"one that divides encoder.dim={encoder.dim} into equal heads, and not into {heads}"
            )
        weights = (self.global_weight, self.local_weight, self.ibot_weight, self._regulariser_weight)
        if not any(weight is None or weight for weight in weights):
            yield Fault(
                "ssl.global_weight", self.global_weight, "one weight above 0 at least: no term is left to learn by"
            )
        if not self.local_to_global:
            return
        if not self.local_crops:
            yield Fault("ssl.local_crops", 0, "1 at least; without local views set ssl.local_to_global=false")
        px = self.local_crop_px
        if px % encoder.patch_px or px % LOCAL_STEP_PX or px > VIEW_PX:
            expected = f"a multiple of encoder.patch_px={encoder.patch_px} and of {LOCAL_STEP_PX}, {VIEW_PX} at most"
            yield Fault("ssl.local_crop_px", px, expected)
        if policy.view_a.blur.kernel_px >= 2 * px:
            yield Fault(
                "views.view_a.blur.kernel_px", policy.view_a.blur.kernel_px, f"less than twice the view of {px} px"
            )

    @property
    def _regulariser_weight(self) -> float:
        return {"koleo": self.koleo_weight, "kde": self.kde_weight, "none": 0.0}[self.regulariser]

    @property
    def label(self) -> str:
        """The row of the paper's Table 5."""
        parts = ["DINOv2"]
        if not self.local_to_global:
            parts.append("no local-to-global")
        if self.regulariser != "koleo":
            parts.append({"kde": "KDE", "none": "no regulariser"}[self.regulariser])
        return ", ".join(parts)


METHODS = Registry("lemon.methods", {"mocov3": MoCoV3Config, "dinov2": DINOv2Config}, kind=MethodConfig)
MethodChoice = Annotated[MethodConfig, Choice("ssl", "mocov3", registry=METHODS)]


class FitStainConfig(Settings, CellsConfig):
    """``lemon fit-stain``: what the stain augmentation of a1_gmm1 and a1_gmm10 draws from."""

    cells: AnyPath = Field(description="output of lemon curate; the statistics are written beside it")
    space: Literal["lab", "hsv", "hed"] = Field("lab", description="colour space")
    components: int = Field(10, ge=1, description="Gaussians in the mixture")
    n_cells: int = Field(20_000, ge=10, description="cells of lowest rank that are looked at")
    seed: Seed = 0


class SelectConfig(Settings):
    """Which cells of the table: slides first, then the lowest ranks."""

    organs: list[str] | None = Field(None, description="slides of these organs")
    slides: list[str] | None = Field(None, description="slides of these ids")
    n_slides: int | None = Field(None, ge=1, description="the slides of lowest rank among those")
    n_cells: int | None = Field(None, ge=1, description="the cells of lowest rank among those slides")
    exclude_patients: list[str] = Field([], description="patients of a benchmark, to be left out")


class OnlineProbeConfig(Settings):
    """Some hundred cells that the encoder is scored on with each checkpoint: ``online/...`` in MLflow."""

    n_cells: int = Field(500, ge=10, description="cells of morphometry and of restained, which need no labels")
    labels: AnyPath | None = Field(
        None, description="CSV or Parquet with the columns cell_id, label: scored too, and the best checkpoint is kept"
    )
    cells: AnyPath | None = Field(None, description="cells table of the labels; null: the one that is trained on")


class TrainWorkers(Settings):
    """Workers of Ray Train; one worker without a cluster trains in the job's own process."""

    count: int | tuple[int, int] = Field(1, description="workers, or [least, most] for an elastic run")
    cpus: int = Field(1, ge=1, description="CPUs of a worker")
    gpus: float | None = Field(None, ge=0, description="GPUs of a worker; null: one, where the cluster has any")
    max_failures: int = Field(3, ge=0, description="losses of a worker that are mended by going on from a checkpoint")
    launcher: Literal["auto", "process", "ray"] = Field("auto", description="auto: ray for several workers")

    @property
    def in_process(self) -> bool:
        """Whether the job's own process trains."""
        return self.launcher == "process" or (self.launcher == "auto" and self.count == 1)

    @property
    def most(self) -> int:
        """Workers at most."""
        return self.count if isinstance(self.count, int) else self.count[1]

    @field_validator("count", mode="before")
    @classmethod
    def _rising(cls, value: Any) -> Any:
        counts = [value] if isinstance(value, int) else value
        pair = isinstance(value, (list, tuple)) and len(value) == 2
        numbers = (pair or isinstance(value, int)) and all(type(count) is int and count >= 1 for count in counts)
        if not numbers or list(counts) != sorted(counts):
            raise ValueError(f"got {value!r}; expected 1 or more workers, or [least, most] of an elastic run")
        return value

    @field_validator("gpus")
    @classmethod
    def _whole_above_one(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError(f"got {value:g}; expected a share of one GPU, or a whole number")
        return value

    @model_validator(mode="after")
    def _one_process_is_one_worker(self) -> TrainWorkers:
        if self.launcher == "process" and self.count != 1:
            raise ValueError(f"count={self.count} needs launcher=ray; expected count=1 with launcher=process")
        return self


def steps_of(images_per_epoch: int, batch: int, *, epochs: float = 1) -> int:
    """Optimiser steps of so many epochs; one epoch has one at least."""
    return round(epochs * max(1, round(images_per_epoch / batch)))


class PretrainConfig(Settings, CellsConfig):
    """``lemon pretrain``: cells -> encoder."""

    cells: AnyPath = Field(description="output of lemon curate, a folder or s3:// prefix")
    output: AnyPath = Field(description="folder or s3:// prefix of checkpoints and the exported encoder")
    ssl: MethodChoice = Field({}, validate_default=True)
    views: Annotated[Policy, Choice("views", "a1_gray")] = Field({}, validate_default=True)
    encoder: Annotated[EncoderConfig, Choice("encoder", "vit_s8")] = Field({}, validate_default=True)
    select: SelectConfig = SelectConfig()
    field_um: float | None = Field(
        None,
        ge=15,
        le=512,
        description="side of what the encoder sees around each nucleus, cut from the slides that the cells are of, for "
        "context=field of lemon embed; it is neither scored nor registered. null: the cells' own images, 10 um",
    )
    exclude_benchmarks: BenchmarkNames = Field("auto", description=EXCLUDE_BENCHMARKS)
    epochs: float = Field(FULL_EPOCHS, gt=0)
    images_per_epoch: int = Field(1_000_000, ge=1, description="an epoch is this many images, not a pass")
    batch: int = Field(4096, ge=2, description="of all workers together; ssl.chunk bounds the memory that it takes")
    seed: Seed = 0
    device: str = Field("auto", pattern=DEVICE, description="auto, cpu, cuda or cuda:N; of a run in one process")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU")
    compile: bool | None = Field(None, description="null: on a GPU")
    workers: TrainWorkers = TrainWorkers()
    probe: OnlineProbeConfig | None = Field(
        OnlineProbeConfig(), description="what the encoder is scored on with each checkpoint; null: nothing"
    )
    tasks: list[str] | Literal["auto"] | None = Field(
        "auto",
        description="what the encoder is scored on at the end, as of lemon probe; auto: morphometry and restained of "
        "these cells, which need no labels; null: nothing",
    )
    data: AnyPath = Field("benchmarks_data", description="folder with a subfolder for each benchmark of tasks")
    log_every: int = Field(50, ge=1, description="steps")
    checkpoint_every: int = Field(1000, ge=1, description="steps")
    keep_checkpoints: int = Field(2, ge=1, description="newest ones that are kept, besides the best")
    cache: LocalPath = Field("~/.cache/lemon", description="local folder of uncompressed images, shared by all runs")
    cache_gb: float = Field(
        200, ge=0, description="GB that the cache may take; cells that take more are streamed from the table"
    )
    register_as: str | None = Field(
        "lemon",
        pattern=REGISTERED,
        description="name of the encoder in MLflow's model registry, without / : . % and quotes; null: in none",
    )

    @model_validator(mode="before")
    @classmethod
    def _fields_are_scored_on_nothing(cls, value: Any) -> Any:
        """Probes have images of nuclei, and so has who opens an encoder of the registry."""
        if isinstance(value, dict) and value.get("field_um") is not None:
            return {"probe": None, "tasks": None, "register_as": None} | value
        return value

    @field_validator("tasks", "exclude_benchmarks", mode="before")
    @classmethod
    def _wrap_single_task(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) and value != "auto" else value

    def check_inputs(self) -> None:
        """Raises ConfigError where ``cells`` is no cells table, and for a task that is not known."""
        super().check_inputs()
        check_tasks(self.probe_tasks)
        check_benchmarks(self.exclude_benchmarks)

    @property
    def probe_tasks(self) -> list[str]:
        """Names of the tasks on which the encoder is scored at the end."""
        return self.unlabelled_tasks if self.tasks == "auto" else list(dict.fromkeys(self.tasks or []))

    @property
    def unlabelled_tasks(self) -> list[str]:
        """Names of the tasks on the run's own cells that need no labels."""
        return [f"morphometry:{self.cells}", f"restained:{self.cells}"]

    @model_validator(mode="after")
    def _fits_together(self) -> PretrainConfig:
        object.__setattr__(self, "ssl", self.ssl.fitted(self.epochs))  # the config is frozen for all others
        raise_faults([*self._run_faults(), *self._view_faults(), *self.ssl.faults(self.encoder, self.views)])
        return self

    def _run_faults(self) -> Iterator[Fault]:
        """Runs of no step, or whose learning rate never comes down; fields that would be scored as nuclei."""
        if self.field_um is not None:
            expected = f"null with field_um={self.field_um:g}: probes and registered models have images of nuclei"
            if self.probe is not None:
                yield Fault("probe", self.probe.model_dump(exclude_unset=True), expected)
            for name in ("tasks", "register_as"):
                if given := getattr(self, name):
                    yield Fault(name, given, expected)
        if self.total_steps < 1:
            steps = self.steps_per_epoch
            yield Fault("epochs", self.epochs, f"{1 / steps:g} at least: an epoch is {steps:,} steps of {self.batch:,}")
        frozen = getattr(self.ssl, "freeze_last_layer_epochs", 0.0)
        for name, got in (("warmup_epochs", self.ssl.warmup_epochs), ("freeze_last_layer_epochs", frozen)):
            if got and got >= self.epochs:
                remedy = f"train longer or set ssl.{name}={self.epochs / 10:g}"
                yield Fault(f"ssl.{name}", got, f"less than epochs={self.epochs:g}; {remedy}")
        if self.batch < 2 * self.workers.most:
            yield Fault("batch", self.batch, f"2 cells at least for each of workers.count={self.workers.most} workers")

    def _view_faults(self) -> Iterator[Fault]:
        if self.encoder.crop_px != VIEW_PX:
            yield Fault("encoder.crop_px", self.encoder.crop_px, f"{VIEW_PX}, the side of a view")
        elif VIEW_PX % self.encoder.patch_px:
            yield Fault("encoder.patch_px", self.encoder.patch_px, f"a divisor of encoder.crop_px={VIEW_PX}")
        for key, recipe in (("view_a", self.views.view_a), ("view_b", self.views.view_b)):
            if recipe is not None and recipe.blur.kernel_px >= 2 * VIEW_PX:
                got = recipe.blur.kernel_px
                yield Fault(f"views.{key}.blur.kernel_px", got, f"less than twice the view of {VIEW_PX} px")

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps an epoch: at least one."""
        return steps_of(self.images_per_epoch, self.batch)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return steps_of(self.images_per_epoch, self.batch, epochs=self.epochs)

    def result_settings(self) -> dict[str, Any]:
        """The settings that change the encoder; an output goes on only with the same."""
        names = "cells ssl views encoder select epochs images_per_epoch batch seed precision"
        fields = {} if self.field_um is None else {"field_um": self.field_um}
        return self.model_dump(mode="json", include=set(names.split())) | fields
