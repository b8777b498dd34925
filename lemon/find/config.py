"""Settings of the search for neighbours. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from lemon.cells.config import CellsConfig
from lemon.runtime.config import AnyPath, LocalPath, NameOrPath
from lemon.schema import CELL_MPP


class FindConfig(CellsConfig):
    """``lemon find``: a nucleus -> the nuclei most like it over all slides, as a table and a picture."""

    embeddings: AnyPath = Field(description="output of lemon embed")
    cell: list[str] | None = Field(None, description="id of a cell among them, or several; this or image")
    image: list[LocalPath] | None = Field(None, description="picture of a nucleus, in its middle, or several")
    image_mpp: float = Field(CELL_MPP, gt=0, description="um a px of these pictures")
    k: int = Field(50, ge=1, le=1000, description="neighbours of each")
    output: AnyPath = Field("neighbours", description="folder or s3:// prefix of neighbours.parquet, .csv and .png")
    cells: AnyPath | None = Field(
        None, description="the cells table that was embedded, for the picture; null: <embeddings>/cells, if it is there"
    )
    index: LocalPath | None = Field(None, description="folder of the index; null: <embeddings>/index")
    probes: int = Field(32, ge=1, description="lists of the index that are looked through: more find more, slower")
    model: NameOrPath | None = Field(
        None, description="with image: the encoder that made the embeddings, where its name no longer leads to it"
    )

    @field_validator("cell", "image", mode="before")
    @classmethod
    def _wrap_single_value(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind_of_query(self) -> FindConfig:
        if bool(self.cell) == bool(self.image):
            got = "cell=... and image=..." if self.cell else "neither cell=... nor image=..."
            raise ValueError(f"got {got}; expected exactly one of the two")
        return self
