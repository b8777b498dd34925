"""Downloads from a server that misbehaves in every way that servers do."""

from __future__ import annotations

import fcntl
import itertools
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lemon.fetch import download
from lemon.fetch.config import DownloadConfig
from lemon.fetch.download import PARTS, Downloader, DownloadError, RemoteFile, StoppedError
from tests.fetch.gdc_server import GdcServer, Served, serving

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "BLOCK_BYTES", 10_000)


def remote(gdc: GdcServer, file: Served) -> RemoteFile:
    return RemoteFile(f"{gdc.url}/data/{file.file_id}", file.name, len(file.content), file.md5)


def downloader(folder: Path, **settings: Any) -> Downloader:
    return Downloader(folder, DownloadConfig(**{"attempts": 3, "backoff_s": 0.001, "reserve_gb": 0.0, **settings}))


def part_of(folder: Path) -> Path:
    """Where a file is until it is whole."""
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    return folder / PARTS / "a.svs"


def one(tmp_path: Path, *faults: tuple[Any, ...], always: tuple[Any, ...] = (), **settings: Any) -> list[int]:
    """Download a file past these faults; returns from which bytes it was asked for."""
    file = Served("a.svs", CONTENT, faults=list(faults), always=always)
    with serving(file) as gdc:
        path = downloader(tmp_path, **settings).get(remote(gdc, file))
        assert path == tmp_path / "a.svs"
        assert path.read_bytes() == CONTENT
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.svs"]
        return gdc.offsets(file)


def test_a_file_is_downloaded_in_one_request(tmp_path: Path) -> None:
    assert one(tmp_path / "new" / "folder") == [0]


def test_a_truncated_download_is_resumed_where_it_broke_off(tmp_path: Path) -> None:
    assert one(tmp_path, ("cut", 123_456), ("cut", 100_000)) == [0, 120_000, 220_000]  # after the last whole block


def test_a_reset_connection_is_resumed_after_what_had_arrived(tmp_path: Path) -> None:
    first, second = one(tmp_path, ("reset", 50_000))
    assert first == 0
    assert second <= 50_000


def test_a_silent_server_is_left_after_the_timeout_and_asked_for_the_rest(tmp_path: Path) -> None:
    assert one(tmp_path, ("stall", 40_000), timeout_s=0.2) == [0, 40_000]


def test_a_server_that_ignores_ranges_sends_all_of_it_again(tmp_path: Path) -> None:
    assert one(tmp_path, ("cut", 100_000), ("whole",)) == [0, 100_000]


def test_a_slow_but_steady_server_may_break_off_more_often_than_attempts_are_allowed(tmp_path: Path) -> None:
    assert len(one(tmp_path, *[("cut", 30_000)] * 9, attempts=2)) == 10


def test_a_server_that_never_gets_further_is_given_up(tmp_path: Path) -> None:
    """It ignores ranges and breaks off at the same byte: each attempt has bytes, none brings anything new."""
    with pytest.raises(DownloadError, match=r"broken off at byte 100000.*after 3 attempts"):
        one(tmp_path, always=("whole", 100_000))


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_an_overloaded_server_is_asked_again(tmp_path: Path, status: int) -> None:
    assert one(tmp_path, ("status", status), ("cut", 10_000), ("status", status)) == [0, 0, 10_000, 10_000]


def test_errors_without_end_are_a_failure_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="too many 500 error responses"):
        one(tmp_path, always=("status", 500))


def test_the_server_says_how_long_to_wait(tmp_path: Path) -> None:
    file = Served("a.svs", CONTENT, faults=[("status", 429, 0), ("status", 429, 1)])
    with serving(file) as gdc:
        downloader(tmp_path).get(remote(gdc, file))
        times = [request.at_s for request in gdc.requests]
    assert len(times) == 3
    assert times[2] - times[1] >= 1  # the settings' own wait is a thousandth


def test_a_file_that_is_not_there_is_asked_for_once(tmp_path: Path) -> None:
    with serving() as gdc:
        with pytest.raises(DownloadError, match=r"HTTP 404 Not Found"):
            downloader(tmp_path).get(remote(gdc, Served("a.svs", CONTENT)))
        assert gdc.downloads() == 1


def test_a_server_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    with serving() as gdc:
        gone = remote(gdc, Served("a.svs", CONTENT))
    with pytest.raises(DownloadError, match="Connection refused") as caught:
        downloader(tmp_path).get(gone)
    assert "\n" not in str(caught.value)


def test_a_wrong_md5_is_downloaded_anew_from_the_first_byte(tmp_path: Path) -> None:
    assert one(tmp_path, ("garbage",)) == [0, 0]


