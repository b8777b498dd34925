"""Whether given nuclei lie where the slide has some, and what would fit where they do not.

A guess is told and never applied: who gave the nuclei knows what their coordinates are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import cv2
import numpy as np

from lemon.nuclei.given.config import Flip
from lemon.nuclei.given.layout import XENIUM_UM_PER_PX, Layout, is_inside
from lemon.nuclei.given.nuclei import GivenError, GivenNuclei
from lemon.slides.errors import RegionError
from lemon.slides.reader import SlideReader
from lemon.slides.tissue import optical_density

MAX_OUTSIDE_SHARE = 0.01
"""Nuclei beyond the slide's edge up to here are left out, with a note; more are refused."""

_SAMPLES, _SAMPLE_PX = 4, 512
_BESIDE_PX = 32  # 8 um: outside of most nuclei, and not yet the next field
_BLUR_PX, _NUCLEUS_PX = 5, 25
_SEEN, _UNSEEN = 6.0, 2.0  # standard errors: certainly nuclei; nothing to be seen
_ENOUGH = 30  # nuclei that a judgement takes
_MATCH_MPP = 4.0
_MAX_MATCH_PX = 1 << 26


def check_fit(nuclei: GivenNuclei, reader: SlideReader, *, layout: Layout, centroid: np.ndarray) -> list[str]:
    """Whether nuclei lie within the slide and on dark spots; notes where that cannot be told.

    Args:
        nuclei: as the file has them.
        reader: of the slide.
        layout: how they were laid on it.
        centroid: float64 [N, 2], where they lie then, in level-0 px.

    Raises GivenError where many lie outside, or where they lie on nothing and another layout would fit.
    """
    sight = Sight(reader)
    share_outside = float(np.mean(~is_inside(centroid, reader)))
    seen = None if share_outside > MAX_OUTSIDE_SHARE else sight.contrast(centroid)
    if share_outside <= MAX_OUTSIDE_SHARE and (seen is None or seen > _UNSEEN):
        return []
    better = _better_layout(nuclei, sight, layout)
    hint = f"they fit with {better.setting}, which is not assumed: give it if it is so" if better else "nothing fits"
    if share_outside > MAX_OUTSIDE_SHARE:
        (x0, y0), (x1, y1) = centroid.min(axis=0), centroid.max(axis=0)
        raise GivenError(
            f"{share_outside:.0%} of its nuclei lie beyond the slide of {reader.width_px} x {reader.height_px} px: "
            f"read as {layout.unit}, they span {x0:.0f} to {x1:.0f} by {y0:.0f} to {y1:.0f} px of level 0; {hint}"
        )
    if better:
        raise GivenError(f"read as {layout.unit}, its nuclei do not lie where the slide has any; {hint}")
    return ["nuclei are no darker than what is beside them: do they belong to this slide?"]


