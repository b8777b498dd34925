"""One encoder on one task: every protocol, fold and probe, as rows of the scores table and stored predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from joblib import Parallel, delayed

from lemon.probe import linear, metrics
from lemon.probe.config import ProbeSettings
from lemon.probe.folds import PAPER
from lemon.probe.nuclei import Nuclei
from lemon.probe.robustness import robustness
from lemon.probe.task import Fold, Task
from lemon.schema import ScoreRow

OVER_FOLDS = -1
"""The fold of a row that is of all folds: a mean over folds, or a bound of its interval."""

ROBUSTNESS = "robustness"
"""The protocol of rows that are measures of robustness; ``batches`` is the number of hospitals, scanners or sites."""

MAIN_METRICS = ("balanced_accuracy", "pearson", "recall_at_1")
"""What tables show: of classification, of regression, of retrieval."""

INTERVALS = {
    "classification": ("balanced_accuracy", "macro_f1"),
    "regression": ("pearson",),
    "retrieval": ("recall_at_1",),
}
"""Kind of a task -> metrics whose mean over folds has an interval."""


class Score(NamedTuple):
    """A value of a metric over the ``n`` crops that a fold held out."""

    protocol: str
    fold: int
    metric: str
    value: float
    n: int


@dataclass(frozen=True)
class Scored:
    """``predictions``: one row a crop that was held out."""

    scores: list[Score]
    predictions: pa.Table


def score_task(task: Task, embedding: np.ndarray, settings: ProbeSettings) -> Scored:
    """Fit and score the probes of a task.

    Args:
        task: crops with labels or targets; its images are not used.
        embedding: float32 [N, D].
        settings: which protocols, probes and features.

    A metric of the linear probe has its plain name; other probes prefix theirs (``knn_balanced_accuracy``). PCA makes
    a protocol of its own (``leak-free-pca256``). Rows over folds hold the mean, and with ``_low`` and ``_high`` the
    bounds of its interval over whole slides, which are NaN where there is one slide.
    """
    target = _target(task)
    protocols = [protocol for protocol in task.protocols if protocol.name in settings.protocols] or list(task.protocols)
    jobs = [
        (protocol, features, probe, number)
        for protocol in protocols
        for features in settings.features
        for probe in _probes(task, settings)
        for number in range(len(protocol.folds))
    ]
    outputs = Parallel(n_jobs=-1)(
        delayed(predict_fold)(
            embedding,
            target,
            protocol.folds[number],
            inner_groups=protocol.inner_groups,
            kind=task.kind,
            probe=probe,
            features=features,
            class_weight=class_weight_of(protocol.name, settings),
            seed=settings.seed,
        )
        for protocol, features, probe, number in jobs
    )
    grouped: dict[tuple[str, str], list[tuple[Fold, np.ndarray]]] = {}
    for (protocol, features, probe, number), output in zip(jobs, outputs, strict=True):
        name = protocol.name if features == "raw" else f"{protocol.name}-{features}"
        grouped.setdefault((name, probe), []).append((protocol.folds[number], output))
    scores: list[Score] = []
    tables = []
    for (name, probe), folds in grouped.items():
        prefix = "" if probe == "linear" else f"{probe.replace('-', '_')}_"
        values = [*_fold_scores(task, target, folds), *_means(task, target, folds, settings)]
        scores += [Score(name, fold, prefix + metric, value, n) for fold, metric, value, n in values]
        tables += [_predictions(task, target, folds, protocol=name, probe=probe)]
    if settings.robustness:
        scores += _robustness_scores(task, embedding, target, settings)
    return Scored(scores, pa.concat_tables(tables))


def class_weight_of(protocol: str, settings: ProbeSettings) -> linear.ClassWeight:
    """Of logistic regression under a protocol: where the settings leave it to that, the paper's is plain."""
    if settings.class_weight != "protocol":
        return settings.class_weight
    return "none" if protocol == PAPER else "balanced"


