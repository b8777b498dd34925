from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lemon.probe.folds import (
    check_folds,
    fold_faults,
    grouped_folds,
    leak_free,
    leave_one_group_out,
    look_alike_groups,
    missing_classes,
    official_folds,
    random_folds,
)
from lemon.probe.task import Fold, Protocol, Task, TaskError

GROUPS = np.repeat([f"slide_{index:02d}" for index in range(20)], 15)
LABELS = np.where(np.random.default_rng(0).random(300) < 0.2, "rare", "common")


def task_with(*protocols: Protocol, labels: np.ndarray) -> Task:
    n = len(labels)
    ids = np.array([str(index) for index in range(n)])
    return Task(
        name="toy",
        kind="classification",
        images=np.zeros((n, 60, 60, 3), np.uint8),
        target=labels,
        target_names=tuple(np.unique(labels)),
        sample_ids=ids,
        groups={"slide": ids},
        protocols=protocols,
    )


def indices_tested(folds: tuple[Fold, ...]) -> list[int]:
    return sorted(np.concatenate([fold.test for fold in folds]).tolist())


@pytest.mark.parametrize(
    "folds",
    [
        random_folds(300, seed=1),
        grouped_folds(GROUPS, labels=LABELS, seed=1),
        grouped_folds(GROUPS, seed=1),
        leave_one_group_out(GROUPS),
    ],
)
def test_every_crop_is_tested_once_and_never_trained_with_it(folds: tuple[Fold, ...]) -> None:
    assert indices_tested(folds) == list(range(300))
    assert all(len(np.intersect1d(fold.train, fold.test)) == 0 for fold in folds)
    assert all(len(fold.train) + len(fold.test) == 300 for fold in folds)


def test_grouped_folds_divide_no_group_and_share_the_classes_evenly() -> None:
    folds = grouped_folds(GROUPS, labels=LABELS, seed=3)
    protocol = Protocol("leak-free", folds, GROUPS)
    assert fold_faults(protocol) == ()
    assert missing_classes(protocol, LABELS) == ()
    shares = [(LABELS[fold.test] == "rare").mean() for fold in folds]
    assert max(shares) - min(shares) < 0.1


def test_a_seed_gives_the_same_folds_and_another_seed_others() -> None:
    def of_seed(seed: int) -> list[list[int]]:
        return [fold.test.tolist() for fold in grouped_folds(GROUPS, labels=LABELS, seed=seed)]

    assert of_seed(4) == of_seed(4)
    assert of_seed(4) != of_seed(5)


def test_there_are_no_more_folds_than_groups() -> None:
    assert len(grouped_folds(np.array(["a", "b", "b", "c"]))) == 3


@pytest.mark.parametrize("make", [grouped_folds, leave_one_group_out])
def test_a_single_group_is_one_line(make: object) -> None:
    with pytest.raises(TaskError, match=r"^1 group cannot be .*; expected at least two slides or patients"):
        make(np.array(["a", "a"]))  # type: ignore[operator]


def test_fewer_crops_than_folds_is_one_line() -> None:
    with pytest.raises(TaskError, match=r"^3 crops cannot make 5 folds; expected"):
        random_folds(3)


def test_a_group_left_out_names_its_fold() -> None:
    folds = leave_one_group_out(np.array(["b", "a", "b"]))
    assert [fold.name for fold in folds] == ["a", "b"]
    assert folds[0].test.tolist() == [1]


def test_official_folds_leave_out_what_is_on_neither_side() -> None:
    folds = official_folds(np.array(["s1", "s2", "s3", "s1"]), {"1": ({"s1"}, {"s2"})})
    assert folds[0].train.tolist() == [0, 3]
    assert folds[0].test.tolist() == [1]


