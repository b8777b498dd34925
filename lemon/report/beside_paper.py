"""Tables of scores with the paper's numbers beside ours, and a plain word where the two do not compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lemon.probe.folds import PAPER
from lemon.probe.tables import METRIC_NAMES, task_labels
from lemon.report.blocks import Column, Table, TableCell, printed
from lemon.report.paper import UNKNOWN, Artefact, PaperNumbers, plain_key
from lemon.schema import ScoreRow, SweepRow
from lemon.sweep.studies import Value

Key = tuple[str, str]
"""Task and protocol: what a column of scores is of."""


@dataclass
class Line:
    """A row of a table of scores: its first cells, the names that the paper may call it by, its scores."""

    head: list[TableCell]
    names: list[str]
    cells: dict[Key, TableCell]


def metric_names(rows: Iterable[ScoreRow | SweepRow | Value]) -> dict[str, str]:
    """Task -> the name of its score."""
    return {row.task: METRIC_NAMES[row.metric] for row in rows if row.task and row.metric in METRIC_NAMES}


def score_grid(
    lines: Sequence[Line],
    keys: Sequence[Key],
    *,
    first: list[Column],
    numbers: PaperNumbers,
    artefact: Artefact | None,
    papers: Mapping[Key, str],
    metrics: Mapping[str, str],
) -> tuple[list[Column], list[list[TableCell]]]:
    """A table of scores, the paper's beside ours: its columns, and its rows; those that only the paper has come last.

    Args:
        lines: our rows.
        keys: our columns.
        first: titles of what comes before the scores.
        numbers: of the paper.
        artefact: which of its tables it is; None: of one's own.
        papers: columns that a paper's column stands beside -> why the two do not compare, empty where they do.
        metrics: task -> name of its score.
    """
    key = artefact.key if artefact else ""
    found = {column: [numbers.find(key, row=line.names, column=column[0]) for line in lines] for column in papers}
    tasks = {plain_key(task) for task, _ in papers}
    others = dict.fromkeys(each.row for each in numbers.left(key) if plain_key(each.column) in tasks)
    blank = [TableCell("")] * (len(first) - 1)
    more = [Line([TableCell(name, "in the paper"), *blank], [name], {}) for name in others]
    for column in papers:
        found[column] += [numbers.find(key, row=line.names, column=column[0]) for line in more]
    labels, protocols = task_labels(task for task, _ in keys), {protocol for _, protocol in keys}
    head, rows = [*first], [[*line.head] for line in (*lines, *more)]
    for column in keys:
        task, protocol = column
        beside = found.get(column, [])
        title = labels[task]
        is_beside = any(beside)
        metric = metrics.get(task, "score")
        about = f"{task}: {metric}, {protocol} splits"
        small = metric if len(protocols) == 1 else f"{metric}, {protocol}"
        ours = Column(title, small, tip=about)
        head.append(ours._replace(title="here", group=title) if is_beside else ours)
        for line, row in zip((*lines, *more), rows, strict=True):
            row.append(line.cells.get(column, TableCell("", "" if line in more else "no result")))
        if is_beside:
            why = papers[column]
            tip = f"Not comparable: {why}." if why else "By the paper's splits, as far as it says which."
            head.append(Column("paper", f"\u2260 {why}" if why else "", tip=tip, group=title, paper=True))
            for number, row in zip(beside, rows, strict=True):
                row.append(TableCell(printed(number), value=number.value if number else None))
    return head, rows


def left_table(artefact: Artefact, numbers: PaperNumbers) -> list[Table]:
    """The paper's numbers that have no counterpart here, as the paper has them: rows x columns."""
    left = numbers.left(artefact.key)
    if not left:
        return []
    columns = list(dict.fromkeys(each.column for each in left))
    by_place = {(each.row, each.column): each for each in left}
    rows = [
        [
            TableCell(name),
            *(
                TableCell(printed(each), value=each.value if each else None)
                for each in (by_place.get((name, column)) for column in columns)
            ),
        ]
        for name in dict.fromkeys(each.row for each in left)
    ]
    head = [Column(""), *(Column(column, paper=True) for column in columns)]
    caption = f"Of the paper's {artefact.name}, what has no counterpart here ({len(left)})."
    return [Table(caption, head, rows, folded=True)]


def facts_of(artefact: Artefact | None, here: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(what, the paper's, here) of all that is known on either side."""
    paper = artefact.facts if artefact else {}
    return [(name, paper.get(name, UNKNOWN), here.get(name, "not known")) for name in dict.fromkeys([*paper, *here])]


def is_papers(key: Key, keys: Iterable[Key]) -> bool:
    """Whether the paper's number belongs beside a column: that of its splits, or another where a task has only that."""
    return key[1] == PAPER or (key[0], PAPER) not in keys
