"""Each program's JSON is read from a file of its own layout; what is none is one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lemon.nuclei.given.nuclei import GivenError
from lemon.nuclei.given.read import read_given
from lemon.slides.reader import SlideReader
from tests.nuclei.given.made_up import (
    CENTRES,
    CLASSES,
    COUNT,
    OUTLINES,
    SIDE,
    agrees,
    centres_of,
    contour_of,
    geojson,
    uuid_of,
    write_json,
)

FEW = 6


def ring(outline: np.ndarray) -> list[list[float]]:
    return [*outline.tolist(), outline[0].tolist()]


def test_geojson_of_qupath_keeps_ids_classes_and_probabilities(tmp_path: Path, reader: SlideReader) -> None:
    nuclei = read_given(write_json(tmp_path / "s.geojson", geojson()), reader)
    assert agrees(nuclei, within=1e-6)
    assert (nuclei.unit, nuclei.centred, nuclei.notes) == ("px of level 0", False, ())
    assert nuclei.ids.to_pylist() == [uuid_of(index) for index in range(COUNT)]
    assert nuclei.classes.to_pylist() == CLASSES
    assert set(nuclei.probability.tolist()) == {0.5}
    assert set(nuclei.sizes.tolist()) == {12}  # rings are open


@pytest.mark.parametrize("kind", ["list", "one line", "gzip"])
def test_geojson_may_be_a_list_of_features_in_one_line_or_gzipped(
    tmp_path: Path, reader: SlideReader, kind: str
) -> None:
    features = geojson()["features"]
    text = json.dumps(features if kind == "list" else {"type": "FeatureCollection", "features": features})
    path = tmp_path / ("s.geojson.gz" if kind == "gzip" else "s.geojson")
    path.write_bytes(gzip.compress(text.encode()) if kind == "gzip" else text.encode())
    assert agrees(read_given(path, reader))


def test_a_cell_of_qupath_is_its_nucleus(tmp_path: Path, reader: SlideReader) -> None:
    document = geojson((OUTLINES - CENTRES[:, None]) * 2 + CENTRES[:, None])
    for feature, outline in zip(document["features"], OUTLINES, strict=True):
        feature["properties"]["objectType"] = "cell"
        feature["nucleusGeometry"] = {"type": "Polygon", "coordinates": [ring(outline)]}
    nuclei = read_given(write_json(tmp_path / "s.geojson", document), reader)
    assert np.allclose(nuclei.points.reshape(OUTLINES.shape), OUTLINES)


def test_annotations_beside_detections_are_regions_and_alone_are_nuclei(tmp_path: Path, reader: SlideReader) -> None:
    document = geojson()
    region = {"type": "Polygon", "coordinates": [[[0, 0], [SIDE, 0], [SIDE, SIDE], [0, 0]]]}
    annotation = {"type": "Feature", "id": "r", "geometry": region, "properties": {"objectType": "annotation"}}
    line = annotation | {"geometry": {"type": "LineString", "coordinates": [[0, 0], [1, 1]]}}
    mixed = read_given(write_json(tmp_path / "s.geojson", [annotation, line, *document["features"]]), reader)
    assert agrees(mixed)
    assert mixed.notes == (
        "1 of geometry LineString passed over",
        "1 annotations passed over, as there are detections",
    )
    for feature in document["features"]:
        feature["properties"]["objectType"] = "annotation"
    assert agrees(read_given(write_json(tmp_path / "s.geojson", document), reader))


def test_the_one_multipolygon_a_class_of_cellvits_geojson_is_many_nuclei(tmp_path: Path, reader: SlideReader) -> None:
    template = {"type": "Feature", "id": "c", "properties": {"objectType": "annotation", "classification": {}}}
    features = []
    for name, chosen in (("Neoplastic", OUTLINES[:4]), ("Dead", OUTLINES[4:FEW])):
        feature: dict[str, Any] = json.loads(json.dumps(template))
        feature["geometry"] = {"type": "MultiPolygon", "coordinates": [[ring(outline)] for outline in chosen]}
        feature["properties"]["classification"]["name"] = name
        features.append(feature)
    nuclei = read_given(write_json(tmp_path / "cells.geojson", features), reader)
    assert agrees(nuclei, among=range(FEW))
    assert nuclei.classes.to_pylist() == ["Neoplastic"] * 4 + ["Dead"] * 2
    assert nuclei.ids.to_pylist() == ["c#0", "c#1", "c#2", "c#3", "c#0", "c#1"]


def test_a_detection_in_pieces_is_one_nucleus_and_old_versions_of_qupath_have_no_ids(
    tmp_path: Path, reader: SlideReader
) -> None:
    small = [[1, 1], [3, 1], [3, 3], [1, 1]]
    pieces = {"type": "MultiPolygon", "coordinates": [[small], [ring(OUTLINES[0])]]}
    measurements = [{"name": "Detection probability", "value": 0.5}]
    old = {"type": "Feature", "id": "PathDetectionObject", "geometry": pieces}
    old["properties"] = {"classification": {"name": "A", "colorRGB": -1}, "measurements": measurements}
    nuclei = read_given(write_json(tmp_path / "s.json", [old]), reader)
    assert agrees(nuclei, among=[0])
    assert (nuclei.ids.to_pylist(), nuclei.probability.tolist()) == (["0"], [0.5])


def test_cells_of_cellvit_have_the_names_of_their_types(tmp_path: Path, reader: SlideReader) -> None:
    cells = [
        {
            "bbox": [[0, 0], [9, 9]],
            "centroid": (CENTRES[index] - 0.5).tolist(),
            "contour": contour_of(index),
            "type_prob": 0.75,
            "type": 1 + index % 2,
            "patch_coordinates": [0, 0],
            "cell_status": 0,
            "offset_global": [0, 0],
            "edge_position": False,
        }
        for index in range(FEW)
    ]
    document = {
        "wsi_metadata": {"base_mpp": 0.25, "downsampling": 1},
        "processed_patches": ["0_0"],
        "type_map": {"Background": 0, "Neoplastic": 1, "Inflammatory": 2},
        "cells": cells,
    }
    nuclei = read_given(write_json(tmp_path / "cells.json", document), reader)
    assert agrees(nuclei, among=range(FEW))
    assert nuclei.classes.to_pylist() == ["Neoplastic", "Inflammatory"] * (FEW // 2)
    assert set(nuclei.probability.tolist()) == {0.75}
    for cell in cells:
        del cell["contour"], cell["type_prob"]
    write_json(tmp_path / "out" / "cell_detection" / "cells.json", document)
    detections = read_given(tmp_path / "out", reader)  # the folder that CellViT writes
    assert not detections.outlined
    assert agrees(detections, among=range(FEW))


def test_tiles_of_histoplus_are_those_of_openslides_deepzoom(
    tmp_path: Path, reader: SlideReader, slide_path: Path
) -> None:
    from openslide import OpenSlide
    from openslide.deepzoom import DeepZoomGenerator

    tile, level = 128, 9  # of 10, which is level 0: px of twice the size
    zoom = DeepZoomGenerator(OpenSlide(str(slide_path)), tile_size=tile, overlap=0, limit_bounds=False)
    tiles = []
    for index in range(FEW):
        column, row = (CENTRES[index] // (2 * tile)).astype(int).tolist()
        corner = np.array(zoom.get_tile_coordinates(level, (column, row))[0], float)
        local = (OUTLINES[index] - corner) / 2 - 0.5
        mask = {"cell_id": 0, "cell_type": "Plasmocyte", "confidence": 0.5}
        mask |= {"coordinates": local.tolist(), "centroid": local.mean(axis=0).tolist()}
        place = {"x": float(column), "y": float(row), "level": level, "width": tile, "height": tile}
        tiles.append(place | {"masks": [mask]})
    document = {"model_name": "histoplus", "inference_mpp": 0.5, "cell_masks": tiles}
    nuclei = read_given(write_json(tmp_path / "cell_masks.json", document), reader)
    assert agrees(nuclei, among=range(FEW))
    assert set(nuclei.classes.to_pylist()) == {"Plasmocyte"}
    assert nuclei.ids[0].as_py() == "{x:g}_{y:g}_0".format(**tiles[0])


@pytest.mark.parametrize(("magnification", "scale"), [(40, 1.0), (20, 2.0), (None, 1.0)])
def test_nuclei_of_hovernet_are_px_at_its_magnification(
    tmp_path: Path, reader: SlideReader, magnification: int | None, scale: float
) -> None:
    nuc = {
        str(index + 7): {
            "bbox": [[0, 0], [1, 1]],
            "centroid": [0, 0],
            "contour": ((OUTLINES[index] - 0.5 * scale) / scale).tolist(),
            "type_prob": 0.9,
            "type": index % 2,
        }
        for index in range(FEW)
    }
    nuclei = read_given(write_json(tmp_path / "s.json", {"mag": magnification, "nuc": nuc}), reader)
    assert agrees(nuclei, among=range(FEW))
    assert nuclei.ids.to_pylist() == [str(index + 7) for index in range(FEW)]
    assert nuclei.classes.to_pylist() == [None, "1"] * (FEW // 2)
    assert nuclei.unit == (f"px at {magnification}x of a slide of 40x" if magnification else "px of level 0")


def test_details_of_stardist_have_y_first(tmp_path: Path, reader: SlideReader) -> None:
    coord = (OUTLINES - 0.5)[:, :, ::-1].transpose(0, 2, 1)  # [N, 2, rays]
    details = {"coord": coord.tolist(), "points": (CENTRES - 0.5)[:, ::-1].tolist(), "prob": [0.5] * COUNT}
    nuclei = read_given(write_json(tmp_path / "s.json", details | {"class_id": [1] * COUNT}), reader)
    assert agrees(nuclei)
    assert set(nuclei.classes.to_pylist()) == {"1"}
    del details["coord"]
    assert agrees(read_given(write_json(tmp_path / "s.json", details), reader))
    np.savez(tmp_path / "s.npz", coord=coord, prob=np.full(COUNT, 0.5))
    assert np.allclose(centres_of(read_given(tmp_path / "s.npz", reader)), CENTRES)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"{", "no JSON, or not all of it"),
        (b'{"features": [{"type": "Feature"', "no JSON, or not all of it"),
        (b'{"features": []}', "holds no nuclei"),
        (b'{"features": [{"geometry": null, "properties": null}]}', "holds no nuclei"),
        (b'{"features": [7]}', "an entry is not as"),
        (b'{"cells": [{"type": 1}]}', "an entry is not as"),
        (b'{"a": 1, "b": [2]}', "has a, b; expected QuPath's GeoJSON"),
        (b'"text"', "no JSON, or not all of it"),
        (b"\x1f\x8bdamaged", "a damaged gzip"),
        (b"\xff\xfe\xff", "no text"),
        (b'{"coord": [[1, 2]]}', "expected \\[N, 2, rays\\]"),
        (b"[" * 100_000, "no JSON, or not all of it"),
    ],
)
def test_what_is_no_document_of_nuclei_is_one_line(
    tmp_path: Path, reader: SlideReader, content: bytes, reason: str
) -> None:
    (tmp_path / "s.json").write_bytes(content)
    with pytest.raises(GivenError, match=reason) as refused:
        read_given(tmp_path / "s.json", reader)
    assert "\n" not in str(refused.value)
