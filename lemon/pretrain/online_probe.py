"""A small probe during training: the encoder of a checkpoint on some hundred cells, without labels and with them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from torch import nn

from lemon.cells.labels import read_labels
from lemon.cells.shard import images_from_arrow
from lemon.encoders.features import encode_cells
from lemon.errors import ConfigError, one_line
from lemon.pretrain.config import PretrainConfig
from lemon.probe.embedding import SharedEmbeddings
from lemon.probe.folds import leak_free
from lemon.probe.score import quick_scores
from lemon.probe.task import Task
from lemon.probe.tasks.catalogue import open_task
from lemon.runtime.console import stage_logger
from lemon.runtime.store import Store
from lemon.views.policy import Policy

LABELS = "labels"
"""The task of the cells that ``probe.labels`` names."""

LABELLED_METRIC = f"online/{LABELS}/balanced_accuracy"
"""What the best checkpoint is chosen by, and what ASHA compares trials by."""

LEAST_SLIDES = 3

logger = stage_logger(__name__, "pretrain")


@dataclass(frozen=True)
class OnlineProbe:
    """Tasks of few cells by the names that they have in metrics, and how images are normalised."""

    tasks: dict[str, Task]
    policy: Policy

    @classmethod
    def open(cls, config: PretrainConfig) -> OnlineProbe | None:
        """Read the cells; a task without labels that cannot be read costs a line. None where ``probe`` is null.

        Raises ConfigError as ``labelled_task`` does.
        """
        if config.probe is None:
            return None
        tasks = {}
        for name in config.unlabelled_tasks:
            try:
                tasks[name.partition(":")[0]] = open_task(name, config.data, n_cells=config.probe.n_cells)
            except Exception as error:  # whatever it is, training goes on without it  # noqa: BLE001
                logger.warning(f"checkpoints are not scored on {name}: {one_line(error)}")
        if config.probe.labels is not None:
            tasks[LABELS] = labelled_task(config)
        return cls(tasks, config.views)

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        """``online/<task>/<metric>`` of a frozen encoder, and what that took in ``online/seconds``.

        Draws no random number of torch's or numpy's own.
        """
        start = time.perf_counter()
        crop_px = int(encoder.patch_embed.img_size[0])  # type: ignore[union-attr, index]
        mean, std = self.policy.mean, self.policy.std
        embeddings = SharedEmbeddings(
            lambda images: encode_cells(encoder, images, mean=mean, std=std, crop_px=crop_px).cpu().numpy()
        )
        scores = {
            f"online/{name}/{metric}": value
            for name, task in self.tasks.items()
            for metric, value in quick_scores(task, embeddings.of(task.images)).items()
        }
        return scores | {"online/seconds": time.perf_counter() - start}


def labelled_task(config: PretrainConfig) -> Task:
    """The cells that ``probe.labels`` names, of ``probe.cells`` or the run's own; folds never divide a slide.

    Raises ConfigError for a missing column, and for labels that match too few cells, slides or classes.
    """
    assert config.probe is not None
    assert config.probe.labels is not None
    wanted = read_labels(config.probe.labels, key="probe.labels")
    store = Store(config.probe.cells or config.cells)
    images: list[np.ndarray] = []
    ids: list[str] = []
    slides: list[str] = []
    for name in store.list("cells"):
        of_slide = store.read_table(name, columns=["cell_id", "slide_id"]).to_pylist()
        if rows := [index for index, cell in enumerate(of_slide) if cell["cell_id"] in wanted]:
            images.append(images_from_arrow(store.read_table(name, columns=["image"])["image"])[rows])
            ids += [of_slide[index]["cell_id"] for index in rows]
            slides += [of_slide[index]["slide_id"] for index in rows]
    labels, groups = np.array([wanted[cell_id] for cell_id in ids], str), np.array(slides, str)
    classes = tuple(sorted(set(labels.tolist())))
    if len(set(slides)) < LEAST_SLIDES or len(classes) < 2:
        got = f"{len(labels)} labelled cells of {len(set(slides))} slides in {len(classes)} classes"
        raise ConfigError(f"probe.labels: got {got}; expected {LEAST_SLIDES} slides and 2 classes at least")
    protocol = leak_free(groups, labels=labels)
    if any(len(set(labels[fold.train])) < 2 for fold in protocol.folds):
        raise ConfigError(
            "probe.labels: without some slides one class alone is left to learn from; expected classes that are "
            "spread over slides"
        )
    return Task(
        name=LABELS,
        kind="classification",
        images=np.concatenate(images),
        target=labels,
        target_names=classes,
        sample_ids=np.array(ids, str),
        groups={"slide": groups},
        protocols=(protocol,),
    )
