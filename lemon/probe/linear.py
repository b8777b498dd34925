"""Linear and nearest-neighbour probes of frozen embeddings, by scikit-learn.

What is learned from data (standardisation, PCA, C, alpha) is learned from the training part of a fold alone; C and
alpha are chosen on an inner split that never divides a group.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from lemon.probe.metrics import mean_pearson

C_GRID = tuple(10.0 ** np.linspace(-8, 4, 15))
ALPHA_GRID = tuple(10.0 ** np.linspace(-2, 8, 11))
INNER_FOLDS = 3
PATIENCE = 2
"""Steps along a path of rising C that fall below the best inner score before the search stops."""
PATIENT_FROM = 1e-3
"""C below which the search does not stop: fits there are cheap, and so alike that they differ by accident."""
MAX_ITER = 500
NEIGHBOURS = 20
QUICK_C, QUICK_ALPHA = 0.01, 1000.0
"""Strong: a look is at some hundred crops, about as many as an embedding has values."""

Features = Literal["raw", "pca256"]
ClassWeight = Literal["balanced", "none"]
Criterion = Literal["balanced_accuracy", "log_loss"]


class Fitted(NamedTuple):
    """A fitted probe, what the inner search chose, and the inner score of each value that it tried."""

    model: Pipeline
    chosen: float
    inner_scores: dict[float, float]


def preprocessing(features: Features, embedding: np.ndarray) -> list[Any]:
    """Standardisation, after a PCA to 256 dimensions where asked for and where the embedding is wider."""
    rows, width = embedding.shape
    if features == "pca256" and width > 256:
        return [PCA(min(256, rows), svd_solver="randomized", random_state=0), StandardScaler()]
    return [StandardScaler()]


def fit_classifier(
    embedding: np.ndarray,
    labels: np.ndarray,
    *,
    groups: np.ndarray | None,
    seed: int,
    features: Features = "raw",
    class_weight: ClassWeight = "balanced",
    criterion: Criterion = "balanced_accuracy",
    grid: Sequence[float] = C_GRID,
) -> Fitted:
    """Logistic regression whose C has the best inner balanced accuracy, or log loss.

    Each inner fold follows C upwards from a warm start, where fits are cheap, and the search ends when ``PATIENCE``
    steps in a row from ``PATIENT_FROM`` on were worse than the best: the costly, hardly penalised fits at the end of
    the grid are seldom made.
    Steps up to the last one where one class takes all do not count.

    Args:
        embedding: float32 [N, D].
        labels: int [N].
        groups: [N] of the inner split; None: at random.
        seed: of the inner split.
        features: as they are, or their first 256 principal components.
        class_weight: ``balanced`` weighs classes alike, as balanced accuracy does.
        criterion: of C. Balanced accuracy may not fall for a C that is far too small, whose probabilities mean nothing.
        grid: values of C, rising.
    """
    paths = [
        _Path(embedding, labels, train, test, features=features, class_weight=class_weight, criterion=criterion)
        for train, test in inner_splits(labels, groups, seed=seed, classify=True)
    ]
    scores: dict[float, float] = {}
    candidates: list[float] = []
    chance = 1 / len(np.unique(labels))
    for c in grid:
        scores[c] = float(np.mean([path.score(c) for path in paths]))
        # Under a strong penalty one class takes all. A better score at a stronger one still, where all crops are about
        # even, was an accident.
        candidates = [] if math.isclose(scores[c], chance) else [*candidates, c]
        late = [scores[each] for each in candidates if each > PATIENT_FROM]
        if len(late) >= PATIENCE and max(late[-PATIENCE:]) < max(scores[each] for each in candidates):
            break
    best = max(candidates or scores, key=lambda c: scores[c])
    return Fitted(fit_logistic(embedding, labels, c=best, features=features, class_weight=class_weight), best, scores)


def fit_logistic(
    embedding: np.ndarray,
    labels: np.ndarray,
    *,
    c: float,
    features: Features = "raw",
    class_weight: ClassWeight = "balanced",
) -> Pipeline:
    """Logistic regression of labels int [N] on embeddings float32 [N, D] with a C that is known."""
    model: Pipeline = make_pipeline(*preprocessing(features, embedding), _logistic(c, class_weight))
    return _quietly(model.fit, embedding, labels)


class _Path:
    """Logistic regression of one inner fold along a path of C."""

    def __init__(
        self,
        embedding: np.ndarray,
        labels: np.ndarray,
        train: np.ndarray,
        test: np.ndarray,
        *,
        features: Features,
        class_weight: ClassWeight,
        criterion: Criterion,
    ) -> None:
        prepared = make_pipeline(*preprocessing(features, embedding[train])).fit(embedding[train])
        self._train, self._test = prepared.transform(embedding[train]), prepared.transform(embedding[test])
        self._labels, self._truth = labels[train], labels[test]
        self._model = _logistic(1.0, class_weight, warm_start=True)
        self._criterion = criterion

    def score(self, c: float) -> float:
        """The criterion on the inner test part, more being better."""
        self._model.set_params(C=c)
        model = _quietly(self._model.fit, self._train, self._labels)
        if self._criterion == "log_loss":
            classes = max(self._labels.max(), self._truth.max()) + 1
            probability = class_probabilities(model, self._test, classes=classes)
            return float(np.log(np.maximum(probability[np.arange(len(self._truth)), self._truth], 1e-12)).mean())
        predicted = model.predict(self._test)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
            return float(balanced_accuracy_score(self._truth, predicted))


def fit_regressor(
    embedding: np.ndarray,
    targets: np.ndarray,
    *,
    groups: np.ndarray | None,
    seed: int,
    features: Features = "raw",
    grid: Sequence[float] = ALPHA_GRID,
) -> Fitted:
    """Ridge regression of float [N, G] whose alpha has the best inner Pearson correlation, averaged over targets."""
    embedding = embedding.astype(np.float64)  # the normal equations of correlated values are ill-conditioned in float32
    scores = dict.fromkeys(grid, 0.0)
    for train, test in inner_splits(targets, groups, seed=seed, classify=False):
        prepared = make_pipeline(*preprocessing(features, embedding[train])).fit(embedding[train])
        inner_train, inner_test = prepared.transform(embedding[train]), prepared.transform(embedding[test])
        for alpha in grid:
            predicted = Ridge(alpha).fit(inner_train, targets[train]).predict(inner_test)
            scores[alpha] += mean_pearson(targets[test], predicted) / INNER_FOLDS
    best = max(scores, key=lambda alpha: scores[alpha])
    model = make_pipeline(*preprocessing(features, embedding), Ridge(best))
    return Fitted(model.fit(embedding, targets), best, scores)


def fit_quickly(embedding: np.ndarray, target: np.ndarray, *, classify: bool) -> Pipeline:
    """Logistic or ridge regression whose C or alpha is given: no inner search, for a look during training."""
    model = _logistic(QUICK_C, "balanced") if classify else Ridge(QUICK_ALPHA)
    fitted: Pipeline = _quietly(make_pipeline(StandardScaler(), model).fit, embedding.astype(np.float64), target)
    return fitted


def fit_hest_bench(embedding: np.ndarray, targets: np.ndarray) -> Fitted:
    """HEST-Bench's regressor: standardised, PCA to 256, ridge with alpha = 100 / (components * genes)."""
    components = min(256, *embedding.shape)
    alpha = 100 / (components * targets.shape[1])
    model = make_pipeline(StandardScaler(), PCA(components, random_state=0), Ridge(alpha))
    return Fitted(model.fit(embedding, targets), alpha, {})


