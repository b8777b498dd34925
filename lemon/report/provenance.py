"""Where the numbers come from: every trial and every scored encoder, with its run and the fingerprints of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lemon.probe.tables import encoder_stem
from lemon.report.blocks import Column, Section, Table, TableCell
from lemon.report.files import write_csv
from lemon.report.sources import OutputTable, Report, Sources, TrackedRun
from lemon.runtime.store import fingerprint
from lemon.schema import ScoreRow, SweepRow

FILE = "provenance.csv"


@dataclass(frozen=True)
class Origin:
    """A row of the table: what others link to, what is shown when they are pointed at, the run's page in MLflow."""

    anchor: str
    record: dict[str, str]
    page: str

    @property
    def tip(self) -> str:
        """What is known of it, in a line."""
        return "; ".join(f"{name}: {text}" for name, text in self.record.items() if text)


def anchor(folder: str, name: str) -> str:
    """What a link to the row of a trial or an encoder (its stem) of an output leads to."""
    return f"run-{fingerprint([folder, name])}"


def provenance_sections(report: Report) -> Iterator[Section]:
    """A row a trial and a row an encoder."""
    sources = report.sources
    origins = [origin for sweep in sources.sweeps for origin in trials(sweep, sources)]
    origins += [origin for probe in sources.probes for origin in encoders(probe, sources)]
    if not origins:
        return
    write_csv(report.store, FILE, [origin.record for origin in origins])
    rows = [_row(origin) for origin in origins]
    caption = "Where the numbers come from. Settings, cells, encoder and benchmarks are named by fingerprints."
    head = [Column(name) for name in origins[0].record]
    table = Table(caption, head, rows, FILE, anchors=[origin.anchor for origin in origins])
    section = Section("provenance", "Provenance", tables=[table])
    if any(origin.page for origin in origins):
        section.notes.append("Links lead to MLflow, where its page runs: make ui DB=... for a database of your own.")
    yield section


def _row(origin: Origin) -> list[TableCell]:
    texts = {"MLflow run": TableCell(origin.record["MLflow run"], href=origin.page)}
    cells = [texts.get(name, TableCell(text)) for name, text in origin.record.items()]
    return [cells[0]._replace(tip=origin.tip), *cells[1:]]


def trials(sweep: OutputTable[SweepRow], sources: Sources) -> Iterator[Origin]:
    """A sweep's trials."""
    by_trial: dict[str, list[SweepRow]] = {}
    for row in sweep.rows:
        by_trial.setdefault(row.trial, []).append(row)
    for trial, trial_rows in by_trial.items():
        first = trial_rows[0]
        data = dict.fromkeys(row.data_fingerprint for row in trial_rows if row.data_fingerprint)
        yield _origin(
            anchor(sweep.store.uri, trial),
            what=trial,
            status=first.status,
            folder=sweep.store.uri,
            tracked=sources.runs.get(first.run_id or ""),
            run=first.run_id,
            settings=first.config_fingerprint,
            cells=first.cells_fingerprint,
            encoder=first.model_fingerprint,
            benchmarks=" ".join(data),
        )


def encoders(probe: OutputTable[ScoreRow], sources: Sources) -> Iterator[Origin]:
    """The encoders of an output of probes."""
    runs = {each.model_fingerprint: each for each in sources.runs.values() if each.output == probe.store.uri}
    by_encoder: dict[str, list[ScoreRow]] = {}
    for row in probe.rows:
        by_encoder.setdefault(encoder_stem(row), []).append(row)
    for encoder_rows in by_encoder.values():
        first = encoder_rows[0]
        tracked = runs.get(first.model_fingerprint)
        yield _origin(
            anchor(probe.store.uri, encoder_stem(first)),
            what=first.model,
            status="probed",
            folder=probe.store.uri,
            tracked=tracked,
            run=tracked.run.run_id if tracked else None,
            encoder=first.model_fingerprint,
            benchmarks=" ".join(dict.fromkeys(row.data_fingerprint for row in encoder_rows)),
        )


def _origin(name: str, *, tracked: TrackedRun | None, run: str | None, **facts: str | None) -> Origin:
    code, host, page = (tracked.code_version, tracked.host, tracked.page) if tracked else ("", "", "")
    names = ("what", "status", "folder", "settings", "cells", "encoder", "benchmarks")
    record = {each: facts.get(each) or "" for each in names} | {"MLflow run": run or "", "code": code, "host": host}
    return Origin(name, record, page)
