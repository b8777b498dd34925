"""Runs in MLflow. The only importer of mlflow."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lemon.config import ConfigError

DATABASE = "mlflow.db"
_MAX_PARAM = 6000  # characters that MLflow keeps of a parameter
_PARAMS_A_CALL = 100
_TRIES = 5  # to write to a SQLite database that other runs hold; each waits for some seconds by itself


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite database in the working directory, by its absolute path."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DATABASE).absolute()}"


@dataclass(frozen=True)
class Run:
    """A run that is going on. Holds names only, so it can be sent to a worker, which then logs to the same run."""

    uri: str
    run_id: str

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log metrics of a step. A server that cannot be reached costs the metrics, not the run."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now = int(time.time() * 1000)
        values = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        for left in reversed(range(_TRIES)):
            try:
                return self._client().log_batch(self.run_id, metrics=values)
            except MlflowException as error:
                told = str(error).splitlines()[0]
                if not left or "database is locked" not in told:
                    break
        logging.getLogger(__name__).warning("metrics of step %d are lost: %s", step, told)

    def log_file(self, path: str | Path, folder: str = "") -> None:
        """Attach a file."""
        self._client().log_artifact(self.run_id, str(path), folder or None)

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self._client().set_tag(self.run_id, key, value)

    def log_dataset(self, name: str, *, digest: str, source: str, context: str) -> None:
        """Note which data the run used: shown as the run's datasets, and found by their digest.

        Args:
            name: of the data.
            digest: fingerprint of its content.
            source: the folder or prefix where it lies.
            context: what it was used for (training, probe).
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kind = "s3" if source.startswith("s3://") else "local"
        dataset = Dataset(name=name, digest=digest, source_type=kind, source=json.dumps({"uri": source}))
        tags = [InputTag("mlflow.data.context", context)]
        self._client().log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def is_open(self) -> bool:
        """Whether the run has not ended, as after its process was killed; a run that is gone is not open."""
        client = self._client()
        return _exists(client, self.run_id) and client.get_run(self.run_id).info.status == "RUNNING"

    def close(self, status: str = "FINISHED") -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        self._client().set_terminated(self.run_id, status)

    def _client(self) -> Any:
        import mlflow

        return mlflow.MlflowClient(self.uri)


@dataclass(frozen=True)
class Record:
    """What MLflow holds of a run: its tags and parameters as text, of each metric the last value."""

    run: Run
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]


def find_runs(experiment: str) -> list[Record]:
    """All runs of an experiment, the oldest first; none where the experiment or the database is absent.

    Raises ConfigError where MLflow cannot be read.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError  # MLflow lets those of its database through

    uri = tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return []  # the client would make an empty one
    found: list[Any] = []
    page: Any = None
    try:
        client = mlflow.MlflowClient(uri)
        if (known := client.get_experiment_by_name(experiment)) is None:
            return []
        while page is None or page.token:
            token = page and page.token
            page = client.search_runs([known.experiment_id], order_by=["attributes.start_time"], page_token=token)
            found += page
    except (MlflowException, SQLAlchemyError) as error:
        told = without_user(str(error).splitlines()[0], uri=uri)
        raise ConfigError(f"experiment: MLflow at {without_user(uri, uri=uri)} cannot be read: {told}") from None
    return [
        Record(Run(uri, run.info.run_id), tags=run.data.tags, params=run.data.params, metrics=run.data.metrics)
        for run in found
    ]


def without_user(text: str, *, uri: str) -> str:
    """A text that may name ``uri``, without the user and password in it."""
    place = urlsplit(uri).netloc
    return text.replace(place, place.rpartition("@")[2]) if place else text


def start_run(
    experiment: str,
    name: str,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    parent: Run | None = None,
    run_id: str | None = None,
) -> Run:
    """Begin a run, or go on with ``run_id``. Call it on the driver: two processes that open a fresh database break it.

    Args:
        experiment: the stage's name; made where it is absent.
        name: of the run.
        params: flat or nested settings; nested keys are joined by dots.
        tags: further tags.
        parent: the run of a sweep that this one belongs to; the run is made where the parent is.
        run_id: of an earlier run that was interrupted.
    """
    import mlflow
    from mlflow.entities import Param

    uri = parent.uri if parent else tracking_uri()
    client = mlflow.MlflowClient(uri)
    if run_id is not None and _exists(client, run_id):
        client.update_run(run_id, status="RUNNING")
        return Run(uri, run_id)
    found = client.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else client.create_experiment(experiment)
    labels = dict(tags or {}) | ({"mlflow.parentRunId": parent.run_id} if parent else {})
    made = client.create_run(experiment_id, run_name=name, tags=labels)
    entries = [Param(key, str(value)[:_MAX_PARAM]) for key, value in flatten(params).items()]
    for first in range(0, len(entries), _PARAMS_A_CALL):
        client.log_batch(made.info.run_id, params=entries[first : first + _PARAMS_A_CALL])
    return Run(uri, made.info.run_id)


def metric_history(run: Run, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, in the order of steps."""
    history = run._client().get_metric_history(run.run_id, name)
    return sorted((point.step, point.value) for point in history)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: ``{"a": {"b": 1}}`` gives ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException:
        return False
    return True
