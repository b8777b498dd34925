"""Which slides a job works on: a glob, a folder, a file, or a cohort table; TCGA barcodes are read where they parse."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from lemon.errors import ConfigError
from lemon.runtime.identifiers import look_alikes_line, some, tcga_patient
from lemon.runtime.secrets import holds_secret
from lemon.runtime.store import Store, is_uri
from lemon.runtime.tables import Column, Form, is_table, read_user_table
from lemon.schema import COHORT, Slide
from lemon.slides.listing import describe_skipped, find_slides, identity
from lemon.slides.paths import as_text
from lemon.slides.resolution import PLAUSIBLE_MPP

# TCGA-{TSS}-{patient}-{sample}{vial}-{portion}-{DX|TS|BS}{n}: https://docs.gdc.cancer.gov/Encyclopedia/pages/TCGA_Barcode
_BARCODE = re.compile(
    r"^(?P<patient_id>TCGA-(?P<site>[A-Z0-9]{2})-[A-Z0-9]{4})-\d{2}[A-Z]-\d{2}-(DX|TS|BS)\w+", re.ASCII
)


_NUMBERS = {"mpp": PLAUSIBLE_MPP}
"""Columns of a cohort that are numbers, with their bounds."""

logger = logging.getLogger(__name__)


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
    """The slides that ``source`` names, sorted by id; what was skipped is logged in a line.

    Args:
        source: one or several of: a glob, a folder (searched in depth), a slide file, a .csv or .parquet cohort with
            the column path and, where known, slide_id, patient_id, project, organ, site, mpp.

    Raises:
        ConfigError: nothing is found, a cohort lacks a column, two slides have the same id, or two rows the same file.
    """
    words, skipped = [source] if isinstance(source, str) else source, Counter[str]()
    # Of a slide that a cohort has too, its row counts: it knows more.
    stated = [slide for word in words if _is_cohort(word) for slide in _read_cohort(word)]
    listed = [slide for word in words if not _is_cohort(word) for slide in _list(word, skipped)]
    slides = _distinct(stated, listed, skipped)
    _check_ids(slides)
    if skipped:
        logger.info(f"slides: passed over {describe_skipped(skipped)}")
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
    store.write_table(name, Slide.table(slides))


def _is_cohort(word: str) -> bool:
    return is_table(word) and (is_uri(word) or not Path(word).expanduser().is_dir())


def _list(word: str, skipped: Counter[str]) -> list[Slide]:
    here = Counter[str]()
    try:
        files = find_slides(word, here)
    except ValueError as error:
        raise ConfigError(f"slides: {error}") from None
    if not files:
        got = f"no slide (passed over {describe_skipped(here)})" if here else "no file"
        raise ConfigError(f"slides: got {word!r}, which matches {got}; expected a glob, folder, slide or cohort table")
    skipped.update(here)
    return [Slide(slide_id=as_text(PurePosixPath(file).stem), path=as_text(file)) for file in files]


def _distinct(stated: list[Slide], listed: list[Slide], skipped: Counter[str]) -> list[Slide]:
    """Each file once, under one id. Raises ConfigError where a cohort has it under two."""
    kept: dict[Hashable, Slide] = {}
    for slide in stated:
        other = kept.setdefault(identity(slide.path), slide)
        if other.slide_id != slide.slide_id:
            raise ConfigError(
                f"slides: slide_id {other.slide_id!r} and {slide.slide_id!r} name one slide ({slide.path}); "
                "expected one row a slide: remove one of them"
            )
        if other != slide:
            raise ConfigError(f"slides: the rows of slide_id {slide.slide_id!r} differ; expected one row a slide")
    for slide in listed:
        if kept.setdefault(identity(slide.path), slide).path != slide.path:
            skipped["listed already under another name"] += 1
    return list(kept.values())


def _read_cohort(path: str) -> list[Slide]:
    slides = []
    for row in read_user_table(path, form=_COHORT_FORM).rows():
        values = {name: value for name, value in row.items() if value is not None}
        if holds_secret(values["path"]):
            raise ConfigError(f"slides: cohort {path}: a path holds a key or an option; expected addresses alone")
        values["path"] = beside(path, values["path"])
        slides.append(Slide(**{"slide_id": PurePosixPath(values["path"]).stem, **values}))
    _warn_of_names(path, slides)
    return slides


def _warn_of_names(path: str, slides: Sequence[Slide]) -> None:
    """Warn where a cohort's patients are not those of TCGA's barcodes, or two names look like one."""
    for column in ("patient_id", "organ", "project", "site"):
        names = {getattr(slide, column) for slide in slides} - {None}
        if line := look_alikes_line(f"slides: cohort {path}: {column}", names):
            logger.warning("%s", line)
    others = []
    for slide in slides:
        barcode, patient = tcga_patient(slide.slide_id), slide.patient_id
        if barcode and patient and barcode not in (patient.upper(), tcga_patient(patient)):
            others.append(f"{slide.slide_id}: {patient}")
    if others:
        logger.warning("slides: cohort %s: patient_id is not the barcode's (%s); it is kept", path, some(others))


def beside(cohort: str, name: str) -> str:
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
    first: dict[str, str] = {}
    for slide_id in counts:
        if (other := first.setdefault(slide_id.lower(), slide_id)) != slide_id:
            logger.info(
                f"slides: slide_id {other!r} and {slide_id!r} differ by case only; on a disk that does not tell case "
                "apart (macOS, Windows) their files would be one: give them other ids there"
            )