def fold_means(scores: Iterable[Score | ScoreRow]) -> Iterator[tuple[str, str, float, float]]:
    """(protocol, metric, mean over folds, standard deviation over folds) of one encoder's scores on one task."""
    folds: dict[tuple[str, str], list[float]] = {}
    for score in scores:
        if score.fold != OVER_FOLDS:
            folds.setdefault((score.protocol, score.metric), []).append(score.value)
    for (protocol, metric), values in folds.items():
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
        yield protocol, metric, float(np.nanmean(values)), spread


def predict_fold(
    embedding: np.ndarray,
    target: np.ndarray,
    fold: Fold,
    *,
    inner_groups: np.ndarray | None,
    kind: str,
    probe: str,
    features: linear.Features,
    class_weight: linear.ClassWeight,
    seed: int,
) -> np.ndarray:
    """Fit on a fold's training part and predict its test part, float32.

    Probabilities [n, K], targets [n, G], or of retrieval the target [n, 1] of the nearest crop.
    """
    train, test = embedding[fold.train], embedding[fold.test]
    known = target[fold.train]
    if kind == "retrieval":
        return known[nearest(test, train)][:, None].astype(np.float32)
    groups = None if inner_groups is None else inner_groups[fold.train]
    if kind == "regression":
        if probe == "hest-bench":
            fitted = linear.fit_hest_bench(train, known)
        else:
            fitted = linear.fit_regressor(train, known, groups=groups, seed=seed, features=features)
        return np.asarray(fitted.model.predict(test), np.float32).reshape(len(test), -1)
    if probe == "knn":
        fitted = linear.fit_neighbours(train, known, features=features)
    else:
        fitted = linear.fit_classifier(
            train, known, groups=groups, seed=seed, features=features, class_weight=class_weight
        )
    return linear.class_probabilities(fitted.model, test, classes=int(target.max()) + 1)


def quick_scores(task: Task, embedding: np.ndarray) -> dict[str, float]:
    """The main metric of a task, mean over the folds of its last protocol, by probes without a search: in a second.

    Not comparable with ``score_task``. A metric that is not defined, as of equal embeddings, is left out.
    """
    target = _target(task)
    folds = [(fold, _quick_output(task.kind, embedding, target, fold)) for fold in task.protocols[-1].folds]
    values: dict[str, list[float]] = {}
    for _, metric, value, _ in _fold_scores(task, target, folds):
        if metric in MAIN_METRICS and np.isfinite(value):
            values.setdefault(metric, []).append(value)
    return {metric: float(np.mean(each)) for metric, each in values.items()}


def _quick_output(kind: str, embedding: np.ndarray, target: np.ndarray, fold: Fold) -> np.ndarray:
    """As of ``predict_fold``."""
    train, test = embedding[fold.train], embedding[fold.test]
    if kind == "retrieval":
        return target[fold.train][nearest(test, train)][:, None].astype(np.float32)
    model = linear.fit_quickly(train, target[fold.train], classify=kind == "classification")
    if kind == "classification":
        return linear.class_probabilities(model, test, classes=int(target.max()) + 1)
    return np.asarray(model.predict(test), np.float32).reshape(len(test), -1)


