"""What is known of the LEMON paper (arXiv 2603.25802): its recipe, what its tables and figures show, its scores.

``assets/paper.csv`` has the 88 scores of its Tables 1, 2 and 5 as printed, mean and standard deviation over folds. They
are facts out of that paper, measured by its authors, and no result of this project.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lemon.errors import ConfigError
from lemon.runtime.tables import ANY_NUMBER, Column, Form, read_user_table

COLUMNS = ("artefact", "row", "column", "value", "spread")

_FORM = Form(
    "paper:",
    (
        Column("artefact", filled=True),
        Column("row"),
        Column("column"),
        Column("value", filled=True, number=ANY_NUMBER),
        Column("spread", number=(0, math.inf)),
    ),
)

SHIPPED = "shipped"
"""In place of a path: the scores that come with LEMON."""

_SHIPPED = Path(__file__).parent / "assets" / "paper.csv"

SOURCE = "the LEMON paper, arXiv 2603.25802, Tables 1, 2 and 5"

UNKNOWN = "not at hand"

SCORE = "linear probe: balanced accuracy, or Pearson correlation over the top 50 genes; mean (s.d.) over folds"

RECIPE = {
    "Cells": "10 M",
    "Slides": "about 10,000, TCGA diagnostic",
    "Organs": "10",
    "Encoder": "ViT-S/8",
    "Method": "MoCo v3",
    "Images seen": "150 M (150 epochs of 1 M)",
    "Batch": "4,096",
    "Seeds": UNKNOWN,
    "Score": SCORE,
}
"""Its default pretraining, which its studies vary; whether they change more than they say is not known here."""

ENCODERS = {
    "Encoders": "LEMON: ViT-S/8 by MoCo v3, 10 M cells of about 10,000 TCGA slides, 150 M images, batch 4,096; others",
    "Score": SCORE,
}


@dataclass(frozen=True)
class Artefact:
    """A table or figure of the paper: what it shows, and what it was made with as far as known."""

    key: str
    name: str
    shows: str
    facts: dict[str, str]


ARTEFACTS = {
    artefact.key: artefact
    for artefact in (
        Artefact(
            "table1",
            "Table 1",
            "LEMON beside other encoders on labelled nuclei: NuCLS (three levels of classes), "
            "atypical mitoses (MIDOG 2025) and gene expression (HEST: bowel, breast, lung).",
            ENCODERS,
        ),
        Artefact(
            "figure2",
            "Figure 2",
            "Accuracy against arithmetic. Its FLOPs are multiply-adds without the products inside attention: 0.55 G "
            "for ViT-S/8, which is 1.12 GFLOP of true arithmetic.",
            ENCODERS,
        ),
        Artefact(
            "table2",
            "Table 2",
            "How views are made: a0 (as MoCo), a1 (rotation, stronger colours, erasing), a1 with grayscale (its "
            "default), a1 with stain drawn from 1 or from 10 fitted Gaussians.",
            RECIPE,
        ),
        Artefact(
            "table5",
            "Table 5",
            "DINOv2 variants: as published; without the local-to-global term; without it and with KDE (von "
            "Mises-Fisher kernel, kappa 5, weight 0.05) in place of KoLeo.",
            RECIPE | {"Method": "DINOv2 and its variants"},
        ),
        Artefact(
            "figure3_size",
            "Figure 3, size",
            "Scores by the number of cells in pretraining. The paper reports that they saturate near 1 M cells.",
            RECIPE | {"Cells": "varied"},
        ),
        Artefact(
            "figure3_slides",
            "Figure 3, slides",
            "Scores by the number of slides that the same number of cells comes from.",
            RECIPE | {"Cells": "1 M", "Slides": "varied"},
        ),
        Artefact(
            "figure3_organs",
            "Figure 3, organs",
            "Scores by the number of organs that the same number of cells comes from.",
            RECIPE | {"Cells": "1 M", "Slides": UNKNOWN, "Organs": "varied"},
        ),
        Artefact("figure4", "Figure 4", "t-SNE of 100,000 cells of one slide.", {"Cells": "100,000", "Slides": "1"}),
        Artefact("figure5", "Figure 5", "Views of the same cells under each augmentation policy.", {}),
    )
}


@dataclass(frozen=True)
class Contradiction:
    """A place where the paper does not agree with itself: the artefact that a reader compares with, and what is odd."""

    artefact: str
    text: str


CONTRADICTIONS = (
    Contradiction(
        "table1",
        "Section 3.3 gives LEMON 0.773 on NuCLS and 0.748 on MIDOG; Table 1 has 0.779 and 0.746.",
    ),
    Contradiction(
        "table1",
        "LEMON is not best on HEST-breast: 0.156, below DINOv2-g 0.164, DINOv2-S 0.157 and H-optimus-0 0.157.",
    ),
    Contradiction("table2", "a1 alone (0.784) beats a1+gray (0.779), the default, on NuCLS."),
    Contradiction(
        "table5",
        "DINOv2 with KDE (0.147) beats MoCo v3 (0.128) on HEST-lung, though the text calls MoCo v3 best throughout.",
    ),
)


@dataclass(frozen=True)
class Printed:
    """A number that the paper prints; ``spread`` is its standard deviation, NaN where not given."""

    artefact: str
    row: str
    column: str
    value: float
    spread: float


def read_paper(path: str) -> list[Printed]:
    """The paper's numbers of ``shipped``, or a CSV with ``COLUMNS``. Raises ConfigError with the line that is wrong."""
    table = read_user_table(_SHIPPED if path == SHIPPED else path, form=_FORM)
    keys = {plain_key(each.name): each.key for each in ARTEFACTS.values()}
    printed = []
    for index, row in enumerate(table.rows()):
        artefact = keys.get(plain_key(row["artefact"]))
        if artefact is None:
            known = "; ".join(each.name for each in ARTEFACTS.values())
            raise ConfigError(f"{table.where(index)}: got the artefact {row['artefact']!r}; expected one of {known}")
        spread = math.nan if row["spread"] is None else row["spread"]
        printed.append(Printed(artefact, row["row"] or "", row["column"] or "", row["value"], spread))
    return printed


class PaperNumbers:
    """The paper's numbers, found by artefact, row and column; those that fitted nothing here are listed, too."""

    def __init__(self, printed: Iterable[Printed] = ()) -> None:
        self._printed = list(printed)
        self._shown: set[Printed] = set()

    def find(self, artefact: str, *, row: Iterable[str], column: str) -> Printed | None:
        """The number in a column (a task) of a row, which may have several names."""
        rows = {plain_key(name) for name in row}
        for each in self._printed:
            if (each.artefact, plain_key(each.column)) == (artefact, plain_key(column)) and plain_key(each.row) in rows:
                self._shown.add(each)
                return each
        return None

    def notes(self, artefact: str) -> list[str]:
        """Where the paper contradicts itself about an artefact whose numbers are shown."""
        is_shown = any(each.artefact == artefact for each in self._printed)
        return [f"In the paper: {each.text}" for each in CONTRADICTIONS if is_shown and each.artefact == artefact]

    def left(self, artefact: str) -> list[Printed]:
        """Those of an artefact that ``find`` has not given out."""
        return [each for each in self._printed if each.artefact == artefact and each not in self._shown]


def plain_key(text: str) -> str:
    """A name without case, spaces and signs, so that ``a1+gray`` is ``a1_gray`` and ``Table 1`` is ``table1``."""
    return re.sub(r"[^a-z0-9]", "", text.lower())
