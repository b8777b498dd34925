from __future__ import annotations

from pathlib import Path

import pytest

from lemon.tracking import find_runs, flatten, metric_history, start_run, tracking_uri, without_user


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_the_default_store_is_a_database_by_its_absolute_path(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri() == f"sqlite:///{here}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri() == "http://127.0.0.1:5000"


def test_nested_settings_become_flat_parameters() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


@pytest.mark.slow
def test_a_run_keeps_parameters_metrics_parent_and_goes_on_after_an_interruption(here: Path) -> None:
    import mlflow

    parent = start_run("pretrain", "sweep", params={})
    run = start_run("pretrain", "one", params={"ssl": {"name": "mocov3"}, "text": "x" * 9000}, parent=parent)
    run.log({"loss": 2.0}, step=10)
    again = start_run("pretrain", "one", params={}, run_id=run.run_id)
    again.log({"loss": 1.0}, step=20)
    (here / "f.txt").write_text("hello")
    again.log_file(here / "f.txt")
    again.close()
    assert again.run_id == run.run_id
    assert metric_history(run, "loss") == [(10, 2.0), (20, 1.0)]
    stored = mlflow.MlflowClient(tracking_uri()).get_run(run.run_id)
    assert stored.data.params["ssl.name"] == "mocov3"
    assert stored.data.tags["mlflow.parentRunId"] == parent.run_id
    assert stored.info.status == "FINISHED"


@pytest.mark.slow
def test_a_child_is_made_where_its_parent_is_and_tells_its_data_and_whether_it_ended(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    parent = start_run("scaling_sweep", "sweep", params={})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here / 'other.db'}")
    child = start_run("scaling_sweep", "one", params={}, parent=parent)
    assert child.uri == parent.uri
    for _ in range(2):  # a rerun says it again
        child.log_dataset("cells", digest="abc", source="s3://bucket/cells", context="training")
    assert child.is_open()
    child.close("KILLED")
    assert not child.is_open()
    (given,) = mlflow.MlflowClient(parent.uri).get_run(child.run_id).inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest, given.dataset.source_type) == ("cells", "abc", "s3")
    assert given.tags[0].value == "training"


def test_where_there_is_no_database_no_runs_are_found_and_none_is_made(here: Path) -> None:
    assert find_runs("probe") == []
    assert not (here / "mlflow.db").exists()


@pytest.mark.slow
def test_runs_are_found_by_their_experiment_with_what_was_noted_of_them(here: Path) -> None:
    made = [start_run("probe", name, params={"model": name}, tags={"output": f"/{name}"}) for name in ("a", "b")]
    made[1].log({"score": 0.5}, step=0)
    start_run("pretrain", "c", params={})
    found = find_runs("probe")
    assert [each.run for each in found] == made
    assert [each.params["model"] for each in found] == ["a", "b"]
    assert [each.tags["output"] for each in found] == ["/a", "/b"]
    assert found[1].metrics == {"score": 0.5}
    assert find_runs("scaling_sweep") == []


def test_a_password_is_not_told() -> None:
    uri = "https://me:secret@host:5000"
    assert without_user(f"{uri}/api failed", uri=uri) == "https://host:5000/api failed"
    assert without_user("sqlite:///a/b.db", uri="sqlite:///a/b.db") == "sqlite:///a/b.db"
