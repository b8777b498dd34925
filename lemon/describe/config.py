"""Settings of the description of groups."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lemon.cells.config import CellsConfig
from lemon.runtime.config import AnyPath


class DescribeConfig(CellsConfig):
    """``lemon describe``: clusters or classes -> what is different about each, as a page and a table."""

    embeddings: AnyPath = Field(description="output of lemon embed")
    cells: AnyPath = Field(description="the cells table that was embedded: an output of lemon curate")
    output: AnyPath = Field("describe", description="folder or s3:// prefix of describe.html and effects.csv")
    by: Literal["cluster", "foreign_class"] = Field(
        "cluster", description="groups: clusters of the embeddings, or the classes of another program (cells_from=)"
    )
    labels: AnyPath | None = Field(None, description="CSV or Parquet with cell_id, label: groups instead of by=")
    n_cells: int = Field(20_000, ge=100, description="the cells of lowest rank over all slides")
    typical: int = Field(24, ge=1, le=200, description="pictures of typical cells of each group")
    title: str = Field("What the groups are", description="heading of the page")
