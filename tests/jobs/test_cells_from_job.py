"""Curation of given nuclei as a user starts it, on Ray and on a real slide: killed, started again, changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lemon.cells.ledger import read_ledger
from lemon.runtime.ledger import ATTEMPTS_FOLDER
from lemon.runtime.store import Store
from tests.conftest import shared
from tests.jobs.test_curate_job import committed, kill_all, wait_for
from tests.jobs.test_user_path import export_of_qupath
from tests.jobs.warm import Job, run_job

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SLIDES = ("a", "b")


def write_nuclei(folder: Path, slide_id: str, features: Mapping[str, Any]) -> None:
    document = {"type": "FeatureCollection", "features": [*features.values()]}
    (folder / f"{slide_id}.geojson").write_text(json.dumps(document))


def ids_of(output: Path, slide_id: str) -> set[str]:
    return set(pq.read_table(output / "cells" / f"{slide_id}.parquet")["foreign_id"].to_pylist())


def test_a_job_with_given_nuclei_that_was_killed_goes_on_skips_what_is_done_and_sees_other_nuclei(
    tmp_path: Path,
) -> None:
    slide = shared("data/slides/CMU-1-Small-Region.svs")
    slides, nuclei, output = (tmp_path / name for name in ("slides", "nuclei", "out"))
    features = export_of_qupath(slide, tmp_path)
    slides.mkdir()
    nuclei.mkdir()
    for slide_id in SLIDES:
        shutil.copyfile(slide, slides / f"{slide_id}.svs")
        write_nuclei(nuclei, slide_id, features)
    words = [f"slides={slides}", f"cells_from={nuclei}", f"output={output}", "workers.actors=1", "workers.cpus=1"]

    job = Job("curate", words)
    wait_for(lambda: any((output / ATTEMPTS_FOLDER).glob("*/*")), job=job, seconds=500)
    kill_all(job)
    before = committed(output)
    assert before < len(SLIDES)
    done = run_job("curate", words, timeout=900)
    assert done.returncode == 0, done.stderr
    assert f"{before} of an earlier run" in done.stdout
    assert [ids_of(output, slide_id) for slide_id in SLIDES] == [features.keys()] * len(SLIDES)
    rows = read_ledger(Store(output)).to_pylist()
    assert [(row["status"], row["n_cells"]) for row in rows] == [("done", len(features))] * len(SLIDES)

    written = {path: path.stat().st_mtime_ns for path in (output / "cells").glob("*.parquet")}
    fewer = dict(list(features.items())[: len(features) // 2])
    write_nuclei(nuclei, "b", fewer)
    again = run_job("curate", words, timeout=900)
    assert again.returncode == 0, again.stderr
    assert "1 of an earlier run" in again.stdout
    assert ids_of(output, "b") == fewer.keys()
    changed = {path.stem for path, then in written.items() if path.stat().st_mtime_ns != then}
    assert changed == {"b"}
