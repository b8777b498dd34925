"""Every benchmark by name: where it lies below the data folder, what reads it, how to obtain it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lemon.probe.task import Task, TaskError
from lemon.probe.tasks import amibr, consep, folder, hest, midog, morphometry, nucls, nucls15
from lemon.runtime.store import is_uri, local_copy, path_exists

FOLDER_PREFIX = "folder:"
MORPHOMETRY_PREFIX = "morphometry:"


@dataclass(frozen=True)
class Entry:
    """A benchmark: its folder below ``data``, its loader, and how to obtain it."""

    folder: str
    load: Callable[..., Task]
    obtain: str


ENTRIES: dict[str, Entry] = {
    **{f"nucls-{level}": Entry("nucls", partial(nucls.load, level=level), nucls.OBTAIN) for level in nucls.CLASSES},
    **{
        name: Entry(name.split("-")[0], partial(midog.load, task=name), obtain) for name, obtain in midog.OBTAIN.items()
    },
    **{f"hest-{organ}": Entry("hest", partial(hest.load, organ=organ), hest.OBTAIN) for organ in hest.SLIDES},
    "amibr": Entry("amibr", amibr.load, amibr.OBTAIN),
    "consep-type": Entry("consep", consep.load, consep.OBTAIN),
    "nucls15-super": Entry("nucls15", nucls15.load, nucls15.OBTAIN),
}


def task_names() -> tuple[str, ...]:
    """Names of all benchmarks; on top come ``folder:NAME``, labelled crops, and ``morphometry:PATH``, curated cells."""
    return tuple(ENTRIES)


def open_task(name: str, data: str | Path, *, seed: int = 0, **options: Any) -> Task:
    """Read a benchmark.

    Args:
        name: one of ``task_names()``, ``folder:NAME`` or ``morphometry:PATH``.
        data: the folder that holds those of the data sets; of one at s3:// the task's own is copied here to be read.
        seed: of folds and samples.
        options: of the loader, such as ``target="counts"`` of HEST.

    Raises:
        TaskError: the name is unknown, the folder is absent, or its files are not as expected.
    """
    entry = _entry(name)
    if name.startswith(MORPHOMETRY_PREFIX):
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


def counts_table(task: Task) -> str:
    """What each filter left and how many crops each class has, beside the published numbers: lines of text."""
    head = (f"{task.name}: counts", "here", "published")
    lines = [(count.what, f"{count.n:,}", "" if count.paper is None else f"{count.paper:,}") for count in task.counts]
    lines.append(("crops of the task", f"{len(task.images):,}", ""))
    wide = [max(len(line[column]) for line in (head, *lines)) for column in range(3)]
    table = [f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}".rstrip() for a, b, c in (head, *lines)]
    return "\n".join([*table, *(f"note: {note}" for note in task.notes)])


def _entry(name: str) -> Entry:
    own = name.removeprefix(FOLDER_PREFIX)
    if name.startswith(FOLDER_PREFIX) and own:
        return Entry(own, partial(folder.load, name=own), folder.OBTAIN)
    if name.startswith(MORPHOMETRY_PREFIX):
        return Entry(name.removeprefix(MORPHOMETRY_PREFIX), morphometry.load, morphometry.OBTAIN)
    if name not in ENTRIES:
        close = difflib.get_close_matches(name, ENTRIES, n=3, cutoff=0.5)
        known = ", ".join([*ENTRIES, "folder:NAME", "morphometry:PATH"])
        hint = f"did you mean {' or '.join(close)}?" if close else f"expected one of {known}"
        raise TaskError(f"tasks: unknown {name!r}; {hint}")
    return ENTRIES[name]
