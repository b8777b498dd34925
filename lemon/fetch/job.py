"""Slides from the GDC: kept in a folder, or curated one by one as they come and deleted."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lemon.cells.ledger import read_ledger
from lemon.cells.select import rank_of
from lemon.curate import job as curate
from lemon.errors import ConfigError, FatalError
from lemon.fetch.config import COHORT_FILE, FetchConfig
from lemon.fetch.download import PARTS, Downloader, DownloadError, StoppedError, open_session
from lemon.fetch.gdc import GdcFile, list_files, organ_of, read_manifest, studies_of
from lemon.runtime import pool
from lemon.runtime.console import stage_logger
from lemon.runtime.lease import hold
from lemon.runtime.ledger import Ledger, Summary
from lemon.runtime.records import INTERNAL_FOLDER
from lemon.runtime.secrets import redacted
from lemon.runtime.store import Store
from lemon.schema import DownloadRow
from lemon.slides.cohort import Slide, write_cohort

STREAM_FOLDER = f"{INTERNAL_FOLDER}/passing"
"""Folder in the output for slides that are deleted after their curation."""

logger = stage_logger(__name__, "fetch_tcga")


def main(config: FetchConfig) -> int:
    """``run``; returns the exit code."""
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # attempts that are repeated are no news
    return run(config).exit_code


def run(config: FetchConfig) -> Summary[DownloadRow]:
    """Download the slides of a config, and curate them where it says so; logs and returns what became of downloads.

    The summary has a row of the ledger of downloads for each slide that was tried, now or earlier.

    Raises:
        ConfigError: the user must correct something first.
        GdcError: the GDC cannot be asked which slides there are.
        FatalError: the ledger cannot be written.
    """
    with hold(config.output, stage="fetch_tcga", names=("downloads", COHORT_FILE)) as output:
        files = _choose_files(config)
        summary = (
            _curate_while_downloading(files, output, config)
            if config.stream
            else _download_to_folder(files, output, config)
        )
    n_bytes = sum(row.size_bytes for row in summary.rows if row.status == "done")
    where = f"curated into {config.curate_config().output}" if config.stream else f"in {config.output}"
    logger.info(f"{summary.log_and_describe(logger, ('done', 'failed'))}, {_gigabytes(n_bytes)} {where}")
    return summary


# --- which slides -----------------------------------------------------------------------------------------------------


def lowest_ranks(files: Sequence[GdcFile], n: int | None, *, one_per_patient: bool) -> list[GdcFile]:
    """The ``n`` files of lowest rank of their slides' ids (None: all): a smaller choice lies inside a larger one.

    ``one_per_patient`` leaves of each patient only the slide of lowest rank.
    """
    ranks = rank_of(file.slide_id for file in files)
    kept: dict[str, GdcFile] = {}
    for index in np.argsort(ranks, kind="stable"):
        patient_id = files[index].slide("").patient_id if one_per_patient else None
        kept.setdefault(patient_id or files[index].slide_id, files[index])
    return list(kept.values())[:n]


def _choose_files(config: FetchConfig) -> dict[str, GdcFile]:
    """The slides of a config by their ids. Raises ConfigError and GdcError."""
    pick = functools.partial(lowest_ranks, n=config.slides_per_organ, one_per_patient=config.one_per_patient)
    if config.manifest is not None:
        organ = organ_of(config.organs[0]) if config.organs else None
        groups = {config.manifest: pick(read_manifest(config.manifest, organ=organ))}
    else:
        studies = {word: studies_of(word) for word in config.organs}  # all words are checked before one is asked for
        with open_session(config.download) as session:
            list_of_studies = functools.partial(list_files, session, config.api, timeout_s=config.download.timeout_s)
            groups = {word: pick(list_of_studies(studies=codes)) for word, codes in studies.items()}
    for word, group in groups.items():
        if not group:
            raise ConfigError(f"{'manifest' if config.manifest else 'organs'}: {word} has no diagnostic slides")
        if config.slides_per_organ is not None and len(group) < config.slides_per_organ:
            logger.info(f"{word} has {len(group)} slides, not {config.slides_per_organ}")
    return {file.slide_id: file for group in groups.values() for file in group}


# --- downloads --------------------------------------------------------------------------------------------------------


def download_ledger(store: Store) -> Ledger[DownloadRow]:
    """What became of each download: one row a slide, in ``downloads/``."""
    return Ledger(store, DownloadRow, folder="downloads", counts_attempts=False)


class Fetcher:
    """Downloads slides into a folder and notes what became of each."""

    def __init__(
        self,
        folder: Path,
        ledger: Ledger[DownloadRow],
        config: FetchConfig,
        *,
        progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.api, self.ledger = config.api, ledger
        self.downloader = Downloader(folder, config.download, progress=progress)

    def fetch(self, file: GdcFile) -> Path:
        """Where a slide's file now lies. Raises DownloadError, StoppedError, and OSError when its row isn't written."""
        start, remote = time.perf_counter(), file.remote(self.api)
        row = DownloadRow(
            slide_id=file.slide_id,
            file_id=file.file_id,
            file_name=file.file_name,
            url=remote.url,
            size_bytes=file.size_bytes,
            md5=file.md5,
            status="done",
            total_s=0.0,
        )
        try:
            path = self.downloader.get(remote)
        except DownloadError as error:
            failed_row = replace(row, status="failed", error=redacted(str(error)))
            self.ledger.commit(replace(failed_row, total_s=round(time.perf_counter() - start, 3)))
            raise
        self.ledger.commit(replace(row, total_s=round(time.perf_counter() - start, 3)))
        return path


def _download_to_folder(files: dict[str, GdcFile], output: Store, config: FetchConfig) -> Summary[DownloadRow]:
    """Download the slides that are not there yet; list those that are there in the cohort."""
    folder, ledger = Path(output.root), download_ledger(output)
    known = ledger.rows()
    pending = [file for slide_id, file in files.items() if not _is_downloaded(file, known.get(slide_id), folder=folder)]
    n_bytes = sum(file.size_bytes for file in pending)
    logger.info(f"{len(files)} slides, of which {len(pending)} ({_gigabytes(n_bytes)}) to download")
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="fetch_tcga", disable=None) as bar:

        def progress(n_bytes: int) -> None:
            with bar.get_lock():
                bar.update(n_bytes)

        _fetch_all(Fetcher(folder, ledger, config, progress=progress), pending, parallel=config.download.parallel)
    rows = {slide_id: row for slide_id, row in ledger.rows().items() if slide_id in files}
    done = [file for slide_id, file in files.items() if rows[slide_id].status == "done"]
    write_cohort(output, COHORT_FILE, [file.slide(file.file_name) for file in done])
    return Summary(rows=list(rows.values()), n_skipped=len(files) - len(pending))


def _is_downloaded(file: GdcFile, row: DownloadRow | None, *, folder: Path) -> bool:
    """Whether a row says that a file is done, and the file is still there."""
    path = folder / file.file_name
    done = row is not None and row.status == "done" and row.md5 == file.md5
    return done and path.is_file() and path.stat().st_size == file.size_bytes


def _fetch_all(fetcher: Fetcher, files: Sequence[GdcFile], *, parallel: int) -> None:
    def fetch(file: GdcFile) -> None:
        try:
            fetcher.fetch(file)
        except (DownloadError, StoppedError):
            pass  # the row says it; after a stop there is no row
        except OSError as error:
            raise FatalError(f"cannot write to {fetcher.ledger.store.uri}: {error}") from error

    with ThreadPoolExecutor(parallel) as pool:
        try:
            for future in as_completed([pool.submit(fetch, file) for file in files]):
                future.result()
        except BaseException:  # Ctrl-C too: what is under way ends soon
            fetcher.downloader.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# --- straight into cells ----------------------------------------------------------------------------------------------


class StreamedSlides:
    """Slides that are on disk only while they are curated; lives in the actors of curation."""

    def __init__(self, files: dict[str, GdcFile], folder: Path, config: FetchConfig, *, cells: Store) -> None:
        self.files = files
        self.fetcher = Fetcher(folder, download_ledger(cells), config)

    @contextlib.contextmanager
    def __call__(self, slide: Slide) -> Iterator[str]:
        """Download a slide, say where it is, and delete it. Raises pool.AbsentError."""
        try:
            path = self.fetcher.fetch(self.files[slide.slide_id])
        except DownloadError as error:
            raise pool.AbsentError(str(error)) from error
        try:
            yield str(path)
        finally:
            path.unlink(missing_ok=True)


def _curate_while_downloading(files: dict[str, GdcFile], output: Store, config: FetchConfig) -> Summary[DownloadRow]:
    """Curate the slides as they come. Downloads are noted beside the cells, because actors may be on other machines."""
    curation, folder = config.curate_config(), Path(output.root) / STREAM_FOLDER
    try:
        cells = Store(curation.output)
    except ValueError as error:
        raise ConfigError(f"cells: {error}") from None
    write_cohort(output, COHORT_FILE, [file.slide(file.remote(config.api).url) for file in files.values()])
    committed = files.keys() & set(read_ledger(cells)["slide_id"].to_pylist())
    _remove_unwanted_files(
        folder, keep=[file.file_name for slide_id, file in files.items() if slide_id not in committed]
    )
    opening = functools.partial(StreamedSlides, files, folder, config, cells=cells)
    try:
        curated = curate.run(curation, source=curate.SlideAccess(open=opening, ahead=config.ahead))
    except ConfigError as error:
        message = str(error).replace("output: ", "cells: ", 1).replace("overwrite=true", "curation.overwrite=true")
        raise ConfigError(message) from None
    rows = [row for slide_id, row in download_ledger(cells).rows().items() if slide_id in files]
    return Summary(rows=rows, n_skipped=len(committed), before=[curated])


def _remove_unwanted_files(folder: Path, *, keep: Sequence[str]) -> None:
    """Delete what a killed job left of slides that are no longer wanted; what is wanted is gone on with."""
    for path in (*folder.glob("*"), *(folder / PARTS).glob("*")):
        if path.is_file() and path.name not in keep:
            path.unlink()


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
