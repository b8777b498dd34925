"""The robustness card of an encoder: what its embeddings hold of hospitals, scanners, stains and compression.

It is made of the scores that ``lemon probe`` left, whatever tasks they are of, and says what was not measured. In words
of the card a *site* is a hospital, a scanner or a laboratory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from lemon.probe.card_figure import card_figure
from lemon.probe.figures import save_figure
from lemon.probe.folds import LEAK_FREE
from lemon.probe.measures import MEASURES, Measure, place_of, shown_task
from lemon.probe.score import OVER_FOLDS, ROBUSTNESS, fold_means
from lemon.probe.tables import encoder_labels, encoder_stem, read_scores
from lemon.runtime.store import Store, code_version
from lemon.schema import RobustnessRow, ScoreRow

FOLDER = "cards"
"""In an output of ``lemon probe``: ``<encoder>/card.json``, ``.md``, ``.png``; ``robustness.parquet`` has all rows."""

TABLE = f"{FOLDER}/robustness.parquet"


class CardLine(NamedTuple):
    """A measure on a task: a row of each encoder in their order, None where it was not measured."""

    measure: Measure
    task: str
    rows: tuple[RobustnessRow | None, ...]


class Cards(NamedTuple):
    """Cards beside each other: encoders' names, a line for each measure, and a sentence for each kind without any."""

    encoders: tuple[str, ...]
    lines: tuple[CardLine, ...]
    missing: tuple[str, ...]


def card_rows(rows: Iterable[ScoreRow]) -> list[RobustnessRow]:
    """The measures of robustness among rows of the scores table, in the order of cards."""
    units: dict[tuple[str, str, str, str], list[ScoreRow]] = {}
    for row in rows:
        units.setdefault((row.model, row.model_fingerprint, row.task, row.data_fingerprint), []).append(row)
    made = [row for unit_rows in units.values() for row in _unit_rows(unit_rows)]
    return sorted(made, key=lambda row: (row.model, row.model_fingerprint, _order(row)))


def _unit_rows(rows: Sequence[ScoreRow]) -> Iterator[RobustnessRow]:
    """Of one encoder on one task: means over folds, and what is of all folds together."""
    pooled = {(row.protocol, row.metric): row for row in rows if row.fold == OVER_FOLDS}
    values = {(protocol, metric): mean for protocol, metric, mean, _ in fold_means(rows)}
    values |= {key: row.value for key, row in pooled.items() if row.protocol == ROBUSTNESS}
    batches = values.get((ROBUSTNESS, "batches"))
    for (protocol, metric), value in values.items():
        if (measure := measure_of(rows[0].task, protocol, metric)) is None or not math.isfinite(value):
            continue
        bounds = [pooled.get((protocol, f"{metric}_{end}")) for end in ("low", "high")]
        low, high = (bound.value if bound and math.isfinite(bound.value) else None for bound in bounds)
        n = sum(row.n for row in rows if (row.protocol, row.metric) == (protocol, metric) and row.fold != OVER_FOLDS)
        n = n or pooled[protocol, metric].n
        n_batches = None if batches is None else int(batches)
        yield RobustnessRow(
            model=rows[0].model,
            model_fingerprint=rows[0].model_fingerprint,
            task=rows[0].task,
            measure=measure,
            value=value,
            low=low,
            high=high,
            chance=values.get((protocol, f"{metric}_chance"), chance_of(measure, n=n, n_batches=n_batches)),
            n=n,
            n_batches=n_batches,
            data_fingerprint=rows[0].data_fingerprint,
        )


def _order(row: RobustnessRow) -> tuple[int, str, int]:
    return (*place_of(row.task), list(MEASURES).index(row.measure))


def measure_of(task: str, protocol: str, metric: str) -> str | None:
    """What a pooled score is called on cards; None where it is none of robustness."""
    if task.startswith("site:") and (protocol, metric) == (LEAK_FREE, "balanced_accuracy"):
        return "site_accuracy"
    if metric == "recall_at_1" and protocol != LEAK_FREE:
        metric = f"{metric}_{protocol}"
    elif metric != "recall_at_1" and protocol != ROBUSTNESS:
        return None
    return metric if metric in MEASURES else None


def chance_of(measure: str, *, n: int, n_batches: int | None) -> float | None:
    """What embeddings without information get, where it follows from counts."""
    if measure.startswith("recall_at_1"):
        return 1 / n
    return 1 / n_batches if MEASURES[measure].best is None and n_batches else None


