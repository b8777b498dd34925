"""Settings of the atlas. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lemon.cells.config import CellsConfig
from lemon.runtime.config import AnyPath, Frozen

MAX_CELLS = 100_000
"""Of a page that is one file, as in the paper's Figure 4."""

MAX_SERVED = 1_000_000


class AtlasSelect(Frozen):
    """Which slides of the table."""

    organs: list[str] | None = Field(None, description="slides of these organs")
    slides: list[str] | None = Field(None, description="slides of these ids")

    @field_validator("organs", "slides", mode="before")
    @classmethod
    def _wrap_single_value(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class AtlasConfig(CellsConfig):
    """``lemon atlas``: embeddings -> a map of cells, as a picture and as a page."""

    embeddings: AnyPath = Field(description="output of lemon embed")
    cells: AnyPath = Field(description="the cells table that was embedded: an output of lemon curate")
    output: AnyPath = Field("atlas", description="folder or s3:// prefix of atlas.html, .png, .svg and map.parquet")
    against: AnyPath | None = Field(
        None, description="output of lemon embed by another encoder: a second map, and how far neighbours agree"
    )
    k: int = Field(20, ge=1, le=500, description="with against: nearest cells of each that are compared")
    n_cells: int = Field(
        20_000,
        ge=10,
        le=MAX_SERVED,
        description=f"the cells of lowest rank over all slides; above {MAX_CELLS:,} with serve=true",
    )
    select: AtlasSelect = AtlasSelect()
    labels: AnyPath | None = Field(None, description="CSV or Parquet with cell_id, label: classes to colour by")
    show: AnyPath | None = Field(
        None,
        description="CSV or Parquet with cell_id, as next/ of lemon classify: the page opens with these cells, to be "
        "labelled one by one",
    )
    method: Literal["tsne", "umap"] = Field("tsne", description="umap needs pip install umap-learn")
    perplexity: float = Field(30, ge=2, description="of t-SNE; for UMAP the number of neighbours")
    seed: int = Field(0, ge=0)
    threads: int = Field(1, ge=1, description="of t-SNE; the map is the same in every run with the same number")
    grid: int = Field(28, ge=4, le=60, description="squares of cell images a side of the picture")
    slide_px: int = Field(4096, ge=0, le=16_384, description="longer side of each slide's picture in the page; 0: none")
    title: str = Field("Atlas of cells", description="heading of picture and page")
    serve: bool = Field(False, description="send the page from a small server on this machine alone, until Ctrl-C")
    port: int = Field(8760, ge=1, le=65535, description="of that server, on 127.0.0.1")

    @model_validator(mode="after")
    def _file_or_server(self) -> AtlasConfig:
        if self.n_cells > MAX_CELLS and not self.serve:
            raise ValueError(f"n_cells: got {self.n_cells}; expected at most {MAX_CELLS}, or serve=true")
        if self.n_cells > MAX_CELLS and self.against:
            raise ValueError(f"n_cells: got {self.n_cells} with against=; expected at most {MAX_CELLS}")
        return self

    def map_settings(self) -> dict[str, Any]:
        """The settings that change where a cell lies."""
        return self.model_dump(include={"method", "perplexity", "seed"})
