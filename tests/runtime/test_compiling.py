from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lemon.runtime.compiling import compile_kept


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that what the test sets is taken away again
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    return tmp_path


def test_compiled_code_is_kept_in_the_users_cache_folder(home: Path) -> None:
    double = compile_kept(lambda x: 2 * x, backend="eager")
    assert double(torch.ones(2)).tolist() == [2, 2]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(home / ".cache/lemon/compiled")
    assert (home / ".cache/lemon/compiled").is_dir()


def test_a_folder_that_the_user_named_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    compile_kept(lambda x: x, backend="eager")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


def test_without_a_folder_that_can_be_made_torchs_default_stays(home: Path) -> None:
    (home / ".cache").write_text("no folder")
    compile_kept(lambda x: x, backend="eager")
    assert str(home) not in os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")  # torch may name its own there
