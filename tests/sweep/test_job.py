"""Sweeps: what is checked first, how selections nest, the table, and what a rerun does."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lemon.cells.ledger import read_ledger
from lemon.cells.select import select_cells
from lemon.errors import EXIT_FAILURES, EXIT_OK, ConfigError
from lemon.pretrain.config import DINOv2Config
from lemon.probe.task import Task, TaskError
from lemon.runtime.config import load, preset_names
from lemon.runtime.store import Store
from lemon.runtime.tracking import RUN
from lemon.sweep import grid, table
from lemon.sweep import job as sweep
from lemon.sweep import trial as trials
from lemon.sweep.config import SweepConfig
from lemon.sweep.points import nested_organs, point_config
from tests.cells_table import synthetic_crops, write_slide
from tests.sweep.studies import ORGANS, light_task, sweep_words, write_cells

pytestmark = pytest.mark.usefixtures("console")

STUDIES = preset_names("sweep")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_cells(folder / "cells")
    return folder


@pytest.fixture(autouse=True)
def circumstances(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One made-up task in place of the catalogue, one MLflow database for all."""

    def open_task(name: str, data: Path, *, seed: int = 0) -> Task:
        if name != "light":
            raise TaskError(f"tasks: unknown {name!r}")
        return light_task()

    monkeypatch.setattr(grid, "open_task", open_task)
    monkeypatch.setattr(trials, "open_task", open_task)
    uri = f"sqlite:///{home / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def config_of(home: Path, *more: str) -> SweepConfig:
    return load("scaling_sweep", sweep_words(home, *more), SweepConfig)


