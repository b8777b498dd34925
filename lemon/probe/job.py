"""Encoders x tasks -> scores: what ``lemon probe`` does.

A unit of work is one encoder on one task. Its scores are a file that says of which data and settings they are, written
last; a rerun does what is missing or of other circumstances.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from lemon.encoders.cost import count
from lemon.encoders.device import choose_device
from lemon.encoders.open import Encoder, load_encoder, untrained_twin
from lemon.encoders.registry import check_name
from lemon.errors import EXIT_FAILURES, EXIT_OK, ConfigError
from lemon.probe.card import FOLDER, card_json, card_markdown, card_rows, write_cards
from lemon.probe.config import ProbeConfig
from lemon.probe.embedding import SharedEmbeddings
from lemon.probe.figures import draw_cost
from lemon.probe.folds import LEAK_FREE
from lemon.probe.score import MAIN_METRICS, ROBUSTNESS, Score, fold_means, score_task
from lemon.probe.tables import TWINS, read_scores, write_table1
from lemon.probe.task import Task, TaskError
from lemon.probe.tasks.catalogue import counts_table, open_task
from lemon.runtime.console import stage_logger
from lemon.runtime.identifiers import file_stem
from lemon.runtime.lease import hold
from lemon.runtime.store import CIRCUMSTANCES, Store, fingerprint
from lemon.runtime.tracking import Run, reachable_run_of, start_run, training_run_of
from lemon.schema import ScoreRow, marked

logger = stage_logger(__name__, "probe")

RUNS = "runs"
OUTPUT_NAMES = ("scores", "predictions", "embeddings", "costs", RUNS, TWINS, FOLDER)
"""Folders of a probe in its output."""

SCORES = "intervals of means over folds"
"""What scores are; those of an output that were made otherwise are made again."""

ATTACHED = ("table1.md", "table1.csv", "differences.csv", "figure2.png")
"""Files of an output that the MLflow run of each of its encoders gets."""


@dataclass(frozen=True)
class Unit:
    """One encoder on one task; ``circumstances`` names the data and the settings of its scores."""

    model: str
    model_fingerprint: str
    task: str
    data_fingerprint: str
    circumstances: str

    @property
    def stem(self) -> str:
        """<task>/<model>-<fingerprint>."""
        return f"{file_stem(self.task)}/{file_stem(self.model)}-{self.model_fingerprint}"

    @property
    def scores(self) -> str:
        """The file of rows of the scores table, written last."""
        return f"scores/{self.stem}.parquet"

    def is_done(self, store: Store) -> bool:
        """Whether its scores are there, of the same data and settings."""
        return store.circumstances(self.scores) == self.circumstances


def main(config: ProbeConfig) -> int:
    """Score every encoder on every task, log what could not be done; returns the exit code."""
    with hold(config.output, stage="probe", names=OUTPUT_NAMES) as store:
        code = _score_all(config, store)
        draw_cost(store)
        logger.info(write_table1(store))
        if cards := write_cards(store):
            logger.info(f"{len(cards)} cards of robustness: {store.uri}/{FOLDER}/cards.md, {cards[0]}, ...")
        _attach(store)
        return code


def _score_all(config: ProbeConfig, store: Store) -> int:
    device = choose_device(config.device)
    tasks, faults = open_tasks(config)
    models = [name for name in dict.fromkeys(config.models) if not _left_out(check_name, name, faults)]
    for name in models:
        try:
            encoder = load_encoder(name, device=device)
            encoder.check_of_cells()
        except (ConfigError, FileNotFoundError, ValueError) as error:
            faults.append(f"{name}: {error}")
            logger.warning(f"left out {faults[-1]}")
            continue
        trained_by = training_run_of(name) if config.on_training_run else None
        probe_model(encoder, tasks, config=config, store=store, trained_by=trained_by)
        if config.untrained:
            _probe_twin(encoder, tasks, config=config, store=store)
    if not store.list("scores"):
        raise ConfigError("models: none of them can be opened, see above")
    logger.info(f"{len(store.list('scores'))} files of scores in {store.uri}/scores; {len(faults)} left out")
    return EXIT_FAILURES if faults else EXIT_OK


def _probe_twin(encoder: Encoder, tasks: list[Task], *, config: ProbeConfig, store: Store) -> None:
    """Score an untrained encoder of the same shape, so that a table tells what training gave; note whose it is."""
    twin = untrained_twin(encoder)
    if twin is not None:
        probe_model(twin.to(next(encoder.parameters()).device), tasks, config=config, store=store)
        store.write_json(f"{TWINS}/{stem_of(encoder)}.json", {"untrained": stem_of(twin)})


def _left_out(check: Callable[[str], None], name: str, faults: list[str]) -> bool:
    """Whether a check refuses a name; the reason is logged before the hours that the others take."""
    try:
        check(name)
    except ConfigError as error:
        faults.append(str(error))
        logger.warning(f"left out {error}")
        return True
    return False


def open_tasks(config: ProbeConfig) -> tuple[list[Task], list[str]]:
    """The tasks that can be read, with their counts logged, and a line for each that cannot."""
    tasks, faults = [], []
    for name in dict.fromkeys(config.tasks):
        try:
            task = open_task(name, config.data, seed=config.seed, **config.task_options(name))
        except TaskError as error:
            faults.append(f"{name}: {error}")
            logger.warning(f"left out {faults[-1]}")
            continue
        logger.info(counts_table(task))
        tasks.append(task)
    if not tasks:
        raise ConfigError("tasks: none of them can be read, see above")
    return tasks, faults


def probe_model(
    encoder: Encoder,
    tasks: list[Task],
    *,
    config: ProbeConfig,
    store: Store,
    run: Run | None = None,
    trained_by: Run | None = None,
) -> list[ScoreRow]:
    """Score one encoder on all tasks; returns its rows of the scores table.

    Metrics go to ``run``, which stays open, or to an MLflow run of this probing that a rerun goes on with; and to the
    run that trained the encoder, where it is given.
    """
    scorer = Scorer(encoder, config=config, store=store)
    probed_by = run or _open_run(scorer)
    if trained_by is not None:
        probed_by.set_tag("training_run_id", trained_by.run_id)
    runs = [probed_by, *([trained_by] if trained_by else [])]
    scores = [row for task in tasks for row in scorer.score(task, runs)]
    rows = read_scores(store) if scores else []  # of earlier calls, too
    if card := [row for row in card_rows(rows) if row.model_fingerprint == encoder.fingerprint]:
        for each in runs:
            each.log_text(card_markdown(card, name=encoder.name), "robustness/card.md")
            each.log_text(card_json(card), "robustness/card.json")
    if run is None:
        probed_by.close()
    return scores


def stem_of(encoder: Encoder) -> str:
    """What its files are called: ``<model>-<fingerprint>``."""
    return f"{file_stem(encoder.name)}-{encoder.fingerprint}"


class Scorer:
    """Scores one encoder on tasks into an output of probing. Its cost is counted once, each crop is encoded once."""

    def __init__(self, encoder: Encoder, *, config: ProbeConfig, store: Store) -> None:
        self.encoder, self.config, self.store = encoder, config, store
        self.cost = count(encoder.model, px=encoder.cell_input.px)
        store.write_json(f"costs/{stem_of(encoder)}.json", asdict(self.cost))
        self._embeddings = SharedEmbeddings(lambda images: encoder.embed(images).cpu().numpy())

    def score(self, task: Task, runs: Sequence[Run]) -> list[ScoreRow]:
        """The rows of a task in the scores table, made where they are not there; their metrics go to ``runs``."""
        encoder, store, data = self.encoder, self.store, data_fingerprint(task)
        circumstances = fingerprint([SCORES, data, self.config.settings()])
        unit = Unit(encoder.name, encoder.fingerprint, task.name, data, circumstances)
        if not unit.is_done(store):
            scored = score_task(task, self._embedding(task, unit), self.config)
            store.write_table(f"predictions/{unit.stem}.parquet", scored.predictions)
            store.write_table(unit.scores, scores_table(scored.scores, unit, seed=self.config.seed))
        rows = ScoreRow.read(store.read_table(unit.scores))
        source = task.name.partition(":")[2] or self.config.data
        for run in runs:
            run.log(flat_metrics(rows), step=0)
            run.log_dataset(task.name, digest=data, source=source, context="probe")
            run.set_tag(f"data_fingerprint/{short_name(task.name)}", data)
        logger.info(f"{encoder.name} on {task.name}: {main_scores_line(rows)}")
        return rows

    def _embedding(self, task: Task, unit: Unit) -> np.ndarray:
        """Embeddings float32 [N, D] of a task's crops; kept in the output, so that new settings cost no new pass."""
        name = f"embeddings/{file_stem(task.name)}/{unit.model_fingerprint}-{unit.data_fingerprint}.npy"
        if self.store.exists(name):
            return np.load(io.BytesIO(self.store.read_bytes(name)))
        embedding = self._embeddings.of(task.images, title=f"{unit.model} on {task.name}")
        with self.store.write(name) as stream:
            np.save(stream, embedding)
        return embedding


