"""The probing job: encoders x tasks, resumed, with what is missing told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lemon.encoders.config import EncoderConfig
from lemon.encoders.export import CellInput, export_encoder
from lemon.encoders.vit import build_vit, seeded
from lemon.errors import ConfigError
from lemon.probe import figures, tables
from lemon.probe import job as probing
from lemon.probe.config import ProbeConfig
from lemon.runtime.store import Store
from tests.cells_table import synthetic_crops, write_slide
from tests.probe.made_up import made_up, task_of

pytestmark = pytest.mark.usefixtures("console")

SMALL = EncoderConfig(name="small", dim=32, depth=1, heads=2)


@pytest.fixture(autouse=True)
def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def encoders(tmp_path: Path) -> list[str]:
    """Two exported encoders of random weights."""
    for seed in (0, 1):
        with seeded(1 + seed):  # 0 is the untrained encoder that stands beside them
            vit = build_vit(SMALL)
        export_encoder(vit, tmp_path / f"enc{seed}", cell_input=CellInput(mean=(0.5,) * 3, std=(0.2,) * 3))
    return [str(tmp_path / f"enc{seed}") for seed in (0, 1)]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task, in place of the catalogue: bright and dark nuclei on six slides."""
    images = synthetic_crops(120).copy()
    bright = np.random.default_rng(0).random(120) < 0.5
    images[bright] = images[bright] // 2 + 127
    slide = np.array([f"s{i}" for i in np.random.default_rng(1).integers(0, 6, 120)])
    task = task_of(images, np.where(bright, "bright", "dark"), slide, name="light")

    def open_task(name: str, data: Path, *, seed: int = 0):
        if name != "light":
            raise probing.TaskError(f"unknown task {name}")
        return task

    monkeypatch.setattr(probing, "open_task", open_task)


def config(tmp_path: Path, models: list[str], **more) -> ProbeConfig:
    known = {"tasks": ["light"], "output": str(tmp_path / "out"), "bootstrap": 100, "untrained": False}
    return ProbeConfig(models=models, **known | more)


@pytest.mark.slow
def test_two_encoders_give_scores_predictions_and_a_table(tmp_path, encoders, tasks):
    assert probing.main(config(tmp_path, encoders)) == 0
    rows = tables.read_scores(Store(tmp_path / "out"))
    assert {row.model for row in rows} == {"enc0", "enc1"}
    text = tables.write_table1(Store(tmp_path / "out"))
    header, _, first, second = text.splitlines()[:4]
    assert "light, leak-free" in header
    assert "light, paper" in header
    assert first.startswith("| enc0 |")
    assert second.startswith("| enc1 |")
    differences = (tmp_path / "out" / "differences.csv").read_text().splitlines()
    assert differences[0] == "task,protocol,encoder,against,difference,low,high"
    assert len(differences) == 3


@pytest.mark.slow
def test_an_untrained_encoder_of_the_same_shape_is_scored_once_beside_two(tmp_path, encoders, tasks):
    assert probing.main(config(tmp_path, encoders, untrained=True, protocols=["leak-free"], probes=["linear"])) == 0
    store = Store(tmp_path / "out")
    rows = tables.read_scores(store)
    assert {row.model for row in rows} == {"enc0", "enc1", "untrained_vit_32x1"}
    assert tables.untrained_twins(store, rows) == {"enc0": "untrained_vit_32x1", "enc1": "untrained_vit_32x1"}
    pairs = {(each.encoder, each.against) for each in tables.paired_differences(store, rows)}
    assert pairs == {("enc0", "enc1"), ("enc0", "untrained_vit_32x1"), ("enc1", "untrained_vit_32x1")}


@pytest.mark.slow
def test_a_rerun_does_what_is_missing_and_nothing_else(tmp_path, encoders, tasks, monkeypatch):
    probing.main(config(tmp_path, encoders[:1]))
    seen: list[str] = []
    score = probing.score_task
    monkeypatch.setattr(probing, "score_task", lambda task, *rest: seen.append(task.name) or score(task, *rest))
    probing.main(config(tmp_path, encoders))
    assert len(seen) == 1
    probing.main(config(tmp_path, encoders))
    assert len(seen) == 1
    probing.main(config(tmp_path, encoders[:1], seed=4))  # another seed is another score, of the same embeddings
    assert len(seen) == 2


@pytest.mark.slow
def test_scores_are_in_mlflow_under_their_task_in_one_run_an_encoder(tmp_path, encoders, tasks, tracking):
    import mlflow

    for _ in range(2):
        probing.main(config(tmp_path, encoders))
    found = mlflow.MlflowClient(tracking).search_runs(
        [mlflow.MlflowClient(tracking).get_experiment_by_name("probe").experiment_id]
    )
    assert {each.info.run_name for each in found} == {"enc0", "enc1"}
    assert len(found) == 2
    for each in found:
        assert {"probe/light/balanced_accuracy", "probe/light/paper/balanced_accuracy"} <= each.data.metrics.keys()
        assert each.info.status == "FINISHED"
        attached = {file.path for file in mlflow.MlflowClient(tracking).list_artifacts(each.info.run_id)}
        assert attached == set(probing.ATTACHED)


