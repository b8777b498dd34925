"""What of a slide is worked on, before any nucleus is sought: its tissue, its flaws, regions and samples of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from lemon.curate.config import CurateConfig
from lemon.nuclei.given.place import PlacedNuclei
from lemon.runtime.identifiers import file_stem
from lemon.schema import CELL_MPP
from lemon.slides.cohort import Slide
from lemon.slides.quality import blurred_share, find_flaws, share_of
from lemon.slides.reader import RegionError, SlideError, SlideReader
from lemon.slides.source import mask_digest
from lemon.slides.tiles import Region, plan_regions, spread
from lemon.slides.tissue import OVERVIEW_MPP, find_tissue, read_mask, reason_not_he

CALIBRATION_REGIONS = 8  # enough that a slide's thresholds no longer move; read twice, so not more


@dataclass
class Survey:
    """What was seen of a slide.

    Attributes:
        regions: those with tissue, or with given nuclei.
        samples: some of them, uint8 [H, W, 3] each.
        notes: what the slide's row is to say.
        pen_share: of the tissue, where flaws were looked for; so is fold_share.
        blurred_share: of the samples; None without any.
        mask_digest: of the mask that was given for the slide, where it was looked at ahead; None without one.
    """

    regions: list[Region] = field(default_factory=list)
    samples: list[np.ndarray] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pen_share: float | None = None
    fold_share: float | None = None
    blurred_share: float | None = None
    mask_digest: str | None = None


def open_slide(path: str, *, slide: Slide, config: CurateConfig) -> SlideReader:
    """A slide's file. Raises SlideError."""
    return SlideReader(path, default_mpp=config.default_mpp, mpp=slide.mpp, limit_s=config.region_limit_s)


def survey_file(path: str, slide: Slide, config: CurateConfig) -> Survey | None:
    """``survey`` of a file, None for one that cannot be used: in its turn it says why."""
    digest = mask_digest(config.tissue.masks, file_stem(slide.slide_id))
    with contextlib.suppress(SlideError), contextlib.closing(open_slide(path, slide=slide, config=config)) as reader:
        return replace(survey(reader, slide=slide, config=config), mask_digest=digest)
    return None


def survey(reader: SlideReader, *, slide: Slide, config: CurateConfig, given: PlacedNuclei | None = None) -> Survey:
    """Look at a slide. Raises SlideError for one that must not be used."""
    if reader.mpp > config.max_mpp:
        raise SlideError(
            f"{reader.mpp:.3g} um/px is coarser than max_mpp={config.max_mpp:g}: nuclei cannot be resolved"
        )
    seen = Survey()
    overview, overview_mpp = _overview(reader, seen)
    mask = None if overview is None else _check_stain(overview, mpp=overview_mpp, config=config)
    if given is not None:
        mask = None
    elif config.tissue.masks is not None:
        mask = read_mask(f"{config.tissue.masks}/{file_stem(slide.slide_id)}.png").mask
    elif mask is not None and overview is not None:
        flaws = find_flaws(overview, mask, mpp=overview_mpp)
        seen.pen_share, seen.fold_share = share_of(flaws["pen"], mask), share_of(flaws["fold"], mask)
        for name in config.tissue.leave_out:
            mask = mask & ~flaws[name]
    seen.regions = _plan(reader, mask, config=config, given=given)
    if not seen.regions:
        seen.notes.append("no tissue found")
    seen.samples = _read_some(reader, spread(seen.regions, CALIBRATION_REGIONS), threads=config.workers.readers)
    seen.blurred_share = blurred_share(seen.samples)
    if overview is None and seen.samples:  # where it could not be seen as a whole, by its parts
        _check_stain(np.concatenate(seen.samples), mpp=CELL_MPP, config=config)
    return seen


def read_region(reader: SlideReader, region: Region) -> np.ndarray:
    """Pixels of a region, uint8 [H, W, 3]. Raises RegionError."""
    return reader.region(region.x_px, region.y_px, width_px=region.size_px, height_px=region.size_px)


def _overview(reader: SlideReader, seen: Survey) -> tuple[np.ndarray | None, float]:
    try:
        return reader.overview(mpp=OVERVIEW_MPP)
    except RegionError as error:
        # Tissue then is everywhere: each region still gets its chance to be read.
        seen.notes.append(f"overview unreadable, whole area searched ({error})")
        return None, OVERVIEW_MPP


def _plan(
    reader: SlideReader, mask: np.ndarray | None, *, config: CurateConfig, given: PlacedNuclei | None
) -> list[Region]:
    """Regions with tissue, or with given nuclei."""
    regions = plan_regions(
        reader.bounds_base_px,
        size_px=config.region_px,
        overlap_px=config.overlap_px,
        tissue=mask,
        min_tissue_share=config.tissue.min_share,
    )
    if given is None:
        return regions
    members = given.in_regions(regions)
    return [region for region in regions if region.index in members]


def _check_stain(picture: np.ndarray, *, mpp: float, config: CurateConfig) -> np.ndarray:
    """The tissue of a picture, bool [h, w]; raises SlideError where its colours are not those of H&E."""
    mask = find_tissue(picture, mpp=mpp).mask
    reason = reason_not_he(picture, mask) if config.tissue.require_he else None
    if reason:
        raise SlideError(reason)
    return mask


def _read_some(reader: SlideReader, regions: Iterable[Region], *, threads: int) -> list[np.ndarray]:
    """Pixels of the regions that can be read."""

    def read(region: Region) -> np.ndarray | None:
        with contextlib.suppress(RegionError):  # counted when its turn comes
            return read_region(reader, region)
        return None

    with ThreadPoolExecutor(threads) as readers:
        return [image for image in readers.map(read, regions) if image is not None]
