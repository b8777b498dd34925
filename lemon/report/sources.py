"""What a report is made of: outputs of sweeps and probes, found by the runs of MLflow or named, and those runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from lemon.errors import ConfigError
from lemon.probe.tables import read_scores
from lemon.report.config import ReportConfig
from lemon.runtime.console import stage_logger
from lemon.runtime.store import Store
from lemon.runtime.tracking import Record, find_runs
from lemon.schema import SWEEP, SWEEP_FILE

logger = stage_logger(__name__, "report")


@dataclass(frozen=True)
class Output:
    """The folder of a sweep (rows of ``SWEEP``) or of probes (rows of ``SCORES``)."""

    store: Store
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.store.uri.rpartition("/")[2]


@dataclass
class Sources:
    """What was found.

    ``runs``: by their id in MLflow, those of trials too. ``missing``: a line for each thing that was not there;
    ``in_vain``: some of it was asked for by name.
    """

    sweeps: list[Output] = field(default_factory=list)
    probes: list[Output] = field(default_factory=list)
    runs: dict[str, Record] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    in_vain: bool = False

    def miss(self, line: str, *, asked: bool) -> None:
        """Note and tell what is not there."""
        self.missing.append(line)
        self.in_vain |= asked
        logger.info(f"missing: {line}")


def find_sources(config: ReportConfig) -> Sources:
    """Read the outputs of a report. Raises ConfigError where MLflow is needed for that and cannot be read."""
    sources = Sources()
    for name in config.experiment:
        _find_runs(name, sources, needed=config.sweeps is None or config.probes is None)
    made = [each for each in sources.runs.values() if "output" in each.tags and not each.is_child]
    by_kind: dict[bool, list[str]] = {True: [], False: []}
    for record in made:
        by_kind["sweep.name" in record.params].append(record.tags["output"])
    _read_all(sources.sweeps, config.sweeps, by_kind[True], read_sweep, sources)
    _read_all(sources.probes, config.probes, by_kind[False], read_scores, sources)
    return sources


def read_sweep(store: Store) -> pa.Table:
    """The table of a sweep. Raises ConfigError where there is none, or one without rows."""
    if not store.exists(SWEEP_FILE):
        raise ConfigError(f"{store.uri} holds no {SWEEP_FILE}; lemon sweep writes it at its end")
    table = store.read_table(SWEEP_FILE).select(SWEEP.names).cast(SWEEP)
    if not len(table):
        raise ConfigError(f"{store.uri}/{SWEEP_FILE} has no rows")
    return table


def _find_runs(name: str, sources: Sources, *, needed: bool) -> None:
    try:
        found = find_runs(name)
    except ConfigError as error:
        if needed:
            raise
        sources.miss(str(error), asked=False)
        return
    if needed and not found:
        sources.miss(f"MLflow has no runs of the experiment {name!r} (MLFLOW_TRACKING_URI says where)", asked=False)
    sources.runs |= {record.run.run_id: record for record in found}


def _read_all(
    outputs: list[Output],
    given: Sequence[str] | None,
    found: Sequence[str],
    read: Callable[[Store], pa.Table],
    sources: Sources,
) -> None:
    """Read each folder that was given, else each that was found, once."""
    for folder in dict.fromkeys(name.rstrip("/") for name in (found if given is None else given)):
        try:
            store = Store(folder)
            outputs.append(Output(store, read(store).to_pylist()))
        except ConfigError as error:
            sources.miss(str(error), asked=given is not None)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            sources.miss(f"{folder} cannot be read: {' '.join(str(error).split())}", asked=given is not None)
