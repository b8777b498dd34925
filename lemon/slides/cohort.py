"""Which slides a job works on: a glob, a folder, a file, or a cohort table; TCGA barcodes are read where they parse."""

from __future__ import annotations

import glob
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa
from fsspec.utils import glob_translate

from lemon.config import ConfigError
from lemon.runtime.identifiers import look_alikes_line, some, tcga_patient
from lemon.runtime.store import Store, is_uri, path_exists
from lemon.runtime.tables import Column, Form, is_table, read_user_table
from lemon.schema import COHORT
from lemon.slides.reader import PLAUSIBLE_MPP

SUFFIXES = frozenset(
    [".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm", ".czi"]
)

# TCGA-{TSS}-{patient}-{sample}{vial}-{portion}-{DX|TS|BS}{n}: https://docs.gdc.cancer.gov/Encyclopedia/pages/TCGA_Barcode
_BARCODE = re.compile(
    r"^(?P<patient_id>TCGA-(?P<site>[A-Z0-9]{2})-[A-Z0-9]{4})-\d{2}[A-Z]-\d{2}-(DX|TS|BS)\w+", re.ASCII
)


_NUMBERS = {"mpp": PLAUSIBLE_MPP}
"""Columns of a cohort that are numbers, with their bounds."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slide:
    """A slide to work on; what is not known of it is None."""

    slide_id: str
    path: str
    patient_id: str | None = None
    project: str | None = None
    organ: str | None = None
    site: str | None = None


_COHORT_FORM = Form(
    "slides: cohort",
    tuple(
        Column(name, filled=True)
        if name == "path"
        else Column(name, required=False, number=_NUMBERS.get(name), unit="um/px")
        for name in COHORT.names
    ),
)


def list_slides(source: str | list[str]) -> list[Slide]:
    """The slides that ``source`` names, sorted by id.

    Args:
        source: one or several of: a glob, a folder (searched in depth), a slide file, a .csv or .parquet cohort with
            the column path and, where known, slide_id, patient_id, project, organ, site.

    Raises:
        ConfigError: nothing is found, a cohort lacks a column, or two slides have the same id.
    """
    slides = [slide for word in ([source] if isinstance(source, str) else source) for slide in _expand(word)]
    slides = list(dict.fromkeys(slides))
    _check_ids(slides)
    return sorted((with_barcode(slide) for slide in slides), key=lambda slide: slide.slide_id)


def with_barcode(slide: Slide) -> Slide:
    """Fill patient, site (tissue source site) and project from a TCGA barcode; what the cohort says has precedence.

    A barcode does not tell which TCGA study it is of, so project becomes "TCGA" unless the cohort names one.
    """
    match = _BARCODE.match(slide.slide_id)
    if match is None:
        return slide
    return replace(
        slide,
        patient_id=slide.patient_id or match["patient_id"],
        site=slide.site or match["site"],
        project=slide.project or "TCGA",
    )


def write_cohort(store: Store, name: str, slides: Iterable[Slide]) -> None:
    """Write a cohort table that ``list_slides`` reads."""
    store.write_table(name, pa.Table.from_pylist([asdict(slide) for slide in slides], schema=COHORT))


def _expand(word: str) -> list[Slide]:
    if is_table(word) and not (not is_uri(word) and Path(word).expanduser().is_dir()):
        return _read_cohort(word)
    try:
        files = _remote_files(word) if is_uri(word) else _local_files(word)
    except ValueError as error:
        raise ConfigError(f"slides: {error}") from None
    if not files:
        raise ConfigError(
            f"slides: got {word!r}, which matches no file; expected a glob, folder, slide or cohort table"
        )
    return [Slide(slide_id=PurePosixPath(file).stem, path=file) for file in sorted(files)]


def _local_files(word: str) -> list[str]:
    path = Path(word).expanduser()
    if path.is_dir():
        files: Iterable[Path] = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    elif path.exists():
        files = [path]
    else:
        files = (Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207
    return [str(file.absolute()) for file in files]


def _remote_files(word: str) -> list[str]:
    """The objects that a glob, a prefix or a name at s3:// matches."""
    whole = not glob.has_magic(word)
    folder = word if whole else word[: re.search(r"[*?[]", word).start()].rpartition("/")[0]  # type: ignore[union-attr]
    store = Store(folder)
    names = [f"{store.uri}/{name}" for name in store.list("")]
    if not whole:
        pattern = re.compile(glob_translate(word))
        return [name for name in names if pattern.match(name)]
    if names:
        return [name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES]
    return [store.uri] if path_exists(word) else []


def _read_cohort(path: str) -> list[Slide]:
    slides = []
    for row in read_user_table(path, form=_COHORT_FORM).rows():
        values = {name: value for name, value in row.items() if value is not None}
        values["path"] = _beside(path, values["path"])
        slides.append(Slide(**{"slide_id": PurePosixPath(values["path"]).stem, **values}))
    _tell_names(path, slides)
    return slides


def _tell_names(path: str, slides: Sequence[Slide]) -> None:
    """Tell where a cohort's patients are not those of TCGA's barcodes, or two names look like one."""
    for column in ("patient_id", "organ", "project", "site"):
        names = {getattr(slide, column) for slide in slides} - {None}
        if line := look_alikes_line(f"slides: cohort {path}: {column}", names):
            logger.warning("%s", line)
    others = []
    for slide in slides:
        barcode, given = tcga_patient(slide.slide_id), slide.patient_id
        if barcode and given and barcode not in (given.upper(), tcga_patient(given)):
            others.append(f"{slide.slide_id}: {given}")
    if others:
        logger.warning("slides: cohort %s: patient_id is not the barcode's (%s); it is kept", path, some(others))


def _beside(cohort: str, name: str) -> str:
    """A relative path in a cohort is meant from the cohort's folder, or from the working directory."""
    if is_uri(name):
        return name
    file = Path(name).expanduser()
    if is_uri(cohort):
        return str(file) if file.is_absolute() else f"{cohort.rpartition('/')[0]}/{name}"
    beside = Path(cohort).expanduser().parent / file
    return str((beside if beside.exists() else file).absolute())


def _check_ids(slides: list[Slide]) -> None:
    counts = Counter(slide.slide_id for slide in slides)
    for slide_id, count in counts.items():
        if count > 1:
            paths = [slide.path for slide in slides if slide.slide_id == slide_id]
            raise ConfigError(
                f"slides: slide_id {slide_id!r} names {count} files ({paths[0]}, {paths[1]}); "
                "give them different ids in a cohort table"
            )
