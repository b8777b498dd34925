"""Settings of fetching slides."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from lemon.curate.config import CELLS_FOLDER, CurateConfig, nested_curate_config
from lemon.nuclei.config import SegmenterChoice
from lemon.runtime.config import AnyPath, Frozen, LocalPath, NameOrPath

COHORT_FILE = "cohort.parquet"
"""Where in its output ``lemon fetch`` lists its slides."""


class DownloadConfig(Frozen):
    """How files are downloaded."""

    parallel: int = Field(4, ge=1, description="files at a time; not with stream, see ahead")
    attempts: int = Field(5, ge=1, description="attempts in a row that bring nothing new before a file has failed")
    timeout_s: float = Field(60.0, gt=0, description="longest silence of the server")
    backoff_s: float = Field(1.0, ge=0, description="first wait between attempts; it doubles, with jitter")
    reserve_gb: float = Field(5.0, ge=0, description="free space that is left on the disk")


class FetchConfig(Frozen):
    """``lemon fetch``: slides of TCGA from the Genomic Data Commons, kept, or curated and dropped one by one."""

    output: LocalPath = Field(description="local folder of the slides, cohort.parquet and downloads/")
    organs: list[str] = Field(
        [], description="studies and organs, as [BRCA,TCGA-LUAD,kidney]; at most one of a manifest"
    )
    slides_per_organ: int | None = Field(None, ge=1, description="slides of lowest rank of each organ; null: all")
    one_per_patient: bool = Field(True, description="of each patient only the slide of lowest rank")
    manifest: LocalPath | None = Field(
        None, description="manifest (TSV) of the GDC's portal that lists the slides instead"
    )
    api: NameOrPath = Field("https://api.gdc.cancer.gov", pattern=r"^https?://", description="address of the GDC's API")
    download: DownloadConfig = DownloadConfig()
    stream: bool = Field(False, description="curate each slide as it comes, then delete it")
    ahead: int = Field(1, ge=0, description="with stream: slides that a worker downloads while it curates one")
    cells: AnyPath | None = Field(
        None, description=f"with stream: folder or s3:// prefix of the cells; null: <output>/{CELLS_FOLDER}"
    )
    segmenter: SegmenterChoice = Field({}, validate_default=True)
    curation: dict[str, Any] = Field(
        {}, description="with stream: other keys of lemon curate, as curation.cells_per_slide=500"
    )

    @field_validator("organs", mode="before")
    @classmethod
    def _wrap_single_value(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> FetchConfig:
        if self.manifest is not None and len(self.organs) > 1:
            raise ValueError("organs: got several beside a manifest, which does not tell organs apart; expected one")
        if self.manifest is None and not self.organs:
            raise ValueError("organs: missing; give organs=[BRCA,LUAD] or manifest=...")
        if self.manifest is None and "slides_per_organ" not in self.model_fields_set:
            raise ValueError("slides_per_organ: missing; give slides_per_organ=50, or null for all")
        if self.stream:
            self.curate_config()
        elif self.cells is not None or self.curation:
            raise ValueError(f"{'curation' if self.curation else 'cells'}: only with stream=true")
        return self

    def curate_config(self) -> CurateConfig:
        """The settings of the curation that ``stream`` asks for. Raises ValueError.

        Failed slides are not tried again unless ``curation.retry`` says so: the same bytes would fail
        again.
        """
        folder = self.output.rstrip("/")
        reserved = {"slides": "organs", "output": "cells", "segmenter": "segmenter"}
        values = {
            "slides": f"{folder}/{COHORT_FILE}",
            "output": self.cells or f"{folder}/{CELLS_FOLDER}",
            "segmenter": self.segmenter,
            "retry": [],
        }
        return nested_curate_config(self.curation, reserved=reserved, values=values)
