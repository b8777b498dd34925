"""Scores of a finished encoder on the run that trained it: tasks of ``lemon probe``, by default without labels."""

from __future__ import annotations

from lemon.encoders.device import choose_device
from lemon.encoders.open import load_encoder
from lemon.errors import one_line
from lemon.pretrain.config import PretrainConfig
from lemon.probe import job as probing
from lemon.probe.config import ProbeConfig
from lemon.probe.tables import write_table1
from lemon.probe.tasks.catalogue import open_task
from lemon.runtime.console import stage_logger
from lemon.runtime.store import open_output
from lemon.runtime.tracking import Run

PROBE_FOLDER = "probe"
"""In the output: what ``lemon probe`` would leave of this encoder."""

AUTO_CELLS = 10_000
"""Of lowest rank, on which an encoder is scored where no task is named: a minute on two cores for a small encoder."""

logger = stage_logger(__name__, "pretrain")


def score_encoder(config: PretrainConfig, run: Run) -> dict[str, float]:
    """Score the exported encoder on the config's tasks; returns the metrics, which are the run's too.

    Rows, predictions and embeddings go to ``<output>/probe``; scores that are there of the same data and settings are
    not made again. A task that fails costs a line and a tag of the run, not the run: training is done.
    """
    probe = ProbeConfig(
        models=[config.output],
        tasks=config.probe_tasks,
        data=config.data,
        output=f"{config.output}/{PROBE_FOLDER}",
        device=config.device,
    )
    options = {"n_cells": AUTO_CELLS} if config.tasks == "auto" else {}
    metrics: dict[str, float] = {}
    try:
        store = open_output(probe.output, names=probing.OUTPUT_NAMES)
        encoder = load_encoder(config.output, device=choose_device(config.device))
        scorer = probing.Scorer(encoder, config=probe, store=store)
    except Exception as error:  # whatever it is, the encoder is trained  # noqa: BLE001
        logger.warning(f"the encoder is not scored: {one_line(error)}")
        return metrics
    for name in probe.tasks:
        try:
            task = open_task(name, probe.data, seed=probe.seed, **probe.task_options(name), **options)
            rows = scorer.score(task, [run])
        except Exception as error:  # as above  # noqa: BLE001
            logger.warning(f"{name} is not scored: {one_line(error)}")
            run.set_tag(f"probe_failed/{probing.short_name(name)}", one_line(error))
            continue
        metrics |= probing.flat_metrics(rows)
    if metrics:
        run.log_text(write_table1(store), "probe/table1.md")
    return metrics
