"""Settings of the report. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from lemon.runtime.config import AnyPath, Frozen, LocalPath


class ReportConfig(Frozen):
    """``lemon report``: what sweeps, probes and the atlas left -> a page, its tables and its figures."""

    experiment: list[str] = Field(
        ["scaling_sweep", "probe"], description="MLflow experiments: the outputs of their runs are shown"
    )
    sweeps: list[AnyPath] | None = Field(None, description="outputs of lemon sweep; null: those in MLflow")
    probes: list[AnyPath] | None = Field(None, description="outputs of lemon probe; null: those in MLflow")
    atlas: AnyPath | None = Field(None, description="output of lemon atlas, for Figure 4")
    views: LocalPath | None = Field(None, description="picture of the views of each policy, for Figure 5")
    paper: LocalPath | None = Field(
        "shipped",
        description="the paper's numbers: those that come with LEMON (shipped), a CSV of artefact, row, column, value, "
        "spread, or none (null)",
    )
    output: AnyPath = Field("report", description="folder or s3:// prefix of index.html, CSV, PNG and SVG")
    title: str = Field("LEMON: what was found", description="heading of the page")

    @field_validator("experiment", "sweeps", "probes", mode="before")
    @classmethod
    def _wrap_single_value(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
