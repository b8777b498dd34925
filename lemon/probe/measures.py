"""Measures of robustness: their names on cards, what they mean, and which values are the worst and the best."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import NamedTuple

TURNED = "turned"
"""Copies that are turned and not compressed, as a protocol of the task ``jpeg``."""

QUALITIES = (80, 50, 20)
"""Of JPEG, on libjpeg's scale: about that of good slides, of strongly compressed ones, and one with visible blocks."""


class Measure(NamedTuple):
    """``best`` None: what chance gives."""

    title: str
    about: str
    worst: float
    best: float | None


MEASURES = {
    "robustness_index": Measure(
        "robustness index",
        "of the 50 nearest nuclei on other slides, those of the class from another site against those of another class "
        "from the site; from 0 to 1",
        0,
        1,
    ),
    "croma": Measure(
        "CRoMa",
        "how much nearer the five nearest of the first kind are than the five of the second, from -1 to 1: median over "
        "nuclei",
        -1,
        1,
    ),
    "croma_tail": Measure("CRoMa, worst tenth", "its mean over the tenth of nuclei where it is the least", -1, 1),
    "batch_accuracy": Measure(
        "site told",
        "balanced accuracy of a linear probe of the site, on slides that it has not seen, classes even in every site; "
        "chance is best",
        1,
        None,
    ),
    "performance_drop": Measure(
        "drop on an unseen site", "share of balanced accuracy that a probe loses on a site left out; 0 is best", 0.5, 0
    ),
    "nipd": Measure(
        "nIPD",
        "accuracy above chance that is lost as class and site go together more and more in the training part; 0 is "
        "best, -0.5 a straight fall to chance",
        -1,
        0,
    ),
    "ece_seen": Measure("calibration error, seen sites", "of the probe on unseen slides of sites it has seen", 0.5, 0),
    "ece_unseen": Measure("calibration error, unseen site", "of the same probe on the site left out", 0.5, 0),
    "calibration_shift": Measure("calibration shift", "the second of these less the first; 0 is best", 0.5, 0),
    "site_accuracy": Measure(
        "site told, no labels",
        "balanced accuracy of a linear probe of the site of curated cells, on patients that it has not seen; chance is "
        "best",
        1,
        None,
    ),
    "recall_at_1": Measure(
        "known again, re-stained", "share of cells whose turned and re-stained copy is the nearest of all copies", 0, 1
    ),
    f"recall_at_1_{TURNED}": Measure("known again, turned", "the same, turned alone: the one to compare with", 0, 1),
    **{
        f"recall_at_1_q{quality}": Measure(
            f"known again, JPEG {quality}", f"the same, turned and compressed with quality {quality}", 0, 1
        )
        for quality in QUALITIES
    },
}
"""By name, in the order of cards."""


def shown_task(task: str) -> str:
    """A task as cards name it: of a path the kind and the last folder, ``site of cells``."""
    kind, colon, place = task.partition(":")
    return f"{kind} of {PurePosixPath(place).name}" if colon else kind


def place_of(task: str) -> tuple[int, str]:
    """Sorts tasks: labelled ones, then sites, then copies."""
    kinds = ("site", "restained", "jpeg")
    kind = task.partition(":")[0]
    return (1 + kinds.index(kind) if kind in kinds else 0), task
