"""The cache of images: filled once, shared by all selections, within its size, and never wrong images or a crash."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemon.cells import cache as caching
from lemon.cells.cache import RECORD_BYTES, CachedImages, bytes_in_cache, check_cache, checksums
from lemon.cells.images import read_images
from lemon.cells.select import Selection, select_cells
from lemon.errors import ConfigError, StorageError
from lemon.runtime.store import Store
from tests.cells_table import numbered, small_table, write_slide

pytestmark = pytest.mark.usefixtures("console")


@pytest.fixture
def selection(tmp_path: Path) -> Selection:
    return select_cells(small_table(tmp_path / "cells")[0])


def opened(selection: Selection, folder: Path, *, gb: float = 1) -> CachedImages:
    return CachedImages(selection, cache=folder, cache_gb=gb)


def all_of(images: CachedImages, selection: Selection) -> np.ndarray:
    out = np.empty((selection.n_cells, 60, 60, 3), np.uint8)
    images.read(np.arange(selection.n_cells), out)
    return out


def through(selection: Selection, folder: Path, *, gb: float = 1) -> np.ndarray:
    with closing(opened(selection, folder, gb=gb)) as images:
        return all_of(images, selection)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "cells").glob("*.images"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def filling(cells: Path, cache: Path, out: Connection) -> None:
    """Fill a cache and tell the sum of all images and the bytes of images that were written; then wait for the end."""
    written, write = 0, caching._write

    def counted(file: int, content: memoryview, offset: int) -> None:
        nonlocal written
        written += len(content) if len(content) % RECORD_BYTES == 0 else 0
        write(file, content, offset)

    caching._write = counted
    selection = select_cells(Store(cells))
    with closing(opened(selection, cache)) as images:
        out.send((int(all_of(images, selection).astype("u8").sum()), written))
        out.recv()


class Filler:
    """Another process that fills a cache."""

    def __init__(self, cells: Path, cache: Path) -> None:
        forking = multiprocessing.get_context("fork")
        self.end, other = forking.Pipe()
        self.process = forking.Process(target=filling, args=(cells, cache, other), daemon=True)
        self.process.start()
        other.close()

    def found(self) -> tuple[int, int]:
        """What it told, when it has filled."""
        assert self.end.poll(60)
        found: tuple[int, int] = self.end.recv()
        return found

    def finish(self) -> None:
        """Let it close the cache and end."""
        self.end.send(None)
        self.process.join(60)
        assert self.process.exitcode == 0

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()


def test_images_are_those_of_the_table_and_written_once(tmp_path: Path) -> None:
    store, written = small_table(tmp_path / "cells")
    selection, folder = select_cells(store), tmp_path / "cache"
    whole = np.concatenate([written["a"], written["b"], written["c"]])
    assert (through(selection, folder) == whole).all()
    assert size(folder) == bytes_in_cache(selection)
    before = [path.read_bytes() for path in files(folder)]
    with closing(opened(selection, folder)) as images:
        numbers = np.random.default_rng(0).integers(0, len(whole), 1000)
        out = np.empty((1000, 60, 60, 3), np.uint8)
        images.read(numbers, out)
        assert (out == whole[numbers]).all()
    assert [path.read_bytes() for path in files(folder)] == before
    assert (read_images(selection) == whole).all()


def test_the_disk_of_nested_selections_is_that_of_the_largest(tmp_path: Path) -> None:
    store, _ = small_table(tmp_path / "cells")
    for count in (10, 40, 41, 149):
        chosen = select_cells(store, n_cells=count)
        assert (through(chosen, tmp_path / "cache") == read_images(chosen)).all()
        assert size(tmp_path / "cache") == bytes_in_cache(chosen)
    for few in (select_cells(store, slides=["b"], n_cells=20), select_cells(store, organs=["lung"], n_cells=30)):
        assert (through(few, tmp_path / "cache") == read_images(few)).all()
    assert size(tmp_path / "cache") == bytes_in_cache(chosen)


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 0xFF]))


def _swap(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[RECORD_BYTES : 2 * RECORD_BYTES] + content[:RECORD_BYTES] + content[2 * RECORD_BYTES :])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "the first byte": lambda path: _flip(path, 0),
    "a byte in the middle": lambda path: _flip(path, path.stat().st_size // 2),
    "a checksum": lambda path: _flip(path, -1),
    "two images in each other's place": _swap,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}
SHORT: dict[str, Callable[[Path], object]] = {
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut to half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_noticed_whatever_its_date_says_and_made_anew(
    selection: Selection, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    wanted = through(selection, tmp_path / "cache")
    file = files(tmp_path / "cache")[0]
    at = file.stat()
    DAMAGE[damage](file)
    os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns))
    assert (through(selection, tmp_path / "cache") == wanted).all()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file} is damaged, cut short or gone; it is made anew" in line
    assert (through(selection, tmp_path / "cache") == wanted).all()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("damage", SHORT)
def test_a_file_that_is_short_is_completed_before_use_and_mended_in_use(
    selection: Selection, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    wanted = through(selection, tmp_path / "cache")
    file = files(tmp_path / "cache")[0]
    SHORT[damage](file)
    with closing(opened(selection, tmp_path / "cache")) as images:
        assert not capsys.readouterr().err
        SHORT[damage](file)
        assert (all_of(images, selection) == wanted).all()
        assert "it is made anew" in capsys.readouterr().err
        assert (all_of(images, selection) == wanted).all()


@given(st.integers(0, 10_799), st.integers(1, 255), st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_a_checksum_knows_any_byte_and_the_place(at: int, change: int, row: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 10_800), dtype=np.uint8)
    other = image.copy()
    other[0, at] ^= change
    assert checksums(image, np.array([row])) != checksums(other, np.array([row]))
    assert checksums(image, np.array([row])) != checksums(image, np.array([row + 1]))
    assert checksums(np.zeros_like(image), np.array([row])) != 0


# --- size -------------------------------------------------------------------------------------------------------------


def one_slide_each(folder: Path, count: int = 5) -> list[Selection]:
    """Selections of one slide of 10 cells each."""
    store = Store(folder)
    for index in range(count):
        write_slide(store, f"s{index}", numbered(10, start=10 * index))
    return [select_cells(store, slides=[f"s{index}"]) for index in range(count)]


def ten_cells_gb(count: int) -> float:
    return count * 10 * RECORD_BYTES / 1e9


def names(selections: list[Selection]) -> list[str]:
    return sorted(name for each in selections for name in caching._sizes(each))


def test_the_least_recently_used_goes_and_what_is_in_use_does_not(tmp_path: Path) -> None:
    slides, folder, gb = one_slide_each(tmp_path / "cells"), tmp_path / "cache", ten_cells_gb(3)
    used = opened(slides[0], folder, gb=gb)
    for index in (1, 2, 1):
        through(slides[index], folder, gb=gb)
    assert [path.name for path in files(folder)] == names(slides[:3])
    through(slides[3], folder, gb=gb)
    assert [path.name for path in files(folder)] == names([slides[0], slides[1], slides[3]])
    through(slides[4], folder, gb=gb)
    assert [path.name for path in files(folder)] == names([slides[0], slides[3], slides[4]])
    assert (all_of(used, slides[0]) == read_images(slides[0])).all()
    used.close()


def test_what_others_use_is_no_room_and_told_in_one_line(tmp_path: Path) -> None:
    slides, folder, gb = one_slide_each(tmp_path / "cells", 3), tmp_path / "cache", ten_cells_gb(2)
    with closing(opened(slides[0], folder, gb=gb)), closing(opened(slides[1], folder, gb=gb)):
        for attempt in (check_cache, lambda chosen, cache, cache_gb: opened(chosen, cache, gb=cache_gb)):
            with pytest.raises(StorageError, match=r"other runs use 0\.000 of cache_gb=.*raise cache_gb") as told:
                attempt(slides[2], cache=folder, cache_gb=gb)
            assert "\n" not in str(told.value)
        assert [path.name for path in files(folder)] == names(slides[:2])
    through(slides[2], folder, gb=gb)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12))
@settings(max_examples=10, deadline=None)
def test_whatever_is_opened_and_closed_the_cache_keeps_to_its_size_and_every_reader_reads_right(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bool]]
) -> None:
    base = tmp_path_factory.getbasetemp() / "slides"
    slides = one_slide_each(base)
    folder, gb = tmp_path_factory.mktemp("cache"), ten_cells_gb(3)
    held: dict[int, CachedImages] = {}
    for index, close in steps:
        if close and index in held:
            held.pop(index).close()
        elif index not in held:
            if len(held) == 3:
                with pytest.raises(StorageError):
                    opened(slides[index], folder, gb=gb)
            else:
                held[index] = opened(slides[index], folder, gb=gb)
        assert size(folder) <= gb * 1e9
        for one, images in held.items():
            assert (folder / "cells" / names([slides[one]])[0]).exists()
            assert (all_of(images, slides[one]) == read_images(slides[one])).all()
    for images in held.values():
        images.close()


def test_files_of_earlier_versions_make_room_and_others_files_do_not(tmp_path: Path) -> None:
    slides, folder = one_slide_each(tmp_path / "cells", 1), tmp_path / "cache"
    folder.mkdir()
    earlier = [folder / "cells-0123456789abcdef.u8", folder / "cells-0123456789abcdef.tmp"]
    mine = [folder / "cells-mine.u8", folder / "notes.tmp", folder / "images"]
    for path in (*earlier, *mine):
        path.write_bytes(bytes(1000))
    through(slides[0], folder)
    assert all(path.exists() for path in earlier), "there is room"
    through(slides[0], folder, gb=ten_cells_gb(1))
    assert not any(path.exists() for path in earlier)
    assert all(path.exists() for path in mine)


def test_a_disk_without_room_is_told_with_what_is_needed_before_anything_is_made(
    selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"0\.002 GB are to be written, and 0\.001 GB are free.*cache_gb=0") as told:
        check_cache(selection, cache=tmp_path / "cache" / "deep", cache_gb=1)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(StorageError, match=r"0\.001 GB are free"):
        opened(selection, tmp_path / "cache")
    assert not size(tmp_path / "cache")


def test_a_full_disk_makes_room_from_what_nobody_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides, folder = one_slide_each(tmp_path / "cells", 2), tmp_path / "cache"
    through(slides[0], folder)
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    through(slides[1], folder)
    assert [path.name for path in files(folder)] == names(slides[1:])


def test_a_limit_on_file_sizes_is_one_line_and_leaves_no_images(selection: Selection, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(StorageError, match=r"cache_gb=0 \(File too large\)"):
            opened(selection, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").rglob("*.claim"))
    assert (through(selection, tmp_path / "cache") == read_images(selection)).all()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.getuid() != 0 or subprocess.run(words, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("known", [True, False])
def test_a_full_disk_is_an_error_and_no_signal(
    selection: Selection, small_disk: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    if not known:
        monkeypatch.setattr(caching.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    with pytest.raises(StorageError, match=r"0\.002 GB are to be written"):
        opened(selection, small_disk)
    assert not list(small_disk.rglob("*.claim"))


def test_a_folder_that_cannot_be_one_is_refused(selection: Selection, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("file", "file/below", "link"):
        with pytest.raises(ConfigError, match="cache: cannot write"):
            opened(selection, tmp_path / place)


def test_a_shard_with_fewer_cells_than_its_table_says_is_told_and_not_read_as_black(tmp_path: Path) -> None:
    store, _ = small_table(tmp_path / "cells")
    selection = select_cells(store)
    write_slide(store, "b", numbered(30))
    for read in (read_images, lambda chosen: opened(chosen, tmp_path / "cache")):
        with pytest.raises(ConfigError, match=r"cells/b\.parquet: (lacks 20|holds other rows).*curate the slide again"):
            read(selection)
    assert not list((tmp_path / "cache").rglob("*.claim"))


# --- several processes ------------------------------------------------------------------------------------------------


def test_several_processes_fill_it_once(tmp_path: Path) -> None:
    store, written = small_table(tmp_path / "cells")
    fillers = [Filler(tmp_path / "cells", tmp_path / "cache") for _ in range(8)]
    found = [each.found() for each in fillers]
    for each in fillers:
        each.finish()
    assert {total for total, _ in found} == {sum(int(images.astype("u8").sum()) for images in written.values())}
    assert sum(count for _, count in found) == bytes_in_cache(select_cells(store))
    assert not list((tmp_path / "cache").rglob("*.claim"))


def test_who_comes_second_waits_for_a_file_that_another_writes(selection: Selection, tmp_path: Path) -> None:
    through(selection, tmp_path / "cache")
    file = files(tmp_path / "cache")[0]
    content = file.read_bytes()
    with file.open("r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        os.truncate(file, 0)
        second = Filler(tmp_path / "cells", tmp_path / "cache")
        assert not second.end.poll(0.3)
        stream.write(content)
        stream.flush()
        fcntl.flock(stream, fcntl.LOCK_UN)  # closing it does not unlock what the other process has from the fork
    assert second.found()[1] == 0
    second.finish()


def test_what_a_killed_process_claimed_can_go(tmp_path: Path) -> None:
    slides, folder = one_slide_each(tmp_path / "cells", 2), tmp_path / "cache"
    other = Filler(tmp_path / "cells", folder)
    other.found()
    with pytest.raises(StorageError, match="other runs use"):
        opened(slides[0], folder, gb=ten_cells_gb(1))
    other.kill()
    assert len(list(folder.rglob("*.claim"))) == 1
    through(slides[0], folder, gb=ten_cells_gb(1))
    assert not list(folder.rglob("*.claim"))
    assert [path.name for path in files(folder)] == names(slides[:1])


def test_a_file_that_a_killed_process_made_and_did_not_write_goes_though_it_takes_no_room(tmp_path: Path) -> None:
    slides, folder = one_slide_each(tmp_path / "cells", 2), tmp_path / "cache"
    through(slides[0], folder)
    (folder / "cells" / names(slides[1:])[0]).touch()
    through(slides[0], folder, gb=1000)
    assert [path.name for path in files(folder)] == names(slides[:1])


def test_a_fill_that_is_killed_at_any_moment_leaves_nothing_that_is_wrong_or_stays(tmp_path: Path) -> None:
    store, _ = small_table(tmp_path / "cells")
    write_slide(store, "d", numbered(2000))
    selection, folder = select_cells(store), tmp_path / "cache"
    few, whole = select_cells(store, slides=["a"]), read_images(selection)
    random = np.random.default_rng(0)
    for _ in range(8):
        other = Filler(tmp_path / "cells", folder)
        time.sleep(random.uniform(0, 0.1))
        other.kill()
        assert (through(selection, folder) == whole).all()
        through(few, folder, gb=bytes_in_cache(few) / 1e9)
        assert sorted(path.name for path in (folder / "cells").iterdir()) == sorted(["lock", *names([few])])
        for file in files(folder):
            file.unlink()
