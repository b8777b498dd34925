"""Patients of benchmarks, left out of what is trained on: an encoder must not have seen those that it is scored on.

``exclude_benchmarks`` becomes ``select.exclude_patients``, so there is one way to leave a patient out, and settings and
MLflow hold the names. Only patients whom the table has are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lemon.cells.ledger import rows_with_cells
from lemon.cells.select import patients_by_slide
from lemon.errors import ConfigError
from lemon.pretrain.config import PretrainConfig
from lemon.probe.config import BenchmarkNames
from lemon.probe.task import TaskError
from lemon.probe.tasks.catalogue import CURATED, benchmark_patients
from lemon.runtime.console import stage_logger
from lemon.runtime.identifiers import likely_name
from lemon.runtime.store import Store

logger = stage_logger(__name__, "pretrain")


@dataclass(frozen=True)
class Excluded:
    """What is left out of a table of cells, and a line with how much that is; empty where no patient is known."""

    benchmarks: list[str]
    patients: list[str] = field(default_factory=list)
    line: str = ""

    def of(self, config: PretrainConfig) -> PretrainConfig:
        """The settings of a run without them; of settings that are so already, the same."""
        exclude_patients = list(dict.fromkeys([*config.select.exclude_patients, *self.patients]))
        select = config.select.model_copy(update={"exclude_patients": exclude_patients})
        return config.model_copy(update={"exclude_benchmarks": self.benchmarks, "select": select})


def find_excluded(benchmarks: BenchmarkNames, *, tasks: Sequence[str], data: str, cells: Store) -> Excluded:
    """The patients of benchmarks whom a table of cells has.

    Args:
        benchmarks: names; auto: those of ``tasks`` that are of labelled data.
        tasks: what the encoder is scored on.
        data: the folder of the benchmarks, where one names its patients itself (``folder:NAME``).
        cells: a cells table.

    Raises ConfigError for a benchmark that was asked for and cannot be read; one of ``tasks`` is logged.
    """
    names = [task for task in tasks if not task.startswith(tuple(CURATED))] if benchmarks == "auto" else benchmarks
    known: dict[str, set[str]] = {}
    for name in names:
        try:
            known[name] = {likely_name(patient) for patient in benchmark_patients(name, data)}
        except (TaskError, OSError) as error:
            reason = f"exclude_benchmarks: {name}: {error}"
            if benchmarks != "auto":
                raise ConfigError(reason) from None
            logger.warning(f"{reason}; none of its patients is left out")
    wanted = set().union(*known.values())
    if not wanted:
        return Excluded(benchmarks=[*known])
    rows = rows_with_cells(cells)
    by_slide, patients = patients_by_slide(rows), set[str]()
    for slide, named in by_slide.items():
        patients |= named & wanted or (named if likely_name(slide) in wanted else set())
    counts = [row.n_cells for row in rows if by_slide[row.slide_id] & patients]
    line = (
        f"exclude_benchmarks: {', '.join(known)}: {len(patients):,} of {len(wanted):,} patients are in the table; "
        f"their {sum(counts):,} cells of {len(counts):,} slides are left out"
    )
    return Excluded(benchmarks=[*known], patients=sorted(patients), line=line)


def without_benchmarks(config: PretrainConfig) -> PretrainConfig:
    """The settings of a run that leaves out what its ``exclude_benchmarks`` says, with a line, unless it did before.

    Raises ConfigError.
    """
    excluded = find_excluded(
        config.exclude_benchmarks, tasks=config.probe_tasks, data=config.data, cells=Store(config.cells)
    )
    if excluded.line and excluded.of(config) != config:
        logger.info(excluded.line)
    return excluded.of(config)
