"""The ledger of an output: one row an item, each a file that is written last, so that a row means: complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from lemon.runtime.attempts import FOLDER as ATTEMPTS
from lemon.runtime.attempts import begin_attempt, end_attempts
from lemon.runtime.identifiers import file_stem
from lemon.runtime.settings import keep_settings
from lemon.runtime.store import Store, code_version
from lemon.schema import DownloadRow, EmbeddedRow, SlideRow

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

    def begin(self, slide_id: str, *, run_id: str) -> int:
        """Note that work on a slide begins; returns how often it began before in this run without coming to an end."""
        return begin_attempt(self.store, file_stem(slide_id), run_id=run_id)

    def commit(self, row: R) -> R:
        """Write a slide's row and forget its attempts; returns the row with what all have in common."""
        whole = replace(row, **self.facts, code_version=code_version())
        self.store.write_table(self._name(row.slide_id), self.row.table([whole]))
        if self.counts_attempts:
            end_attempts(self.store, file_stem(row.slide_id))
        return whole

    def forget(self, slide_id: str) -> None:
        """Delete a slide's row, so that the slide is new."""
        self.store.delete(self._name(slide_id))

    def lacking(self, slide_ids: Iterable[str], name_of: Callable[[str], str]) -> set[str]:
        """Those slides whose file, in the output's folder of such files, is absent."""
        there = self.store.entries(name_of("").partition("/")[0])
        return {slide_id for slide_id in slide_ids if name_of(slide_id) not in there}

    def _name(self, slide_id: str) -> str:
        return f"{self.folder}/{file_stem(slide_id)}.parquet"


def begin_output(
    store: Store, name: str, settings: Mapping[str, Any], *, folders: Sequence[str], overwrite: bool
) -> None:
    """Make an output ready for items: noted settings, no marks of a run that was killed; emptied with ``overwrite``.

    Args:
        store: the output, held.
        name: file of its settings.
        settings: those that decide what the rows of its tables say.
        folders: of all that the stage makes of items.
        overwrite: whether what was made with whatever settings goes first.

    Raises ConfigError where the output holds items that were made with other settings.
    """
    if overwrite:
        for each in (*folders, name):
            store.delete(each)
    store.delete(ATTEMPTS)  # only those of this run count
    remedy = "choose another output or overwrite=true"
    keep_settings(store, name, settings, is_empty=lambda: not store.list("slides"), remedy=remedy)
