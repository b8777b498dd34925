"""The table of a sweep, ``sweep.parquet`` (``lemon.schema.SweepRow``) and ``sweep.csv``, and its summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lemon.probe.job import metric_name
from lemon.probe.tables import as_csv
from lemon.runtime.config import Frozen
from lemon.runtime.secrets import redacted
from lemon.runtime.store import Store
from lemon.runtime.tracking import DESCRIPTION, Run, run_id_of
from lemon.schema import SWEEP_FILE, SweepRow
from lemon.sweep.grid import GridTrial
from lemon.sweep.studies import OverSeeds, best_points, is_number, point_names, study_values
from lemon.sweep.trial import read_result

NO_RESULT = "lost.json"
PARQUET, CSV = SWEEP_FILE, "sweep.csv"


class NoResult(Frozen):
    """Why a trial has no result: what ``lost.json`` in its folder holds."""

    status: str  # failed, stopped
    error: str
    fingerprint: str


def read_no_result(entry: GridTrial) -> NoResult | None:
    """Why a trial has no result, if an attempt with the same settings said so."""
    store = entry.trial.store
    if not store.exists(NO_RESULT):
        return None
    note: NoResult = store.read_json(NO_RESULT, NoResult)
    return note if note.fingerprint == entry.trial.fingerprint else None


def write_no_result(entry: GridTrial, *, status: str, error: str) -> None:
    """Note why a trial has no result, in one line."""
    note = NoResult(status=status, error=" ".join(redacted(error).split()), fingerprint=entry.trial.fingerprint)
    entry.trial.store.write_json(NO_RESULT, note.model_dump())


def rows_of(entry: GridTrial, *, study: str) -> Iterator[SweepRow]:
    """The rows of one trial; none while it has not come to an end."""
    trial, point = entry.trial, entry.point
    row = SweepRow(
        study=study,
        point=point.name,
        value=point.value,
        seed=entry.seed,
        trial=trial.name,
        status="done",
        config_fingerprint=trial.fingerprint,
        encoder=trial.pretrain.encoder.name,
    )
    result = read_result(trial)
    if result is not None:
        facts = result.model_dump(exclude={"name", "fingerprint", "code_version", "scores"})
        for score in result.scores:
            yield replace(row, **facts, **score.model_dump())
    elif (why := read_no_result(entry)) is not None:
        yield replace(row, status=why.status, error=why.error, run_id=run_id_of(trial.store))


def write(entries: Sequence[GridTrial], output: Store, *, study: str) -> list[SweepRow]:
    """Write the table of what the trials found; returns its rows."""
    rows = [row for entry in entries for row in rows_of(entry, study=study)]
    output.write_table(PARQUET, SweepRow.table(rows))
    if rows:
        output.write_bytes(CSV, as_csv([vars(row) for row in rows]).encode())
    return rows


def summary(rows: Sequence[SweepRow]) -> str:
    """As Markdown: points x (task, protocol) with mean (s.d.) over seeds of the linear probe, and which point leads."""
    by_cell = {(value.point, value.column): value.over for value in study_values(rows)}
    columns = list(dict.fromkeys(column for _, column in by_cell))
    lines = ["| " + " | ".join([rows[0].study, "seeds", *(f"{task}, {kind}" for task, kind in columns)]) + " |"]
    lines.append("|" + "---|" * (len(columns) + 2))
    for point in point_names(rows):
        seeds = len({row.seed for row in rows if row.point == point and row.status == "done"})
        texts = [_mean_text(by_cell.get((point, column))) for column in columns]
        lines.append("| " + " | ".join([point, str(seeds), *texts]) + " |")
    return "\n".join([*lines, "", *(f"- {best.sentence}" for best in best_points(study_values(rows)))])


def log_summary(rows: Sequence[SweepRow], output: Store, run: Run) -> None:
    """Put onto the sweep's own run: its table, the summary, and of each task the best point with its interval.

    Metrics are ``best/<task>[/<protocol>]/<metric>`` (mean over seeds) with ``_sd``, ``_low`` and ``_high``.
    """
    metrics: dict[str, float] = {}
    for best, _ in best_points(study_values(rows)):
        name = metric_name(best.task, best.protocol, best.metric, of="best")
        parts = {"": best.over.mean, "_sd": best.over.sd, "_low": best.over.low, "_high": best.over.high}
        metrics |= {name + part: value for part, value in parts.items() if is_number(value)}
        run.set_tag(name, best.point)
    run.log(metrics, step=0)
    run.log_text(text := summary(rows), "summary.md")
    run.set_tag(DESCRIPTION, text)
    for name in filter(output.exists, (PARQUET, CSV)):
        run.log_file(name, output.read_bytes(name))


def _mean_text(over: OverSeeds | None) -> str:
    if over is None:
        return ""
    return f"{over.mean:.3f} ({over.sd:.3f})" if over.n > 1 else f"{over.mean:.3f}"