def scores_table(scores: list[Score], unit: Unit, *, seed: int) -> pa.Table:
    """A unit's scores as its part of the scores table."""
    rows = [
        ScoreRow(
            model=unit.model,
            task=unit.task,
            **score._asdict(),
            seed=seed,
            model_fingerprint=unit.model_fingerprint,
            data_fingerprint=unit.data_fingerprint,
        )
        for score in scores
    ]
    return ScoreRow.table(rows).cast(marked(ScoreRow.schema, **{CIRCUMSTANCES: unit.circumstances}))


def data_fingerprint(task: Task) -> str:
    """16 hexadecimal digits of a task's crops, targets and groups."""
    digest = hashlib.sha256(np.ascontiguousarray(task.images).data)
    names = [*task.target_names, *(name for column in task.groups.values() for name in column)]
    if task.kind == "regression":
        digest.update(np.ascontiguousarray(task.target).data)
    else:
        names += task.target.tolist()
    digest.update(json.dumps([str(name) for name in names]).encode())
    return digest.hexdigest()[:16]


def flat_metrics(rows: list[ScoreRow]) -> dict[str, float]:
    """Metrics for MLflow: ``probe/<task>/<metric>`` without leaks, ``probe/<task>/<protocol>/<metric>`` otherwise.

    The metric is the mean over folds, ``_sd`` the standard deviation over them; ``_low`` and ``_high`` are the bounds
    of the mean's 95 % interval. ``robustness/<task>/<measure>``: as on the card.
    """
    metrics: dict[str, float] = {}
    for task in dict.fromkeys(row.task for row in rows):
        scored = [row for row in rows if row.task == task and row.protocol != ROBUSTNESS]
        for protocol, metric, value in _named_values(scored):
            metrics[metric_name(task, protocol, metric)] = value
    for row in card_rows(rows):
        ends = {"": row.value, "_low": row.low, "_high": row.high, "_chance": row.chance}
        known = {end: value for end, value in ends.items() if value is not None}
        metrics |= {f"robustness/{short_name(row.task)}/{row.measure}{end}": value for end, value in known.items()}
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def metric_name(task: str, protocol: str, metric: str, *, of: str = "probe") -> str:
    """A score's name in MLflow: ``probe/<task>/<metric>``, with the protocol before the metric where it has leaks."""
    group = "" if protocol == LEAK_FREE else f"{protocol}/"
    return f"{of}/{short_name(task)}/{group}{metric}"


