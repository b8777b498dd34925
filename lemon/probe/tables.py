"""Tables of scores: the paper's Table 1 from the project's own runs, and differences between encoders.

The score of an encoder is its mean over folds; its interval is of this mean, and differences are between such means. No
encoder is called best whose lead over another may be chance. ``lemon report`` sets the paper's numbers beside them.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lemon.errors import ConfigError
from lemon.probe.metrics import Bootstrapped, bootstrap, counts_of
from lemon.probe.score import MAIN_METRICS, OVER_FOLDS, fold_means
from lemon.runtime.identifiers import file_stem
from lemon.runtime.store import Store
from lemon.schema import SCORES, RobustnessRow, ScoreRow

TWINS = "untrained"
"""Folder of an output: for an encoder, which one has the same shape and no training."""


class ScoreCell(NamedTuple):
    """Mean and standard deviation over folds, and the 95 % interval of the mean over draws of slides."""

    mean: float
    spread: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """Of two encoders on a task by a protocol: difference of their means over folds, and its 95 % interval."""

    task: str
    protocol: str
    encoder: str
    against: str
    difference: float
    low: float
    high: float

    @property
    def may_be_chance(self) -> bool:
        """Whether the interval holds 0, or is not known."""
        return holds_zero(self.low, self.high)

    def turned(self) -> PairedDifference:
        """The same from the other's side."""
        task, protocol, encoder, against, difference, low, high = self
        return PairedDifference(task, protocol, against, encoder, -difference, -high, -low)


def holds_zero(low: float, high: float) -> bool:
    """Whether an interval of a difference holds 0, or is not known."""
    return not (low > 0 or high < 0)


METRIC_NAMES = {"balanced_accuracy": "balanced accuracy", "pearson": "Pearson r", "recall_at_1": "recall at 1"}
"""Main metrics as tables and figures call them."""


def read_scores(store: Store) -> list[ScoreRow]:
    """All rows of the scores table of an output. Raises ConfigError where there are none."""
    rows = ScoreRow.read(store.read_tables("scores", schema=SCORES))
    if not rows:
        raise ConfigError(f"{store.uri} holds no scores; expected the output of lemon probe")
    return rows


def write_table1(store: Store) -> str:
    """Write table1.md, table1.csv and differences.csv beside the scores; returns the Markdown."""
    rows = read_scores(store)
    differences = paired_differences(store, rows)
    text = table1(rows, differences)
    store.write_bytes("table1.md", text.encode())
    store.write_bytes("table1.csv", as_csv(table1_records(rows)).encode())
    if differences:
        store.write_bytes("differences.csv", as_csv([each._asdict() for each in differences]).encode())
    return f"{text}\nIn {store.uri}: table1.md, table1.csv" + (", differences.csv" if differences else "")


