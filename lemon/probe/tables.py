"""Tables of scores: the paper's Table 1 from the project's own runs, and differences between encoders.

The paper's own numbers are not in the table: they are not at hand, and typed-in numbers would not be evidence.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lemon.errors import ConfigError
from lemon.probe.metrics import DRAWS, Interval, cluster_draws, confusion_by_cluster, paired_difference
from lemon.probe.score import MAIN_METRICS, POOLED, fold_means
from lemon.runtime.identifiers import file_stem
from lemon.runtime.store import Store
from lemon.schema import SCORES, RobustnessRow, ScoreRow


class ScoreCell(NamedTuple):
    """Mean and standard deviation over folds, and the interval over slides of the pooled value."""

    mean: float
    spread: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """Of two encoders on a task by a protocol: difference of pooled balanced accuracy, and its 95 % interval."""

    task: str
    protocol: str
    encoder: str
    against: str
    difference: float
    low: float
    high: float


def read_scores(store: Store) -> list[ScoreRow]:
    """All rows of the scores table of an output. Raises ConfigError where there are none."""
    rows = ScoreRow.read(store.read_tables("scores", schema=SCORES))
    if not rows:
        raise ConfigError(f"{store.uri} holds no scores; expected the output of lemon probe")
    return rows


def write_table1(store: Store) -> str:
    """Write table1.md, table1.csv and differences.csv beside the scores; returns the Markdown."""
    rows = read_scores(store)
    text = table1(rows)
    differences = list(paired_differences(store, encoder_labels(rows)))
    store.write_bytes("table1.md", text.encode())
    store.write_bytes("table1.csv", as_csv(table1_records(rows)).encode())
    if differences:
        store.write_bytes("differences.csv", as_csv([each._asdict() for each in differences]).encode())
    return f"{text}\nIn {store.uri}: table1.md, table1.csv" + (", differences.csv" if differences else "")


def table1(rows: Sequence[ScoreRow]) -> str:
    """Encoders x (task, protocol) as Markdown: mean (s.d.) over folds of the main metric, the best in bold."""
    cells, labels = main_cells(rows), encoder_labels(rows)
    columns = sorted({key[1:] for key in cells})
    lines = ["| encoder | " + " | ".join(f"{task}, {protocol}" for task, protocol in columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    best = {column: max(cell.mean for key, cell in cells.items() if key[1:] == column) for column in columns}
    for stem in sorted({key[0] for key in cells}):
        texts = [_cell_text(cells.get((stem, *column)), best=best[column]) for column in columns]
        lines.append(f"| {labels[stem]} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def table1_records(rows: Sequence[ScoreRow]) -> list[dict[str, Any]]:
    """The same as records, with intervals."""
    labels = encoder_labels(rows)
    return [
        {"encoder": labels[stem], "task": task, "protocol": protocol, **cell._asdict()}
        for (stem, task, protocol), cell in sorted(main_cells(rows).items())
    ]


def encoder_stem(row: ScoreRow | RobustnessRow) -> str:
    """What the files of a row's encoder are called: ``<model>-<fingerprint>``."""
    return f"{file_stem(row.model)}-{row.model_fingerprint}"


def encoder_labels(rows: Iterable[ScoreRow | RobustnessRow]) -> dict[str, str]:
    """Stem -> the encoder's name; two encoders of one name, as a run before and after, also show their fingerprints."""
    models = {encoder_stem(row): row.model for row in rows}
    shared = {model for model, count in Counter(models.values()).items() if count > 1}
    return {
        stem: f"{model} ({stem.rpartition('-')[2][:6]})" if model in shared else model for stem, model in models.items()
    }


def main_cells(rows: Iterable[ScoreRow]) -> dict[tuple[str, str, str], ScoreCell]:
    """(stem of the encoder, task, protocol) -> the main metric of the linear probe."""
    units: dict[tuple[str, str], list[ScoreRow]] = {}
    for row in rows:
        units.setdefault((encoder_stem(row), row.task), []).append(row)
    cells = {}
    for (stem, task), unit_rows in units.items():
        pooled = {(row.protocol, row.metric): row.value for row in unit_rows if row.fold == POOLED}
        for protocol, metric, mean, spread in fold_means(unit_rows):
            if metric in MAIN_METRICS:
                bounds = (pooled.get((protocol, f"{metric}_{end}"), float("nan")) for end in ("low", "high"))
                cells[stem, task, protocol] = ScoreCell(mean, spread, *bounds)
    return cells


def paired_differences(store: Store, labels: Mapping[str, str]) -> Iterator[PairedDifference]:
    """For each task and protocol, each pair of encoders."""
    by_task: dict[str, list[str]] = {}
    for name in store.list("predictions", suffix=".parquet"):
        by_task.setdefault(name.split("/")[1], []).append(name)
    for task, names in by_task.items():
        tables = {name: _linear_predictions(store, name) for name in names}
        protocols = sorted(
            {protocol for table in tables.values() for protocol in table["protocol"].unique().to_pylist()}
        )
        for protocol, (first, second) in itertools.product(protocols, itertools.combinations(names, 2)):
            difference = _encoder_difference(tables[first], tables[second], protocol=protocol)
            if difference is not None:
                yield PairedDifference(task, protocol, labels[Path(first).stem], labels[Path(second).stem], *difference)


def _linear_predictions(store: Store, name: str) -> pa.Table:
    table = store.read_table(name)
    return table.filter(pc.equal(table["probe"], "linear"))


def _encoder_difference(first: pa.Table, second: pa.Table, *, protocol: str) -> Interval | None:
    """None unless both are classifications of the same crops."""
    parts = [table.filter(pc.equal(table["protocol"], protocol)).sort_by("sample_id") for table in (first, second)]
    a, b = parts
    if not len(a) or not a["sample_id"].equals(b["sample_id"]) or len(a["truth"][0]) != 1:
        return None
    truth = np.concatenate(a["truth"].to_numpy()).astype(int)
    classes, cluster = len(a["predicted"][0]), np.asarray(a["cluster"].to_numpy(), str)
    counts = [
        confusion_by_cluster(truth, np.stack(part["predicted"].to_numpy()).argmax(axis=1), cluster, classes=classes)
        for part in parts
    ]
    draws = cluster_draws(len(counts[0]), seed=0, draws=DRAWS)
    return paired_difference(counts[0], counts[1], draws, metric="balanced_accuracy")


def _cell_text(cell: ScoreCell | None, *, best: float) -> str:
    if cell is None:
        return ""
    text = f"{cell.mean:.3f} ({cell.spread:.3f})"
    return f"**{text}**" if cell.mean == best else text


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    """Records with the same keys as CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()
