from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch

from lemon.encoders.config import VIT_TINY8
from lemon.encoders.export import CellInput, export_encoder
from lemon.encoders.open import load_encoder
from lemon.encoders.vit import build_vit
from lemon.errors import ConfigError
from lemon.runtime import tracking
from lemon.runtime.store import Store
from lemon.runtime.tracking import (
    RUN,
    Run,
    close_killed,
    find_runs,
    flatten,
    metric_history,
    run_id_of,
    run_of,
    start_run,
    tracking_uri,
)
from tests.cells_table import synthetic_crops

pytestmark = pytest.mark.usefixtures("console")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def begin(experiment: str, name: str, **facts: Any) -> Run:
    """The run of an output of that name, here."""
    return start_run(experiment, name, store=Store(name), **{"params": {}, **facts})


@contextmanager
def killed_after(last: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The block ends as by a kill, right after its first call of that method of MLflow's client."""
    from mlflow import MlflowClient

    call = getattr(MlflowClient, last)

    def call_and_end(*words: Any, **facts: Any) -> None:
        call(*words, **facts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, last, call_and_end)
        yield


def test_the_default_store_is_a_database_by_its_absolute_path(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri() == f"sqlite:///{here}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri() == "http://127.0.0.1:5000"


def test_nested_settings_become_flat_parameters() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


@pytest.mark.slow
def test_a_database_on_one_node_of_a_cluster_is_warned_of_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking._warn_of_other_nodes.cache_clear()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for name in ("one", "two"):
        begin("pretrain", name)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tracking:")]
    assert len(told) == 1
    assert "MLFLOW_TRACKING_URI is not set" in told[0]


@pytest.mark.slow
def test_a_run_keeps_parameters_metrics_parent_and_goes_on_after_an_interruption(here: Path) -> None:
    import mlflow

    parent = begin("pretrain", "sweep")
    run = begin("pretrain", "one", params={"ssl": {"name": "mocov3"}, "text": "x" * 9000}, parent=parent)
    run.log({"loss": 2.0}, step=10)
    again = begin("pretrain", "one", params={"ssl": {"name": "dinov2"}}, parent=parent)
    again.log({"loss": 1.0}, step=20)
    again.log_file("below/f.txt", b"hello")
    again.close()
    assert again.run_id == run.run_id
    assert metric_history(run, "loss") == [(10, 2.0), (20, 1.0)]
    client = mlflow.MlflowClient(tracking_uri())
    assert Path(client.download_artifacts(run.run_id, "below/f.txt")).read_bytes() == b"hello"
    stored = client.get_run(run.run_id)
    assert stored.data.params["ssl.name"] == "mocov3"
    assert stored.data.tags["mlflow.parentRunId"] == parent.run_id
    assert stored.info.status == "FINISHED"


@pytest.mark.slow
def test_a_child_is_made_where_its_parent_is_and_tells_its_data_and_whether_it_ended(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    parent = begin("scaling_sweep", "sweep")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here / 'other.db'}")
    child = begin("scaling_sweep", "one", parent=parent)
    assert child.uri == parent.uri
    for _ in range(2):  # a rerun says it again
        child.log_dataset("cells", digest="abc", source="s3://bucket/cells", context="training")
    client = mlflow.MlflowClient(parent.uri)
    assert client.get_run(child.run_id).info.status == "RUNNING"
    close_killed(Store("one"), uri=parent.uri)
    assert client.get_run(child.run_id).info.status == "KILLED"
    parent.close()
    close_killed(Store("sweep"), uri=parent.uri)
    assert client.get_run(parent.run_id).info.status == "FINISHED", "it was not killed"
    (given,) = client.get_run(child.run_id).inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest, given.dataset.source_type) == ("cells", "abc", "s3")
    assert given.tags[0].value == "training"


@pytest.mark.slow
@pytest.mark.parametrize("last", ["search_runs", "create_run", "log_batch"])
def test_a_process_that_is_killed_while_it_begins_a_run_leaves_no_second_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:

    begin("pretrain", "another")
    begun = {"experiment": "pretrain", "key": "k"}
    if last == "search_runs":  # killed after the mark was written
        Store("one").write_json(RUN, begun)
    with killed_after(last, monkeypatch):
        begin("pretrain", "one", params={f"p{i}": i for i in range(150)})
    assert run_id_of(Store("one")) is None
    found = run_of(Store("one"), uri=tracking_uri())
    assert (found is None) == (last == "search_runs")
    run = begin("pretrain", "one", params={f"p{i}": i for i in range(150)})
    assert found in (None, run)
    assert run_id_of(Store("one")) == run.run_id
    (stored,) = [record for record in find_runs("pretrain") if record.run != run_of(Store("another"), uri=run.uri)]
    assert stored.run == run
    assert stored.params == {f"p{i}": str(i) for i in range(150)}


@pytest.mark.slow
def test_a_run_is_made_anew_where_it_was_deleted_or_mlflow_is_another(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin("pretrain", "one")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here / 'other.db'}")
    assert run_of(Store("one"), uri=tracking_uri()) is None
    second = begin("pretrain", "one")
    assert second.uri != first.uri
    assert begin("pretrain", "one") == second
    second._client().delete_run(second.run_id)
    third = begin("pretrain", "one")
    assert third != second
    assert [record.run for record in find_runs("pretrain")] == [third]


WRITERS, STEPS = 4, 50

ONE_WRITER = """
import sys
from lemon.runtime.store import Store
from lemon.runtime.tracking import Run, start_run
uri, parent, number, steps = *sys.argv[1:4], int(sys.argv[4])
params = {f"p{i}": i for i in range(150)}
run = start_run("sweep", f"trial-{number}", store=Store(number), params=params, parent=Run(uri, parent))
for step in range(steps):
    run.log({"loss": step + int(number), "lr": 0.1}, step=step)
run.log_dataset("cells", digest="abc", source="/cells", context="training")
run.set_tag("encoder", number)
run.close()
"""


@pytest.mark.slow
def test_processes_that_log_to_one_database_at_once_lose_nothing(here: Path) -> None:
    """As trials of a sweep do: each makes a run of its own and logs without a pause."""
    import mlflow

    parent = begin("sweep", "parent")
    words = [sys.executable, "-c", ONE_WRITER, parent.uri, parent.run_id]
    jobs = [
        subprocess.Popen([*words, str(number), str(STEPS)], stderr=subprocess.PIPE, text=True)
        for number in range(WRITERS)
    ]
    told = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * WRITERS, told
    client = mlflow.MlflowClient(parent.uri)
    children = client.search_runs(
        [client.get_run(parent.run_id).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    )
    assert sorted(child.info.run_name for child in children) == [f"trial-{number}" for number in range(WRITERS)]
    for child in children:
        number = int(child.data.tags["encoder"])
        run = Run(parent.uri, child.info.run_id)
        assert metric_history(run, "loss") == [(step, step + number) for step in range(STEPS)]
        assert len(metric_history(run, "lr")) == STEPS
        assert len(child.data.params) == 150
        assert len(child.inputs.dataset_inputs) == 1
        assert child.info.status == "FINISHED"


def exported(folder: Path) -> Path:
    torch.manual_seed(0)
    export_encoder(build_vit(VIT_TINY8), folder, cell_input=CellInput(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)))
    return folder


@pytest.mark.slow
def test_a_registered_encoder_gives_the_same_vectors_and_refuses_images_of_another_shape_or_type(here: Path) -> None:
    import mlflow.pyfunc
    from mlflow.exceptions import MlflowException

    run = begin("pretrain", "one")
    folder = exported(here / "encoder")
    assert run.register("nuclei", folder, width=192, tags={"ssl": "none"}) == 1
    assert run.register("nuclei", folder, width=192, tags={}) == 1, "a run has one version"
    assert begin("pretrain", "two").register("nuclei", folder, width=192, tags={}) == 2
    (found, _) = sorted(run._client().search_model_versions("name='nuclei'"), key=lambda each: int(each.version))
    assert (found.run_id, found.tags) == (run.run_id, {"ssl": "none"})
    mlflow.set_tracking_uri(run.uri)
    folder.rename(here / "gone")  # the registry has a copy of its own
    model = mlflow.pyfunc.load_model("models:/nuclei/1")
    images = synthetic_crops(5)
    vectors = model.predict(images)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, load_encoder(here / "gone").embed(images).numpy())
    for wrong in (images[:, :40], images.astype(np.float32), images[0]):
        with pytest.raises(MlflowException, match="enforce schema"):
            model.predict(wrong)
    kept = Path(mlflow.artifacts.download_artifacts("models:/nuclei/1"))
    assert here in kept.parents, "beside the database"
    assert not [path for path in kept.rglob("*") if path.suffix in (".pkl", ".pt", ".pth")]


