"""Settings of the segmenter's training. Imports no torch, so that a mistake is reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from lemon.errors import ConfigError, Fault
from lemon.nuclei.config import SEGMENTERS
from lemon.pretrain.config import DEVICE, NonNegative, Seed, TrainWorkers
from lemon.runtime.config import AnyPath, LocalPath, Settings
from lemon.runtime.registry import unknown


class TrainSegmenterConfig(Settings):
    """``lemon train-segmenter``: images with drawn nuclei -> weights for ``segmenter=hoverfast``."""

    data: list[LocalPath] = Field(
        min_length=1, description="folders of labelled images, a source each; layouts: lemon.nuclei.training.layouts"
    )
    output: AnyPath = Field(description="folder or s3:// prefix of checkpoints, weights and their card")
    odds: dict[str, NonNegative] = Field({}, description="of a window, by source; 1 where none is given")
    mpp: dict[str, float] = Field({}, description="um/px of a source; 0.25 where none is given")
    teacher: str | None = Field(
        None, description="name of a segmenter that labels the images of data, in place of files with labels"
    )
    held_out_share: float = Field(0.08, ge=0, lt=1, description="of the images of each source, never learned from")
    start: AnyPath | None = Field(None, description="weights to begin with; null: random ones")
    width: Literal[4, 8, 16, 32] = Field(16, description="channels of the first level; HoverFast: 16")
    steps: int = Field(2500, ge=1)
    batch: int = Field(40, ge=1, description="windows a step, of all workers together")
    window_px: int = Field(256, ge=64, multiple_of=32, description="side of a window at 0.25 um/px")
    learning_rate: float = Field(1.5e-3, gt=0, description="the highest")
    warmup_steps: int = Field(40, ge=0)
    average: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights, which are what comes out")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU")
    seed: Seed = 0
    device: str = Field("auto", pattern=DEVICE, description="auto, cpu, cuda or cuda:N; of a run in one process")
    workers: TrainWorkers = TrainWorkers()
    log_every: int = Field(50, ge=1, description="steps")
    check_every: int = Field(500, ge=1, description="steps to a checkpoint and to scores of the held-out images")
    checked_px: int = Field(512, ge=64, description="middle of a held-out image that is scored")
    keep_checkpoints: int = Field(2, ge=1)

    @field_validator("data", mode="before")
    @classmethod
    def _wrap_single_folder(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def check_inputs(self) -> None:
        """Raises ConfigError for a folder that is not there, two of one name, and a teacher that is not known."""
        names = [Path(folder).name for folder in self.data]
        faults = [Fault("data", folder, "a folder") for folder in self.data if not Path(folder).is_dir()]
        faults += [
            Fault("data", name, "folders of different names")
            for name in sorted({n for n in names if names.count(n) > 1})
        ]
        if self.teacher is not None and self.teacher not in SEGMENTERS:
            raise ConfigError(f"teacher: {unknown(self.teacher, SEGMENTERS.names())}")
        if self.batch < self.workers.most:
            faults.append(Fault("batch", self.batch, f"a window for each of {self.workers.most} workers"))
        if faults:
            raise ConfigError(*faults)

    def result_settings(self) -> dict[str, Any]:
        """The settings that change the weights; an output goes on only with the same."""
        speed = {"data", "output", "device", "workers", "log_every", "check_every", "checked_px", "keep_checkpoints"}
        return self.model_dump(mode="json", exclude=speed)
