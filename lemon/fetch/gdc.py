"""TCGA's diagnostic slides at the Genomic Data Commons (GDC): listed by its API, or by a manifest of its portal."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import requests
from pydantic import Field

from lemon.errors import ConfigError, FatalError, one_line
from lemon.fetch.download import RemoteFile
from lemon.runtime.config import Frozen, validate
from lemon.runtime.tables import Column, Form, read_user_table
from lemon.slides.cohort import Slide, with_barcode
from lemon.slides.listing import SUFFIXES

PAGE = 500
"""Files that one answer of the API lists."""

# The studies of TCGA that have slides, with the organ of each: https://gdc.cancer.gov/resources-tcga-users/tcga-code-tables
ORGAN_BY_STUDY = {
    "ACC": "adrenal gland",
    "BLCA": "bladder",
    "BRCA": "breast",
    "CESC": "cervix",
    "CHOL": "bile duct",
    "COAD": "colon",
    "DLBC": "lymph node",
    "ESCA": "esophagus",
    "GBM": "brain",
    "HNSC": "head and neck",
    "KICH": "kidney",
    "KIRC": "kidney",
    "KIRP": "kidney",
    "LGG": "brain",
    "LIHC": "liver",
    "LUAD": "lung",
    "LUSC": "lung",
    "MESO": "pleura",
    "OV": "ovary",
    "PAAD": "pancreas",
    "PCPG": "adrenal gland",
    "PRAD": "prostate",
    "READ": "rectum",
    "SARC": "soft tissue",
    "SKCM": "skin",
    "STAD": "stomach",
    "TGCT": "testis",
    "THCA": "thyroid",
    "THYM": "thymus",
    "UCEC": "uterus",
    "UCS": "uterus",
    "UVM": "eye",
}

FIELDS = ("file_id", "file_name", "md5sum", "file_size", "cases.submitter_id", "cases.project.project_id")


MANIFEST = Form(
    "manifest:",
    (
        *(Column(name, filled=True) for name in ("id", "filename", "md5")),
        Column("size", filled=True, number=(1, math.inf), unit="bytes"),
        Column("state", required=False),
    ),
    others=True,
)


class GdcError(FatalError):
    """The GDC's API does not answer as it should; the message is one line."""

    remedy = "a rerun goes on"


class GdcFile(Frozen):
    """A slide's file at the GDC. Names are checked, because they become paths and parts of addresses."""

    file_id: str = Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
    file_name: str = Field(pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*$")
    md5: str = Field(pattern=r"^[0-9a-f]{32}$")
    size_bytes: int = Field(gt=0)
    patient_id: str | None = None
    project: str | None = None
    organ: str | None = None

    @property
    def slide_id(self) -> str:
        """The file's name without its suffix, as everywhere."""
        return PurePosixPath(self.file_name).stem

    def slide(self, path: str) -> Slide:
        """The slide whose file lies at ``path``; patient and site from the barcode where the GDC does not tell."""
        return with_barcode(Slide(self.slide_id, path, self.patient_id, self.project, self.organ))

    def remote(self, api: str) -> RemoteFile:
        """Where to download it."""
        return RemoteFile(f"{api.rstrip('/')}/data/{self.file_id}", self.file_name, self.size_bytes, self.md5)


def studies_of(word: str) -> list[str]:
    """The studies that a word of the user's means: "BRCA", "TCGA-BRCA" or an organ. Raises ConfigError."""
    name = " ".join(word.replace("_", " ").split())
    code = name.upper().removeprefix("TCGA-")
    if code in ORGAN_BY_STUDY:
        return [code]
    if studies := [study for study, organ in ORGAN_BY_STUDY.items() if organ == name.lower()]:
        return studies
    known = [*ORGAN_BY_STUDY, *sorted(set(ORGAN_BY_STUDY.values()))]
    close = difflib.get_close_matches(code if word.isupper() else name.lower(), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected studies or organs of TCGA: {', '.join(known)}"
    raise ConfigError(f"organs: got {word!r}; {hint}")


def organ_of(word: str) -> str:
    """The organ of a word of the user's. Raises ConfigError."""
    return ORGAN_BY_STUDY[studies_of(word)[0]]


def list_files(session: requests.Session, api: str, *, studies: Sequence[str], timeout_s: float) -> list[GdcFile]:
    """All open diagnostic slides of some studies, as the API lists them. Raises GdcError."""
    return [_file_of(hit) for hit in _hits(session, api, studies=studies, timeout_s=timeout_s)]


def read_manifest(path: str | Path, *, organ: str | None) -> list[GdcFile]:
    """The slides of a manifest: a table of id, filename, md5, size and state, as the portal writes it.

    Args:
        path: the manifest, local or at s3://; files in it that are no slides are passed over.
        organ: the organ that they are of; a manifest does not say.

    Raises:
        ConfigError: it cannot be read, lacks a column, or has a row that makes no sense.
    """
    table = read_user_table(path, form=MANIFEST)
    files = []
    for index, row in enumerate(table.rows()):
        if PurePosixPath(row["filename"]).suffix.lower() not in SUFFIXES:
            continue
        values = {"file_id": row["id"], "file_name": row["filename"], "md5": row["md5"], "size_bytes": row["size"]}
        try:
            files.append(validate(values | {"organ": organ}, GdcFile))
        except ConfigError as error:
            raise ConfigError(f"{table.where(index)}: {str(error).splitlines()[0]}") from None
    return files


def _hits(session: requests.Session, api: str, *, studies: Sequence[str], timeout_s: float) -> Iterator[dict[str, Any]]:
    """What the API finds, page after page."""
    filters = {
        "cases.project.project_id": [f"TCGA-{study}" for study in studies],
        "data_type": ["Slide Image"],
        "data_format": ["SVS"],
        "experimental_strategy": ["Diagnostic Slide"],
        "access": ["open"],
    }
    terms = [{"op": "in", "content": {"field": field, "value": value}} for field, value in filters.items()]
    query = {"filters": {"op": "and", "content": terms}, "fields": ",".join(FIELDS), "sort": "file_id:asc"}
    n_seen, total = 0, 1
    while n_seen < total:
        page = {"format": "JSON", "size": PAGE, "from": n_seen}
        try:
            answer = session.post(f"{api.rstrip('/')}/files", json=query | page, timeout=timeout_s)
            answer.raise_for_status()
            data = answer.json()["data"]
            hits, total = data["hits"], int(data["pagination"]["total"])
        except requests.RequestException as error:
            raise GdcError(f"{api}: {one_line(error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise GdcError(f"{api}/files answers in a form that is not the GDC's ({error!r})") from error
        if not hits and n_seen < total:
            raise GdcError(f"{api}/files lists {n_seen} of {total} files and no more")
        yield from hits
        n_seen += len(hits)


def _file_of(hit: dict[str, Any]) -> GdcFile:
    try:
        case = hit["cases"][0]
        project = case["project"]["project_id"]
        values = {
            "file_id": hit["file_id"],
            "file_name": hit["file_name"],
            "md5": hit["md5sum"],
            "size_bytes": hit["file_size"],
            "patient_id": case["submitter_id"],
            "project": project,
            "organ": ORGAN_BY_STUDY[project.removeprefix("TCGA-")],
        }
        return validate(values, GdcFile)
    except (ConfigError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise GdcError(f"the GDC lists a file that makes no sense ({' '.join(str(error).split())}): {hit}") from error
