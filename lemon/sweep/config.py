"""Settings of a sweep. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lemon.cells.config import CellsConfig
from lemon.pretrain.config import Seed
from lemon.probe.config import EXCLUDE_BENCHMARKS, BenchmarkNames, ProbeSettings, check_benchmarks, check_tasks
from lemon.runtime.cluster import ray_address
from lemon.runtime.config import AnyPath, Choice, Frozen, Settings, plain_value

RESERVED = ("cells", "output", "seed", "tasks", "data", "exclude_benchmarks")
"""Keys of the pretraining job that the sweep itself sets."""


Overrides = dict[str, Any] | list[str]


class Point(Frozen):
    """One value of what a study varies."""

    name: str = Field(description="in tables and names of folders")
    value: str = Field(description="what is varied, in words")
    n_organs: int | None = Field(None, ge=1, description="the organs of lowest rank of their name: nested choices")
    overrides: Overrides = Field({}, description="of the pretraining job: nested values, or key=value words")


class Study(Frozen):
    """What a sweep varies: one YAML each in ``conf/presets/sweep``.

    A point may be a plain value, which is then the axis's: ``sweep.points=1000,2000``. With ``encoders``, ``points``
    has each of them with each encoder.
    """

    name: str
    axis: str | None = Field(None, description="key of the pretraining job that plain points are values of")
    points: list[Point] = Field(min_length=1)
    encoders: list[str] = Field([], description="presets; each point is trained with each of them; []: pretrain's")
    overrides: Overrides = Field({}, description="of the pretraining job, for all points")
    seeds: list[Seed] = Field([0], min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _plain_points(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "points" not in values:
            return values
        points = [_as_point(point, axis=values.get("axis")) for point in _listed(values["points"])]
        encoders = _listed(values.get("encoders", []))
        by_encoder = [_with_encoder(point, encoder) for encoder in encoders for point in points]
        return {**values, "points": by_encoder or points, "encoders": encoders}

    @model_validator(mode="after")
    def _names_differ(self) -> Study:
        names = [point.name for point in self.points]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"points: got {twice[0]!r} twice; expected a name of its own for each point")
        return self


class AshaConfig(Settings):
    """Early end of trials whose online probe falls behind (asynchronous successive halving)."""

    grace_share: float = Field(0.25, gt=0, le=1, description="share of the steps that every trial may do")
    reduction: int = Field(3, ge=2, description="of this many trials at a rung one goes on")


class SweepConfig(Settings, CellsConfig):
    """``lemon sweep``: a study's points x seeds -> pretrained, probed, compared."""

    sweep: Annotated[Study, Choice("sweep", "size")] = Field({}, validate_default=True)
    cells: AnyPath = Field(description="output of lemon curate")
    tasks: list[str] = Field(min_length=1, description="benchmarks, as of lemon probe")
    data: AnyPath = Field("benchmarks_data", description="folder with a subfolder for each benchmark")
    exclude_benchmarks: BenchmarkNames = Field("auto", description=EXCLUDE_BENCHMARKS)
    output: AnyPath = Field(description="folder of the trials and the table; one sweep each")
    plan: bool = Field(
        False, description="only print trials, cells that they need, disk and GPU-hours, and what does not fit"
    )
    seeds: list[Seed] | None = Field(None, min_length=1, description="of training; null: the study's")
    pretrain: dict[str, Any] = Field({}, description="overrides of lemon pretrain for all trials: pretrain.epochs=5")
    probe: ProbeSettings = ProbeSettings()
    launcher: Literal["auto", "process", "ray"] = Field(
        "auto", description="process: one trial after another; ray: Ray Tune; auto: ray on a cluster or for several"
    )
    max_concurrent: int | None = Field(None, ge=1, description="trials at a time; null: as many as CPUs and GPUs allow")
    max_failures: int = Field(0, ge=0, description="times that a trial that failed is begun again at once")
    asha: bool = Field(False, description="end trials early by their online probe (pretrain.probe.labels=...)")
    asha_settings: AshaConfig = AshaConfig()

    @field_validator("tasks", "seeds", "exclude_benchmarks", mode="before")
    @classmethod
    def _wrap_single_value(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, int)) and value != "auto" else value

    @field_validator("tasks")
    @classmethod
    def _drop_repeats(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(value))

    @field_validator("pretrain")
    @classmethod
    def _reject_reserved_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in RESERVED:
            if key in value:
                raise ValueError(f"got {key}; give it to the sweep itself: {'seeds' if key == 'seed' else key}=...")
        return value

    @model_validator(mode="after")
    def _launcher_fits(self) -> SweepConfig:
        if self.launcher == "process" and (self.asha or (self.max_concurrent or 1) > 1):
            raise ValueError("launcher=process runs one trial after another; asha and max_concurrent need launcher=ray")
        return self

    def check_inputs(self) -> None:
        """Raises ConfigError where ``cells`` is no cells table, or a task or benchmark has no name that is known.

        A plan may be of a table that is to be made.
        """
        if not self.plan:
            super().check_inputs()
        check_tasks(self.tasks)
        check_benchmarks(self.exclude_benchmarks)

    @property
    def all_seeds(self) -> list[int]:
        """Seeds of training, each once."""
        return list(dict.fromkeys(self.seeds or self.sweep.seeds))

    @property
    def on_ray(self) -> bool:
        """Whether Ray Tune runs the trials."""
        several = self.asha or (self.max_concurrent or 1) > 1 or ray_address() is not None
        return self.launcher == "ray" or (self.launcher == "auto" and several)


def _as_point(value: Any, *, axis: str | None) -> dict[str, Any]:
    """A plain value as a point; 10000 is named 10k."""
    if isinstance(value, Mapping):
        return {"value": value.get("name", ""), **value}
    if axis is None:
        raise ValueError(f"points: got the plain value {value!r}; expected name and overrides, or sweep.axis=KEY")
    value = plain_value(value) if isinstance(value, str) else value
    return {"name": _short(value), "value": str(value), "overrides": {axis: value}}


def _with_encoder(point: dict[str, Any], encoder: Any) -> dict[str, Any]:
    """A point trained with one of the study's encoders; what is wrong in it is left for its fields to tell."""
    overrides = point.get("overrides", {})
    if isinstance(overrides, Mapping):
        overrides = {**overrides, "encoder": encoder}
    elif isinstance(overrides, list):
        overrides = [*overrides, f"encoder={encoder}"]
    names = {key: point[key] + end for key, end in (("name", f"-{encoder}"), ("value", f", {encoder}")) if key in point}
    return {**point, **names, "overrides": overrides}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _short(value: Any) -> str:
    if isinstance(value, int):
        for size, letter in ((1_000_000, "M"), (1_000, "k")):
            if value and value % size == 0:
                return f"{value // size}{letter}"
    return str(value)
