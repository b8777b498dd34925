"""What a report is made of: outputs of sweeps and probes, found by the runs of MLflow or named, and those runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError

from lemon.errors import ConfigError
from lemon.pretrain.config import steps_of
from lemon.probe.tables import read_scores
from lemon.report.config import ReportConfig
from lemon.report.paper import PaperNumbers
from lemon.runtime.console import stage_logger
from lemon.runtime.store import Store
from lemon.runtime.tracking import Run, RunRecord, find_runs
from lemon.schema import SWEEP, SWEEP_FILE, ScoreRow, SweepRow

R = TypeVar("R", SweepRow, ScoreRow)

logger = stage_logger(__name__, "report")


@dataclass(frozen=True)
class OutputTable(Generic[R]):
    """The folder of a sweep or of probes, and the rows of its table."""

    store: Store
    rows: list[R]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.store.uri.rpartition("/")[2]


class TrackedSettings(BaseModel):
    """What a report says of a run's pretraining, from the text that MLflow holds of it."""

    encoder: str = Field(alias="encoder.name")
    width: int = Field(alias="encoder.dim")
    blocks: int = Field(alias="encoder.depth")
    method: str = Field(alias="ssl.name")
    batch: int
    epochs: float
    images_per_epoch: int
    exclude_patients: str = Field(alias="select.exclude_patients")
    exclude_benchmarks: str = "[]"

    @property
    def patients_left_out(self) -> str:
        """Whose cells the encoder has not seen, in words."""
        if self.exclude_benchmarks != "[]":
            return "those of " + self.exclude_benchmarks.strip("[]").replace("'", "")
        return "none" if self.exclude_patients == "[]" else "as select.exclude_patients says"

    @property
    def images_seen(self) -> int:
        """Images that the run is given: whole batches."""
        return steps_of(self.images_per_epoch, self.batch, epochs=self.epochs) * self.batch


class TrackedRun(BaseModel):
    """A run of MLflow; None and empty stand for what it does not record."""

    run: Run
    page: str
    is_child: bool
    is_sweep: bool
    output: str | None = None
    model_fingerprint: str | None = None
    code_version: str = ""
    host: str = ""
    settings: TrackedSettings | None

    @classmethod
    def of(cls, record: RunRecord) -> TrackedRun:
        """A run as MLflow holds it. The only place that reads its tags and parameters."""
        try:
            settings = TrackedSettings.model_validate(record.params)
        except ValidationError:  # a probe's, or of a process that was killed before it had logged all
            settings = None
        facts = {
            "run": record.run,
            "page": record.page,
            "is_child": record.is_child,
            "is_sweep": "sweep.name" in record.params,
        }
        return cls.model_validate({**record.tags, **facts, "settings": settings})


@dataclass
class Sources:
    """What was found.

    ``runs``: by their id in MLflow, those of trials too. ``missing``: a line for each thing that was not there;
    ``requested_missing``: some of it was requested by name.
    """

    sweeps: list[OutputTable[SweepRow]] = field(default_factory=list)
    probes: list[OutputTable[ScoreRow]] = field(default_factory=list)
    runs: dict[str, TrackedRun] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    requested_missing: bool = False

    def add_missing(self, line: str, *, requested: bool) -> None:
        """Note and log what is not there."""
        self.missing.append(line)
        self.requested_missing |= requested
        logger.info(f"missing: {line}")


@dataclass(frozen=True)
class Report:
    """What a section is made from (settings, outputs and runs, the paper's numbers), and where its files go."""

    config: ReportConfig
    sources: Sources
    numbers: PaperNumbers
    store: Store


def stems(key: str, outputs: Sequence[OutputTable[R]]) -> Iterator[tuple[str, str, OutputTable[R]]]:
    """What the files of each output are called (table2, table2_2, ...), and what tells its title from the others'."""
    for number, output in enumerate(outputs, 1):
        yield key if number == 1 else f"{key}_{number}", f" ({output.name})" if len(outputs) > 1 else "", output


def find_sources(config: ReportConfig) -> Sources:
    """Read the outputs of a report. Raises ConfigError where MLflow is needed for that and cannot be read."""
    sources = Sources()
    for name in config.experiment:
        _find_runs(name, sources, needed=config.sweeps is None or config.probes is None)
    by_kind: dict[bool, list[str]] = {True: [], False: []}
    for run in sources.runs.values():
        is_pretraining = run.settings is not None and not run.is_sweep
        if run.output is not None and not run.is_child and not is_pretraining:
            by_kind[run.is_sweep].append(run.output)
    _read_all(sources.sweeps, config.sweeps, by_kind[True], read_sweep, sources)
    _read_all(sources.probes, config.probes, by_kind[False], read_scores, sources)
    return sources


def read_sweep(store: Store) -> list[SweepRow]:
    """The rows of a sweep's table. Raises ConfigError where there is none, or one without rows."""
    if not store.exists(SWEEP_FILE):
        raise ConfigError(f"{store.uri} holds no {SWEEP_FILE}; lemon sweep writes it at its end")
    table = store.read_table(SWEEP_FILE)
    if "encoder" not in table.column_names:  # of sweeps before that column
        table = table.append_column("encoder", pa.nulls(len(table), pa.string()))
    rows = SweepRow.read(table.select(SWEEP.names).cast(SWEEP))
    if not rows:
        raise ConfigError(f"{store.uri}/{SWEEP_FILE} has no rows")
    return rows


def _find_runs(name: str, sources: Sources, *, needed: bool) -> None:
    try:
        records = find_runs(name)
    except ConfigError as error:
        if needed:
            raise
        sources.add_missing(str(error), requested=False)
        return
    if needed and not records:
        sources.add_missing(
            f"MLflow has no runs of the experiment {name!r} (MLFLOW_TRACKING_URI says where)", requested=False
        )
    sources.runs |= {record.run.run_id: TrackedRun.of(record) for record in records}


def _read_all(
    outputs: list[OutputTable[R]],
    wanted: Sequence[str] | None,
    tracked: Sequence[str],
    read: Callable[[Store], list[R]],
    sources: Sources,
) -> None:
    """Read each folder that was given, else each that was found, once."""
    for folder in dict.fromkeys(name.rstrip("/") for name in (tracked if wanted is None else wanted)):
        try:
            store = Store(folder)
            outputs.append(OutputTable(store, read(store)))
        except ConfigError as error:
            sources.add_missing(str(error), requested=wanted is not None)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            sources.add_missing(
                f"{folder} cannot be read: {' '.join(str(error).split())}", requested=wanted is not None
            )
