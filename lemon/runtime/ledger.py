"""The ledger of an output: one row an item, each a file that is written last, so that a row means: complete."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from lemon.errors import EXIT_FAILURES, EXIT_OK
from lemon.runtime.identifiers import file_stem
from lemon.runtime.records import INTERNAL_FOLDER
from lemon.runtime.settings import check_settings
from lemon.runtime.store import Store, code_version
from lemon.schema import SLIDE_STATUSES, DownloadRow, EmbeddedRow, SlideRow

ATTEMPTS_FOLDER = f"{INTERNAL_FOLDER}/attempts"
"""Marks of work on a slide that has begun and not come to an end, as when it kills its worker each time."""

R = TypeVar("R", SlideRow, EmbeddedRow, DownloadRow)


class Ledger(Generic[R]):
    """The rows of one output, by ``slide_id``.

    Args:
        store: the output.
        row: the type of its rows.
        facts: columns that are the same in every row.
        folder: where the rows lie in the output.
        counts_attempts: whether ``begin`` is called; only then does ``commit`` forget attempts, which may be another
            ledger's of the same slides in the same output.
    """

    def __init__(
        self,
        store: Store,
        row: type[R],
        *,
        facts: Mapping[str, Any] | None = None,
        folder: str = "slides",
        counts_attempts: bool = True,
    ) -> None:
        self.row: type[R] = row
        self.store, self.facts, self.folder = store, dict(facts or {}), folder
        self.counts_attempts = counts_attempts

    def rows(self) -> dict[str, R]:
        """All rows by slide id, sorted by it. Raises ConfigError."""
        table = self.store.read_tables(self.folder, schema=self.row.schema).sort_by("slide_id")
        return {row.slide_id: row for row in self.row.read(table)}

    def prepare_output(
        self, name: str, settings: Mapping[str, Any], *, folders: Sequence[str], overwrite: bool
    ) -> None:
        """Make the output ready for items: noted settings, no marks of a run that was killed; emptied by ``overwrite``.

        Args:
            name: file of its settings.
            settings: those that decide what the rows of its tables say.
            folders: of all that the stage makes of items.
            overwrite: whether what was made with whatever settings goes first.

        Raises ConfigError where the output, which is held, has items that were made with other settings.
        """
        if overwrite:
            for each in (*folders, name):
                self.store.delete(each)
        self.store.delete(ATTEMPTS_FOLDER)  # only those of this run count
        remedy = "choose another output or overwrite=true"
        check_settings(self.store, name, settings, is_empty=lambda: not self.store.list(self.folder), remedy=remedy)

    def begin(self, slide_id: str, *, run_id: str) -> int:
        """Note that work on a slide begins; returns how often it began before in this run without coming to an end.

        Attempts of other runs do not count: that a whole job was killed says nothing against the slide.
        """
        folder = f"{ATTEMPTS_FOLDER}/{file_stem(slide_id)}"
        earlier = sum(f"/{run_id}-" in name for name in self.store.list(folder))
        self.store.write_internal(f"{folder}/{run_id}-{earlier}", b"")
        return earlier

    def commit(self, row: R) -> R:
        """Write a slide's row and forget its attempts; returns the row with what all have in common."""
        full_row = replace(row, **self.facts, code_version=code_version())
        self.store.write_table(self._name(row.slide_id), self.row.table([full_row]))
        if self.counts_attempts:
            self.store.delete(f"{ATTEMPTS_FOLDER}/{file_stem(row.slide_id)}")
        return full_row

    def forget(self, slide_id: str) -> None:
        """Delete a slide's row, so that the slide is new."""
        self.store.delete(self._name(slide_id))

    def without_file(self, slide_ids: Iterable[str], name_of: Callable[[str], str]) -> set[str]:
        """Those slides whose file, in the output's folder of such files, is absent."""
        files = self.store.entries(name_of("").partition("/")[0])
        return {slide_id for slide_id in slide_ids if name_of(slide_id) not in files}

    def _name(self, slide_id: str) -> str:
        return f"{self.folder}/{file_stem(slide_id)}.parquet"


@dataclass(frozen=True, kw_only=True)
class Summary(Generic[R]):
    """What became of the slides that a job was asked for; a stage adds fields of its own.

    Attributes:
        rows: of the ledger.
        n_skipped: slides that an earlier run had finished.
        max_failed_share: of the rows; more is a failure of the job.
        failures: statuses that count as failed.
        before: of stages that the job ran before its own; their failures are the job's.
    """

    rows: Sequence[R]
    n_skipped: int
    max_failed_share: float = 0.0
    failures: Sequence[str] = ("failed",)
    before: Sequence[Summary[Any]] = ()

    @property
    def exit_code(self) -> int:
        """Of the job."""
        failed = sum(row.status in self.failures for row in self.rows)
        if failed > self.max_failed_share * len(self.rows):
            return EXIT_FAILURES
        return max((each.exit_code for each in self.before), default=EXIT_OK)

    def log_and_describe(
        self, logger: logging.LoggerAdapter[logging.Logger], statuses: Sequence[str] = SLIDE_STATUSES
    ) -> str:
        """Log the reason of each row that has one; returns in words how many slides have which status."""
        for row in self.rows:
            if row.error:
                logger.info(f"  {row.slide_id}: {row.status}: {row.error}")
        counts = Counter(row.status for row in self.rows)
        by_status = ", ".join(f"{counts[status]} {status}" for status in statuses)
        return f"{len(self.rows)} slides ({by_status}; {self.n_skipped} of an earlier run)"
