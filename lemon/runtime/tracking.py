"""Runs and registered encoders in MLflow. The only importer of mlflow, but for the code that MLflow itself executes."""

from __future__ import annotations

import json
import logging
import os
import random
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import requests

from lemon.errors import ConfigError, one_line
from lemon.runtime.cluster import ray_address
from lemon.runtime.scratch import scratch_folder
from lemon.runtime.secrets import redacted
from lemon.runtime.store import Store, code_version
from lemon.schema import CELL_PX
from lemon.version import __version__

DATABASE = "mlflow.db"
RUN = "run.json"
"""In an output: which run of MLflow is its own."""

NEWEST = "newest"
"""The alias of a registered model's newest version: models:/lemon@newest."""

UI_HOST, UI_PORT = "127.0.0.1", 5000
"""Where ``lemon ui`` serves MLflow's pages."""

MLFLOW_PARENT = "mlflow.parentRunId"
"""The tag that MLflow gives a run which belongs to another."""

DESCRIPTION = "mlflow.note.content"
"""The tag that MLflow shows as a run's description, as Markdown."""

_KEY = "lemon.key"
_ENCODER = "encoder"  # the artifact of a registered model; lemon/served_encoder.py opens it by this name
_MAX_PARAM = 6000  # characters that MLflow keeps of a parameter
_PARAMS_A_CALL = 100
_TRIES = 8  # to write to a SQLite database that other runs hold; each waits for up to 20 s by itself
_CONNECT_TRIES = 4  # at a server that may have been started just now, or be busy
_PAUSE_S = 3.0
_SERVED = Path(__file__).parents[1] / "served_encoder.py"
_REQUIREMENTS = ("torch", "timm", "safetensors")  # besides the package: what the vectors depend on

T = TypeVar("T")

