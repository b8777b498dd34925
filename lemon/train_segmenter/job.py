"""Starts the segmenter's training: in this process for one worker, on Ray Train for several or on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lemon.encoders.device import choose_device
from lemon.errors import EXIT_OK, ConfigError
from lemon.nuclei.training.images import Labelled, split
from lemon.pretrain.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from lemon.pretrain.job import demand_of_workers, train_on_ray
from lemon.runtime.console import install_in_worker, stage_logger
from lemon.runtime.demand import allocate
from lemon.runtime.lease import hold
from lemon.runtime.settings import check_settings
from lemon.runtime.store import Store
from lemon.runtime.tracking import RUN, Run, start_run
from lemon.train_segmenter.config import TrainSegmenterConfig
from lemon.train_segmenter.train import CARD, WEIGHTS, digest_of, read_images, train

SETTINGS = "train_segmenter.json"
OUTPUT_NAMES = (CHECKPOINT_FOLDER, WEIGHTS, CARD, SETTINGS, RUN)
"""What in an output may only be LEMON's."""

logger = stage_logger(__name__, "train_segmenter")


def main(config: TrainSegmenterConfig) -> int:
    """Train and log the outcome; returns the exit code. Nothing is written before all is checked."""
    images = read_images(config)
    kept, held_out = split(images, held_out_share=config.held_out_share)
    if not kept:
        raise ConfigError("data: no labelled images to learn from")
    if not config.workers.in_process:
        allocate(demand_of_workers(config.workers, device=config.device), stage="train_segmenter")
    with hold(config.output, stage="train_segmenter", names=OUTPUT_NAMES) as store:
        digest = digest_of(images)
        _begin(config, store, digest=digest)
        logger.info(f"{len(kept)} images to learn from, {len(held_out)} held out, {config.steps:,} steps")
        run = start_run("train_segmenter", store.uri, store=store, params=config.result_settings())
        run.log_dataset("labelled images", digest=digest, source=config.data[0], context="training")
        with run.ending():
            _train(config, images, run)
    logger.info(f"weights in {store.uri}/{WEIGHTS}; MLflow run {run.run_id}")
    return EXIT_OK


def _begin(config: TrainSegmenterConfig, store: Store, *, digest: str) -> None:
    def is_empty() -> bool:
        return not Checkpoints(store).steps() and not store.exists(WEIGHTS)

    settings = config.result_settings() | {"images": digest}
    check_settings(store, SETTINGS, settings, is_empty=is_empty, remedy="choose another output")


def _train(config: TrainSegmenterConfig, images: list[Labelled], run: Run) -> None:
    if config.workers.in_process:
        train(config, images, device=choose_device(config.device), log=_Logger(run), log_file=run.log_file)
        return
    train_on_ray(
        _ray_worker,
        {"config": config.model_dump(mode="json"), "run": (run.uri, run.run_id)},
        workers=config.workers,
        demand=demand_of_workers(config.workers, device=config.device),
        output=config.output,
        name=f"train-segmenter-{run.run_id[:8]}",
    )


class _Logger:
    """Metrics to MLflow, and lines to who watches."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(metrics, step=step)
        logger.info(f"step {step:,}: " + ", ".join(f"{name} {value:.3g}" for name, value in metrics.items()))


def _ray_worker(settings: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    install_in_worker()
    config, run = TrainSegmenterConfig.model_validate(settings["config"]), Run(*settings["run"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    train(
        config,
        read_images(config),
        device=ray.train.torch.get_device(),
        rank=rank,
        world=context.get_world_size(),
        log=_Logger(run) if rank == 0 else None,
        log_file=run.log_file if rank == 0 else None,
    )
