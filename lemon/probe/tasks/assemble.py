"""From labelled crops to a task: the rule of support, groups, protocols, counts.

Minimum support, for every classification task: a class with fewer than ``MIN_SUPPORT`` crops, or whose crops come from
a single group, is left out, with its count and a note. Under 20 crops a fold tests fewer than four of them, so that one
nucleus moves the class's score by a quarter; from a single group a class cannot be trained and tested without a leak.
In NuCLS at the raw level it strikes eosinophil (n = 2 in the paper's table).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lemon.probe.folds import (
    fold_faults,
    leak_free,
    look_alike_groups,
    missing_classes,
    one_name_each,
    random_protocol,
)
from lemon.probe.task import Count, Protocol, Task, TaskError
from lemon.runtime.tables import Column, Form, read_user_table

MIN_SUPPORT = 20
"""Crops that a class needs to be kept."""

_PLACE = ["x_um", "y_um"]

Folds = Callable[[pd.DataFrame], tuple[Protocol, ...]]
"""Makes the protocols of the rows that are kept."""


def published(*columns: str | Column, may_be_empty: bool = False) -> Form:
    """The table of a published data set: it has further columns, and a name alone is a column that is always filled."""
    known = tuple(Column(column, filled=True) if isinstance(column, str) else column for column in columns)
    return Form("", known, others=True, may_be_empty=may_be_empty, error=TaskError)


def read_rows(path: Path, form: Form) -> pd.DataFrame:
    """The columns of ``form`` that a table has: text or float, None where there is no value. Raises TaskError."""
    return pd.DataFrame(read_user_table(path, form=form).columns)


def check_labels(labels: Collection[str], known: Collection[str], *, where: Path) -> None:
    """Raise TaskError for the first label that the class map does not know."""
    for label in labels:
        if label not in known:
            close = difflib.get_close_matches(label, known, n=1)
            hint = f"; did the set rename {close[0]}?" if close else ""
            raise TaskError(f"{where}: unknown class {label!r}; expected one of {', '.join(sorted(known))}{hint}")


def classification_task(
    name: str,
    *,
    rows: pd.DataFrame,
    images: np.ndarray,
    classes: Mapping[str, int | None],
    folds: Folds,
    counts: Sequence[Count],
    group: str = "slide",
    cluster: str = "slide",
    batch: str | None = None,
    notes: Sequence[str] = (),
    min_support: int = MIN_SUPPORT,
) -> Task:
    """A task of labelled crops.

    Args:
        name: as on the command line.
        rows: ``sample_id``, ``label``, and a column for each group, str [N]; of images with several nuclei also
            ``x_um``, ``y_um``, where in its image a nucleus is.
        images: uint8 [N, 60, 60, 3].
        classes: in the order of reports, with the published number of each where there is one.
        folds: makes the protocols.
        counts: what the loader's own filters left.
        group: the column that leak-free folds do not divide.
        cluster, batch, notes: as in Task.
        min_support: crops that a class needs.

    Raises:
        TaskError: fewer than two classes are left, ids repeat, or a fold leaks or is empty.
    """
    columns = [column for column in rows.columns if column not in ("sample_id", "label", *_PLACE)]
    rows = rows.assign(**{column: one_name_each(_text(rows[column])) for column in columns})
    kept, dropped = supported(rows["label"].to_numpy(), rows[group].to_numpy(), min_support=min_support)
    present = tuple(label for label in classes if label in set(rows["label"][kept]))
    if len(present) < 2:
        got = f"{_remaining_classes(present)} left of {len(rows)} crops"
        raise TaskError(f"{name}: {got}; expected two or more: {_drop_reasons(dropped)}")
    counts = [
        *counts,
        *(Count(f"class {label}", int((rows["label"] == label).sum()), classes[label]) for label in classes),
    ]
    if not kept.all():
        rows, images = rows[kept], images[kept]
        counts.append(Count(f"of classes with {min_support} crops or more of two groups or more", len(rows)))
    rows = rows.reset_index(drop=True)
    _check_ids(name, rows["sample_id"])
    protocols, labels = folds(rows), _text(rows["label"])
    return Task(
        name=name,
        kind="classification",
        images=images,
        target=labels,
        target_names=present,
        sample_ids=_text(rows["sample_id"]),
        groups={column: _text(rows[column]) for column in columns},
        protocols=protocols,
        cluster=cluster,
        batch=batch,
        counts=tuple(counts),
        notes=(*notes, *dropped, *check_protocols(name, protocols, labels=labels)),
        place_um=rows[_PLACE].to_numpy(np.float64) if set(_PLACE) <= set(rows.columns) else None,
    )


def supported(labels: np.ndarray, groups: np.ndarray, *, min_support: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Which of ``labels`` [N] have the support that this module asks for: bool [N]; a note for each class without."""
    kept, notes = np.ones(len(labels), bool), []
    for label in np.unique(labels):
        of_class = labels == label
        n, n_groups = int(of_class.sum()), len(np.unique(groups[of_class]))
        if n < min_support or n_groups < 2:
            kept &= ~of_class
            notes.append(f"{label} is left out: {n} crops of {n_groups} groups; expected {min_support} of two or more")
    return kept, tuple(notes)


def by_group(column: str, *, seed: int, paper_at_random: bool = False) -> Folds:
    """Protocols of five folds that do not divide ``column``; first the paper's random ones where it used those."""

    def make(rows: pd.DataFrame) -> tuple[Protocol, ...]:
        apart = leak_free(_text(rows[column]), labels=_text(rows["label"]), seed=seed)
        if not paper_at_random:
            return (apart,)
        return random_protocol(len(rows), seed=seed), apart

    return make


def check_protocols(name: str, protocols: Sequence[Protocol], *, labels: np.ndarray | None) -> tuple[str, ...]:
    """Notes about groups that look alike and classes that a fold lacks; TaskError where a fold is empty or leaks."""
    faults = [line for protocol in protocols for line in fold_faults(protocol)]
    if faults:
        raise TaskError(f"{name}: {faults[0]}")
    alike = tuple(line for protocol in protocols for line in look_alike_groups(protocol))
    if labels is None:
        return alike
    return (*alike, *(line for protocol in protocols for line in missing_classes(protocol, labels)))


def _check_ids(name: str, ids: pd.Series) -> None:
    repeated = ids[ids.duplicated()]
    if len(repeated):
        raise TaskError(f"{name}: {repeated.iloc[0]!r} names several crops; expected one row a crop: drop the repeats")


def _text(column: pd.Series) -> np.ndarray:
    return column.to_numpy(dtype=str)


def _remaining_classes(present: Sequence[str]) -> str:
    return f"only the class {present[0]} is" if present else "no class is"


def _drop_reasons(dropped: Sequence[str]) -> str:
    return "; ".join(dropped) or "add labelled crops"
