"""Scoring of an encoder on a task."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest

from lemon.probe.config import ProbeSettings
from lemon.probe.score import OVER_FOLDS, Score, class_weight_of, quick_scores, score_task
from lemon.probe.task import Task
from tests.probe.made_up import made_up, task_of

SETTINGS = ProbeSettings(bootstrap=200, robustness=False)


def value(scores: list[Score], protocol: str, metric: str, *, fold: int = OVER_FOLDS) -> float:
    (found,) = [each.value for each in scores if (each.protocol, each.metric, each.fold) == (protocol, metric, fold)]
    return found


@pytest.mark.slow
def test_every_protocol_fold_and_probe_has_its_rows_and_every_crop_is_predicted_once():
    task, embedding = made_up()
    scored = score_task(task, embedding, ProbeSettings(bootstrap=200))
    for protocol in ("paper", "leak-free"):
        for prefix in ("", "knn_"):
            for metric in ("balanced_accuracy", "macro_f1", "auroc"):
                wanted = (protocol, prefix + metric)
                folds = [each.fold for each in scored.scores if (each.protocol, each.metric) == wanted]
                assert sorted(fold for fold in folds if fold != OVER_FOLDS) == [0, 1, 2]
            part = scored.predictions.to_pandas().query(
                f"protocol == '{protocol}' and probe == '{prefix[:3] or 'linear'}'"
            )
            assert sorted(part["sample_id"]) == sorted(task.sample_ids)
    low, middle, high = (value(scored.scores, "leak-free", f"balanced_accuracy{end}") for end in ("_low", "", "_high"))
    assert 0.7 < low < middle < high <= 1
    assert value(scored.scores, "robustness", "robustness_index") > 0.4
    assert value(scored.scores, "robustness", "batches") == 2


@pytest.mark.slow
def test_an_embedding_of_the_slide_gains_by_a_leak_and_by_nothing_else():
    """What the leak-free protocol is for: slides tell the class, so a random split rewards knowing the slide."""
    task, embedding = made_up(480, signal=0.0, per_slide=8.0)
    scores = score_task(task, embedding, SETTINGS).scores
    paper, leak_free = (value(scores, name, "balanced_accuracy") for name in ("paper", "leak-free"))
    assert paper > 0.8
    assert leak_free < paper - 0.15  # a class has few nuclei in some folds, so the mean over folds is not very near 0.5


@pytest.mark.slow
def test_noise_scores_as_chance():
    task, embedding = made_up(600, signal=0.0)
    assert value(score_task(task, embedding, SETTINGS).scores, "leak-free", "balanced_accuracy") == pytest.approx(
        0.5, abs=0.08
    )


@pytest.mark.slow
def test_scores_do_not_depend_on_how_many_processes_share_the_folds(monkeypatch):
    task, embedding = made_up()
    first = score_task(task, embedding, SETTINGS)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    second = score_task(task, embedding, SETTINGS)
    assert first.scores == second.scores
    assert first.predictions.equals(second.predictions)


@pytest.mark.parametrize(
    ("setting", "paper", "leak_free"),
    [("protocol", "none", "balanced"), ("none", "none", "none"), ("balanced", "balanced", "balanced")],
)
def test_class_weights_follow_the_protocol_unless_told_otherwise(setting, paper, leak_free):
    settings = ProbeSettings(class_weight=setting)
    assert (class_weight_of("paper", settings), class_weight_of("leak-free", settings)) == (paper, leak_free)


@pytest.mark.slow
def test_the_papers_protocol_is_plain_and_the_leak_free_one_weighs_classes_alike():
    task, embedding = made_up(160, signal=1.0)
    rare = np.flatnonzero((task.target == "tumour") | (np.arange(160) % 3 == 0))  # classes of unlike size
    task = task_of(task.images[rare], task.target[rare], task.groups["slide"][rare])

    def scores(**more):
        settings = ProbeSettings(probes=["linear"], bootstrap=100, robustness=False, **more)
        return {each[:3]: each.value for each in score_task(task, embedding[rare], settings).scores}

    default, plain, balanced = scores(), scores(class_weight="none"), scores(class_weight="balanced")
    assert plain != balanced
    assert default == {key: (plain if key[0] == "paper" else balanced)[key] for key in plain}


@pytest.mark.slow
def test_pca_makes_a_protocol_of_its_own():
    task, embedding = made_up()
    wide = np.concatenate([embedding] * 10, axis=1)
    settings = ProbeSettings(features=["raw", "pca256"], probes=["linear"], bootstrap=100, robustness=False)
    assert {each.protocol for each in score_task(task, wide, settings).scores} == {
        *("paper", "leak-free", "paper-pca256", "leak-free-pca256")
    }


def genes(n: int = 300) -> tuple[Task, np.ndarray]:
    generator = np.random.default_rng(0)
    embedding = generator.normal(size=(n, 20)).astype(np.float32)
    expression = embedding @ generator.normal(size=(20, 5)) + generator.normal(size=(n, 5))
    slide = np.array([f"s{number}" for number in generator.integers(0, 6, n)])
    return task_of(np.zeros((n, 60, 60, 3), np.uint8), expression.astype(np.float32), slide), embedding


def test_genes_are_scored_by_their_mean_correlation_and_an_interval_over_slides():
    task, embedding = genes()
    scored = score_task(task, embedding, ProbeSettings(probes=["linear", "knn", "hest-bench"], bootstrap=200))
    assert {each.metric for each in scored.scores} == {
        *("pearson", "pearson_low", "pearson_high"),
        *("hest_bench_pearson", "hest_bench_pearson_low", "hest_bench_pearson_high"),
    }
    assert value(scored.scores, "leak-free", "pearson") > 0.9
    assert len(scored.predictions["predicted"][0]) == 5


def test_a_slide_with_a_single_cell_has_no_correlation_and_spoils_none():
    task, embedding = genes()
    slide = task.groups["slide"].copy()
    slide[0] = "lonely"
    lonely = task_of(task.images, task.target, slide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score_task(lonely, embedding, ProbeSettings(probes=["linear"], bootstrap=200)).scores
    low, middle, high = (value(scores, "leak-free", f"pearson{end}") for end in ("_low", "", "_high"))
    assert 0.8 < low <= middle <= high <= 1


def test_a_task_with_one_protocol_is_scored_whatever_protocols_are_asked_for():
    task, embedding = made_up()
    single = dataclasses.replace(task, protocols=task.protocols[1:])
    settings = ProbeSettings(protocols=["paper"], probes=["linear"], bootstrap=100, robustness=False)
    assert {each.protocol for each in score_task(single, embedding, settings).scores} == {"leak-free"}


def test_a_quick_look_tells_signal_from_noise_and_leaves_out_what_is_not_defined() -> None:
    task, embedding = made_up()
    (told,) = quick_scores(task, embedding).values()
    noise = np.random.default_rng(0).normal(size=embedding.shape)
    assert quick_scores(task, noise)["balanced_accuracy"] < 0.65 < 0.75 < told
    measures = task_of(task.images, embedding[:, :2], task.groups["slide"])
    assert quick_scores(measures, embedding)["pearson"] > 0.9
    assert quick_scores(measures, np.zeros_like(embedding)) == {}
