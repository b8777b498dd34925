"""Folds of a task: at random, by group, by group left out, or as the data set's authors split it; and what to check."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
from sklearn.model_selection import GroupKFold, KFold, LeaveOneGroupOut, StratifiedGroupKFold

from lemon.probe.task import Fold, Protocol, Task, TaskError
from lemon.runtime.identifiers import look_alikes_line, same_name

N_FOLDS = 5
PAPER, LEAK_FREE = "paper", "leak-free"


def random_folds(n: int, *, n_folds: int = N_FOLDS, seed: int = 0) -> tuple[Fold, ...]:
    """Shuffled folds of ``n`` crops that know nothing of slides: the paper's, where it says KFold.

    Raises TaskError where there are fewer crops than folds.
    """
    if n < n_folds:
        raise TaskError(f"{n} crops cannot make {n_folds} folds; expected at least one crop a fold: add crops")
    return _numbered(KFold(n_folds, shuffle=True, random_state=seed).split(np.zeros(n)))


def random_protocol(n: int, *, seed: int = 0) -> Protocol:
    """The paper's protocol where its folds are random: of ``n`` crops, also within the training part."""
    return Protocol(PAPER, random_folds(n, seed=seed), inner_groups=None)


def grouped_folds(
    groups: np.ndarray, *, labels: np.ndarray | None = None, n_folds: int = N_FOLDS, seed: int = 0
) -> tuple[Fold, ...]:
    """Folds that never divide a group; with labels, each fold has about the same share of every class.

    Args:
        groups: str [N].
        labels: str [N] of a classification task; None: groups are dealt by size alone.
        n_folds: at most; as many as there are groups where those are fewer.
        seed: of the order in which groups are dealt.

    Raises:
        TaskError: there are fewer than two groups.
    """
    groups = one_name_each(groups)
    n_groups = len(np.unique(groups))
    if n_groups < 2:
        raise TaskError(
            f"{n_groups} group cannot be split; expected at least two slides or patients: add labelled slides"
        )
    n_folds = min(n_folds, n_groups)
    if labels is None:
        return _numbered(GroupKFold(n_folds, shuffle=True, random_state=seed).split(groups, groups=groups))
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    return _numbered(splitter.split(groups, labels, groups))


def leak_free(groups: np.ndarray, *, labels: np.ndarray | None = None, seed: int = 0) -> Protocol:
    """The protocol whose folds never divide a group of ``groups`` str [N]; names that are one for certain are one."""
    groups = one_name_each(groups)
    return Protocol(LEAK_FREE, grouped_folds(groups, labels=labels, seed=seed), inner_groups=groups)


def one_name_each(groups: np.ndarray) -> np.ndarray:
    """Groups str [N] with one spelling for names that differ only in blanks or in Unicode's form."""
    names, owner = np.unique(groups, return_inverse=True)
    return np.array([same_name(name) for name in names.tolist()], str)[owner]


def look_alike_groups(protocol: Protocol) -> tuple[str, ...]:
    """A line where groups of a leak-free protocol are probably one: they differ in case or in a barcode's suffix."""
    if protocol.name != LEAK_FREE or protocol.inner_groups is None:
        return ()
    line = look_alikes_line(f"{protocol.name} groups", np.unique(protocol.inner_groups).tolist())
    return (line,) if line else ()


def leave_one_group_out(groups: np.ndarray) -> tuple[Fold, ...]:
    """A fold a group of ``groups`` str [N], in the order of their names.

    Raises TaskError where there are fewer than two groups.
    """
    groups = one_name_each(groups)
    names = np.unique(groups)
    if len(names) < 2:
        raise TaskError(f"{len(names)} group cannot be left out in turn; expected at least two slides or patients")
    splits = LeaveOneGroupOut().split(groups, groups=groups)
    return tuple(Fold(train, test, str(name)) for name, (train, test) in zip(names, splits, strict=True))


def official_folds(
    values: np.ndarray, splits: Mapping[str, tuple[Collection[str], Collection[str]]]
) -> tuple[Fold, ...]:
    """Folds that a data set's authors made: by name, the values of ``values`` str [N] that train and that test.

    A crop whose value is on neither side of a fold is left out of that fold.
    """
    return tuple(
        Fold(np.flatnonzero(np.isin(values, list(train))), np.flatnonzero(np.isin(values, list(test))), name)
        for name, (train, test) in splits.items()
    )


def check_folds(task: Task) -> tuple[str, ...]:
    """One line for each problem of a task's folds; none where there is none.

    An empty or overlapping side, a group on both sides of a leak-free fold, a class that is not trained or not tested.
    """
    labels = task.target if task.kind == "classification" else None
    return tuple(
        f"{task.name}: {line}"
        for protocol in task.protocols
        for line in (*fold_faults(protocol), *(missing_classes(protocol, labels) if labels is not None else ()))
    )


def fold_faults(protocol: Protocol) -> tuple[str, ...]:
    """What makes a protocol's scores wrong: an empty side, a crop on both sides, a group on both sides if leak-free."""
    lines = []
    for fold in protocol.folds:
        where = f"{protocol.name}, fold {fold.name}"
        if not len(fold.train) or not len(fold.test):
            lines.append(f"{where}: {len(fold.train)} crops train, {len(fold.test)} test; expected some on both sides")
        if common := len(np.intersect1d(fold.train, fold.test)):
            lines.append(f"{where}: {common} crops are on both sides; expected none")
        if protocol.name == LEAK_FREE and protocol.inner_groups is not None:
            names = one_name_each(protocol.inner_groups)
            both = np.intersect1d(names[fold.train], names[fold.test])
            if len(both):
                lines.append(f"{where}: {_some(both)} on both sides; expected no group on both: split by group")
    return tuple(lines)


def missing_classes(protocol: Protocol, labels: np.ndarray) -> tuple[str, ...]:
    """A line for every side of a fold that lacks classes of ``labels`` [N]: scores of those classes are undefined."""
    lines = []
    for fold in protocol.folds:
        for side, indices in (("train", fold.train), ("test", fold.test)):
            absent = np.setdiff1d(labels, labels[indices])
            if len(indices) and len(absent):
                lines.append(f"{protocol.name}, fold {fold.name}: no {_some(absent)} to {side} on")
    return tuple(lines)


def _numbered(splits: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[Fold, ...]:
    return tuple(Fold(train, test, str(number)) for number, (train, test) in enumerate(splits, 1))


def _some(names: np.ndarray, *, shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(str(name) for name in names[:shown]) + more
