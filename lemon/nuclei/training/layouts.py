"""Labelled images as data sets of nuclei lie on disk, told apart by what is in their folder.

``read_folder`` opens each of these; the source is the folder's name.

- images with maps beside them: ``NAME.png`` (jpg, tif) and ``NAME_inst.npz``, ``NAME_inst.npy``, ``NAME_inst.png`` or
  ``NAME_inst.mat``, or outlines ``NAME.geojson`` in pixels of the image;
- MoNuSeg: ``*.tif`` and ``*.xml`` (Aperio ImageScope) of the same names, in one folder or in two;
- CoNSeP and Kumar: ``Images/*.png`` and ``Labels/*.mat`` (``inst_map``);
- NuInsSeg: ``ORGAN/tissue images/*.png`` and ``ORGAN/label masks modify/*.tif``, or ``label masks``;
- TNBC: ``Slide_NN/*.png`` and ``GT_NN/*.png``, whose connected pieces are the nuclei;
- Data Science Bowl 2018: ``ID/images/*.png`` and ``ID/masks/*.png``, a mask a nucleus;
- NuCLS: ``rgb/*.png`` and ``mask/*.png`` (at 0.2 um/px), cut to the field of view; a nucleus of which only a box was
  drawn is the ellipse in it;
- PanNuke: ``images.npy`` and ``masks.npy`` of each fold.

Nothing pickled is opened.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
from scipy import ndimage
from scipy.io import loadmat

from lemon.nuclei.training.images import IMAGE_SUFFIXES, Labelled, enlarged
from lemon.slides.images import read_image

Reader = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Reads an image uint8 [H, W, 3] and its instances, integers [H, W]."""

MAP_SUFFIXES = (".npz", ".npy", ".png", ".mat")
ARRAY = "inst_map"
CELL_MPP = 0.25
_NUCLS_FIELD = 253


def read_folder(folder: str | Path, *, mpp: float = CELL_MPP) -> list[Labelled]:
    """All labelled images of a folder, at 0.25 um/px, sorted by name.

    An ``images.csv`` with the columns ``image`` and ``objective_power`` names images at 20x: they are enlarged twice,
    and are a source of their own, ``<folder>_20x``.

    Args:
        folder: of one data set.
        mpp: um/px of the images that no such table names.

    Raises:
        ValueError: the folder is of no layout that is known, or a file in it is not what its name says; one line.
    """
    folder = Path(folder)
    found = next((files for layout in LAYOUTS if (files := dict(layout(folder)))), None)
    if found is None:
        raise ValueError(f"{folder}: no labelled images; expected a layout of lemon.nuclei.training.layouts")
    at_20x = _names_at_20x(folder / "images.csv")

    def read(name: str) -> Labelled:
        try:
            image, instances = found[name]()
            source = f"{folder.name}_20x" if name in at_20x else folder.name
            labelled = Labelled(source, name, image, instances.astype(np.int32))
        except (OSError, KeyError, ElementTree.ParseError, TypeError) as error:
            raise ValueError(f"{folder}/{name}: {type(error).__name__}: {error}") from None
        return enlarged(labelled, factor=2.0 if name in at_20x else mpp / CELL_MPP)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(read, sorted(found)))


def _names_at_20x(table: Path) -> set[str]:
    if not table.exists():
        return set()
    with table.open(encoding="utf-8") as file:
        return {row["image"] for row in csv.DictReader(file) if row.get("objective_power") == "20"}


def _images(folder: Path) -> dict[str, Path]:
    """Image files below a folder by their names without suffix."""
    return {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES}


