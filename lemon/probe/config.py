"""Settings of probing. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, field_validator

from lemon.errors import ConfigError
from lemon.runtime.config import AnyPath, Frozen, NameOrPath

BenchmarkNames = list[str] | Literal["auto"]
"""Of ``exclude_benchmarks``."""

EXCLUDE_BENCHMARKS = (
    "benchmarks whose patients are left out of the cells, as nucls or folder:mine; auto: those of tasks; []: none"
)


class HestSettings(Frozen):
    """What the paper does not say of its HEST tasks."""

    target: Literal["log1p", "counts"] = Field("log1p", description="log(1 + count), as HEST-Bench, or the bare count")
    centre: Literal["cell", "nucleus"] = Field(
        "cell", description="whose polygon's centroid is the middle of a crop; cells without a nucleus are left out"
    )


class ProbeSettings(Frozen):
    """What decides the scores of given encoders on given data."""

    protocols: list[Literal["paper", "leak-free"]] = Field(
        ["paper", "leak-free"], min_length=1, description="the paper's splits, and splits that never divide a slide"
    )
    features: list[Literal["raw", "pca256"]] = Field(
        ["raw"], min_length=1, description="embeddings as they are, their first 256 components, or both"
    )
    probes: list[Literal["linear", "knn", "hest-bench"]] = Field(
        ["linear", "knn"],
        description="linear: logistic or ridge, always; knn: classification; hest-bench: regression",
    )
    class_weight: Literal["protocol", "balanced", "none"] = Field(
        "protocol",
        description="of logistic regression; protocol: none under paper, which states none, balanced under leak-free",
    )
    bootstrap: int = Field(1000, ge=100, description="draws of whole slides for intervals")
    robustness: bool = Field(True, description="robustness over hospitals or scanners where a task knows them")
    seed: int = Field(0, ge=0, lt=1 << 32, description="of splits, inner splits and draws")
    hest: HestSettings = HestSettings()

    @field_validator("protocols", "features", "probes")
    @classmethod
    def _drop_repeats(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(value))

    @field_validator("probes")
    @classmethod
    def _require_linear(cls, value: list[str]) -> list[str]:
        if "linear" not in value:
            corrected = ",".join(["linear", *value])
            raise ValueError(
                f"got {value}; expected linear among them, which tables and figures show: probes={corrected}"
            )
        return value

    def task_options(self, name: str) -> dict[str, Any]:
        """What ``open_task`` is given for a task of this name, besides the seed."""
        return self.hest.model_dump() if name.startswith("hest-") else {}


class ProbeConfig(ProbeSettings):
    """``lemon probe``: encoders x tasks -> scores."""

    models: list[NameOrPath] = Field(
        min_length=1, description="runs, files and names of baselines; python -m lemon.encoders.registry lists"
    )
    tasks: list[str] = Field(
        min_length=1, description="names of benchmarks, or folder:NAME for labelled crops of your own"
    )
    data: AnyPath = Field("benchmarks_data", description="folder with a subfolder for each benchmark")
    output: AnyPath = Field("probe", description="folder of scores, predictions, embeddings and tables")
    device: str = Field("auto", description="auto, cpu or cuda")
    untrained: bool = Field(
        True, description="whether an untrained encoder of the same shape is scored beside each of LEMON's own"
    )
    on_training_run: bool = Field(
        True, description="whether scores go to the MLflow run that trained the encoder too, where it is known"
    )

    @field_validator("models", "tasks", "protocols", "features", "probes", mode="before")
    @classmethod
    def _wrap_single_value(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def check_inputs(self) -> None:
        """Raises ConfigError where not one task, or not one model, has a name that is known."""
        from lemon.encoders.registry import check_name as check_model
        from lemon.probe.tasks.catalogue import check_name as check_task

        for names, check in ((self.tasks, check_task), (self.models, check_model)):
            if len(faults := name_faults(names, check)) == len(names):
                raise ConfigError(*faults)

    def settings(self) -> dict[str, Any]:
        """The settings that change a score."""
        return self.model_dump(mode="json", include=set(ProbeSettings.model_fields))


def check_tasks(names: list[str]) -> None:
    """Raises ConfigError with a line for each task whose name is not known; imports no loader."""
    from lemon.probe.tasks.catalogue import check_name

    if faults := name_faults(names, check_name):
        raise ConfigError(*faults)


def check_benchmarks(names: BenchmarkNames) -> None:
    """Raises ConfigError with a line for each of ``exclude_benchmarks`` whose name is not known; imports no loader."""
    from lemon.probe.tasks.catalogue import check_benchmark

    if names != "auto" and (faults := name_faults(list(names), check_benchmark)):
        raise ConfigError(*(f"exclude_benchmarks: {fault}" for fault in faults))


def name_faults(names: list[str], check: Callable[[str], None]) -> list[str]:
    """What ``check`` says of those names that it refuses."""
    faults = []
    for name in names:
        try:
            check(name)
        except ValueError as error:
            faults.append(str(error))
    return faults