logger = logging.getLogger(__name__)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite database in the working directory, by its absolute path."""
    return os.environ.get("MLFLOW_TRACKING_URI", "").strip() or sqlite_uri(DATABASE)


def sqlite_uri(database: str | Path) -> str:
    """The address of a SQLite database by its file."""
    return f"sqlite:///{Path(database).absolute()}"


def version() -> str:
    """The version of MLflow that is installed."""
    import mlflow

    return f"mlflow {mlflow.__version__}"


def reach(uri: str) -> None:
    """Find within seconds whether something speaks against ``uri`` as the place of runs; MLflow tries for minutes.

    Raises:
        requests.HTTPError: a server answers, but not that it is well. It may want the login that MLflow's client has.
        OSError: it is no address, no server answers, or the database's folder cannot be written.
    """
    try:
        _ = urlsplit(uri).port
    except ValueError:
        raise OSError("it is no address: its host or port cannot be read") from None
    if uri.startswith(("http://", "https://")):
        try:
            answer = requests.get(f"{uri.rstrip('/')}/health", timeout=5)
        except requests.exceptions.SSLError:
            return  # something is there, and MLflow's client may have a certificate for it
        except requests.RequestException as error:
            raise OSError(f"it does not answer: {one_line(error)}") from None
        answer.raise_for_status()
    elif uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///"))
        if database.is_dir():
            raise OSError(f"{database} is a folder; expected a file or none")
        folder = next(parent for parent in database.absolute().parents if parent.exists())  # MLflow makes the rest
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise OSError(f"{folder} is no folder that can be written")


@dataclass(frozen=True)
class Run:
    """A run that is going on. Holds names only, so it can be sent to a worker, which then logs to the same run."""

    uri: str
    run_id: str

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log metrics of a step. Here and below a server that cannot be reached costs the values, not the run."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._send(f"metrics of step {step}", lambda client: client.log_batch(self.run_id, metrics=values))

    def log_file(self, name: str, content: bytes) -> None:
        """Attach a file; its name may have folders."""
        folder, _, base = name.rpartition("/")
        with scratch_folder() as scratch:
            (scratch / base).write_bytes(content)
            try:
                self._client().log_artifact(self.run_id, str(scratch / base), folder or None)
            except Exception as error:  # an artifact store raises what its own library does  # noqa: BLE001
                self._warn_of_loss(f"file {name}", error)

    def log_text(self, text: str, name: str) -> None:
        """Attach a text as a file of that name."""
        self._send(f"file {name}", lambda client: client.log_text(self.run_id, redacted(text), name))

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self._send(f"tag {key}", lambda client: client.set_tag(self.run_id, key, redacted(value)))

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
        dataset = Dataset(name=name, digest=digest, source_type=kind, source=json.dumps({"uri": redacted(source)}))
        tags = [InputTag("mlflow.data.context", context)]
        inputs = [DatasetInput(dataset, tags)]
        self._send(f"dataset {name}", lambda client: client.log_inputs(self.run_id, inputs))

    def register(self, name: str, encoder: Path, *, width: int, tags: Mapping[str, str]) -> int | None:
        """Log an exported encoder as a pyfunc model and register it; a run has one version under a name.

        ``mlflow.pyfunc.load_model("models:/<name>/<version>").predict`` takes uint8 [N, 60, 60, 3] and gives
        float32 [N, D]; another shape or type is refused.

        Args:
            name: in the registry; made where it is absent.
            encoder: the folder that ``lemon.load_encoder`` opens.
            width: D.
            tags: of the version.

        Returns:
            The version: a new one, or that which this run has already; None where MLflow could not take it, after a
            warning.
        """
        try:
            client = self._client()
            earlier = _with_retries(lambda: client.search_model_versions(f"run_id='{self.run_id}'"))
            if versions := [each.version for each in earlier if each.name == name]:
                return int(versions[0])
            redacted_tags = {key: redacted(value) for key, value in tags.items()}
            return _register(client, self.run_id, name, encoder, width=width, tags=redacted_tags)
        except Exception as error:  # an artifact store raises what its own library does
            logger.debug("registration", exc_info=True)
            logger.warning("the encoder is not registered as %s: %s", name, _first_line(error))
            return None

    def close(self, status: str = "FINISHED") -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        self._send(f"status {status}", lambda client: client.set_terminated(self.run_id, status))

    @contextmanager
    def ending(self) -> Iterator[None]:
        """End the run with the block: FINISHED, or FAILED by an error, or KILLED by what ends the process."""
        try:
            yield
        except Exception:
            self.close("FAILED")
            raise
        except BaseException:
            self.close("KILLED")
            raise
        self.close()

    def _send(self, what: str, call: Callable[[Any], object]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            _with_retries(lambda: call(self._client()))
        except MlflowException as error:
            self._warn_of_loss(what, error)

    def _warn_of_loss(self, what: str, error: Exception) -> None:
        logger.warning("MLflow run %s: %s is lost: %s", self.run_id[:8], what, _first_line(error))

    def _client(self) -> Any:
        import mlflow

        return mlflow.MlflowClient(self.uri)


@dataclass(frozen=True)
class RunRecord:
    """What MLflow holds of a run: its tags and parameters as text, of each metric the last value.

    ``page`` is its page in MLflow, of a database where ``make ui`` serves it.
    """

    run: Run
    page: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]

    @property
    def is_child(self) -> bool:
        """Whether it belongs to another run, as a trial's to its sweep's."""
        return MLFLOW_PARENT in self.tags


def _is_absent_database(uri: str) -> bool:
    """Whether a SQLite database is not there yet; MLflow's client would make an empty one."""
    return uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists()


def experiment_ids(uri: str) -> dict[str, str]:
    """The id of each experiment in the MLflow at ``uri`` by its name, MLflow's own "Default" left out.

    None where a SQLite database is absent. Raises ConfigError where MLflow cannot be read.
    """
    import mlflow

    if _is_absent_database(uri):
        return {}
    _require(uri)
    with _refused("MLFLOW_TRACKING_URI", uri):
        known = mlflow.MlflowClient(uri).search_experiments(order_by=["creation_time ASC"])
    return {each.name: each.experiment_id for each in known if each.experiment_id != "0"}


