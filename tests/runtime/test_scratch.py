"""Scratch folders: whose they are, and what is removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lemon.runtime.scratch import PREFIX, scratch_folder

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from lemon.runtime.scratch import scratch_folder

with scratch_folder(sys.argv[1]) as folder:
    (folder / "large").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        theirs = Path(holder.stdout.readline().strip())
        foreign = tmp_path / f"{PREFIX}of-a-user"
        foreign.mkdir()
        (foreign / "notes.txt").write_text("mine")
        (tmp_path / f"{PREFIX}file").write_text("mine")
        (tmp_path / f"{PREFIX}link").symlink_to(foreign)
        with scratch_folder(tmp_path) as folder:
            assert folder != theirs
            assert (theirs / "large").exists()  # its process lives
        assert not folder.exists()
        holder.kill()
        holder.wait()
    assert (theirs / "large").exists()
    with scratch_folder(tmp_path):
        assert not theirs.exists()
    assert (foreign / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {foreign.name, f"{PREFIX}file", f"{PREFIX}link"}