def nearest(queries: np.ndarray, searched: np.ndarray, *, chunk: int = 1024) -> np.ndarray:
    """Row of ``searched`` float32 [M, D] that is nearest to each query [N, D] by cosine: int64 [N]."""
    unit = [each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12) for each in (queries, searched)]
    rows = [(part @ unit[1].T).argmax(axis=1) for part in np.array_split(unit[0], max(1, len(queries) // chunk))]
    return np.concatenate(rows)


def _target(task: Task) -> np.ndarray:
    """Indices of classes or of crops int64 [N], or targets float32 [N, G]."""
    if task.kind == "regression":
        return task.target
    if task.kind == "retrieval":
        return np.unique(task.target, return_inverse=True)[1]
    order = {name: index for index, name in enumerate(task.target_names)}
    return np.array([order[name] for name in task.target], np.int64)


def _probes(task: Task, settings: ProbeSettings) -> list[str]:
    fitting = {"classification": ("linear", "knn"), "regression": ("linear", "hest-bench"), "retrieval": ()}[task.kind]
    return [probe for probe in settings.probes if probe in fitting] or ["linear"]


def _fold_scores(
    task: Task, target: np.ndarray, folds: list[tuple[Fold, np.ndarray]]
) -> Iterator[tuple[int, str, float, int]]:
    """(fold, metric, value, number of crops) of each fold."""
    for number, (fold, output) in enumerate(folds):
        truth = target[fold.test]
        if task.kind == "classification":
            scores = metrics.classification_scores(truth, output)
        elif task.kind == "retrieval":
            scores = {"recall_at_1": float((output[:, 0] == truth).mean())}
        else:
            scores = {"pearson": metrics.mean_pearson(truth, output)}
        for metric, value in scores.items():
            yield number, metric, value, len(truth)


def _means(
    task: Task, target: np.ndarray, folds: list[tuple[Fold, np.ndarray]], settings: ProbeSettings
) -> Iterator[tuple[int, str, float, int]]:
    """Means over folds with the bounds of their intervals, by a bootstrap of whole slides."""
    test = np.concatenate([fold.test for fold, _ in folds])
    output = np.concatenate([part for _, part in folds])
    number = np.repeat(np.arange(len(folds)), [len(fold.test) for fold, _ in folds])
    cluster, truth = task.groups[task.cluster][test], target[test].reshape(len(test), -1)
    for metric in INTERVALS[task.kind]:
        counts = metrics.counts_of(metric, truth, output, fold=number, cluster=cluster)
        found = metrics.bootstrap(counts, seed=settings.seed, draws=settings.bootstrap).interval()
        for suffix, value in (("", found.value), ("_low", found.low), ("_high", found.high)):
            yield OVER_FOLDS, metric + suffix, value, len(test)


def _predictions(
    task: Task, target: np.ndarray, folds: list[tuple[Fold, np.ndarray]], *, protocol: str, probe: str
) -> pa.Table:
    test = np.concatenate([fold.test for fold, _ in folds])
    number = np.repeat(np.arange(len(folds)), [len(fold.test) for fold, _ in folds])
    output = np.concatenate([part for _, part in folds]).astype(np.float32)
    truth = target[test].reshape(len(test), -1).astype(np.float32)
    return pa.table(
        {
            "sample_id": pa.array(task.sample_ids[test], pa.string()),
            "cluster": pa.array(task.groups[task.cluster][test], pa.string()),
            "protocol": pa.repeat(pa.scalar(protocol), len(test)),
            "probe": pa.repeat(pa.scalar(probe), len(test)),
            "fold": pa.array(number, pa.int32()),
            "truth": list_column(truth),
            "predicted": list_column(output),
        }
    )


def list_column(values: np.ndarray) -> pa.ListArray:
    """float32 [N, K] as a list column, whose length may differ between tasks."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(offsets, values.ravel())


def _robustness_scores(task: Task, embedding: np.ndarray, target: np.ndarray, settings: ProbeSettings) -> list[Score]:
    """Measures with the bounds of their intervals; of a task that asks for the batch itself only how many there are."""
    if task.batch is None or task.kind != "classification":
        return []
    batch = task.groups[task.batch]
    if np.array_equal(batch, task.target):
        return [Score(ROBUSTNESS, OVER_FOLDS, "batches", len(task.target_names), len(target))]
    nuclei = Nuclei(embedding, target, batch, task.groups["slide"])
    found = robustness(nuclei, seed=settings.seed, draws=settings.bootstrap)
    if found is None:
        return []
    values: dict[str, float] = {"batches": found.n_batches}
    for measure, (value, low, high) in found.measures.items():
        values |= {measure: value, f"{measure}_low": low, f"{measure}_high": high}
    values |= {f"{measure}_chance": value for measure, value in found.chance.items()}
    return [Score(ROBUSTNESS, OVER_FOLDS, name, value, found.n) for name, value in values.items() if np.isfinite(value)]