@pytest.mark.slow
@pytest.mark.parametrize("last", ["create_logged_model", "log_model_artifacts", "log_outputs", "create_model_version"])
def test_a_process_that_is_killed_while_it_registers_an_encoder_leaves_no_second_model(
    here: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    import mlflow.pyfunc

    run, folder = begin("pretrain", "one"), exported(here / "encoder")

    with killed_after(last, monkeypatch):
        run.register("nuclei", folder, width=192, tags={})
    assert run.register("nuclei", folder, width=192, tags={}) == 1
    client = run._client()
    (version,) = client.search_model_versions("name='nuclei'")
    (model,) = client.search_logged_models([client.get_run(run.run_id).info.experiment_id])
    (output,) = client.get_run(run.run_id).outputs.model_outputs
    assert output.model_id == model.model_id
    assert version.source == model.artifact_location
    assert model.status == "READY"
    mlflow.set_tracking_uri(run.uri)
    assert mlflow.pyfunc.load_model("models:/nuclei/1").predict(synthetic_crops(2)).shape == (2, 192)


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_costs_what_it_is_told_and_a_warning_and_not_the_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = Run("http://127.0.0.1:9", "abc")  # the port that discards: nothing listens
    with caplog.at_level(logging.WARNING, "lemon.runtime.tracking"):
        assert run.register("nuclei", exported(here / "encoder"), width=192, tags={}) is None
        run.log({"loss": 1.0}, step=3)
        run.set_tag("a", "b")
        run.close()
        Store("out").write_json(RUN, {"run_id": "abc"})
        close_killed(Store("out"), uri=run.uri)
    told = [record.getMessage() for record in caplog.records if record.name == "lemon.runtime.tracking"]
    assert len(told) == 5
    assert all("\n" not in line for line in told)
    assert told[0].startswith("the encoder is not registered as nuclei: ")
    assert "metrics of step 3" in told[1]


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("http://me:secret@127.0.0.1:9", r"http://\*\*\*@127\.0\.0\.1:9: it does not answer: .*Connection refused$"),
        ("sqlite:///{here}", "is a folder; expected a file or none$"),
        ("sqlite:///{here}/text.db/runs/mlflow.db", r"text\.db is no folder that can be written$"),
        ("sqlite:///{here}/text.db", "cannot be used: .*not a database$"),
        ("nonsense://x", "cannot be used: .*nonsense"),
    ],
)
def test_a_run_cannot_begin_where_mlflow_cannot_be_used_and_one_line_says_why(
    here: Path, monkeypatch: pytest.MonkeyPatch, uri: str, why: str
) -> None:
    monkeypatch.setattr(tracking, "_PAUSE_S", 0.0)
    (here / "text.db").write_text("no database" * 1000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(here=here))
    with pytest.raises(ConfigError, match=f"^MLFLOW_TRACKING_URI: .*{why}") as error:
        begin("pretrain", "one")
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_a_server_that_is_about_to_start_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = [OSError("refused"), OSError("refused"), None, OSError("refused")]

    def reach(uri: str) -> None:
        if (error := refused.pop(0)) is not None:
            raise error

    monkeypatch.setattr(tracking, "reach", reach)
    monkeypatch.setattr(tracking, "_PAUSE_S", 0.0)
    tracking._require("http://127.0.0.1:9")
    assert len(refused) == 1
    with pytest.raises(ConfigError, match="refused"):
        tracking._require("sqlite:///mlflow.db")


