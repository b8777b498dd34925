"""Connected pieces of a mask: their outlines, and those that hold several nuclei, divided by a watershed.

Coordinates are region pixels, x then y, with integers at pixel centres, as OpenCV's contours have them. Pieces and
parts hang together by their sides, not by corners.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.segmentation import watershed

_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_Box = tuple[slice, slice]


@dataclass(frozen=True)
class Parts:
    """The connected parts of an image, by its pixels that are not 0."""

    at: np.ndarray  # int64 [N], where in the flattened image
    part: np.ndarray  # int32 [N], the part of each, from 1
    count: int  # parts, with the background, 0

    def pieces(self, piece_ids: np.ndarray) -> np.ndarray:
        """The piece, of int32 [H, W], in which each part lies: int32 [count]; 0 for the background."""
        piece_of = np.zeros(self.count, np.int32)
        piece_of[self.part] = piece_ids.ravel()[self.at]
        return piece_of


def connected_parts(image: np.ndarray) -> Parts:
    """The parts of uint8 [H, W], 0 or 1, contiguous."""
    count, labels = cv2.connectedComponents(image, connectivity=4)
    at = np.flatnonzero(image.view(bool))
    return Parts(at, labels.ravel()[at], count)


def large_outlines(pieces: np.ndarray, piece_ids: np.ndarray, *, min_area_px: float) -> dict[int, np.ndarray]:
    """The outer contour int32 [N, 1, 2] of every piece of ``min_area_px`` pixels or more, all traced in one pass.

    Args:
        pieces: uint8 [H, W], 0 or 1.
        piece_ids: int32 [H, W], the number of each piece, 0 is background.
        min_area_px: smaller pieces are left out.
    """
    contours, hierarchy = cv2.findContours(pieces, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return {}
    joined = _joined_at_corners(pieces, piece_ids)
    outlines: dict[int, np.ndarray] = {}
    x_px, y_px = np.array([contour[0, 0] for contour in contours]).T
    for piece_id, contour, (_, _, hole, parent) in zip(
        piece_ids[y_px, x_px].tolist(), contours, hierarchy[0].tolist(), strict=True
    ):
        if parent >= 0:  # a hole's
            continue
        # A contour runs through centres of pixels, so that a piece without holes has more pixels than that area.
        if piece_id not in joined and hole < 0 and cv2.contourArea(contour) >= min_area_px:
            outlines[piece_id] = contour
            continue
        left, top, width, height = cv2.boundingRect(contour)
        if width * height < min_area_px:
            continue
        box = piece_ids[top : top + height, left : left + width]
        # Tracing joins pieces that touch at a corner; those few are traced again one by one.
        for member in joined.get(piece_id, (piece_id,)):
            piece = box == member
            if np.count_nonzero(piece) >= min_area_px:
                alone = member == piece_id and piece_id not in joined
                outlines[member] = contour if alone else outer_contour(piece, x0_px=left, y0_px=top)
    return outlines


def mean_by_piece(weight: np.ndarray, piece_ids: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Mean of uint8 [H, W] over each piece of int32 [H, W]: float64 [highest id + 1]; that of the background is 0.

    ``pieces`` is uint8 [H, W], 1 where there are any: found faster in bytes.
    """
    at = np.flatnonzero(pieces.view(bool))
    ids = piece_ids.ravel()[at]
    n_px = np.bincount(ids)
    return np.bincount(ids, weight.ravel()[at]) / np.maximum(n_px, 1)


def _joined_at_corners(pieces: np.ndarray, piece_ids: np.ndarray) -> dict[int, list[int]]:
    """Of each piece that touches one at a corner, all that hang together so, itself among them."""
    beside = pieces[:, :-1] ^ pieces[:, 1:]
    crossed = pieces[:-1, :-1] ^ pieces[1:, :-1]  # of four pixels one diagonal is full and the other empty, if ...
    crossed &= beside[:-1]  # ... above, below
    crossed &= beside[1:]  # and on the left neighbours differ
    at = np.flatnonzero(crossed.view(bool))
    if len(at) == 0:
        return {}
    y, x = np.divmod(at, crossed.shape[1])
    left = 1 - pieces[y, x]  # 1 where it is the diagonal from the right down to the left
    first, second = piece_ids[y, x + left], piece_ids[y + 1, x + 1 - left]
    n_ids = int(max(first.max(), second.max())) + 1
    touch = coo_array((np.ones(len(first), np.uint8), (first, second)), shape=(n_ids, n_ids))
    group_of = connected_components(touch, directed=False)[1]
    groups: dict[int, list[int]] = {}
    for piece_id in np.union1d(first, second).tolist():
        groups.setdefault(int(group_of[piece_id]), []).append(piece_id)
    return {piece_id: group for group in groups.values() if len(group) > 1 for piece_id in group}


def outer_contour(cell: np.ndarray, *, x0_px: int, y0_px: int) -> np.ndarray:
    """Longest outer contour of a non-empty bool [h, w] crop, as int32 [N, 1, 2] in the frame of the region."""
    contours, _ = cv2.findContours(
        cell.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(x0_px, y0_px)
    )
    return contours[0] if len(contours) == 1 else max(contours, key=cv2.contourArea)


