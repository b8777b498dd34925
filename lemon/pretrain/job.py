"""Starts training: in this process for one worker, on Ray Train for several or on a cluster."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from lemon.cells.batches import is_streamed
from lemon.cells.select import Selection
from lemon.encoders.device import choose_device
from lemon.encoders.export import CONFIG, CellInput
from lemon.errors import EXIT_OK
from lemon.pretrain.assemble import EXPORT, train
from lemon.pretrain.check import check
from lemon.pretrain.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from lemon.pretrain.config import PretrainConfig, TrainWorkers
from lemon.pretrain.loop import Log, TrainingStoppedError
from lemon.pretrain.progress import Progress, following
from lemon.pretrain.score import score_encoder
from lemon.probe.score import MAIN_METRICS
from lemon.runtime.cluster import nodes, start_ray
from lemon.runtime.console import install_in_worker, stage_logger
from lemon.runtime.demand import Demand, allocate, gpus_of_worker
from lemon.runtime.lease import hold
from lemon.runtime.metrics import count_cells
from lemon.runtime.records import INTERNAL_FOLDER
from lemon.runtime.settings import check_settings, settings_difference
from lemon.runtime.store import Store, local_copy, open_output
from lemon.runtime.tracking import NEWEST, RUN, Run, start_run
from lemon.views.make import statistics_of

SETTINGS = "pretrain.json"
OUTPUT_NAMES = (CHECKPOINT_FOLDER, EXPORT, SETTINGS, RUN)
"""What in an output may only be LEMON's."""

logger = stage_logger(__name__, "pretrain")

_STOPPED = re.compile(rf"^(?:\w+\.)*{TrainingStoppedError.__name__}: (.*)$", re.MULTILINE)


def main(config: PretrainConfig) -> int:
    """Pretrain and log the outcome; returns the exit code. Nothing is written before all is checked."""
    config, selection = check(config)
    if not config.workers.in_process:
        allocate(demand_of(config), stage="pretrain")
    with hold(config.output, stage="pretrain", names=OUTPUT_NAMES) as store:
        begin_output(config, selection, store)
        return _pretrain(config, selection, store)


def _pretrain(config: PretrainConfig, selection: Selection, store: Store) -> int:
    run = _open_run(config, store, selection)
    with run.ending():
        encoder = fit(config, run)
        metrics = score_encoder(config, run) if config.probe_tasks else {}
        if config.register_as is not None:
            register(config.register_as, encoder, run, metrics=metrics)
    logger.info(f"encoder in {encoder}; MLflow run {run.run_id}")
    return EXIT_OK


def check_and_begin(config: PretrainConfig) -> tuple[PretrainConfig, Selection]:
    """``check``, then ``begin_output``, where the output, or a folder above it, is held already. Raises ConfigError."""
    config, selection = check(config)
    begin_output(config, selection, open_output(config.output, names=OUTPUT_NAMES))
    return config, selection


def begin_output(config: PretrainConfig, selection: Selection, store: Store) -> None:
    """Write the settings into the output, and log what will be done.

    Raises ConfigError for an output in which something was made with other settings. One in which nothing was takes
    new ones, and a run of its own in MLflow.
    """
    if settings_changed(config, selection, store) and not is_begun(store):
        store.delete(RUN)
    settings = settings_of(config, selection)
    check_settings(store, SETTINGS, settings, is_empty=lambda: not is_begun(store), remedy="choose another output")
    if selection.n_cells < config.batch:
        logger.info(f"{selection.n_cells:,} cells are fewer than a batch of {config.batch:,}; cells repeat in it")
    slides = len(selection.parts)
    logger.info(f"{selection.n_cells:,} cells of {slides} slides, {config.total_steps:,} steps of {config.batch:,}")
    if config.field_um is not None:
        logger.info(f"fields of {config.field_um:g} um are cut from the slides, where {config.cache} lacks them")


def settings_of(config: PretrainConfig, selection: Selection) -> dict[str, Any]:
    """The settings that change the encoder; cells and stain statistics by their content, wherever they lie.

    ``order`` is that of the cells, which another ``cache_gb`` may change.
    """
    order = "streamed" if is_streamed(selection, cache_gb=config.cache_gb) else "permuted"
    settings = config.result_settings() | {"cells": selection.fingerprint, "order": order}
    if config.views.stain.kind == "gmm":
        stain = settings["views"]["stain"] | {"statistics": statistics_of(config.views.stain).fingerprint}
        settings["views"] = settings["views"] | {"stain": stain}
    return settings


def is_begun(store: Store) -> bool:
    """Whether an output holds something that was trained."""
    return bool(Checkpoints(store).steps()) or store.exists(f"{EXPORT}/{CONFIG}")


def settings_changed(config: PretrainConfig, selection: Selection, store: Store) -> str:
    """What differs from the settings that are noted in an output; empty where nothing does, or none are."""
    return (
        settings_difference(store.read_json(SETTINGS), settings_of(config, selection)) if store.exists(SETTINGS) else ""
    )