def _pair(image: Path, instances: Callable[[tuple[int, int]], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    pixels = read_image(image)
    return pixels, instances(pixels.shape[:2])


# --- layouts: names and how each is read ------------------------------------------------------------------------------


def _beside(folder: Path) -> Iterator[tuple[str, Reader]]:
    for name, image in _images(folder).items():
        maps = [image.with_name(f"{name}_inst{suffix}") for suffix in MAP_SUFFIXES]
        outlines = image.with_suffix(".geojson")
        if file := next((path for path in maps if path.is_file()), None):
            yield name, partial(_pair, image, partial(_read_map, file))
        elif outlines.is_file():
            yield name, partial(_pair, image, partial(_read_geojson, outlines))


def _monuseg(folder: Path) -> Iterator[tuple[str, Reader]]:
    images = _images(folder)
    for outlines in folder.rglob("*.xml"):
        if outlines.stem in images:
            yield outlines.stem, partial(_pair, images[outlines.stem], partial(_read_xml, outlines))


def _consep(folder: Path) -> Iterator[tuple[str, Reader]]:
    for file in folder.rglob("Labels/*.mat"):
        if image := _images(file.parents[1] / "Images").get(file.stem):
            yield file.stem, partial(_pair, image, partial(_read_map, file))


def _nuinsseg(folder: Path) -> Iterator[tuple[str, Reader]]:
    for organ in sorted({path.parent for path in folder.rglob("tissue images")}):
        for maps in (organ / "label masks", organ / "label masks modify"):  # of two the mended one is taken
            for name, image in _images(organ / "tissue images").items():
                if (file := maps / f"{name}.tif").is_file():
                    yield name, partial(_pair, image, partial(_read_map, file))


def _tnbc(folder: Path) -> Iterator[tuple[str, Reader]]:
    for masks in folder.rglob("GT_*"):
        for name, image in _images(masks.with_name(masks.name.replace("GT_", "Slide_", 1))).items():
            if (file := masks / image.name).is_file():
                yield name, partial(_pair, image, partial(_read_pieces, file))


def _bowl(folder: Path) -> Iterator[tuple[str, Reader]]:
    for masks in folder.rglob("masks"):
        for name, image in _images(masks.with_name("images")).items():
            yield name, partial(_pair, image, partial(_read_masks, masks))


def _pannuke(folder: Path) -> Iterator[tuple[str, Reader]]:
    for file in folder.rglob("images.npy"):
        masks = Path(*(part.replace("images", "masks") for part in file.relative_to(folder).parts))
        if (folder / masks).is_file():
            images, maps = (np.load(path, mmap_mode="r", allow_pickle=False) for path in (file, folder / masks))
            for i in range(len(images)):
                yield f"{file.parent.name}_{i:05d}", partial(_read_pannuke, images, maps, i)


def _nucls(folder: Path) -> Iterator[tuple[str, Reader]]:
    for images in folder.rglob("rgb"):
        masks = images.with_name("mask")
        for name, image in _images(images).items():
            if (file := masks / f"{name}.png").is_file():
                yield name, partial(_read_nucls, image, file)


LAYOUTS = (_beside, _consep, _nuinsseg, _tnbc, _bowl, _pannuke, _nucls, _monuseg)


# --- files ------------------------------------------------------------------------------------------------------------


def _read_map(file: Path, shape: tuple[int, int]) -> np.ndarray:  # noqa: ARG001
    """An instance map by its suffix."""
    if file.suffix == ".mat":
        return _named(loadmat(str(file), variable_names=[ARRAY]), file)
    if file.suffix in (".npz", ".npy"):
        with file.open("rb") as stream:
            stored = np.load(stream, allow_pickle=False)
            return stored if isinstance(stored, np.ndarray) else _named(dict(stored), file)
    return _read_grey(file)


def _named(arrays: dict[str, np.ndarray], file: Path) -> np.ndarray:
    if ARRAY not in arrays:
        raise ValueError(f"{file}: got arrays {sorted(a for a in arrays if a[0] != '_')}, expected {ARRAY}")
    return arrays[ARRAY]


def _read_grey(file: Path) -> np.ndarray:
    """Values of an image as they are: numbers of instances, not colours."""
    values = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    if values is None or values.ndim != 2:
        got = "unreadable" if values is None else list(values.shape)
        raise ValueError(f"{file}: got {got}, expected one channel of numbers")
    return np.asarray(values)


def _read_pieces(file: Path, shape: tuple[int, int]) -> np.ndarray:  # noqa: ARG001
    mask = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise ValueError(f"{file}: unreadable, expected a mask")
    return cv2.connectedComponents((mask > 0).view(np.uint8), connectivity=4)[1]


def _read_masks(folder: Path, shape: tuple[int, int]) -> np.ndarray:
    instances = np.zeros(shape, np.int32)
    for number, file in enumerate(sorted(folder.glob("*.png")), start=1):
        instances[_read_grey(file) > 0] = number
    return instances


def _read_pannuke(images: np.ndarray, masks: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Five channels of instances, one a type, and the background; numbers are kept apart."""
    instances = np.zeros(masks.shape[1:3], np.int32)
    for channel in range(masks.shape[3] - 1):
        of_type = masks[i, ..., channel].astype(np.int32)
        instances = np.where(of_type > 0, of_type + instances.max(), instances)
    return images[i].astype(np.uint8), instances


def _read_nucls(image: Path, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Classes are in the first channel, the number of a nucleus is the product of the others; 253 is the field of view.

    DEVIATION: masks have whole boxes for nuclei that were not outlined. Their corners are no nucleus, so that each
    instance that fills its box becomes the ellipse in it.
    """
    pixels, mask = read_image(image), read_image(file)
    if mask.shape != pixels.shape:
        raise ValueError(f"{file}: got {list(mask.shape)}, expected the shape of its image, {list(pixels.shape)}")
    y, x = np.nonzero(mask[..., 0] == _NUCLS_FIELD)
    if not len(y):
        raise ValueError(f"{file}: has no pixel of class {_NUCLS_FIELD}, the field of view")
    field = np.s_[y.min() : y.max() + 1, x.min() : x.max() + 1]
    kind, high, low = np.moveaxis(mask[field].astype(np.int32), -1, 0)
    instances = np.where((kind > 0) & (kind != _NUCLS_FIELD), high * low, 0)
    for number, box in enumerate(ndimage.find_objects(instances), start=1):
        if box is not None and (instances[box] == number).all():
            height, width = instances[box].shape
            rows, columns = (np.linspace(-1, 1, 2 * side + 1)[1::2] for side in (height, width))
            instances[box] = np.where(rows[:, None] ** 2 + columns**2 <= 1, number, 0)
    return np.ascontiguousarray(pixels[field]), instances


def _read_xml(file: Path, shape: tuple[int, int]) -> np.ndarray:
    regions = ElementTree.parse(file).iter("Region")
    return _filled(
        [[(float(v.attrib["X"]), float(v.attrib["Y"])) for v in region.iter("Vertex")] for region in regions], shape
    )


def _read_geojson(file: Path, shape: tuple[int, int]) -> np.ndarray:
    """Polygons and MultiPolygons, their outer rings; one nucleus a feature."""
    content = json.loads(file.read_text(encoding="utf-8"))
    rings = []
    for feature in content["features"] if isinstance(content, dict) else content:
        geometry = feature["geometry"]
        parts = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
        if geometry["type"] in ("Polygon", "MultiPolygon"):
            rings.append(max((part[0] for part in parts), key=len))
    return _filled(rings, shape)


def _filled(rings: list[list[tuple[float, float]]], shape: tuple[int, int]) -> np.ndarray:
    """Rings of corners between pixels (0, 0 is the corner of the first) as instances; larger ones lie below."""
    contours = [
        np.round(np.asarray(ring, np.float64).reshape(-1, 2) - 0.5).astype(np.int32) for ring in rings if len(ring) >= 3
    ]
    instances = np.zeros(shape, np.int32)
    for number, contour in enumerate(sorted(contours, key=cv2.contourArea, reverse=True), start=1):
        cv2.fillPoly(instances, [contour], number)
    return instances