class Sheet:
    """The boxes of some pieces side by side, a pixel more around each, so that all are worked on at once.

    Args:
        outlines: the outer contour int32 [N, 1, 2] of each piece, one or more.
        piece_ids: int32 [H, W], the number of each piece of the region.
    """

    def __init__(self, outlines: dict[int, np.ndarray], piece_ids: np.ndarray) -> None:
        self._outlines, (height, width) = outlines, piece_ids.shape
        boxes = [cv2.boundingRect(outline) for outline in outlines.values()]
        corners, self.shape = _side_by_side([(h + 2, w + 2) for *_, w, h in boxes], width=width + 2)
        self._owner = np.full(self.shape, -1, np.int32)  # the piece whose box it is, without the pixel around
        self._offsets: dict[int, tuple[int, int]] = {}  # x, y: from the sheet to the region
        self._copies: list[tuple[_Box, _Box, tuple[int, int, int, int]]] = []
        for piece_id, (x, y, w, h), (row, column) in zip(outlines, boxes, corners, strict=True):
            self._owner[row + 1 : row + 1 + h, column + 1 : column + 1 + w] = piece_id
            self._offsets[piece_id] = x - column - 1, y - row - 1
            beyond = (int(y == 0), int(y + h == height), int(x == 0), int(x + w == width))  # the region's border
            around = np.s_[max(y - 1, 0) : y + h + 1, max(x - 1, 0) : x + w + 1]
            self._copies.append((np.s_[row : row + h + 2, column : column + w + 2], around, beyond))
        self._own = (self.lay(piece_ids) == self._owner).view(np.uint8)

    def lay(self, image: np.ndarray) -> np.ndarray:
        """An image [H, W] of the region on the sheet, as OpenCV continues it beyond the border; else 0."""
        sheet = np.zeros(self.shape, image.dtype)
        for place, around, beyond in self._copies:
            box = image[around]
            sheet[place] = cv2.copyMakeBorder(box, *beyond, cv2.BORDER_REFLECT_101) if any(beyond) else box
        return sheet

    def own(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W] of the region on the sheet, 0 outside the pieces themselves."""
        return self.lay(image) * self._own

    def divide(
        self,
        relief: np.ndarray,
        *,
        seeds: np.ndarray,
        inside: np.ndarray,
        min_area_px: float = 0,
        weight: np.ndarray | None = None,
        min_weight: float = 0,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Flood the pieces from their seeds.

        Args:
            relief: [h, w] of the sheet; low places are flooded first.
            seeds: uint8 of the sheet, 0 or 1; each connected part is the seed of a nucleus.
            inside: uint8 of the sheet, 0 or 1: what can be flooded.
            min_area_px: nuclei of fewer pixels are left out.
            weight: uint8 of the sheet; nuclei whose mean weight is below ``min_weight`` are left out.
            min_weight: of them.

        Yields:
            Piece and outer contour int32 [N, 1, 2] of each nucleus; a piece that stays whole has its own outline.
        """
        cells = _flooded(relief, cv2.connectedComponents(seeds, connectivity=4)[1], inside)
        found = [(label, box) for label, box in enumerate(ndimage.find_objects(cells), start=1) if box is not None]
        owners = [int(self._owner[rows.start, columns.start]) for _, (rows, columns) in found]
        divided = {owner for owner, count in Counter(owners).items() if count > 1}
        for owner, (label, (rows, columns)) in zip(owners, found, strict=True):
            if owner not in divided:
                continue
            cell, (x_px, y_px) = cells[rows, columns] == label, self._offsets[owner]
            if min_area_px and np.count_nonzero(cell) < min_area_px:
                continue
            if weight is not None and weight[rows, columns][cell].mean() < min_weight:
                continue
            yield owner, outer_contour(cell, x0_px=x_px + columns.start, y0_px=y_px + rows.start)
        whole = [(piece_id, outline) for piece_id, outline in self._outlines.items() if piece_id not in divided]
        if weight is not None and whole:
            means = mean_by_piece(weight, self._owner, self._own)
            whole = [(piece_id, outline) for piece_id, outline in whole if means[piece_id] >= min_weight]
        yield from whole


def _flooded(relief: np.ndarray, markers: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The watershed, int32 [h, w], of a relief [h, w] from markers int32 [h, w] inside uint8 [h, w]."""
    # Every pixel has its turn in a queue; those amid a marker, which no flood leaves, need none.
    amid = cv2.erode((markers > 0).view(np.uint8), _CROSS)
    cells: np.ndarray = watershed(relief, markers=markers, mask=(inside > amid))
    np.copyto(cells, markers, where=(inside & amid).view(bool))
    return cells


def _side_by_side(sizes: Sequence[tuple[int, int]], *, width: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Where boxes of (height, width) lie on a sheet of a width, in rows; and the sheet's shape."""
    corners, row, column, highest = [(0, 0)] * len(sizes), 0, 0, 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        if column + sizes[i][1] > width:
            row, column, highest = row + highest, 0, 0
        corners[i] = (row, column)
        column, highest = column + sizes[i][1], max(highest, sizes[i][0])
    return corners, (row + highest, width)
