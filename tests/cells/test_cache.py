"""The cache of images: made once, held against its checksums, and never a partial file or a crash on a full disk."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lemon.cells import cache as caching
from lemon.cells.cache import check_cache, open_images, read_images
from lemon.cells.select import Selection, select_cells
from lemon.errors import ConfigError, StorageError
from tests.cells_table import numbered, small_table, write_slide

pytestmark = pytest.mark.usefixtures("console")

FILL = """
import sys
from lemon.cells.cache import open_images
from lemon.cells.select import select_cells
from lemon.runtime.store import Store
print(int(open_images(select_cells(Store(sys.argv[1])), cache=sys.argv[2]).astype("u8").sum()))
"""


@pytest.fixture
def selection(tmp_path: Path) -> Selection:
    return select_cells(small_table(tmp_path / "cells")[0])


def wanted(selection: Selection) -> np.ndarray:
    return read_images(selection)


def filler(cells: Path, cache: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", FILL, str(cells), str(cache)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_cache_holds_the_selected_images_in_order_and_is_made_once(tmp_path: Path) -> None:
    store, written = small_table(tmp_path / "cells")
    selection = select_cells(store)
    whole = np.concatenate([written["a"], written["b"], written["c"]])
    assert (open_images(selection, cache=tmp_path / "cache") == whole).all()
    (file,) = (tmp_path / "cache").iterdir()
    before = file.stat().st_mtime_ns
    assert (open_images(selection, cache=tmp_path / "cache") == whole).all()
    assert file.stat().st_mtime_ns == before
    assert (read_images(selection) == whole).all()


def test_a_cache_of_a_smaller_selection_is_another_file(tmp_path: Path) -> None:
    store, written = small_table(tmp_path / "cells")
    few = select_cells(store, slides=["b"])
    assert (open_images(few, cache=tmp_path / "cache") == written["b"]).all()
    assert few.fingerprint != select_cells(store).fingerprint


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 0xFF]))


DAMAGE = {
    "the first byte": lambda path: _flip(path, 0),
    "a byte in the middle": lambda path: _flip(path, path.stat().st_size // 2),
    "a checksum": lambda path: _flip(path, -6),
    "the checksum of checksums": lambda path: _flip(path, -1),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut to half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "of an earlier version": lambda path: os.truncate(path, 150 * 60 * 60 * 3),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_noticed_whatever_its_date_says_and_made_anew(
    selection: Selection, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    open_images(selection, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    at = file.stat()
    DAMAGE[damage](file)
    os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns))
    assert (open_images(selection, cache=tmp_path / "cache") == wanted(selection)).all()
    (line,) = capsys.readouterr().err.splitlines()
    assert "is damaged, cut short or of an earlier version; it is made anew" in line
    open_images(selection, cache=tmp_path / "cache")
    assert not capsys.readouterr().err


def test_a_disk_without_room_is_told_with_what_is_needed_before_anything_is_made(
    selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda _: usage)
    for check in (check_cache, open_images):
        with pytest.raises(StorageError, match=r"150 cells take 0\.002 GB, and 0\.001 GB are free.*cache=") as told:
            check(selection, cache=tmp_path / "cache" / "deep")
        assert "\n" not in str(told.value)
    assert not (tmp_path / "cache").exists()


def test_a_limit_on_file_sizes_is_one_line_and_leaves_no_file(selection: Selection, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(StorageError, match=r"cache=\.\.\. \(File too large\)"):
            open_images(selection, cache=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").iterdir())


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


@pytest.mark.parametrize("known", ["told before", "told by the reservation", "told by a write"])
def test_a_full_disk_is_an_error_and_no_signal_and_the_partial_file_is_removed(
    selection: Selection, small_disk: Path, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    if known != "told before":
        monkeypatch.setattr(caching, "check_cache", lambda *_, **__: None)
    if known == "told by a write":
        monkeypatch.delattr(os, "posix_fallocate")
    with pytest.raises(StorageError, match=r"150 cells take 0\.002 GB, and 0\.001 GB are free"):
        open_images(selection, cache=small_disk)
    assert not list(small_disk.iterdir())


def test_a_folder_that_cannot_be_one_is_refused(selection: Selection, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("file", "file/below", "link"):
        with pytest.raises(ConfigError, match="cache: cannot write"):
            open_images(selection, cache=tmp_path / place)


def test_a_shard_with_fewer_cells_than_its_table_says_is_told_and_not_read_as_black(tmp_path: Path) -> None:
    store, _ = small_table(tmp_path / "cells")
    selection = select_cells(store)
    write_slide(store, "b", numbered(30))
    for read in (read_images, lambda chosen: open_images(chosen, cache=tmp_path / "cache")):
        with pytest.raises(ConfigError, match=r"cells/b\.parquet: (lacks 20|holds other rows).*curate the slide again"):
            read(selection)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.slow
def test_several_processes_fill_it_once_and_what_killed_ones_left_is_reclaimed(tmp_path: Path) -> None:
    _, written = small_table(tmp_path / "cells")
    folder = tmp_path / "cache"
    folder.mkdir()
    other = folder / "cells-0123456789abcdef.tmp"
    other.write_bytes(bytes(1000))
    mine = [folder / "cells-mine.tmp", folder / "notes.tmp", folder / "cells-0123456789abcdef.u8.tmp"]
    for path in mine:
        path.write_text("mine")
    fillers = [filler(tmp_path / "cells", folder) for _ in range(3)]
    ends = [process.communicate(timeout=100) for process in fillers]
    assert [process.returncode for process in fillers] == [0, 0, 0], ends
    total = sum(int(images.astype("u8").sum()) for images in written.values())
    assert {int(out) for out, _ in ends} == {total}
    assert not other.exists()
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert len(list(folder.glob("*.u8"))) == 1


def test_who_comes_second_waits_with_a_line(selection: Selection, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with caching._locked(folder / f"cells-{selection.fingerprint}.tmp") as file:
        assert file is not None
        second = filler(tmp_path / "cells", folder)
        assert second.stderr is not None
        assert "another process makes" in second.stderr.readline()
        caching._build_cache(file, folder / f"cells-{selection.fingerprint}.u8", selection)
        made = (folder / f"cells-{selection.fingerprint}.u8").stat()
    assert second.wait(100) == 0
    assert (folder / f"cells-{selection.fingerprint}.u8").stat().st_ino == made.st_ino


@pytest.mark.slow
def test_a_fill_that_is_killed_at_any_moment_leaves_a_whole_file_or_one_that_the_next_fill_takes(
    tmp_path: Path,
) -> None:
    store, _ = small_table(tmp_path / "cells")
    for name in "defgh":
        write_slide(store, name, numbered(400))
    selection, folder = select_cells(store), tmp_path / "cache"
    random = np.random.default_rng(0)
    for _ in range(10):
        process = filler(tmp_path / "cells", folder)
        while not folder.exists() or not any(folder.iterdir()):
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert (open_images(selection, cache=folder) == wanted(selection)).all()
        (file,) = folder.iterdir()
        file.unlink()