def fit_neighbours(embedding: np.ndarray, labels: np.ndarray, *, features: Features = "raw") -> Fitted:
    """The 20 nearest neighbours by cosine of standardised embeddings, each weighed by its nearness."""
    neighbours = KNeighborsClassifier(
        min(NEIGHBOURS, len(labels)), metric="cosine", algorithm="brute", weights="distance"
    )
    model = make_pipeline(*preprocessing(features, embedding), neighbours)
    return Fitted(model.fit(embedding, labels), float(neighbours.n_neighbors), {})


def class_probabilities(model: Pipeline | LogisticRegression, embedding: np.ndarray, *, classes: int) -> np.ndarray:
    """Probabilities float32 [N, K] with a column for every class, also one that the training part lacked."""
    out = np.zeros((len(embedding), classes), np.float32)
    out[:, model.classes_] = model.predict_proba(embedding)
    return out


def inner_splits(
    target: np.ndarray, groups: np.ndarray | None, *, seed: int, classify: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Three inner folds, by group where there are groups enough, stratified by class for classification."""
    by_group = groups is not None and len(np.unique(groups)) >= INNER_FOLDS
    options: dict[str, Any] = {"n_splits": INNER_FOLDS, "shuffle": True, "random_state": seed}
    splitter: Any
    if classify:
        splitter = StratifiedGroupKFold(**options) if by_group else StratifiedKFold(**options)
    else:
        splitter = GroupKFold(**options) if by_group else KFold(**options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        splits = list(splitter.split(np.zeros(len(target)), target if classify else None, groups if by_group else None))
        if not (classify and by_group):
            return splits
    # Where classes are sites, leaving out a group may leave a single one.
    usable = [(train, test) for train, test in splits if len(np.unique(target[train])) > 1]
    return usable or inner_splits(target, None, seed=seed, classify=classify)


def _logistic(c: float, class_weight: ClassWeight, *, warm_start: bool = False) -> LogisticRegression:
    weight = None if class_weight == "none" else "balanced"
    return LogisticRegression(C=c, class_weight=weight, max_iter=MAX_ITER, warm_start=warm_start)


def _quietly(fit: Any, *data: np.ndarray) -> Any:
    """A fit that stops at MAX_ITER is scored as it stands, without a warning for each of hundreds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return fit(*data)