def test_a_group_on_both_sides_of_a_leak_free_fold_is_told_by_name() -> None:
    fold = Fold(np.array([0, 1]), np.array([2, 3]), "1")
    groups = np.array(["p1", "p2", "p2", "p3"])
    assert fold_faults(Protocol("leak-free", (fold,), groups)) == (
        "leak-free, fold 1: p2 on both sides; expected no group on both: split by group",
    )
    assert fold_faults(Protocol("paper", (fold,), groups)) == ()


@pytest.mark.parametrize("twin", ["p2 ", "p2\u00a0", "\u200bp2", "p2\t"])
def test_a_group_under_two_spellings_of_one_name_is_on_both_sides_too(twin: str) -> None:
    fold = Fold(np.array([0, 1]), np.array([2, 3]), "1")
    (line,) = fold_faults(Protocol("leak-free", (fold,), np.array(["p1", "p2", twin, "p3"])))
    assert "p2 on both sides" in line


@pytest.mark.parametrize(
    ("name", "twin"), [("X", "X "), ("B\u00f6hm", "Bo\u0308hm"), ("a b", " a  b"), ("a b", "a\u00a0b")]
)
def test_blanks_and_unicodes_form_do_not_divide_a_group(name: str, twin: str) -> None:
    groups = np.array([name, twin, "c", "d", "e"] * 20)
    for protocol in (leak_free(groups), leak_free(groups, labels=np.tile(LABELS[:5], 20))):
        assert fold_faults(protocol) == ()
        assert len(protocol.folds) == 4
        for fold in protocol.folds:
            assert not {name, twin} <= {*groups[fold.train], *groups[fold.test]} or len(
                {name, twin} & set(groups[fold.test].tolist())
            ) in (0, 2)
    assert len(leave_one_group_out(groups)) == 4


@pytest.mark.parametrize(
    ("name", "twin"),
    [("p1", "P1"), ("p 1", "p1"), ("7", "007"), ("7", "7.0"), ("TCGA-A2-A0SX", "TCGA-A2-A0SX-01Z-00-DX1")],
)
def test_groups_that_look_alike_are_told_and_stay_apart(name: str, twin: str) -> None:
    protocol = leak_free(np.array([name, twin, "other"] * 10))
    assert len(protocol.folds) == 3
    (line,) = look_alike_groups(protocol)
    assert repr(name) in line
    assert repr(twin) in line
    assert "count as different" in line


def test_groups_that_differ_are_not_told() -> None:
    names = ["p1", "p2", "p10", "P3", "s_1", "s1_", "1-1", "11", "TCGA-A2-A0SX", "TCGA-A2-A0SY"]
    assert look_alike_groups(leak_free(np.array(names * 2))) == ()


def test_empty_and_overlapping_sides_are_told() -> None:
    empty = Fold(np.array([0, 1]), np.array([], int), "1")
    overlapping = Fold(np.array([0, 1]), np.array([1, 2]), "2")
    lines = fold_faults(Protocol("paper", (empty, overlapping), None))
    assert [line.split(":")[0] for line in lines] == ["paper, fold 1", "paper, fold 2"]
    assert "2 crops train, 0 test" in lines[0]
    assert "1 crops are on both sides" in lines[1]


def test_a_class_that_a_fold_lacks_is_one_line_for_each_side() -> None:
    labels = np.array(["a", "b", "a", "a", "c"])
    protocol = Protocol("leak-free", (Fold(np.array([0, 2]), np.array([1, 3, 4]), "x"),), np.array(list("pqrst")))
    task = task_with(protocol, labels=labels)
    assert check_folds(task) == ("toy: leak-free, fold x: no b, c to train on",)
    swapped = replace(protocol, folds=(Fold(np.array([0, 1, 4]), np.array([2, 3]), "x"),))
    assert check_folds(replace(task, protocols=(swapped,))) == ("toy: leak-free, fold x: no b, c to test on",)


def test_folds_in_order_have_nothing_to_tell() -> None:
    protocol = Protocol("leak-free", grouped_folds(GROUPS, labels=LABELS), GROUPS)
    assert check_folds(task_with(protocol, labels=LABELS)) == ()