class Sight:
    """What can be seen of a slide where nuclei should be, in samples of 128 um at 0.25 um/px.

    The red channel is looked at, where hematoxylin absorbs and eosin hardly does.
    """

    def __init__(self, reader: SlideReader) -> None:
        self.reader = reader
        self._density = lru_cache(maxsize=64)(self._read)  # a layout that is tried looks at what another one did

    def contrast(self, centroid: np.ndarray) -> float | None:
        """How much darker it is at centroids [N, 2] (level-0 px) than 8 um beside them, in standard errors.

        None where fewer than 30 nuclei are in the samples.
        """
        differences = []
        for spots, density in self.samples(centroid, blur_px=_BLUR_PX):
            beside = [_at(density, spots + step) for step in _AROUND]
            differences.append(_at(density, spots) - np.mean(beside, axis=0))
        values = np.concatenate(differences) if differences else np.empty(0)
        if len(values) < _ENOUGH:
            return None
        return float(values.mean() / max(values.std() / np.sqrt(len(values)), 1e-6))

    def shift(self, centroid: np.ndarray) -> np.ndarray:
        """By how many base px (x, y), up to 8 um, nuclei have to move to lie darkest: float64 [2]."""
        reach = np.arange(-_BESIDE_PX, _BESIDE_PX + 1, 2)
        total = np.zeros((len(reach), len(reach)))
        for spots, density in self.samples(centroid, blur_px=_NUCLEUS_PX):
            total += [[_at(density, spots + np.array([dx, dy])).sum() for dx in reach] for dy in reach]
        row, column = np.unravel_index(np.argmax(total), total.shape)
        return np.array([reach[column], reach[row]], float)

    def samples(self, centroid: np.ndarray, *, blur_px: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Centroids, int [n, 2] in px of a sample, and its optical density in red, float32 [512, 512], blurred.

        The samples are those with the most nuclei.
        """
        base = centroid[is_inside(centroid, self.reader)] / self.reader.scale - 0.5
        if not len(base):
            return
        boxes, counts = np.unique(np.floor(base / _SAMPLE_PX).astype(np.int64), axis=0, return_counts=True)
        for x, y in (boxes[np.argsort(-counts, kind="stable")[:_SAMPLES]] * _SAMPLE_PX).tolist():
            density = self._density(x, y)
            if density is not None:
                spots = np.round(base - (x, y)).astype(np.int64)
                spots = spots[np.all((spots >= 0) & (spots < _SAMPLE_PX), axis=1)]
                yield spots, cv2.blur(density, (blur_px, blur_px))

    def _read(self, x_base_px: int, y_base_px: int) -> np.ndarray | None:
        try:
            image = self.reader.region(x_base_px, y_base_px, width_px=_SAMPLE_PX, height_px=_SAMPLE_PX)
        except RegionError:
            return None
        return optical_density(np.ascontiguousarray(image[..., 0]))


_AROUND = [(round(_BESIDE_PX * np.cos(angle)), round(_BESIDE_PX * np.sin(angle))) for angle in np.arange(8) * np.pi / 4]


def _at(density: np.ndarray, spots: np.ndarray) -> np.ndarray:
    """Values at places [n, 2] (x, y), those beyond the edge at the edge."""
    x, y = np.clip(spots, 0, _SAMPLE_PX - 1).T
    values: np.ndarray = density[y, x]
    return values


def _better_layout(nuclei: GivenNuclei, sight: Sight, used: Layout) -> Layout | None:
    """The layout that puts the nuclei on dark spots, of those that people mean; None where none does."""
    centre = _means(nuclei)
    best: tuple[float, Layout] | None = None
    for layout in _candidates(sight.reader, used):
        places = layout.apply(centre, sight.reader, centred=nuclei.centred)
        if np.mean(~is_inside(places, sight.reader)) > MAX_OUTSIDE_SHARE:
            continue
        seen = sight.contrast(places) or 0.0
        if seen > _SEEN and (best is None or seen > best[0]):
            best = seen, layout
    return best[1] if best else _shifted(centre, sight, used, centred=nuclei.centred)


def _means(nuclei: GivenNuclei) -> np.ndarray:
    """Mean of the corners of each outline that has any: float64 [N, 2]; near enough to a centroid to look at."""
    drawn = nuclei.sizes > 0
    sums = np.add.reduceat(nuclei.points, nuclei.starts[:-1][drawn], axis=0)
    return sums / nuclei.sizes[drawn][:, None]


def _candidates(reader: SlideReader, used: Layout) -> Iterator[Layout]:
    """Layouts that differ from the one used in their scale, their flip, or by the corner of the scanned area."""
    scales = {f"cells_from.level={level}": scale for level, scale in enumerate(reader.level_downsamples)}
    scales |= {"cells_from.unit=um": 1 / reader.mpp}
    scales |= {f"cells_from.mpp={mpp:g}": mpp / reader.mpp for mpp in (0.25, 0.5, XENIUM_UM_PER_PX)}
    flips: tuple[Flip, ...] = ("none", "y", "x", "xy", "transpose")
    corner = float(reader.bounds_px[0]), float(reader.bounds_px[1])
    kept: dict[str, float] = {"": used.scale}
    for setting, scale in scales.items():
        if all(abs(scale / other - 1) > 0.01 for other in kept.values()):
            kept[setting] = scale
    for setting, scale in kept.items():
        for flip in flips:
            for offset in dict.fromkeys([used.offset_px, corner]):
                words = [setting] if setting else []
                words += [f"cells_from.flip={flip}"] if flip != used.flip else []
                words += [f"cells_from.offset_px=[{offset[0]:g},{offset[1]:g}]"] if offset != used.offset_px else []
                if words:
                    yield replace(used, scale=scale, flip=flip, offset_px=offset, setting=" ".join(words))


def _shifted(centre: np.ndarray, sight: Sight, used: Layout, *, centred: bool) -> Layout | None:
    """The layout with an offset that puts the nuclei on dark spots; None where none does.

    Nuclei are matched with the slide's red density at 4 um/px by correlation, then pixel by pixel in samples.
    """
    reader = sight.reader
    places = used.apply(centre, reader, centred=centred)
    places = places[np.isfinite(places).all(axis=1)]
    try:
        picture, mpp = reader.overview(mpp=_MATCH_MPP)
    except RegionError:
        return None
    density = optical_density(np.ascontiguousarray(picture[..., 0]))
    step, low = mpp / reader.mpp, places.min(axis=0)  # level-0 px a px of the picture
    column, row = np.floor((places - low) / step).astype(np.int64).T
    high, wide = density.shape[0] + int(row.max()) + 1, density.shape[1] + int(column.max()) + 1
    if high * wide > _MAX_MATCH_PX:
        return None
    raster = np.zeros((int(row.max()) + 1, int(column.max()) + 1))
    np.add.at(raster, (row, column), 1)
    spectra = [np.fft.rfft2(each - each.mean(), (high, wide)) for each in (density, raster)]
    match = np.fft.irfft2(spectra[0] * np.conj(spectra[1]), (high, wide))
    dy, dx = np.unravel_index(np.argmax(match), match.shape)
    moved = np.array([dx if dx < density.shape[1] else dx - wide, dy if dy < density.shape[0] else dy - high])
    offset = moved * step + np.array(reader.bounds_px[:2]) - low
    offset = offset + sight.shift(places + offset) * reader.scale
    final = places + offset
    if np.mean(~is_inside(final, reader)) > MAX_OUTSIDE_SHARE or (sight.contrast(final) or 0.0) <= _SEEN:
        return None
    x, y = np.round(np.array(used.offset_px) + offset).tolist()
    return replace(used, offset_px=(x, y), setting=f"cells_from.offset_px=[{x:.0f},{y:.0f}]")