def table1(rows: Sequence[ScoreRow], differences: Sequence[PairedDifference]) -> str:
    """Encoders x (task, protocol) as Markdown: mean (s.d.) over folds of the main metric, those that lead in bold."""
    cells, labels, tasks = main_cells(rows), encoder_labels(rows), task_labels(row.task for row in rows)
    columns = sorted({key[1:] for key in cells})
    lines = ["| encoder | " + " | ".join(f"{tasks[task]}, {protocol}" for task, protocol in columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    lead = leading_encoders(rows, differences)
    for stem in sorted({key[0] for key in cells}):
        texts = [_cell_text(cells.get((stem, *column)), best=labels[stem] in lead[column]) for column in columns]
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


def untrained_twins(store: Store, rows: Sequence[ScoreRow]) -> dict[str, str]:
    """Label of an encoder -> that of the untrained one of its shape; of those that have one in this output."""
    labels = encoder_labels(rows)
    twins = {}
    for stem, label in labels.items():
        name = f"{TWINS}/{stem}.json"
        if store.exists(name) and (twin := store.read_json(name, dict[str, str])["untrained"]) in labels:
            twins[label] = labels[twin]
    return twins


def task_labels(tasks: Iterable[str]) -> dict[str, str]:
    """Task -> a short name: of a path its last part, ``morphometry:cells``, or as many as tell two tasks apart."""
    places = {task: [part for part in task.partition(":")[2].split("/") if part] for task in tasks}
    labels = {}
    for task, parts in places.items():
        kind = task.partition(":")[0]
        others = [place for other, place in places.items() if other != task and other.startswith(f"{kind}:")]
        shorter = (parts[-length:] for length in range(1, len(parts) + 1))
        part = next((end for end in shorter if not any(place[-len(end) :] == end for place in others)), None)
        labels[task] = f"{kind}:{'/'.join(part)}" if part else task
    return labels


def main_cells(rows: Iterable[ScoreRow]) -> dict[tuple[str, str, str], ScoreCell]:
    """(stem of the encoder, task, protocol) -> the main metric of the linear probe, where it is a number."""
    units: dict[tuple[str, str], list[ScoreRow]] = {}
    for row in rows:
        units.setdefault((encoder_stem(row), row.task), []).append(row)
    cells = {}
    for (stem, task), unit_rows in units.items():
        over_folds = {(row.protocol, row.metric): row.value for row in unit_rows if row.fold == OVER_FOLDS}
        for protocol, metric, mean, spread in fold_means(unit_rows):
            if metric in MAIN_METRICS and np.isfinite(mean):
                bounds = (over_folds.get((protocol, f"{metric}_{end}"), float("nan")) for end in ("low", "high"))
                cells[stem, task, protocol] = ScoreCell(mean, spread, *bounds)
    return cells


def leaders(scores: Mapping[str, float], may_be_chance: Callable[[str, str], bool]) -> set[str]:
    """The best of a column with all that it cannot be told apart from; nobody where that is everybody.

    Args:
        scores: by name.
        may_be_chance: whether the lead of the first over the second may be.
    """
    best = max(scores, key=lambda name: scores[name])
    lead = {best, *(name for name in scores if name != best and may_be_chance(best, name))}
    return lead if len(lead) < len(scores) else set()


def leading_encoders(
    rows: Iterable[ScoreRow], differences: Iterable[PairedDifference]
) -> dict[tuple[str, str], set[str]]:
    """(task, protocol) -> labels of the encoders that lead."""
    rows = list(rows)
    labels = encoder_labels(rows)
    columns: dict[tuple[str, str], dict[str, float]] = {}
    for (stem, task, protocol), cell in main_cells(rows).items():
        columns.setdefault((task, protocol), {})[labels[stem]] = cell.mean
    sure = {
        (each.task, each.protocol, frozenset((each.encoder, each.against)))
        for each in differences
        if not each.may_be_chance
    }

    def is_chance(column: tuple[str, str], first: str, second: str) -> bool:
        return (*column, frozenset((first, second))) not in sure

    return {column: leaders(scores, functools.partial(is_chance, column)) for column, scores in columns.items()}


def paired_differences(store: Store, rows: Sequence[ScoreRow]) -> list[PairedDifference]:
    """For each task and protocol, each pair of encoders that predicted the same nuclei by the same folds."""
    labels = encoder_labels(rows)
    metrics = {row.task: row.metric for row in rows if row.metric in MAIN_METRICS}
    protocols: dict[tuple[str, str], set[str]] = {}
    for stem, task, protocol in main_cells(rows):
        protocols.setdefault((task, protocol), set()).add(stem)
    found = []
    for task, metric in metrics.items():
        tables = {stem: table for stem in labels if (table := _linear_predictions(store, task, stem)) is not None}
        for (_, protocol), stems in sorted(item for item in protocols.items() if item[0][0] == task):
            scored = {stem: _bootstrapped(tables[stem], protocol, metric) for stem in sorted(stems & tables.keys())}
            for first, second in itertools.combinations(scored, 2):
                (ids, mine), (other_ids, others) = scored[first], scored[second]
                if ids.equals(other_ids):
                    difference = mine.less(others)
                    found.append(PairedDifference(task, protocol, labels[first], labels[second], *difference))
    return found


def _linear_predictions(store: Store, task: str, stem: str) -> pa.Table | None:
    name = f"predictions/{file_stem(task)}/{stem}.parquet"
    if not store.exists(name):
        return None
    table = store.read_table(name)
    return table.filter(pc.equal(table["probe"], "linear"))


def _bootstrapped(table: pa.Table, protocol: str, metric: str) -> tuple[pa.Table, Bootstrapped]:
    """What was predicted (crop, fold), and the mean over folds with its draws."""
    part = table.filter(pc.equal(table["protocol"], protocol))
    part = part.sort_by([("fold", "ascending"), ("sample_id", "ascending")])
    counts = counts_of(
        metric,
        _matrix(part["truth"]),
        _matrix(part["predicted"]),
        fold=part["fold"].to_numpy(),
        cluster=np.asarray(part["cluster"].to_numpy(), str),
    )
    return part.select(["sample_id", "fold"]), bootstrap(counts, seed=0)


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of one length as [N, K]."""
    return pc.list_flatten(column).to_numpy().reshape(len(column), -1)


def _cell_text(cell: ScoreCell | None, *, best: bool) -> str:
    if cell is None:
        return ""
    text = f"{cell.mean:.3f} ({cell.spread:.3f})"
    return f"**{text}**" if best else text


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    """Records with the same keys as CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()