def test_the_part_of_an_earlier_attempt_counts_in_the_md5(tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(CONTENT[:70_000])
    assert one(tmp_path) == [70_000]
    (tmp_path / "a.svs").unlink()
    part_of(tmp_path).write_bytes(bytes(70_000))
    assert one(tmp_path) == [70_000, 0]


def test_a_part_that_is_whole_or_too_long_is_seen_for_what_it_is(tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(CONTENT)
    assert one(tmp_path) == []
    (tmp_path / "a.svs").unlink()
    part_of(tmp_path).write_bytes(CONTENT + b"more")
    assert one(tmp_path) == [0]


def test_a_file_whose_md5_is_always_wrong_fails_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"md5 is \w{32}, expected \w{32}; given up after 3 attempts"):
        one(tmp_path, always=("garbage",))
    assert [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()] == [0]


def test_a_page_of_a_proxy_is_no_slide_and_spoils_nothing(tmp_path: Path) -> None:
    assert one(tmp_path, ("page",), ("cut", 50_000), ("page",)) == [0, 0, 50_000, 50_000]
    (tmp_path / "a.svs").unlink()
    with pytest.raises(DownloadError, match="the server announces 26 bytes, expected 300000"):
        one(tmp_path, always=("page",))


def test_a_file_that_is_there_is_not_downloaded_and_another_one_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(CONTENT)
    assert one(tmp_path) == []
    (tmp_path / "a.svs").write_bytes(bytes(len(CONTENT)))
    with pytest.raises(DownloadError, match=r"a\.svs is another file than the one to download; move it away"):
        one(tmp_path)
    assert (tmp_path / "a.svs").read_bytes() == bytes(len(CONTENT))


def test_progress_counts_what_is_there_in_the_end(tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(bytes(70_000))
    file, counted = Served("a.svs", CONTENT, faults=[("cut", 30_000), ("garbage",), ("cut", 9), ("whole",)]), []
    with serving(file) as gdc:
        worker = downloader(tmp_path)
        worker.progress = counted.append
        worker.get(remote(gdc, file))
        worker.get(remote(gdc, file))  # there already
    assert sum(counted) == 2 * len(CONTENT)
    assert min(counted) < 0
    assert worker._promised == 0


def test_a_download_that_would_eat_into_the_reserve_does_not_begin(tmp_path: Path) -> None:
    file = Served("a.svs", CONTENT)
    with serving(file) as gdc:
        with pytest.raises(DownloadError, match=r"no room: .* GB free in .*download.reserve_gb=1e\+09"):
            downloader(tmp_path, reserve_gb=1e9).get(remote(gdc, file))
        assert gdc.downloads() == 0


def test_what_other_downloads_have_yet_to_write_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has room for either file, not for both."""
    first, second = Served("a.svs", CONTENT, faults=[("stall", 50_000)]), Served("b.svs", CONTENT)
    used = lambda: sum(path.stat().st_size for path in tmp_path.iterdir())  # noqa: E731
    disk = lambda path: shutil._ntuple_diskusage(500_000, used(), 500_000 - used())  # type: ignore[attr-defined]  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", disk)
    with serving(first, second) as gdc:
        worker = downloader(tmp_path)
        thread = threading.Thread(target=worker.get, args=[remote(gdc, first)])
        worker.progress = lambda n_bytes: begun.set() if n_bytes else None
        begun = threading.Event()
        thread.start()
        assert begun.wait(30)
        with pytest.raises(DownloadError, match="no room"):
            worker.get(remote(gdc, second))
        gdc.closing.set()  # the stalled answer breaks off, and the rest is fetched
        thread.join()
    assert (tmp_path / "a.svs").read_bytes() == CONTENT


def test_a_disk_that_is_full_all_the_same_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with serving() as gdc, pytest.raises(DownloadError, match=r"cannot write .*file"):
        downloader(tmp_path / "file").get(remote(gdc, Served("a.svs", CONTENT)))


def test_a_stopped_downloader_keeps_what_it_has(tmp_path: Path) -> None:
    file = Served("a.svs", CONTENT)
    with serving(file) as gdc:
        worker, blocks = downloader(tmp_path), itertools.count()
        worker.progress = lambda n_bytes: worker.stop() if n_bytes and next(blocks) == 4 else None
        with pytest.raises(StoppedError):
            worker.get(remote(gdc, file))
        kept = part_of(tmp_path).read_bytes()
        assert 0 < len(kept) < len(CONTENT)
        assert kept == CONTENT[: len(kept)]
        with pytest.raises(StoppedError):
            worker.get(remote(gdc, file))


def test_two_jobs_do_not_write_to_the_same_file(tmp_path: Path) -> None:
    with part_of(tmp_path).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another process is downloading it"):
            one(tmp_path)
    assert one(tmp_path) == [0]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.svs"]