def faults(home: Path, *more: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        grid.build_grid(config_of(home, *more))
    return str(caught.value).splitlines()


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("variant", ["default", "smoke"])
def test_every_shipped_study_composes_and_gives_a_pretraining_job_a_point(home: Path, study: str, variant: str) -> None:
    given = [f"variant={variant}", f"sweep={study}", f"cells={home / 'cells'}", "tasks=light", "output=o"]
    config = load("scaling_sweep", given, SweepConfig)
    organs = [f"organ{number}" for number in range(10)]
    made = [point_config(config, point, organs=organs) for point in config.sweep.points]
    assert study.startswith(config.sweep.name)  # ssl_tiny is the study ssl
    assert len({repr(each) for each in made}) == len(made) >= 3


def test_later_words_win_the_study_then_the_sweep_then_the_point(home: Path) -> None:
    config = config_of(home, "sweep=slides", "sweep.points=[2,3]", "pretrain.select.n_cells=40")
    made = point_config(config, config.sweep.points[1], organs=[])
    assert (made.select.n_slides, made.select.n_cells) == (3, 40)


def test_the_pretraining_job_takes_a_choice_and_values_inside_it_in_any_order(home: Path) -> None:
    inside = ["pretrain.ssl.prototypes=64", "pretrain.ssl.teacher_temperature=[0.1,0.2]"]
    for more in (["pretrain.ssl=dinov2_tiny", *inside], [*inside, "pretrain.ssl=dinov2_tiny"]):
        given = [f"cells={home / 'cells'}", "tasks=light", "output=o", "pretrain.probe=null", *more]
        config = load("scaling_sweep", given, SweepConfig)
        made = point_config(config, config.sweep.points[0], organs=[])
        assert isinstance(made.ssl, DINOv2Config)
        assert (made.ssl.prototypes, made.ssl.teacher_temperature) == (64, (0.1, 0.2))
        assert made.ssl.centering == "sinkhorn"  # of the choice
        assert made.probe is None


def test_plain_values_are_points_of_the_axis_and_large_numbers_have_short_names(home: Path) -> None:
    config = config_of(home, "sweep=size", "sweep.points=100,5000,2000000")
    assert [(point.name, point.value) for point in config.sweep.points] == [
        ("100", "100"),
        ("5k", "5000"),
        ("2M", "2000000"),
    ]


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["sweep=size", "sweep.points=[50,500]"], ["point 500: pretrain.select.n_cells: got 500", "hold 120"]),
        (["sweep=slides", "sweep.points=[2,9]", "pretrain.select.n_cells=40"], ["point 9", "n_slides: got 9", "has 6"]),
        (["sweep=slides", "sweep.points=[1,3]", "pretrain.select.n_cells=40"], ["point 1", "1 slides hold 20"]),
        (["sweep.points=[{name: x, n_organs: 4}]"], ["select.organs: got 4 organs", "has 3"]),
        (["sweep.points=[a0,a7]"], ["point a7: pretrain.views: got 'a7'", "a1_gray"]),
        (["sweep.points=[a0,{name: b, overrides: [views]}]"], ["point b", "'views': expected key=value"]),
        (["pretrain.epochs=many"], ["pretrain.epochs: got 'many'", "number"]),
        (["pretrain.epcohs=2"], ["pretrain.epcohs: unknown key", "epochs"]),
        (["pretrain.select.organs=[liver]"], ["select.organs: got 'liver'", "breast"]),
        (["pretrain.device=cuda"], ["device: got 'cuda'"]),
        (["pretrain.probe.cells=c", "pretrain.probe.labels=nowhere.csv"], ["probe.labels: nowhere.csv not found"]),
        (["launcher=ray", "asha=true"], ["asha=true needs labelled cells"]),
        (
            ["launcher=ray", "pretrain.workers.count=900", "pretrain.batch=1800"],
            ["pretrain.workers.count: got 900, of 1 CPUs each; "],
        ),
        (["tasks=[light,dark]"], ["tasks: unknown 'dark'"]),
        (["cells=/nowhere"], ["cells: /nowhere holds no cells"]),
        (["output=gs://bucket/x"], ["output: ", "expected a local path or s3://bucket/prefix"]),
        (
            ["sweep.points=[{name: x, overrides: {views: {stain: {kind: gmm, statistics: no.json}}}}]"],
            ["views.stain.statistics: no.json not found"],
        ),
    ],
)
def test_a_fault_of_the_grid_is_one_line_before_anything_starts(home: Path, more: list[str], parts: list[str]) -> None:
    (line,) = faults(home, *more)
    assert all(part in line for part in parts), line
    assert not (home / "out" / "trials").exists()


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("sweep.points=[a0,a0]", "'a0' twice"),
        ("sweep.points=[]", "at least 1"),
        ("pretrain.seed=1", "seeds=..."),
        ("pretrain.output=x", "output=..."),
        ("max_concurrent=2", "launcher=ray"),
        ("sweep=nothing", "augmentation, organs"),
    ],
)
def test_a_mistake_in_the_sweeps_own_settings_is_one_line(home: Path, word: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(home, word)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_fault_of_every_point_is_told_at_once(home: Path) -> None:
    told = faults(home, "sweep=size", "sweep.points=[500,900]", "pretrain.device=cuda")
    assert len(told) == 3
    assert sum("point" in line for line in told) == 2


def test_selections_are_nested_and_copy_nothing(home: Path) -> None:
    config = config_of(home, "sweep=size", "sweep.points=[10,40,100]")
    cells = Store(home / "cells")
    chosen = []
    for entry in grid.build_grid(config).entries:
        selection = select_cells(cells, **entry.trial.pretrain.select.model_dump())
        assert selection.n_cells == int(entry.point.value)
        chosen.append({part.slide_id: part.n_rows for part in selection.parts})
        assert entry.trial.pretrain.cells == str(home / "cells")
    for small, large in itertools.pairwise(chosen):
        assert all(large[slide] >= rows for slide, rows in small.items())


def test_organs_are_nested_in_the_order_of_their_hash_and_the_number_of_cells_is_fixed(home: Path) -> None:
    points = ",".join(f"{{name: o{n}, n_organs: {n}, overrides: {{select: {{n_slides: 2}}}}}}" for n in (1, 2, 3))
    config = config_of(home, "sweep=organs", f"sweep.points=[{points}]", "pretrain.select.n_cells=30")
    order = nested_organs(Store(home / "cells"))
    assert sorted(order) == list(ORGANS)
    for number, entry in enumerate(grid.build_grid(config).entries, 1):
        select = entry.trial.pretrain.select
        assert select.organs == order[:number]
        selection = select_cells(Store(home / "cells"), **select.model_dump())
        assert (selection.n_cells, len(selection.parts)) == (30, 2)


def test_seeds_change_training_and_nothing_else(home: Path) -> None:
    entries = grid.build_grid(config_of(home, "seeds=[0,7]")).entries
    assert [(entry.point.name, entry.seed) for entry in entries] == [("a0", 0), ("a1", 0), ("a0", 7), ("a1", 7)]
    first, _, same, _ = (entry.trial for entry in entries)
    assert same.pretrain.seed == 7
    assert (first.pretrain.select, first.probe) == (same.pretrain.select, same.probe)


@pytest.mark.slow
def test_missing_stain_statistics_are_fitted_beside_the_cells(tmp_path: Path) -> None:
    write_cells(tmp_path / "cells")
    (entry,) = grid.build_grid(config_of(tmp_path, "sweep.points=a1_gmm1")).entries
    statistics = entry.trial.pretrain.views.stain.statistics
    assert statistics is not None
    assert Path(statistics).is_file()
    assert Path(statistics).parent == tmp_path / "cells"


@pytest.mark.slow
@pytest.mark.slow
def test_stain_statistics_of_cells_that_the_table_had_before_are_fitted_again(tmp_path: Path) -> None:
    write_cells(tmp_path / "cells")
    config = config_of(tmp_path, "sweep.points=a1_gmm1")
    grid.build_grid(config)
    (path,) = (tmp_path / "cells").glob("stain_*.json")
    first = path.read_bytes()
    grid.build_grid(config)
    assert path.read_bytes() == first
    write_slide(Store(tmp_path / "cells"), "another", synthetic_crops(40, seed=9), organ=ORGANS[0])
    grid.build_grid(config)
    assert path.read_bytes() != first


def test_other_cells_or_other_labelled_nuclei_are_another_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cells(tmp_path / "cells")
    config = config_of(tmp_path)

    def names() -> set[str]:
        return {entry.trial.fingerprint for entry in grid.build_grid(config).entries}

    first = names()
    assert names() == first
    shutil.copytree(tmp_path / "cells", tmp_path / "moved")
    moved = config.model_copy(update={"cells": str(tmp_path / "moved")})
    assert {entry.trial.fingerprint for entry in grid.build_grid(moved).entries} == first
    task = light_task()
    changed = replace(task, images=task.images ^ 1)
    with monkeypatch.context() as patch:
        patch.setattr(grid, "open_task", lambda name, data, *, seed=0: changed)
        assert not names() & first
    (slide_id, *_) = [row["slide_id"] for row in read_ledger(Store(tmp_path / "cells")).to_pylist()]
    write_slide(Store(tmp_path / "cells"), slide_id, synthetic_crops(40, seed=9), organ=ORGANS[0])
    assert not names() & first


@pytest.mark.slow
def is_leak_free(row: dict, point: str) -> bool:
    return row["protocol"] == "leak-free" and row["point"] == point


def test_a_sweep_gives_a_whole_table_and_nested_runs_and_a_rerun_does_nothing(
    tmp_path: Path, circumstances: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    write_cells(tmp_path / "cells")
    config = config_of(tmp_path, "seeds=[0,1]")
    assert sweep.main(config) == EXIT_OK
    told = capsys.readouterr().out
    assert "| a0 | 2 |" in told
    rows = pq.read_table(tmp_path / "out" / table.PARQUET, schema=table.SweepRow.schema).to_pylist()
    main = [row for row in rows if row["metric"] == "balanced_accuracy"]
    assert {(row["point"], row["seed"], row["protocol"]) for row in main} == {
        (point, seed, protocol) for point in ("a0", "a1") for seed in (0, 1) for protocol in ("paper", "leak-free")
    }
    assert all(row["status"] == "done" and np.isfinite(row["mean"]) and row["n_cells"] == 120 for row in rows)
    assert len({row["model_fingerprint"] for row in rows}) == 4
    assert len((tmp_path / "out" / table.CSV).read_text().splitlines()) == len(rows) + 1
    client = mlflow.MlflowClient(circumstances)
    parent = Store(tmp_path / "out").read_json(RUN)["run_id"]
    assert client.get_run(parent).info.status == "FINISHED"
    summary = client.get_run(parent).data
    best = max(("a0", "a1"), key=lambda point: np.mean([row["mean"] for row in main if is_leak_free(row, point)]))
    name = "best/light/balanced_accuracy"
    assert summary.tags[name] == best
    assert summary.metrics[name] == pytest.approx(np.mean([row["mean"] for row in main if is_leak_free(row, best)]))
    assert summary.metrics[f"{name}_low"] <= summary.metrics[name] <= summary.metrics[f"{name}_high"]
    assert f"light, leak-free: {best} has the highest balanced_accuracy" in summary.tags["mlflow.note.content"]
    attached = {file.path for file in client.list_artifacts(parent)}
    assert attached == {"summary.md", table.PARQUET, table.CSV}
    for row in main:
        child = client.get_run(row["run_id"])
        assert child.data.tags["mlflow.parentRunId"] == parent
        assert child.data.params["sweep.point"] == row["point"]
        assert int(child.data.params["seed"]) == row["seed"]
        name = "probe/light/balanced_accuracy" if row["protocol"] == "leak-free" else ""
        assert not name or child.data.metrics[name] == pytest.approx(row["mean"])
        assert len(client.get_metric_history(row["run_id"], "loss")) == 4
    monkeypatch.setattr(trials, "run", lambda *_, **__: pytest.fail("a finished trial was run again"))
    assert sweep.main(config) == EXIT_OK
    assert pq.read_table(tmp_path / "out" / table.PARQUET).to_pylist() == rows


@pytest.mark.slow
def test_a_trial_that_fails_is_a_row_with_its_reason_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cells(tmp_path / "cells")
    points = "sweep.points=[{name: wild, overrides: {ssl.base_lr: 1e30}},{name: calm}]"
    config = config_of(tmp_path, points, "pretrain.epochs=4", "pretrain.checkpoint_every=100")
    assert sweep.main(config) == EXIT_FAILURES
    rows = pq.read_table(tmp_path / "out" / table.PARQUET).to_pylist()
    (failed,) = [row for row in rows if row["point"] == "wild"]
    assert failed["status"] == "failed"
    assert "TrainingStoppedError" in failed["error"]
    assert failed["task"] is None
    assert failed["run_id"]
    assert all(row["status"] == "done" for row in rows if row["point"] == "calm")
    assert "augmentation-wild-s0: failed: TrainingStoppedError" in capsys.readouterr().out
    mended = config_of(tmp_path, "sweep.points=[{name: calm}]", "pretrain.epochs=4")
    assert sweep.main(mended) == EXIT_OK  # with the same output


@pytest.mark.ray
def test_what_ends_ray_tune_is_the_reason_of_the_trials_that_are_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray import tune

    def fit(_: tune.Tuner) -> None:
        raise EOFError("Ran out of input")  # as Tune does where its own file was cut short by a full disk

    monkeypatch.setattr(tune.Tuner, "fit", fit)
    write_cells(tmp_path / "cells")
    assert sweep.main(config_of(tmp_path, "launcher=ray")) == EXIT_FAILURES
    told = capsys.readouterr().out
    for point in ("a0", "a1"):
        assert f"augmentation-{point}-s0: failed: Ray Tune ended: EOFError: Ran out of input; the same command" in told


@pytest.mark.slow
def test_an_output_of_another_sweep_or_of_other_settings_is_refused(tmp_path: Path) -> None:
    write_cells(tmp_path / "cells")
    assert sweep.main(config_of(tmp_path, "sweep.points=a0")) == EXIT_OK
    (line,) = faults(tmp_path, "sweep.points=a0", "pretrain.epochs=3")
    assert "epochs" in line
    assert "begun" in line
    (line,) = faults(tmp_path, "sweep=size", "sweep.points=20")
    assert "holds the sweep 'augmentation'" in line