def find_runs(experiment: str) -> list[RunRecord]:
    """All runs of an experiment, the oldest first; none where the experiment or the database is absent.

    Raises ConfigError where MLflow cannot be read.
    """
    import mlflow

    uri = tracking_uri()
    if _is_absent_database(uri):
        return []
    _require(uri)
    runs: list[Any] = []
    page: Any = None
    with _refused("experiment", uri):
        client = mlflow.MlflowClient(uri)
        if (known := client.get_experiment_by_name(experiment)) is None:
            return []
        while page is None or page.token:
            token = page and page.token
            page = client.search_runs([known.experiment_id], order_by=["attributes.start_time"], page_token=token)
            runs += page
    site = (
        f"{uri if uri.startswith('http') else f'http://{UI_HOST}:{UI_PORT}'}/#/experiments/{known.experiment_id}/runs"
    )
    return [
        RunRecord(
            Run(uri, run.info.run_id),
            page=f"{site}/{run.info.run_id}",
            tags=run.data.tags,
            params=run.data.params,
            metrics=run.data.metrics,
        )
        for run in runs
    ]


@contextmanager
def _refused(key: str, uri: str) -> Iterator[None]:
    """What MLflow at ``uri`` raises as a ConfigError of one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError  # MLflow lets those of its database through

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        raise ConfigError(f"{key}: MLflow at {redacted(uri)} cannot be used: {_first_line(error)}") from None
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{key}: MLflow at {redacted(uri)} needs the package {error.name}, which is not installed: pip install it"
        ) from None


def _require(uri: str) -> None:
    for left in reversed(range(_CONNECT_TRIES)):
        try:
            return reach(uri)
        except requests.HTTPError:
            return  # MLflow's client tells why, or logs in
        except OSError as error:
            if not left or not uri.startswith("http"):
                raise ConfigError(f"MLFLOW_TRACKING_URI: runs cannot go to {redacted(f'{uri}: {error}')}") from None
        time.sleep(_PAUSE_S)


def start_run(
    experiment: str,
    name: str,
    *,
    store: Store,
    mark: str = RUN,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    parent: Run | None = None,
) -> Run:
    """Begin the run of an output, or go on with it. Call it on the driver: two that open a fresh database break it.

    The mark gets a key before MLflow gets a run that has the key as its tag. So a process that is killed between any
    two steps leaves no second run: the next one finds it, and completes its parameters.

    Args:
        experiment: the stage's name; made where it is absent.
        name: of the run.
        store: the output.
        mark: where in the output its run is noted.
        params: flat or nested settings; nested keys are joined by dots.
        tags: further tags, besides code_version and host.
        parent: the run of a sweep that this one belongs to; the run is made where the parent is.

    Raises ConfigError where MLflow cannot be used; within seconds where nothing answers, but for a child, whose parent
    was answered.
    """
    import mlflow

    uri = parent.uri if parent else tracking_uri()
    _warn_of_other_nodes()
    if parent is None:
        _require(uri)
    with _refused("MLFLOW_TRACKING_URI", uri):
        client = mlflow.MlflowClient(uri)
        mark_content = _read_mark(store, mark)
        run_id = _find(client, mark_content)
        if run_id is None:
            mark_content = {"experiment": experiment, "key": uuid.uuid4().hex}
            store.write_json(mark, mark_content)
            facts = {"code_version": code_version(), "host": os.uname().nodename, _KEY: mark_content["key"]} | dict(
                tags or {}
            )
            facts |= {MLFLOW_PARENT: parent.run_id} if parent else {}
            run_id = _create(client, uri, experiment, name, tags=facts)
        else:
            _with_retries(partial(client.update_run, run_id, status="RUNNING"))
        _complete_params(client, run_id, params)
    if mark_content.get("run_id") != run_id:
        store.write_json(mark, mark_content | {"run_id": run_id})
    return Run(uri, run_id)


def _create(client: Any, uri: str, experiment: str, name: str, *, tags: dict[str, str]) -> str:
    """A new run; returns its id."""
    known = client.get_experiment_by_name(experiment)
    experiment_id = known.experiment_id if known else _make_experiment(client, experiment, uri)
    redacted_tags = {key: redacted(value) for key, value in tags.items()}
    return str(
        _with_retries(lambda: client.create_run(experiment_id, run_name=redacted(name), tags=redacted_tags)).info.run_id
    )


def _read_mark(store: Store, mark: str) -> dict[str, str]:
    """What a mark holds: experiment and key, then the run's id too; empty where there is no mark."""
    return store.read_json(mark, dict[str, str]) if store.exists(mark) else {}


