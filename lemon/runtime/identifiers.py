"""Names of slides and patients as people write them: which are the same, which look like it, and as file names."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import urllib.parse
from collections import defaultdict
from collections.abc import Collection, Iterable

# Blanks that str.strip leaves: a byte order mark in the middle of a file, and signs of no width out of web pages.
_INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060\u00ad"))
_EDGES = "".join(map(chr, _INVISIBLE))

# The first three parts name a patient: https://docs.gdc.cancer.gov/Encyclopedia/pages/TCGA_Barcode
_TCGA_PATIENT = re.compile(r"^(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})(?![A-Z0-9])", re.ASCII | re.IGNORECASE)

_WHOLE_NUMBER = re.compile(r"^0*(\d+)(\.0*)?$", re.ASCII)


def trimmed(text: str) -> str:
    """Text without blanks and invisible signs at its ends; what is inside stays, because paths have it."""
    while (shorter := text.strip().strip(_EDGES)) != text:
        text = shorter
    return text


def same_name(text: str) -> str:
    """One spelling for what is one name for certain: blanks (at the ends, doubled, of no width) and Unicode's form."""
    return " ".join(unicodedata.normalize("NFC", text).translate(_INVISIBLE).split())


def tcga_patient(text: str) -> str | None:
    """The patient that a TCGA barcode, whole or cut anywhere behind the patient, is of; None for other text."""
    match = _TCGA_PATIENT.match(same_name(text))
    return match[1].upper() if match else None


def likely_name(text: str) -> str:
    """One spelling for what is probably one name: case and blanks, a TCGA barcode's suffix, 007 and 7.0."""
    if patient := tcga_patient(text):
        return patient
    plain = unicodedata.normalize("NFKC", same_name(text)).casefold()
    if number := _WHOLE_NUMBER.match(plain):
        return number[1]
    return plain.replace(" ", "")


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """Different names that are probably one, together; sorted."""
    alike: dict[str, set[str]] = defaultdict(set)
    for name in names:
        alike[likely_name(name)].add(name)
    return sorted(sorted(group) for group in alike.values() if len(group) > 1)


def look_alikes_line(what: str, names: Iterable[str]) -> str | None:
    """One line on names that look alike and are kept apart; None where there are none."""
    alike = look_alikes(names)
    if not alike:
        return None
    more = f", and {len(alike) - 1} more such names" if len(alike) > 1 else ""
    shown, patient = " and ".join(repr(name) for name in alike[0][:3]), tcga_patient(alike[0][0])
    if patient:
        return f"{what}: {shown} are of the patient {patient} and count as different{more}; group by patient"
    return f"{what}: {shown} look alike and count as different{more}; write them alike if they are one"


def some(names: Collection[object], *, shown: int = 4) -> str:
    """The first few of many names, and how many more there are."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "")


# --- as file names ----------------------------------------------------------------------------------------------------

MAX_STEM_BYTES = 180
"""Longest stem of a file: with its suffix, and the mark of a file being written, it stays below 255 bytes."""

# What a file system, a listing or a shell takes amiss in a whole name, though each of its characters is harmless:
# hidden files, a mark of ours (``Store`` passes over it), ends that Windows drops, and its devices.
_ODD = re.compile(r"\.|.*\.tmp-|.*[. ]\Z|(con|prn|aux|nul|com\d|lpt\d)(\.|\Z)", re.IGNORECASE | re.DOTALL)


def file_stem(slide_id: str) -> str:
    """A slide id as a file name: ASCII, at most 180 bytes, another one for each id, no folder, not hidden.

    What a file system or a URL would take amiss is percent-encoded. Where the outcome is too long or odd as a whole,
    it is the id's harmless characters, ``!``, and a hash of the id; ``!`` is in no other name.
    """
    # Ids need not be valid Unicode: bytes of a file name that are no UTF-8 reach Python as lone surrogates.
    content = slide_id.encode("utf-8", "surrogatepass")
    quoted = urllib.parse.quote(content, safe=" ()[],;@+=")
    if quoted and len(quoted) <= MAX_STEM_BYTES and not _ODD.match(quoted):
        return quoted
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", slide_id)[:60].strip("_")
    return f"{readable or 'slide'}!{hashlib.sha256(content).hexdigest()[:32]}"
