"""Settings of curation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lemon.errors import ConfigError
from lemon.nuclei.config import SegmenterChoice
from lemon.nuclei.given.config import CellsFrom
from lemon.runtime.config import AnyPath, AnyPaths, Frozen, LocalPath, load

CELLS_FOLDER = "cells"
"""Where in its output a job that curates on the way puts the cells."""


class TissueConfig(Frozen):
    """Which part of a slide is searched for nuclei."""

    masks: AnyPath | None = Field(
        None, description="folder of <slide_id>.png masks (non-zero is tissue) to use instead"
    )
    min_share: float = Field(0.01, ge=0, le=1, description="a region with a smaller share of tissue is skipped")
    leave_out: list[Literal["pen", "fold"]] = Field([], description="tissue in which no nuclei are searched: pen, fold")
    require_he: bool = Field(True, description="reject slides whose colours are not those of H&E")


class WorkersConfig(Frozen):
    """Resources of the slide actors; one actor works on one slide at a time."""

    actors: int | None = Field(None, ge=1, description="actors in the pool; null: as many as the cluster's CPUs allow")
    cpus: int = Field(2, ge=1, description="CPUs of an actor: processes for instances and crops")
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs of an actor; null: the share that its CPUs allow, if the segmenter computes on one",
    )
    readers: int = Field(2, ge=1, description="threads that read regions")


class CurateConfig(Frozen):
    """``lemon curate``: slides -> nuclei -> cells."""

    slides: AnyPaths = Field(description="glob, folder, slide file, or a CSV/Parquet cohort; also at s3://")
    output: AnyPath = Field(description="folder or s3:// prefix of the tables cells/ and slides/")
    segmenter: SegmenterChoice = Field({}, validate_default=True)
    cells_from: CellsFrom | None = Field(None, description="nuclei that another program found, instead of a segmenter")
    cells_per_slide: int | None = Field(
        1000, ge=1, description="cells of lowest rank kept of a slide; null, the default with cells_from, keeps all"
    )
    default_mpp: float = Field(0.25, gt=0, description="um/px assumed where a slide states none")
    max_mpp: float = Field(0.75, gt=0, description="coarser slides fail: their nuclei cannot be resolved")
    region_px: int = Field(1024, ge=256, multiple_of=8, description="side of a region at 0.25 um/px")
    overlap_px: int = Field(128, ge=80, multiple_of=2, description="overlap of neighbouring regions")
    region_limit_s: float = Field(
        120.0, gt=0, description="longest time for reading one region; a slide that exceeds it fails"
    )
    tissue: TissueConfig = TissueConfig()
    scratch: LocalPath | None = Field(
        None,
        description="local folder for slides of s3://, of an actor the one that is curated and the next; "
        "null: the system's temporary one",
    )
    workers: WorkersConfig = WorkersConfig()
    geojson: bool = Field(False, description="also write geojson/<slide>.geojson.gz for QuPath")
    retry: list[Literal["failed", "partial"]] = Field(["failed"], description="rows of an earlier run that are redone")
    max_attempts: int = Field(3, ge=1, description="crashes of a worker on one slide before it is given up")
    max_failed_share: float = Field(
        0.1, ge=0, le=1, description="share of failed slides above which the exit code is 3"
    )
    max_failed_region_share: float = Field(
        0.5, ge=0, le=1, description="share of unreadable regions that fails a slide"
    )
    overwrite: bool = Field(False, description="discard what an earlier run with other settings left in output")

    @model_validator(mode="before")
    @classmethod
    def _given_nuclei_are_all_kept(cls, value: Any) -> Any:
        """Who gives nuclei wants all of them back, unless a sample is asked for."""
        if isinstance(value, dict) and value.get("cells_from") is not None:
            return {"cells_per_slide": None} | value
        return value

    @model_validator(mode="after")
    def _overlap_fits(self) -> CurateConfig:
        if self.overlap_px * 2 > self.region_px:
            raise ValueError(f"overlap_px={self.overlap_px} exceeds half of region_px={self.region_px}")
        return self

    @property
    def uses_gpu(self) -> bool:
        """Whether nuclei are found on a GPU where there is one."""
        return self.cells_from is None and self.segmenter.uses_gpu

    def result_settings(self) -> dict[str, Any]:
        """The settings that change the rows of the tables: what the fingerprint is taken of."""
        kept = {"cells_per_slide", "default_mpp", "max_mpp", "region_px", "overlap_px", "tissue"}
        if self.cells_from is None:
            finder = {"segmenter": self.segmenter.result_settings()}
        else:
            finder = {"cells_from": self.cells_from.result_settings()}
        settings = self.model_dump(include=kept) | finder
        # Where the masks lie says nothing of them: each slide's row has the digest of its own.
        settings["tissue"]["masks"] = self.tissue.masks is not None
        return settings


def nested_curate_config(curation: dict[str, Any], *, reserved: dict[str, str], values: dict[str, Any]) -> CurateConfig:
    """The curation that is a part of another job, from that job's keys ``curation.*``.

    Args:
        curation: what was given as ``curation.*``.
        reserved: keys of curation that are not to be given so, and the job's own keys in their place.
        values: those keys' values, and the defaults of others.

    Raises:
        ValueError: one line that names the key.
    """
    for key in sorted(reserved.keys() & curation.keys()):
        raise ValueError(f"curation.{key}: expected {reserved[key]}=... instead")
    try:
        return load("curate", [values, curation], CurateConfig)
    except ConfigError as error:
        raise ValueError("; ".join(f"curation.{line}" for line in str(error).splitlines())) from None