def test_a_server_that_wants_a_login_is_left_to_mlflow(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = requests.Response()
    answer.status_code = 401
    monkeypatch.setattr(requests, "get", lambda *_, **__: answer)
    with pytest.raises(requests.HTTPError):
        tracking.reach("http://127.0.0.1:9")
    tracking._require("http://127.0.0.1:9")


def test_where_there_is_no_database_no_runs_are_found_and_none_is_made(here: Path) -> None:
    assert find_runs("probe") == []
    assert not (here / "mlflow.db").exists()


@pytest.mark.slow
def test_runs_are_found_by_their_experiment_with_what_was_noted_of_them(here: Path) -> None:
    made = [begin("probe", name, params={"model": name}, tags={"output": f"/{name}"}) for name in ("a", "b")]
    made[1].log({"score": 0.5}, step=0)
    begin("pretrain", "c")
    found = find_runs("probe")
    assert [each.run for each in found] == made
    assert [each.params["model"] for each in found] == ["a", "b"]
    assert [each.tags["output"] for each in found] == ["/a", "/b"]
    assert found[1].metrics == {"score": 0.5}
    assert find_runs("scaling_sweep") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("mysql+nothing://me:hunter2@host/db", "cannot be used"),
        ("sqlite+aiosqlite:///x.db", "needs the package aiosqlite"),
        ("nothing://me:hunter2@host", "cannot be used"),
        ("postgresql://me:hunter2@host:port/db", "no address"),
        ("http://me:hunter2@[bad/", "no address"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line_without_its_password(
    uri: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for use in (lambda: find_runs("probe"), lambda: start_run("probe", "a", store=Store(tmp_path), params={})):
        with pytest.raises(ConfigError, match=part) as caught:
            use()
        assert "hunter2" not in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_blanks_are_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "  ")
    assert tracking_uri() == f"sqlite:///{tmp_path / 'mlflow.db'}"