def fit(config: PretrainConfig, run: Run, *, log: Log | None = None) -> str:
    """Train what ``check`` returned, from its newest checkpoint, here or on Ray; returns where the encoder is.

    Metrics go to ``run``, which stays open; to ``log`` too where this process trains.
    Raises TrainingStoppedError.
    """
    if config.workers.in_process:
        train(config, device=choose_device(config.device), log=_Logger(run, config, then=log))
    else:
        _train_on_ray(config, run)
    return f"{config.output}/{EXPORT}"


def register(name: str, encoder: str, run: Run, *, metrics: Mapping[str, float]) -> None:
    """Put the encoder into MLflow's registry: its newest version, tagged with how it was made and what it scored."""
    described = Store(encoder).read_json(CONFIG)
    expects = {each.name for each in fields(CellInput)}
    tags = {key: str(value) for key, value in described["lemon"].items() if key not in expects}
    tags |= {key: f"{value:.4f}" for key, value in metrics.items() if key.endswith(MAIN_METRICS)}
    with local_copy(encoder) as folder:
        version = run.register(name, folder, width=described["num_features"], tags=tags)
    if version is not None:
        logger.info(f"registered in MLflow as models:/{name}/{version}, models:/{name}@{NEWEST}")


class _Logger:
    """Metrics to MLflow, to Prometheus, and to who watches."""

    def __init__(self, run: Run, config: PretrainConfig, *, then: Log | None = None) -> None:
        self._run, self._config, self._then = run, config, then
        self._progress = Progress(config.total_steps, batch=config.batch)

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(metrics, step=step)
        if "loss" in metrics:
            self._count(metrics, step)
        self._progress(metrics, step)
        if self._then is not None:
            self._then(metrics, step)

    def _count(self, metrics: Mapping[str, float], step: int) -> None:
        """Count the window of steps that ends here; it began at the last log or checkpoint, as a resumed run does."""
        every = (self._config.log_every, self._config.checkpoint_every)
        images = (step - max((step - 1) // n * n for n in every)) * self._config.batch
        seconds = images / metrics["images_per_s"]
        count_cells("pretrain", images, seconds=seconds, device_s=seconds * (1 - metrics["data_wait_share"]))


def _train_on_ray(config: PretrainConfig, run: Run) -> None:
    with following(run, Progress(config.total_steps, batch=config.batch)):
        train_on_ray(
            _ray_worker,
            {"config": config.model_dump(mode="json"), "run": (run.uri, run.run_id)},
            workers=config.workers,
            demand=demand_of(config),
            output=config.output,
            name=f"pretrain-{run.run_id[:8]}",
        )


def train_on_ray(
    worker: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    *,
    workers: TrainWorkers,
    demand: Demand,
    output: str,
    name: str,
) -> None:
    """N workers; a lost one restarts all from the newest checkpoint, which is in the output and not Ray's.

    Args:
        worker: what each of them runs, on ``settings``.
        settings: plain values.
        workers: how many, and what losses are mended.
        demand: what they take.
        output: under which Ray keeps its own notes.
        name: of the run, for Ray.

    Raises TrainingStoppedError where a worker did.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    start_ray()
    store, gpus = Store(output), gpus_of_worker(demand, nodes=nodes())
    count: Any = workers.count  # a pair makes the run elastic
    trainer = TorchTrainer(
        worker,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=count,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=f"{name}-{int(time.time())}",
            storage_path=store.path(f"{INTERNAL_FOLDER}/ray"),
            storage_filesystem=None if store.is_local else store.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        if stopped := _STOPPED.findall(str(error)):  # of a worker, whose traceback Ray gives as text
            raise TrainingStoppedError(stopped[-1]) from None
        raise


def demand_of(config: PretrainConfig, *, key: str = "workers") -> Demand:
    """What a run asks of a cluster."""
    return demand_of_workers(config.workers, device=config.device, key=key)


def demand_of_workers(workers: TrainWorkers, *, device: str, key: str = "workers") -> Demand:
    """What workers ask of a cluster: of an elastic run the least number of workers has to be there."""
    least, most = (workers.count, workers.count) if isinstance(workers.count, int) else workers.count
    gpus = 0 if device == "cpu" and workers.gpus is None else workers.gpus
    return Demand(workers.cpus, gpus, min_workers=least, wanted_workers=most, key=key, count_key=f"{key}.count")


def _ray_worker(settings: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    install_in_worker()
    config = PretrainConfig.model_validate(settings["config"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    log = _Logger(Run(*settings["run"]), config) if rank == 0 else None
    train(config, device=ray.train.torch.get_device(), rank=rank, world=world, log=log)


def _open_run(config: PretrainConfig, store: Store, selection: Selection) -> Run:
    """The MLflow run of this output: a rerun goes on in the same one."""
    tags = {"cells_fingerprint": selection.fingerprint, "encoder": f"{store.uri}/{EXPORT}"}
    name = f"{config.encoder.name}-{config.ssl.name}-{config.views.name}"
    run = start_run("pretrain", name, store=store, params=parameters_of(config), tags=tags)
    run.log_dataset("cells", digest=selection.fingerprint, source=selection.store.uri, context="training")
    return run


def parameters_of(config: PretrainConfig) -> dict[str, Any]:
    """What MLflow keeps of the settings: without the folders that would be a difference between any two runs."""
    return config.model_dump(mode="json", exclude={"output", "cache", "cache_gb"})
