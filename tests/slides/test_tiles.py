from __future__ import annotations

import numpy as np
import pytest

from lemon.slides.tiles import plan_regions, spread


@pytest.mark.parametrize("bounds", [(0, 0, 3000, 2000), (37, 91, 896, 897), (5, 5, 10, 10)])
def test_inner_parts_cover_every_pixel_exactly_once(bounds: tuple[int, int, int, int]) -> None:
    x, y, width, height = bounds
    count = np.zeros((height, width), int)
    for region in plan_regions(bounds, size_px=1024, overlap_px=128):
        x0, y0, x1, y1 = region.inner_px
        count[max(0, y0 - y) : max(0, y1 - y), max(0, x0 - x) : max(0, x1 - x)] += 1
    assert (count == 1).all()


def test_neighbouring_regions_overlap_by_what_was_asked() -> None:
    first, second = plan_regions((0, 0, 1500, 800), size_px=1024, overlap_px=128)
    assert first.x_px + first.size_px - second.x_px == 128


def test_regions_without_tissue_are_left_out_and_the_others_numbered_in_order() -> None:
    tissue = np.zeros((20, 40), bool)
    tissue[:, 30:] = True
    regions = plan_regions((0, 0, 4000, 2000), size_px=1024, overlap_px=24, tissue=tissue, min_tissue_share=0.01)
    assert [(region.index, region.inner_px[0]) for region in regions] == [(0, 3000), (1, 3000)]
    assert plan_regions((0, 0, 100, 100), size_px=1024, overlap_px=128, tissue=np.zeros((5, 5), bool)) == []


def test_a_sample_of_regions_is_spread_and_repeatable() -> None:
    regions = plan_regions((0, 0, 20_000, 5_000), size_px=1024, overlap_px=128)
    sample = list(spread(regions, 8))
    assert len(sample) == 8
    assert sample[0].index == 0
    assert sample[-1].index == len(regions) - 1
    assert sample == list(spread(regions, 8))
    assert len(list(spread(regions[:3], 8))) == 3
