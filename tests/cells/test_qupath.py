from __future__ import annotations

import gzip
import io
import json
import uuid

import numpy as np
import shapely

from lemon.cells.crop import Frame, claim_cells
from lemon.cells.qupath import GeoJsonWriter
from lemon.slides.cohort import Slide
from tests.cells.test_crop import REGION, ellipse, picture


def write(**options: object) -> bytes:
    frame = Frame(slide=Slide("s", "s.svs"), mpp=0.25, scale=1.0, bounds_px=(0, 0, 5000, 5000))
    rows = claim_cells(picture(), [ellipse(150, 150), ellipse(300, 200)], region=REGION, frame=frame).rows
    stream = io.BytesIO()
    with GeoJsonWriter(stream, **options) as writer:  # type: ignore[arg-type]
        writer.write(rows)
        writer.write(rows.slice(0, 0))
        writer.write(rows.slice(1))
    return stream.getvalue()


def test_every_feature_is_a_detection_as_qupath_wants_it() -> None:
    collection = json.loads(gzip.decompress(write()))
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == 3
    for feature in collection["features"]:
        uuid.UUID(feature["id"])
        assert feature["type"] == "Feature"
        assert feature["properties"]["objectType"] == "detection"
        assert set(feature["properties"]["classification"]) == {"name", "color"}
        assert all(isinstance(value, float) for value in feature["properties"]["measurements"].values())
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        assert shapely.Polygon(ring).is_valid


def test_coordinates_count_from_the_corner_of_the_scanned_area() -> None:
    here, moved = (json.loads(gzip.decompress(write(origin_px=origin))) for origin in ((0, 0), (100, 50)))
    first = [np.array(file["features"][0]["geometry"]["coordinates"][0]) for file in (here, moved)]
    assert np.allclose(first[0] - first[1], (100, 50))


def test_every_nucleus_may_have_a_class_of_its_own() -> None:
    frame = Frame(slide=Slide("s", "s.svs"), mpp=0.25, scale=1.0, bounds_px=(0, 0, 5000, 5000))
    rows = claim_cells(picture(), [ellipse(150, 150), ellipse(300, 200)], region=REGION, frame=frame).rows
    classes = [{"name": "a", "color": [1, 2, 3]}, {"name": "b", "color": [4, 5, 6]}]
    stream = io.BytesIO()
    with GeoJsonWriter(stream) as writer:
        writer.write(rows, classifications=classes)
    features = json.loads(gzip.decompress(stream.getvalue()))["features"]
    assert [feature["properties"]["classification"] for feature in features] == classes


def test_the_same_nuclei_give_the_same_bytes() -> None:
    assert write() == write()