def _named_values(rows: list[ScoreRow]) -> Iterator[tuple[str, str, float]]:
    """(protocol, name in MLflow, value) of one task's rows."""
    for protocol, metric, mean, spread in fold_means(rows):
        yield protocol, metric, mean
        yield protocol, f"{metric}_sd", spread
    for row in rows:
        if row.metric.endswith(("_low", "_high")):
            yield row.protocol, row.metric, row.value


def short_name(task: str) -> str:
    """A task in MLflow's names, where a slash begins a group: of a path its last two parts, morphometry_runs_cells."""
    kind, _, place = task.partition(":")
    return re.sub(r"[^\w.-]", "_", "_".join([kind, *PurePosixPath(place).parts[-2:]]))


def main_scores_line(rows: list[ScoreRow]) -> str:
    """The main metric of each protocol in words."""
    main = [score for score in fold_means(rows) if score[1] in MAIN_METRICS]
    return "; ".join(
        f"{metric.replace('_', ' ')} {mean:.3f} ({spread:.3f}) {protocol}" for protocol, metric, mean, spread in main
    )


def _open_run(scorer: Scorer) -> Run:
    encoder, store = scorer.encoder, scorer.store
    mark = f"{RUNS}/{stem_of(encoder)}.json"
    params = {"model": encoder.name, "width": encoder.width, "cost": asdict(scorer.cost), **scorer.config.settings()}
    tags = {"output": store.uri, "model_fingerprint": encoder.fingerprint}
    return start_run("probe", encoder.name, store=store, mark=mark, params=params, tags=tags)


def _attach(store: Store) -> None:
    """Give the tables and the figure of an output to the MLflow runs of all encoders in it."""
    for mark in store.list(RUNS, suffix=".json"):
        if (run := reachable_run_of(store, mark)) is not None:
            for name in filter(store.exists, ATTACHED):
                run.log_file(name, store.read_bytes(name))