def _find(client: Any, mark_content: Mapping[str, str]) -> str | None:
    """The id of the run that a mark names; None where MLflow has none."""
    if (run_id := mark_content.get("run_id")) is not None:
        return run_id if _exists(client, run_id) else None
    if not mark_content or (experiment := client.get_experiment_by_name(mark_content["experiment"])) is None:
        return None
    runs = client.search_runs([experiment.experiment_id], f"tags.`{_KEY}` = '{mark_content['key']}'", max_results=1)
    return str(runs[0].info.run_id) if runs else None


def run_id_of(store: Store, mark: str = RUN) -> str | None:
    """The id of an output's run from its mark; None where the run was not begun, or just then."""
    return _read_mark(store, mark).get("run_id")


def run_of(store: Store, mark: str = RUN, *, uri: str) -> Run | None:
    """The run of an output in the MLflow at ``uri``; None where there is none (yet, any more, or in this MLflow).

    Raises MlflowException where it does not answer.
    """
    import mlflow

    run_id = _find(mlflow.MlflowClient(uri), _read_mark(store, mark))
    return None if run_id is None else Run(uri, run_id)


def reachable_run_of(store: Store, mark: str = RUN) -> Run | None:
    """``run_of`` in the MLflow in use; None also where that does not answer."""
    from mlflow.exceptions import MlflowException

    if _is_absent_database(uri := tracking_uri()):
        return None
    try:
        return run_of(store, mark, uri=uri)
    except MlflowException:
        return None


def training_run_of(model: str) -> Run | None:
    """The run that trained an encoder, in the MLflow in use: of an output of pretraining, or of ``models:/...``.

    None where it is neither, or MLflow does not have the run (any more), or does not answer.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = tracking_uri()
    if _is_absent_database(uri):
        return None
    try:
        if model.startswith("models:/"):
            name, _, alias = model.removeprefix("models:/").partition("@")
            name, _, number = name.partition("/")
            client = mlflow.MlflowClient(uri)
            by_alias, by_number = client.get_model_version_by_alias, client.get_model_version
            version = by_alias(name, alias) if alias else by_number(name, number)
            return Run(uri, version.run_id) if version.run_id and _exists(client, version.run_id) else None
        store = Store(model)
        return reachable_run_of(store) if store.exists(RUN) else None
    except (MlflowException, OSError, ValueError):
        return None


def close_killed(store: Store, *, uri: str) -> None:
    """End the run of an output whose process was killed before it could do that."""
    from mlflow.exceptions import MlflowException

    try:
        run = run_of(store, uri=uri)
        if run is not None and run._client().get_run(run.run_id).info.status == "RUNNING":
            run.close("KILLED")
    except MlflowException as error:
        logger.warning("MLflow's run of %s is not ended: %s", store.uri, _first_line(error))


@cache
def _warn_of_other_nodes() -> None:
    if ray_address() is not None and not os.environ.get("MLFLOW_TRACKING_URI"):
        logger.warning(
            f"tracking: MLFLOW_TRACKING_URI is not set: runs go to {tracking_uri()} on this node, and workers on other "
            "nodes of the cluster cannot log; start a server that all nodes reach (cluster/README.md)"
        )


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


def _complete_params(client: Any, run_id: str, params: Mapping[str, Any]) -> None:
    """Tell a run the parameters that it does not have yet; MLflow keeps the first value of each."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    entries = [
        Param(key, redacted(str(value))[:_MAX_PARAM]) for key, value in flatten(params).items() if key not in known
    ]
    for first in range(0, len(entries), _PARAMS_A_CALL):
        some = entries[first : first + _PARAMS_A_CALL]
        _with_retries(partial(client.log_batch, run_id, params=some))


