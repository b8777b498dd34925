"""What was written is what is read, or is told as damaged."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lemon.pretrain.checkpoint import Checkpoints, DamagedError
from lemon.runtime.store import TEMPORARY, Store


def state(value: float) -> dict[str, Any]:
    tensors = {"weight": torch.full((50, 7), value), "count": torch.tensor(3)}
    return {"method": tensors, "optimizer": {"state": {0: {"step": 1.0}}, "groups": [1, 2]}, "config": "{}"}


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path), keep=2)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.4), (5, 0.3)):
        checkpoints.save(state(step), step=step, score=score)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == (2, 0.9)
    (newest, faults), best = checkpoints.newest(), checkpoints.load(2)
    assert newest is not None
    assert not faults
    assert (newest["step"], best["step"]) == (5, 2)
    assert torch.equal(newest["method"]["weight"], state(5)["method"]["weight"])


def test_a_checkpoint_that_was_being_written_when_the_job_died_is_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path))
    checkpoints.save(state(1), step=1)
    (tmp_path / "checkpoints" / f"{TEMPORARY}00000000-step-00000002.pt").write_bytes(b"half")
    assert checkpoints.steps() == [1]
    checkpoints.store.remove_temporaries()  # as whoever holds the output next does first
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.pt"]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_byte_that_differs_and_any_length_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(Store(folder))
    checkpoints.save(state(1), step=1)
    path = folder / checkpoints.name(1)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    path.write_bytes(content)
    with pytest.raises(DamagedError) as told:
        checkpoints.load(1)
    assert "\n" not in str(told.value)
    assert "weights_only" not in str(told.value)


def zipped(content: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    return stream.getvalue()


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


FOREIGN = {
    "empty": b"",
    "text": b"hello",
    "a pickle that runs code": pickle.dumps(print),
    "another archive": zipped({"x": b"y"}),
    "a list": saved([1]),
    "other keys": saved({"state_dict": {}, "step": 1}),
    "NaN in a weight": saved(state(float("nan")) | {"step": 1}),
    "infinity in the optimiser": saved(state(1) | {"step": 1, "optimizer": {"state": [{"exp_avg": float("inf")}]}}),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_is_no_whole_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, foreign: str) -> None:
    checkpoints = Checkpoints(Store(tmp_path))
    checkpoints.save(state(1), step=1)
    (tmp_path / checkpoints.name(2)).write_bytes(FOREIGN[foreign])
    found, faults = checkpoints.newest()
    assert found is not None
    assert found["step"] == 1
    assert list(faults) == [2]
    assert "weights_only" not in faults[2]
    aside = Path(checkpoints.put_aside(checkpoints.name(2)))
    assert aside.read_bytes() == FOREIGN[foreign], "nothing is removed"
    checkpoints.save(state(2), step=2)
    assert checkpoints.load(2)["step"] == 2


def test_a_checkpoint_of_an_earlier_version_has_no_record_and_opens(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    checkpoints = Checkpoints(Store(tmp_path))
    (tmp_path / checkpoints.name(3)).write_bytes(saved(state(1) | {"step": 3}))
    assert checkpoints.load(3)["step"] == 3


@pytest.mark.parametrize("mark", [b"", b"{", b"[]", b'{"step": "x", "score": 1}', b"\xff\xfe"])
def test_a_damaged_mark_of_the_best_costs_no_run(tmp_path: Path, mark: bytes) -> None:
    checkpoints = Checkpoints(Store(tmp_path))
    checkpoints.save(state(1), step=1, score=0.5)
    (tmp_path / "checkpoints" / "best.json").write_bytes(mark)
    checkpoints.save(state(2), step=2, score=0.4)
    assert checkpoints.best() == (2, 0.4)