@pytest.mark.slow
def test_what_cannot_be_had_is_one_line_each_and_the_run_goes_on(tmp_path, encoders, tasks, capsys):
    code = probing.main(config(tmp_path, ["no-such-model", *encoders[:1]], tasks=["light", "nowhere"]))
    told = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert code == 3
    assert len(told) == 2
    assert "nowhere" in told[0]
    assert "no-such-model" in told[1]
    assert len(Store(tmp_path / "out").list("scores")) == 1


def test_no_task_at_all_is_a_wrong_argument(tmp_path, encoders, tasks):
    with pytest.raises(ConfigError, match="tasks: none"):
        probing.main(config(tmp_path, encoders, tasks=["nowhere"]))


def test_a_folder_without_scores_has_no_table(tmp_path):
    with pytest.raises(ConfigError, match="no scores"):
        tables.write_table1(Store(tmp_path))


def test_the_data_fingerprint_follows_crops_and_labels():
    task, _ = made_up(20)
    images = task.images.copy()
    images[3, 0, 0, 0] ^= 1
    same = probing.data_fingerprint(task)
    assert probing.data_fingerprint(made_up(20)[0]) == same
    assert probing.data_fingerprint(task_of(images, task.target, task.groups["slide"])) != same
    assert probing.data_fingerprint(task_of(task.images, task.target[::-1], task.groups["slide"])) != same
    assert probing.data_fingerprint(task_of(task.images, task.target, task.groups["slide"][::-1])) != same


@pytest.mark.slow
def test_figure_2_has_a_point_for_each_encoder(tmp_path, encoders, tasks):
    probing.main(config(tmp_path, encoders))
    names = figures.draw_cost(Store(tmp_path / "out"))
    assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in names)
    points = figures.cost_points(Store(tmp_path / "out"))
    assert {point.encoder for point in points} == {"enc0", "enc1"}
    assert all(0 < point.gflop < 0.01 for point in points)


@pytest.mark.slow
def test_two_encoders_of_one_name_are_two_rows(tmp_path, encoders, tasks):
    """As a run that was trained again, or the folders ``encoder`` of two runs."""
    again = tmp_path / "again" / "enc0"
    again.parent.mkdir()
    Path(encoders[1]).rename(again)
    assert probing.main(config(tmp_path, [encoders[0], str(again)])) == 0
    rows = tables.table1_records(tables.read_scores(Store(tmp_path / "out")))
    names = {row["encoder"] for row in rows}
    assert len(names) == 2
    assert all(name.startswith("enc0 (") for name in names)
    tables.write_table1(Store(tmp_path / "out"))
    assert all(name in (tmp_path / "out" / "differences.csv").read_text() for name in names)
    assert len(figures.cost_points(Store(tmp_path / "out"))) == 2


def test_the_papers_protocol_alone_has_a_table_and_no_figure(tmp_path, encoders, tasks):
    probing.main(config(tmp_path, encoders[:1], protocols=["paper"]))
    assert figures.draw_cost(Store(tmp_path / "out")) == []
    assert "light, paper" in tables.write_table1(Store(tmp_path / "out"))


def test_no_encoder_at_all_is_a_wrong_argument(tmp_path, tasks):
    with pytest.raises(ConfigError, match="models: none"):
        probing.main(config(tmp_path, ["no-such-model"]))


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("nucls-super", "nucls-super"),
        ("folder:mine", "folder_mine"),
        ("morphometry:/data/runs/my cells+", "morphometry_runs_my_cells_"),
    ],
)
def test_a_task_is_one_part_of_a_metrics_name_in_mlflow(task: str, name: str) -> None:
    assert probing.short_name(task) == name


def test_a_card_of_robustness_is_in_the_output_and_in_mlflow(tmp_path, encoders, tracking):
    import mlflow

    cells = tmp_path / "cells"
    for number in range(4):
        images = synthetic_crops(25, seed=number)
        write_slide(Store(cells), f"s{number}", images, site=("north", "south")[number % 2])
    asked = config(tmp_path, encoders, tasks=[f"site:{cells}", f"restained:{cells}"], probes=["linear"])
    assert probing.main(asked) == 0
    (card, *others) = sorted((tmp_path / "out" / "cards").glob("*/card.md"))
    assert len(others) == 1
    assert "site told, no labels" in card.read_text()
    client = mlflow.MlflowClient(tracking)
    for run in client.search_runs([client.get_experiment_by_name("probe").experiment_id]):
        of_site = {name.rpartition("/")[2] for name in run.data.metrics if name.startswith("robustness/site_")}
        assert of_site == {f"site_accuracy{end}" for end in ("", "_low", "_high", "_chance")}
        names = {artifact.path for artifact in client.list_artifacts(run.info.run_id, "robustness")}
        assert names == {"robustness/card.md", "robustness/card.json"}
