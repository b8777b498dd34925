"""Micrometres per pixel: read wherever a file states them, checked, and never guessed in silence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

from lemon.slides.errors import SlideError

PLAUSIBLE_MPP = (0.05, 20.0)
"""um/px outside this range is a writer's mistake and is treated as missing."""

SQUARE = 1.01
"""Pixels whose sides differ by more are not square. Scanners' own x and y differ by up to 0.4 %."""

SAME = 1.05
"""Sources that differ by more contradict each other."""

_SAME_POWER = 1.4  # an objective's power is nominal: 40x is 0.22 to 0.26 um/px

_WORDS = {
    "file": "the header",
    "ome": "the OME-XML",
    "imagej": "ImageJ's description",
    "magnification": "the objective's power",
    "tiff": "the TIFF tags",
}

_UNITS_UM = {
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "\\u00b5m", "\ufffdm", "micron", "microns", "micrometer"), 1.0),
    "nm": 1e-3,
    "pm": 1e-6,
    "\u00e5": 1e-4,
    "mm": 1e3,
    "cm": 1e4,
    **dict.fromkeys(("centimeter", "centimetre"), 1e4),
    "m": 1e6,
    **dict.fromkeys(("in", "inch", "inches"), 25_400.0),
}


@dataclass(frozen=True)
class Resolution:
    """``mpp`` um/px, where it comes from (``given``, ``assumed``, or a place in the file), and what there is to say."""

    mpp: float
    source: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Stated:
    """um/px in one place of a file."""

    source: str
    x: float
    y: float

    def __str__(self) -> str:
        return f"{self.x:.4g}" if self.is_square else f"{self.x:.4g} x {self.y:.4g}"

    @property
    def is_square(self) -> bool:
        return max(self.x, self.y) / min(self.x, self.y) <= SQUARE

    @property
    def is_plausible(self) -> bool:
        return all(PLAUSIBLE_MPP[0] <= side <= PLAUSIBLE_MPP[1] for side in (self.x, self.y))

    def agrees(self, x: float, y: float) -> bool:
        at_most = _SAME_POWER if self.source == "magnification" else SAME
        return all(max(a, b) / min(a, b) <= at_most for a, b in ((self.x, x), (self.y, y)))


def find_resolution(properties: Mapping[str, str], *, default_mpp: float, given_mpp: float | None = None) -> Resolution:
    """The resolution of a slide by OpenSlide's properties of it.

    Args:
        properties: OpenSlide's, which hold the tags and the description of a TIFF.
        default_mpp: um/px to assume where nothing states any.
        given_mpp: um/px that the user states; it outranks the file.

    Raises:
        SlideError: the pixels are not square.
    """
    stated = [_Stated(source, x or y or 0, y or x or 0) for source, x, y in _places(properties) if x or y]
    plausible = [each for each in stated if each.is_plausible]
    notes = [f"um/px {each} in {_WORDS[each.source]} cannot be right" for each in stated if not each.is_plausible]
    best = plausible[0] if plausible else None
    if given_mpp is not None:
        if best and not best.agrees(given_mpp, given_mpp):
            notes.append(f"um/px {given_mpp:g} as given; {_WORDS[best.source]} says {best}")
        return Resolution(given_mpp, "given", tuple(notes))
    if best is None:
        return Resolution(default_mpp, "assumed", (*notes, f"um/px missing in the file: {default_mpp:g} assumed"))
    if not best.is_square:
        raise SlideError(
            f"pixels are not square: {best} um (x, y) in {_WORDS[best.source]}; resample the slide to square pixels, "
            "or state its true um/px in the column mpp of a cohort"
        )
    notes += [
        f"um/px {best} of {_WORDS[best.source]} taken; {_WORDS[other.source]} says {other}"
        for other in plausible[1:]
        if not (other.agrees(best.x, best.y) or best.agrees(other.x, other.y))
    ]
    return Resolution((best.x + best.y) / 2, best.source, tuple(notes))


def _places(properties: Mapping[str, str]) -> Iterator[tuple[str, float | None, float | None]]:
    """Source, x and y in um/px of all that a file states, the most trustworthy first."""
    x, y = _number(properties.get("openslide.mpp-x")), _number(properties.get("openslide.mpp-y"))
    tags = _number(properties.get("tiff.XResolution")), _number(properties.get("tiff.YResolution"))
    # Of a TIFF that is no scanner's, OpenSlide's resolution is that of the tags, which any editor writes.
    generic = properties.get("openslide.vendor") == "generic-tiff"
    if not generic:
        yield "file", x, y
    description = properties.get("tiff.ImageDescription") or properties.get("openslide.comment") or ""
    yield "ome", *_of_ome(description)
    yield "imagej", *_of_imagej(description, per_unit=tags)
    if generic:
        yield "file", x, y
    power = _number(properties.get("openslide.objective-power")) or _number(properties.get("aperio.AppMag"))
    mpp = 10 / power if power else None  # 40x is 0.25 um/px, 20x is 0.5
    yield "magnification", mpp, mpp
    unit_um = {"centimeter": 1e4, "inch": 25_400.0}.get(properties.get("tiff.ResolutionUnit", ""))
    if unit_um and not x:
        yield "tiff", tags[0] and unit_um / tags[0], tags[1] and unit_um / tags[1]


def _of_ome(description: str) -> tuple[float | None, float | None]:
    """PhysicalSizeX and PhysicalSizeY of the first image of an OME-XML, in um."""
    if "<OME" not in description[:4096] and ":OME" not in description[:4096]:
        return None, None
    if "<!DOCTYPE" in description or "<!ENTITY" in description:
        return None, None  # OME-XML has neither, and an entity may grow without end
    try:
        root = ElementTree.fromstring(description.strip().encode())  # bytes: it may declare its own encoding
    except (ElementTree.ParseError, ValueError):
        return None, None
    pixels = next((element for element in root.iter() if element.tag.rpartition("}")[2] == "Pixels"), None)
    if pixels is None:
        return None, None
    return _axis_of_ome(pixels, "X"), _axis_of_ome(pixels, "Y")


def _axis_of_ome(pixels: ElementTree.Element, axis: str) -> float | None:
    return _in_um(pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "um"))


def _of_imagej(description: str, *, per_unit: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    """ImageJ writes px a unit into the tags of the resolution, and the unit into the description."""
    unit = re.search(r"^unit=(.+?)\s*$", description, re.MULTILINE) if description.startswith("ImageJ=") else None
    if unit is None:
        return None, None
    unit_um = _UNITS_UM.get(unit[1].lower())
    x, y = per_unit
    return x and unit_um and unit_um / x, y and unit_um and unit_um / y


def _in_um(value: str | None, unit: str) -> float | None:
    number = _number(value)
    return number and (unit_um := _UNITS_UM.get(unit.strip().lower())) and number * unit_um


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        return None
    return value if value and math.isfinite(value) and value > 0 else None
