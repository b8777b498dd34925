"""Every benchmark by name: where it lies below the data folder, what reads it, how to obtain it."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

from lemon.probe.inferred import inferences
from lemon.probe.task import Task, TaskEntry, TaskError
from lemon.runtime.registry import Registry, unknown
from lemon.runtime.store import is_uri, local_copy, path_exists

_HERE = "lemon.probe.tasks"

TASKS = Registry(
    "lemon.tasks",
    {
        "nucls-super": f"{_HERE}.nucls:SUPER",
        "nucls-main": f"{_HERE}.nucls:MAIN",
        "nucls-raw": f"{_HERE}.nucls:RAW",
        "midog25-atypical": f"{_HERE}.midog:ATYPICAL_FIGURES",
        "midogpp-mitosis": f"{_HERE}.midog:MITOTIC_FIGURES",
        "hest-bowel": f"{_HERE}.hest:BOWEL",
        "hest-breast": f"{_HERE}.hest:BREAST",
        "hest-lung": f"{_HERE}.hest:LUNG",
        "amibr": f"{_HERE}.amibr:ENTRY",
        "consep-type": f"{_HERE}.consep:ENTRY",
        "nucls15-super": f"{_HERE}.nucls15:ENTRY",
    },
    kind=TaskEntry,
)

FOLDER = "folder:"
"""Begins the name of a task of labelled crops, ``folder:NAME``."""

CURATED = {f"{kind}:": f"{_HERE}.{kind}" for kind in ("morphometry", "restained", "jpeg", "site")}
"""What begins the name of a task of curated cells, ``morphometry:PATH``, and the module that reads it."""


def check_name(name: str) -> None:
    """Raise TaskError for a name that ``open_task`` does not know; imports no loader."""
    if name not in TASKS and not (name.startswith((FOLDER, *CURATED)) and name.partition(":")[2]):
        paths = [f"{kind}PATH" for kind in CURATED]
        raise TaskError(f"tasks: {unknown(name, [*TASKS.names(), 'folder:NAME', *paths])}")


def open_task(name: str, data: str | Path, *, seed: int = 0, **options: Any) -> Task:
    """Read a benchmark.

    Args:
        name: one of ``TASKS.names()``, ``folder:NAME``, or ``KIND:PATH`` for the kinds of ``CURATED``.
        data: the folder that holds those of the data sets; of one at s3:// the task's own is copied here to be read.
        seed: of folds and samples.
        options: of the loader, such as ``target="counts"`` of HEST.

    Raises:
        TaskError: the name is unknown, the folder is absent, or its files are not as expected.
    """
    entry = _entry(name)
    if name.startswith(tuple(CURATED)):
        if not path_exists(entry.folder):
            raise TaskError(f"{name}: no folder {entry.folder}; expected {entry.obtain}")
        return entry.load(entry.folder, seed=seed, **options)
    place = f"{data}/{entry.folder}"
    try:
        with local_copy(place) as path:
            if path.is_dir():
                return entry.load(path, seed=seed, **options)
    except FileNotFoundError as error:
        if not is_uri(place):
            raise
        raise TaskError(f"{name}: {error}; expected {entry.obtain}") from None
    raise TaskError(f"{name}: no folder {path}; expected {entry.obtain}")


def check_benchmark(name: str) -> None:
    """Raise TaskError for a name that ``benchmark_patients`` does not know; imports no loader."""
    if not _tasks_of(name):
        families = sorted({task.rpartition("-")[0] for task in TASKS.names()} - {""})
        raise TaskError(unknown(name, [*families, *TASKS.names(), "folder:NAME"]))


def benchmark_patients(name: str, data: str) -> list[str]:
    """Names of the patients, or slides, of a benchmark; none where no name is known that a table of cells could have.

    Args:
        name: a task, or what several tasks' names begin with up to a hyphen: ``nucls`` is all tasks ``nucls-...``.
        data: the folder that holds those of the data sets, also at s3://.

    Raises TaskError: the name is unknown, or its folder, where that is needed, cannot be read.
    """
    check_benchmark(name)
    entries = [_entry(task) for task in _tasks_of(name)]
    return sorted({each for entry in entries if entry.patients for each in entry.patients(f"{data}/{entry.folder}")})


def _tasks_of(name: str) -> list[str]:
    if name in TASKS or (name.startswith(FOLDER) and name != FOLDER):
        return [name]
    return [task for task in TASKS.names() if task.startswith(f"{name}-")]


def counts_table(task: Task) -> str:
    """What each filter left and how many crops each class has, beside the published numbers: lines of text."""
    head = (f"{task.name}: counts", "here", "published")
    lines = [(count.what, f"{count.n:,}", "" if count.paper is None else f"{count.paper:,}") for count in task.counts]
    lines.append(("crops of the task", f"{len(task.images):,}", ""))
    wide = [max(len(line[column]) for line in (head, *lines)) for column in range(3)]
    table = [f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}".rstrip() for a, b, c in (head, *lines)]
    assumed = [f"note: inferred of the paper: {each.subject}: {each.assumed}" for each in inferences(task.name)]
    return "\n".join([*table, *(f"note: {note}" for note in task.notes), *assumed])


def _entry(name: str) -> TaskEntry:
    check_name(name)
    kind, colon, place = name.partition(":")
    if name.startswith(FOLDER):
        from lemon.probe.tasks import folder

        return TaskEntry(place, partial(folder.load, name=place), folder.OBTAIN, folder.patients)
    if module := CURATED.get(kind + colon):
        return TaskEntry(place, importlib.import_module(module).load, "the output of lemon curate")
    try:
        entry: TaskEntry = TASKS.load(name)
    except ValueError as error:
        raise TaskError(f"tasks: {error}") from None
    return entry
