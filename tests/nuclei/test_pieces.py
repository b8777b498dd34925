from __future__ import annotations

import cv2
import numpy as np
import pytest

from lemon.nuclei.pieces import Sheet, connected_parts, large_outlines, outer_contour


def numbered(pieces: np.ndarray) -> np.ndarray:
    return cv2.connectedComponents(pieces, connectivity=4)[1]


@pytest.mark.parametrize("min_area_px", [1, 4, 12, 30])
def test_outlines_are_those_of_each_piece_alone_with_enough_pixels(min_area_px: int) -> None:
    rng = np.random.default_rng(min_area_px)
    pieces = cv2.medianBlur((rng.random((120, 90)) > 0.5).astype(np.uint8), 3)  # holes, corners and islands in them
    ids = numbered(pieces)
    expected = {
        i: outer_contour(ids == i, x0_px=0, y0_px=0).tolist()
        for i in range(1, ids.max() + 1)
        if (ids == i).sum() >= min_area_px
    }
    found = large_outlines(pieces, ids, min_area_px=min_area_px)
    assert {i: contour.tolist() for i, contour in found.items()} == expected
    assert len(expected) > 5


def test_parts_know_the_piece_that_they_lie_in() -> None:
    pieces = np.zeros((20, 30), np.uint8)
    pieces[2:18, 2:10] = pieces[2:18, 12:28] = 1
    seeds = np.zeros_like(pieces)
    seeds[4:6, 4:6] = seeds[4:6, 14:16] = seeds[10:12, 20:22] = 1
    assert connected_parts(seeds).pieces(numbered(pieces)).tolist() == [0, 1, 2, 2]


def test_a_sheet_holds_what_is_around_its_pieces_also_beyond_the_border_of_the_region() -> None:
    image = np.random.default_rng(0).random((40, 50)).astype(np.float32)
    pieces = np.zeros((40, 50), np.uint8)
    pieces[0:9, 0:12] = pieces[20:40, 30:50] = pieces[15:18, 10:14] = 1
    ids = numbered(pieces)
    sheet = Sheet(large_outlines(pieces, ids, min_area_px=1), ids)
    blurred = sheet.own(cv2.GaussianBlur(image, (3, 3), 0))
    there = sheet.own(pieces) > 0
    assert np.allclose(np.sort(blurred[there]), np.sort(cv2.GaussianBlur(image, (3, 3), 0)[pieces > 0]))
    # On the sheet the blur sees the same neighbours.
    assert np.allclose(cv2.GaussianBlur(sheet.lay(image), (3, 3), 0)[there], blurred[there], atol=1e-6)
    assert there.sum() == pieces.sum()


def test_pieces_are_divided_in_the_region_and_one_with_a_single_seed_keeps_its_outline() -> None:
    pieces = np.zeros((30, 60), np.uint8)
    pieces[5:15, 5:25] = pieces[5:15, 40:60] = 1
    seeds = np.zeros_like(pieces)
    seeds[8:12, 7:10] = seeds[8:12, 20:23] = seeds[8:12, 50:53] = 1
    ids = numbered(pieces)
    outlines = large_outlines(pieces, ids, min_area_px=1)
    sheet = Sheet(outlines, ids)
    found = list(sheet.divide(np.zeros(sheet.shape), seeds=sheet.own(seeds), inside=sheet.own(pieces)))
    boxes = sorted((piece, *cv2.boundingRect(contour)) for piece, contour in found)
    assert [piece for piece, *_ in boxes] == [1, 1, 2]
    assert boxes[2][1:] == (40, 5, 20, 10)
    (_, x0, y0, w0, h0), (_, x1, y1, w1, h1) = boxes[:2]
    assert (x0, y0, h0, y1, h1, x1 + w1) == (5, 5, 10, 5, 10, 25)
    assert x1 == x0 + w0
    large = list(sheet.divide(np.zeros(sheet.shape), seeds=sheet.own(seeds), inside=sheet.own(pieces), min_area_px=150))
    assert [piece for piece, _ in large] == [2]