def _exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"  # it keeps those that a user deletes
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def download_encoder(uri: str, folder: Path) -> Path:
    """Of ``models:/<name>/<version>`` (or ``@<alias>``) the exported encoder, somewhere in a folder that is made.

    Raises ConfigError where MLflow has no such model, it is not one of ``Run.register``, or MLflow cannot be used.
    """
    where = tracking_uri()
    if _is_absent_database(where):
        raise ConfigError(
            f"encoder: {uri}: there is no {redacted(where)}; expected MLFLOW_TRACKING_URI=... of the MLflow that has it"
        )
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow.artifacts
    from mlflow.models import Model

    _require(where)
    folder.mkdir(parents=True)
    with _refused(f"encoder: {uri}", where):
        places = {"tracking_uri": where, "registry_uri": where}
        model = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder), **places))
        artifacts = Model.load(model).flavors.get("python_function", {}).get("artifacts") or {}
    if _ENCODER not in artifacts:
        raise ConfigError(f"encoder: {uri} is no encoder that lemon pretrain registered")
    return model / artifacts[_ENCODER]["path"]


def _register(client: Any, run_id: str, name: str, encoder: Path, *, width: int, tags: dict[str, str]) -> int:
    """A model of the run, and the version that points to it. Goes on with a model that a killed process left."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    run = client.get_run(run_id)
    place = run.info.experiment_id
    left = client.search_logged_models([place], f"source_run_id = '{run_id}' AND name = '{name}'")
    model = left[0] if left else _with_retries(lambda: client.create_logged_model(place, name, run_id, tags))
    model_id = model.model_id
    with scratch_folder() as folder:
        _save(folder / "model", encoder, width=width, run_id=run_id, model_id=model_id)
        client.log_model_artifacts(model_id, f"{folder}/model")
    _with_retries(lambda: client.finalize_logged_model(model_id, "READY"))
    if model_id not in (each.model_id for each in run.outputs.model_outputs):
        _with_retries(lambda: client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)]))
    try:
        _with_retries(lambda: client.create_registered_model(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = model.artifact_location  # "models:/<id>" would be looked for where the process logs by default
    facts = {"run_id": run_id, "model_id": model_id, "description": run.info.run_name, "tags": tags}
    version = int(_with_retries(lambda: client.create_model_version(name, source, **facts)).version)
    _with_retries(lambda: client.set_registered_model_alias(name, NEWEST, str(version)))
    return version


def _save(path: Path, encoder: Path, *, width: int, run_id: str, model_id: str) -> None:
    """A pyfunc model from code: the file that opens the encoder, the exported folder, and what both need."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    # Without names, so that predict takes an array and not a dictionary.
    images = Schema([TensorSpec(np.dtype("uint8"), (-1, CELL_PX, CELL_PX, 3))])
    vectors = Schema([TensorSpec(np.dtype("float32"), (-1, width))])
    needed = [f"lemon-nuclei=={__version__}", *(f"{each}=={_release(each)}" for each in _REQUIREMENTS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no example is given: it would be run, and the signature is known
        mlflow.pyfunc.save_model(
            path,
            python_model=_SERVED,
            artifacts={_ENCODER: str(encoder)},
            signature=ModelSignature(images, vectors),
            pip_requirements=needed,
            mlflow_model=Model(run_id=run_id, model_id=model_id),
        )


def _release(package: str) -> str:
    """A version without the part that names a build (+cpu), which no index has."""
    return metadata.version(package).partition("+")[0]


def _make_experiment(client: Any, name: str, uri: str) -> str:
    """An experiment whose files lie beside a SQLite database, or where its server puts them; returns its id."""
    beside = None
    if uri.startswith("sqlite:///"):
        beside = str(Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlruns" / name)
    # Else MLflow's page shows an experiment as one of language models, without charts of training.
    return client.create_experiment(name, beside, {"mlflow.experimentKind": "custom_model_development"})


def _with_retries(call: Callable[[], T]) -> T:
    """What a call returns; it is made again while other runs hold the SQLite database."""
    from mlflow.exceptions import MlflowException

    for left in reversed(range(_TRIES)):
        try:
            return call()
        except MlflowException as error:
            if not left or "database is locked" not in str(error):
                raise
            time.sleep(random.uniform(0, 0.5))  # else two that wait for one another do so again
    raise AssertionError("unreachable")


def _first_line(error: Exception) -> str:
    """What an error says, without what MLflow's client may have put into it of its address."""
    return redacted(str(error).strip().partition("\n")[0]) or type(error).__name__
