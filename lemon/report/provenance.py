"""Where the numbers come from: every trial and every scored encoder, with its run and the fingerprints of its parts."""

from __future__ import annotations

from collections.abc import Iterator

from lemon.probe.tables import as_csv, encoder_stem
from lemon.report.blocks import Section, Table, TableCell
from lemon.report.sources import OutputTable, Sources, TrackedRun
from lemon.runtime.store import Store
from lemon.schema import ScoreRow, SweepRow

FILE = "provenance.csv"


def provenance_section(sources: Sources, store: Store) -> Section:
    """A row a trial and a row an encoder."""
    records = [row for sweep in sources.sweeps for row in trials(sweep, sources)]
    records += [row for probe in sources.probes for row in encoders(probe, sources)]
    section = Section("provenance", "Provenance")
    if records:
        store.write_bytes(FILE, as_csv(records).encode())
        rows = [[TableCell(text) for text in record.values()] for record in records]
        caption = "Where the numbers come from. Settings, cells, encoder and benchmarks are named by fingerprints."
        section.tables = [Table(caption, [(name, "") for name in records[0]], rows, FILE)]
    return section


def trials(sweep: OutputTable[SweepRow], sources: Sources) -> Iterator[dict[str, str]]:
    """A sweep's trials."""
    by_trial: dict[str, list[SweepRow]] = {}
    for row in sweep.rows:
        by_trial.setdefault(row.trial, []).append(row)
    for trial, trial_rows in by_trial.items():
        first = trial_rows[0]
        data = dict.fromkeys(row.data_fingerprint for row in trial_rows if row.data_fingerprint)
        yield _record(
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


def encoders(probe: OutputTable[ScoreRow], sources: Sources) -> Iterator[dict[str, str]]:
    """The encoders of an output of probes."""
    runs = {each.model_fingerprint: each for each in sources.runs.values() if each.output == probe.store.uri}
    by_encoder: dict[str, list[ScoreRow]] = {}
    for row in probe.rows:
        by_encoder.setdefault(encoder_stem(row), []).append(row)
    for encoder_rows in by_encoder.values():
        first = encoder_rows[0]
        tracked = runs.get(first.model_fingerprint)
        yield _record(
            what=first.model,
            status="probed",
            folder=probe.store.uri,
            tracked=tracked,
            run=tracked.run.run_id if tracked else None,
            encoder=first.model_fingerprint,
            benchmarks=" ".join(dict.fromkeys(row.data_fingerprint for row in encoder_rows)),
        )


def _record(*, tracked: TrackedRun | None, run: str | None, **facts: str | None) -> dict[str, str]:
    code, host = (tracked.code_version, tracked.host) if tracked else ("", "")
    names = ("what", "status", "folder", "settings", "cells", "encoder", "benchmarks")
    record = {name: facts.get(name) or "" for name in names}
    return record | {"MLflow run": run or "", "code": code, "host": host}
