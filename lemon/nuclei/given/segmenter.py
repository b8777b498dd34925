"""Given nuclei in the place of a segmenter: curation asks for the nuclei of a region, and gets those that are there."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from lemon.nuclei.given.config import CellsFrom, Files
from lemon.nuclei.given.nuclei import GivenError
from lemon.nuclei.given.place import PlacedNuclei, counting, place_nuclei
from lemon.nuclei.given.read import read_given
from lemon.nuclei.instances import Nucleus
from lemon.nuclei.segmenter import Postprocess
from lemon.runtime.store import local_copy
from lemon.slides.errors import SlideError
from lemon.slides.reader import SlideReader
from lemon.slides.tiles import Region


def read_placed(slide_id: str, reader: SlideReader, config: CellsFrom) -> PlacedNuclei:
    """The nuclei that are given for a slide. Raises SlideError, one line, where there are none that can be used."""
    file = Files(config.path).of(slide_id)
    try:
        with local_copy(file) as path:
            return place_nuclei(read_given(path, reader), reader, config)
    except (GivenError, OSError) as error:
        raise SlideError(f"cells_from: {file}: {' '.join(str(error).split())}") from None


class GivenSegmenter:
    """Answers with given nuclei; of a network and of calibration it knows nothing."""

    def __init__(self, placed: PlacedNuclei, regions: Sequence[Region]) -> None:
        self._placed, self._members = placed, placed.in_regions(regions)

    def calibrate(self, samples: Sequence[np.ndarray]) -> None:
        """Nothing to calibrate."""

    def predict(self, regions: np.ndarray) -> list[None]:
        """Nothing to predict."""
        return [None] * len(regions)

    @property
    def postprocess(self) -> Postprocess:
        """Of no region; see ``postprocess_of``."""
        return functools.partial(_nuclei, np.empty((0, 2), np.float32), np.empty(0, int), np.empty((0, 2)), [], [], [])

    def postprocess_of(self, region: Region) -> Postprocess:
        """The nuclei whose centroids lie in a region's inner part, with all that they are made of: picklable."""
        placed, members = self._placed, self._members[region.index]
        sizes = np.diff(placed.starts)[members]
        at = np.repeat(placed.starts[members], sizes) + counting(sizes)
        offset = np.array([region.x_px, region.y_px], np.float64)
        return functools.partial(
            _nuclei,
            (placed.points[at] - offset).astype(np.float32),
            sizes,
            placed.centroid[members] - offset,
            placed.ids.take(pa.array(members)).to_pylist(),
            placed.classes.take(pa.array(members)).to_pylist(),
            [None if np.isnan(each) else float(each) for each in placed.probability[members]],
        )


def _nuclei(
    points: np.ndarray,
    sizes: np.ndarray,
    centroid: np.ndarray,
    ids: list[str],
    classes: list[str | None],
    probability: list[float | None],
    *_: object,
) -> list[Nucleus]:
    """The nuclei of a region; its image, prediction and calibration, which follow, are not looked at."""
    outlines = np.split(points, np.cumsum(sizes)[:-1]) if len(sizes) else []
    return [
        Nucleus(outline, (x, y), foreign_id, label, chance)
        for outline, (x, y), foreign_id, label, chance in zip(
            outlines, centroid.tolist(), ids, classes, probability, strict=True
        )
    ]