def write_cards(store: Store) -> list[str]:
    """Write a card of each encoder of an output of ``lemon probe``, and all of them in one table and one picture.

    Returns the names of the cards' texts; none where no task says anything of robustness.
    """
    rows = card_rows(read_scores(store))
    if not rows:
        return []
    store.write_table(TABLE, RobustnessRow.table(rows))
    store.write_bytes(f"{FOLDER}/cards.md", comparison_markdown(rows).encode())
    save_figure(card_figure(rows), store, f"{FOLDER}/cards")
    names = []
    for stem, label in encoder_labels(rows).items():
        own = [row for row in rows if encoder_stem(row) == stem]
        store.write_bytes(f"{FOLDER}/{stem}/card.json", card_json(own).encode())
        store.write_bytes(f"{FOLDER}/{stem}/card.md", card_markdown(own, name=label).encode())
        save_figure(card_figure(own), store, f"{FOLDER}/{stem}/card")
        names.append(f"{FOLDER}/{stem}/card.md")
    return names


def card_json(rows: Sequence[RobustnessRow]) -> str:
    """The card of one encoder as JSON: its measures, as in the table, and what was not measured."""
    record: dict[str, Any] = {
        "encoder": rows[0].model,
        "model_fingerprint": rows[0].model_fingerprint,
        "lemon": code_version(),
        "measures": [{key: value for key, value in asdict(row).items() if not key.startswith("model")} for row in rows],
        "not_measured": not_measured(rows),
    }
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def card_markdown(rows: Sequence[RobustnessRow], *, name: str) -> str:
    """The card of one encoder as Markdown."""
    lines = [f"# Robustness of {name}", "", "| measure | on | value | 95 % interval | chance | nuclei | sites |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|")
    for row in rows:
        value, interval = shown(row)
        chance, sites = ("" if number is None else f"{number:.3g}" for number in (row.chance, row.n_batches))
        place = shown_task(row.task)
        lines.append(
            f"| {MEASURES[row.measure].title} | {place} | {value} | {interval} | {chance} | {row.n:,} | {sites} |"
        )
    return "\n".join([*lines, "", *_legend(rows)]) + "\n"


def comparison_markdown(rows: Sequence[RobustnessRow]) -> str:
    """All encoders as Markdown, one a column."""
    cards = beside(rows)
    lines = [
        f"| measure | on | chance | {' | '.join(cards.encoders)} |",
        "|---|---|--:|" + "--:|" * len(cards.encoders),
    ]
    for measure, task, of_encoders in cards.lines:
        chances = sorted({f"{row.chance:.2g}" for row in of_encoders if row and row.chance is not None}, key=float)
        texts = [
            " to ".join(chances[:1] + chances[1:][-1:]),
            *(_with_interval(row) if row else "" for row in of_encoders),
        ]
        lines.append(f"| {measure.title} | {task} | {' | '.join(texts)} |")
    return "\n".join([*lines, "", *_legend(rows)]) + "\n"


def beside(rows: Sequence[RobustnessRow]) -> Cards:
    """The cards of some encoders beside each other: what a page shows of them."""
    labels = encoder_labels(rows)
    found = {(row.task, row.measure, encoder_stem(row)): row for row in rows}
    keys = dict.fromkeys((row.task, row.measure) for row in sorted(rows, key=_order))
    lines = (
        CardLine(MEASURES[measure], shown_task(task), tuple(found.get((task, measure, stem)) for stem in labels))
        for task, measure in keys
    )
    return Cards(tuple(labels.values()), tuple(lines), tuple(not_measured(rows)))


def _with_interval(row: RobustnessRow) -> str:
    value, interval = shown(row)
    return f"{value} ({interval})" if interval else value


def shown(row: RobustnessRow) -> tuple[str, str]:
    """A value and its interval as text, the second empty where there is none."""
    interval = "" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}"
    return f"{row.value:.3f}", interval


def not_measured(rows: Iterable[RobustnessRow]) -> list[str]:
    """A line for each kind of measure that is absent: what it is, and the task that measures it."""
    present = {row.measure for row in rows}
    kinds = {
        "croma": "class against site: tasks=nucls-super, midogpp-mitosis, or folder:NAME with hospital or scanner",
        "site_accuracy": "site without labels: tasks=site:PATH of cells that were curated with the column site",
        "recall_at_1": "another stain: tasks=restained:PATH of curated cells",
        "recall_at_1_turned": "compression: tasks=jpeg:PATH of curated cells",
    }
    return [line for measure, line in kinds.items() if measure not in present]


def _legend(rows: Sequence[RobustnessRow]) -> list[str]:
    used = [MEASURES[measure] for measure in MEASURES if any(row.measure == measure for row in rows)]
    lines = [f"- {measure.title}: {measure.about}" for measure in used]
    return lines + [f"- Not measured: {line}" for line in not_measured(rows)]
