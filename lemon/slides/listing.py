"""Which files of a folder, a glob or an s3:// prefix are slides, and how many are passed over for which reason."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath

from fsspec.utils import glob_translate

from lemon.runtime.store import Store, is_uri, path_exists
from lemon.slides.headers import Instance, read_instance
from lemon.slides.paths import on_disk
from lemon.slides.reader import detect_format

SUFFIXES = frozenset(
    [".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm", ".czi"]
)
_MAX_REASONS = 8  # reasons in a line
_UNFINISHED = (".part", ".partial", ".tmp", ".crdownload", ".download", ".filepart", ".bak", "~")


def find_slides(word: str, skipped: Counter[str]) -> list[str]:
    """Paths of the slides that a glob, a folder, a prefix or a name matches, sorted, one path a slide.

    A file that is named as such is taken whatever it is. ``skipped`` counts the others by their reason.

    Raises ValueError for a URI or a pattern that cannot be read, or an empty word.
    """
    if not word.strip():
        raise ValueError("got an empty path; expected a glob, folder, slide or cohort table")
    if is_uri(word):
        names = _remote_names(word)
        return [word.rstrip("/")] if names is None else _sort_out(names, skipped)
    path = Path(on_disk(word)).expanduser()
    if path.is_dir():
        return _sort_out(_walk(path.absolute(), skipped), skipped)
    if path.exists():
        return [str(path.absolute())]
    return _sort_out(_matches(str(path.absolute()), skipped), skipped)


def identity(path: str) -> Hashable:
    """What two names of one slide have in common: a series of DICOM, a file on a disk, else the path."""
    if is_uri(path):
        return path
    file = on_disk(path)
    if (instance := _instance(file)) is not None:
        return instance.series
    try:
        status = Path(file).stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino


def describe_skipped(skipped: Counter[str]) -> str:
    """``12 files: 9 .txt, 2 hidden, 1 unfinished``."""
    total = sum(skipped.values())
    commonest = skipped.most_common(_MAX_REASONS)
    rest = total - sum(count for _, count in commonest)
    parts = ", ".join([f"{count} {reason}" for reason, count in commonest] + [f"{rest} others"] * (rest > 0))
    return f"{total} file{'s' * (total != 1)}: {parts}"


def _walk(root: Path, skipped: Counter[str]) -> Iterator[str]:
    """All files below a folder, links followed; each folder once, under its own path rather than a link's."""
    seen: set[tuple[int, int]] = set()
    starts = [str(root)]

    def unreadable(_: OSError) -> None:
        skipped["in folders that cannot be read"] += 1

    for start in starts:  # grows: links are followed last
        for folder, folders, files in os.walk(start, onerror=unreadable):
            try:
                status = Path(folder).stat()
            except OSError as error:
                unreadable(error)
                continue
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            visible = sorted(name for name in folders if not name.startswith("."))
            if len(visible) < len(folders):
                skipped["hidden"] += len(folders) - len(visible)
            folders[:] = visible
            starts += [path for name in visible if Path(path := f"{folder}/{name}").is_symlink()]
            yield from (f"{folder}/{name}" for name in files)


def _matches(pattern: str, skipped: Counter[str]) -> Iterable[str]:
    """The files that a glob matches; ``**`` looks into each folder once: links may go in rings."""
    if "**" not in PurePath(pattern).parts:
        return [name for name in glob.glob(pattern) if not Path(name).is_dir()]  # noqa: PTH207
    regex = re.compile(glob_translate(pattern))
    root = Path(*_above_magic(PurePath(pattern).parts))
    return (name for name in _walk(root, skipped) if regex.match(name)) if root.is_dir() else ()


def _above_magic(parts: Sequence[str]) -> Sequence[str]:
    """The folders of a pattern above its first wildcard."""
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return parts[:first]


def _remote_names(word: str) -> list[str] | None:
    """The objects that a glob or a prefix at s3:// matches; None for the name of one."""
    is_plain = not glob.has_magic(word)
    folder = word if is_plain else word[: re.search(r"[*?[]", word).start()].rpartition("/")[0]  # type: ignore[union-attr]
    store = Store(folder)
    names = [f"{store.uri}/{name}" for name in store.list("")]
    if not is_plain:
        pattern = re.compile(glob_translate(word))
        return [name for name in names if pattern.match(name)]
    return None if not names and path_exists(word) else names


def _sort_out(names: Iterable[str], skipped: Counter[str]) -> list[str]:
    """The slides among files: the one rule for folders, globs and s3://."""
    names = sorted(names)
    # A MIRAX slide is a file and the folder of the same name.
    parts_of = {name[: -len(".mrxs")] for name in names if name.lower().endswith(".mrxs")}
    slides, series = [], defaultdict[Hashable, list[tuple[str, Instance | None]]](list)
    for name in (name for name in names if name.rpartition("/")[0] not in parts_of):
        instance, hidden = _instance(name), PurePosixPath(name).name.startswith(".")
        if instance is not None or (name.lower().endswith(".dcm") and not hidden):
            # Objects at s3:// are not looked into: those of one folder are taken for one slide.
            series[instance.series if instance else is_uri(name) and name.rpartition("/")[0]].append((name, instance))
        elif (reason := _reason_against(name)) is not None:
            skipped[reason] += 1
        else:
            slides.append(name)
    return sorted(slides + [name for files in series.values() for name in _of_series(files, skipped)])


def _of_series(files: list[tuple[str, Instance | None]], skipped: Counter[str]) -> list[str]:
    """The file that stands for a slide of DICOM: that of its finest level; OpenSlide finds the others beside it."""
    known = [(name, instance) for name, instance in files if instance is not None]
    volumes = sorted((-instance.width_px, name) for name, instance in known if instance.is_volume)
    slides = [volumes[0][1]] if volumes else [name for name, _ in files[:1] if is_uri(name)]
    reason = ".dcm of a slide already listed" if slides else ".dcm without pixels of a slide"
    skipped.update({reason: len(files) - len(slides)} if len(files) > len(slides) else {})
    return slides


def _instance(name: str) -> Instance | None:
    """A file's part in a slide of DICOM, whose files need not have a suffix."""
    suffix = PurePosixPath(name).suffix.lower()
    looked_into = suffix == ".dcm" or suffix not in SUFFIXES
    hidden = PurePosixPath(name).name.startswith(".")
    return read_instance(name) if looked_into and not hidden and not is_uri(name) and Path(name).is_file() else None


def _reason_against(name: str) -> str | None:
    """Why a file is no slide, or None. Where its suffix does not tell, OpenSlide is asked."""
    file, suffix = PurePosixPath(name).name, PurePosixPath(name).suffix.lower()
    if file.startswith("."):
        return "hidden"
    if file.lower().endswith(_UNFINISHED):
        return "unfinished"
    if suffix in SUFFIXES or (not is_uri(name) and Path(name).is_file() and detect_format(name)):
        return None
    return suffix if re.fullmatch(r"\.\w{1,10}", suffix, re.ASCII) else "of no known suffix"
