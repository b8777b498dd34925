"""What the LEMON paper (arXiv 2603.25802) does not say of its protocol, and what ``paper`` assumes for it here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Inference:
    """A gap in the paper's protocol.

    Args:
        tasks: what the names of the tasks begin with that it concerns.
        subject: what is not said.
        assumed: what is assumed, and why; how to have the other form.
    """

    tasks: tuple[str, ...]
    subject: str
    assumed: str


INFERENCES = (
    Inference(
        ("nucls-",),
        "folds",
        "five random folds of nuclei: the s.d. that the paper prints for NuCLS, 0.003 to 0.009, is that of random "
        "folds (binomial error of a fold: 0.005), not of hospitals",
    ),
    Inference(
        ("nucls-", "midog25-atypical"),
        "class weights",
        "none in logistic regression, as the paper states none; leak-free weighs classes alike (class_weight=balanced: "
        "both do)",
    ),
    Inference(
        ("hest-",), "target", "log(1 + count) of transcripts, as in HEST-Bench (hest.target=counts: the bare count)"
    ),
    Inference(
        ("hest-",),
        "middle of a crop",
        "centroid of the cell's polygon (hest.centre=nucleus: of its nucleus, without cells that have none)",
    ),
)


def inferences(task: str) -> list[Inference]:
    """What is assumed of the paper's protocol on a task."""
    return [each for each in INFERENCES if task.startswith(each.tasks)]
