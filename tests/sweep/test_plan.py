"""``plan=true``: what a sweep needs, whether the table has it, and what to change; nothing is started or written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lemon.cells.ledger import cells_ledger
from lemon.errors import EXIT_BAD_CONFIG, EXIT_OK
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.schema import SlideRow
from lemon.sweep import start
from lemon.sweep.config import SweepConfig
from lemon.sweep.plan import _least_limit, _round_down, _round_up

pytestmark = pytest.mark.usefixtures("console")

ROOT = Path(__file__).resolve().parents[2]


def write_ledger(folder: Path, *, slides: int = 40, n_cells: int = 1000, n_nuclei: int = 90_000) -> Path:
    """A cells table as far as a plan reads it: its ledger. Half of the slides of each of two organs."""
    rows = [
        SlideRow(
            f"s{number}",
            "",
            f"p{number}",
            organ=("breast", "lung")[number % 2],
            status="done",
            n_cells=n_cells,
            n_nuclei=n_nuclei,
        )
        for number in range(slides)
    ]
    Store(folder).write_table("slides/rows.parquet", SlideRow.table(rows))
    return folder


def words(home: Path, *more: str) -> list[str]:
    places = [f"cells={home / 'cells'}", f"output={home / 'out'}", f"data={home}", f"pretrain.cache={home / 'cache'}"]
    return [*places, "tasks=consep-type", "plan=true", *more]


def plan(home: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """Exit code and text of a plan of the table in ``home``."""
    config = load("scaling_sweep", words(home, *more), SweepConfig)
    config.check_inputs()
    code = start.main(config)
    return code, capsys.readouterr().out


def test_a_study_that_fits_is_told_with_its_trials_room_and_hours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ledger(tmp_path / "cells")
    code, text = plan(
        tmp_path, capsys, "sweep=slides", "sweep.points=[10,20]", "pretrain.select.n_cells=5000", "seeds=[0,1]"
    )
    assert code == EXIT_OK
    assert "2 points with seeds 0, 1 are 4 trials" in text
    assert "40,000 cells of 40 slides (1,000 to 1,000 a slide, 1,000 in the middle), of 3,600,000 nuclei" in text
    assert ["10", "10", "5,000", "500", "1,000", "yes"] in map(str.split, text.splitlines())
    assert ["breast", "20", "20,000", "1,000", "1,000"] in map(str.split, text.splitlines())
    images = 150 * 244 * 4096
    assert f"vit_s8, MoCo v3, 150 epochs, {images:,} images" in text
    assert "warmup 40 epochs" in text
    hours = 4 * images / 34_496 / 3600
    assert f"pretraining on one NVIDIA H100 80GB HBM3, bf16: {hours:.1f} hours" in text
    assert "uncompressed images, on each node that trains: 0.1 GB" in text
    assert "all of it fits" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells"], "nothing is written"


def test_too_few_cells_a_slide_are_told_with_the_curation_and_the_study_that_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ledger(tmp_path / "cells")
    code, text = plan(tmp_path, capsys, "sweep=slides_paper", "sweep.points=[10,20]")
    assert code == EXIT_BAD_CONFIG
    assert "point 10: pretrain.select.n_cells: got 1,000,000; the 10 slides hold 10,000" in text
    assert "to change: point 10: all nuclei of its slides are too few" in text
    assert "to change: curate into another output with cells_per_slide=50000: 21.6 GB of cells" in text
    assert "to change: pretrain.select.n_cells=10000, which all points" in text
    code, text = plan(tmp_path, capsys, "sweep=slides_paper", "sweep.points=[10,20]", "pretrain.select.n_cells=10000")
    assert (code, "all of it fits" in text) == (EXIT_OK, True), "what was proposed fits"


def test_slides_and_organs_that_are_not_there_leave_the_points_that_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ledger(tmp_path / "cells")
    code, text = plan(tmp_path, capsys, "sweep=slides", "sweep.points=[10,1000]", "pretrain.select.n_cells=5000")
    assert code == EXIT_BAD_CONFIG
    assert "point 1k: pretrain.select.n_slides: got 1,000; the table has 40 slides" in text
    assert "to change: sweep.points=10, which fit" in text
    code, text = plan(tmp_path, capsys, "sweep=organs", "pretrain.select.n_cells=5000")
    assert code == EXIT_BAD_CONFIG
    assert "point o5-s100, o5-s400: pretrain.select.organs: got 5 organs; the table has 2 (" in text
    code, text = plan(tmp_path, capsys, "sweep=slides", "sweep.points=[10]", "pretrain.field_um=56")
    assert code == EXIT_BAD_CONFIG
    assert "field_um: got 56; expected null: a sweep scores encoders on images of nuclei" in text


def test_without_a_table_the_plan_says_what_to_curate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = plan(tmp_path, capsys, "sweep=organs_paper")
    assert code == EXIT_BAD_CONFIG
    assert "holds no cells yet" in text
    assert "to change: curate 400 slides of 10 organs with cells_per_slide=10000 or more" in text
    code, text = plan(tmp_path, capsys, "sweep=ssl")
    assert "pretraining on one NVIDIA H100 80GB HBM3, bf16: 11.7 hours" in text
    assert "pretraining of mocov3 alone on one AMD EPYC, 2 cores: " in text, "no DINOv2 was measured there"
    assert "uncompressed images" not in text, "how many cells is not known yet"


def test_default_studies_fit_a_table_of_default_curation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ledger(tmp_path / "cells", slides=1000, n_cells=900)
    for sweep, points in (("slides", "sweep.points=[100,1000]"), ("organs", "pretrain.epochs=10")):
        code, text = plan(tmp_path, capsys, f"sweep={sweep}", points, "pretrain.select.organs=null")
        lacking = [line for line in text.splitlines() if "n_cells" in line]
        assert not lacking, "cells a slide suffice"
        assert code == (EXIT_OK if sweep == "slides" else EXIT_BAD_CONFIG), "five organs are not there"


def test_patients_of_the_tasks_benchmarks_are_left_out_of_the_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ledger(tmp_path / "cells", slides=12)
    barcode = "TCGA-A2-A0SX-01Z-00-DX1"
    row = SlideRow(barcode, "", organ="breast", status="done", n_cells=700, n_nuclei=700)
    cells_ledger(Store(tmp_path / "cells"), config_fingerprint="x").commit(row)
    tasks = ["tasks=nucls-super", "sweep=size", "sweep.points=[12000,12001]"]
    code, text = plan(tmp_path, capsys, *tasks)
    assert "nucls-super: 1 of 124 patients are in the table; their 700 cells of 1 slides are left out" in text
    assert "point 12001: pretrain.select.n_cells: got 12,001; the 12 slides hold 12,000" in text
    assert code == EXIT_BAD_CONFIG
    code, text = plan(tmp_path, capsys, *tasks, "exclude_benchmarks=[]")
    assert (code, "left out" in text) == (EXIT_OK, False)


def test_neither_torch_nor_ray_nor_mlflow_is_imported(tmp_path: Path) -> None:
    write_ledger(tmp_path / "cells", slides=2)
    code = (
        "import sys; from lemon.cli import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'ray', 'mlflow'} & sys.modules.keys(); sys.exit(code)"
    )
    given = ["sweep", *words(tmp_path, "sweep=size", "sweep.points=[500,1000]")]
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == EXIT_OK, done.stderr
    assert "sweep: plan of size: 2 points with seeds 0 are 2 trials; nothing is started" in done.stdout


@pytest.mark.parametrize("seed", range(20))
def test_the_least_limit_a_slide_is_that_of_trying_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nuclei = rng.integers(1, 60, int(rng.integers(1, 8)))
    for wanted in range(1, int(nuclei.sum()) + 3):
        tried = (k for k in range(1, 61) if np.minimum(nuclei, k).sum() >= wanted)
        assert _least_limit(nuclei, wanted) == next(tried, None)


def test_numbers_are_rounded_to_the_side_that_fits() -> None:
    assert (_round_up(84_321), _round_up(7), _round_up(10_000)) == (85_000, 7, 10_000)
    assert (_round_down(84_321), _round_down(7), _round_down(10_000)) == (84_000, 7, 10_000)
