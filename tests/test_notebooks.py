"""The notebooks of the documentation run, and show what this version gives."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lemon

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells(notebook: Path) -> list[dict]:
    """Its cells of code."""
    return [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(notebook: Path, tmp_path: Path) -> None:
    """On the synthetic slide that it draws where none is given."""
    code = "\n".join("".join(cell["source"]) for cell in cells(notebook))
    script = re.sub(r"^%.*$", "", code, flags=re.MULTILINE)
    env = {name: value for name, value in os.environ.items() if name != "LEMON_SLIDE"}
    env |= {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    # Not from a file, which its worker processes would run, too; a kernel's cells have none either.
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_with_the_encoder_that_is_shipped(notebook: Path) -> None:
    outputs = json.dumps([cell["outputs"] for cell in cells(notebook)])
    assert all(cell["outputs"] or cell["execution_count"] for cell in cells(notebook))
    for told in re.findall(r"lemon_mini ([0-9a-f]{16})\b", outputs):
        assert told == lemon.load_encoder("lemon_mini").fingerprint


def test_the_notebooks_show_no_path_of_the_machine_they_were_run_on() -> None:
    for notebook in NOTEBOOKS:
        outputs = json.dumps([cell["outputs"] for cell in cells(notebook)])
        assert not re.search(r"/tmp/|/home/|/work/|site-packages", outputs), notebook.name
