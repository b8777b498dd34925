"""Settings of classification by few labels. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from lemon.cells.config import CellsConfig
from lemon.runtime.config import AnyPath, AnyPaths


class ClassifyConfig(CellsConfig):
    """``lemon classify``: a few labels and embeddings -> a class with its confidence for every nucleus."""

    labels: AnyPaths = Field(
        description="CSV or Parquet with label and cell_id, foreign_id or cluster; of several a later one corrects"
    )
    embeddings: AnyPath = Field(description="output of lemon embed")
    output: AnyPath = Field("classes", description="folder or s3:// prefix of classes/, counts.csv and the formats")
    cells: AnyPath | None = Field(
        None, description="the cells table that was embedded; null: <embeddings>/cells, if it is there"
    )
    format: list[Literal["parquet", "h5ad", "geojson"]] = Field(
        ["parquet"], description="files of each slide, as [parquet,h5ad,geojson]; parquet is always written"
    )
    next: int = Field(20, ge=0, le=500, description="cells to label next: a sheet in next/ to fill in, and its picture")
    unknown: float | None = Field(
        0.99,
        gt=0,
        le=1,
        description="a cell farther from any label than this share of labels from each other is unknown; null: none",
    )
    neighbours: int = Field(10, ge=1, description="nearest nuclei of each that make its neighbourhood")
    radius_um: float = Field(50.0, gt=0, description="farther nuclei are no neighbours")
    seed: int = Field(0, ge=0)

    @field_validator("format", mode="before")
    @classmethod
    def _wrap_single_value(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
