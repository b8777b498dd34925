"""One job at a time writes an output, whatever becomes of the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lemon.errors import ConfigError
from lemon.runtime import lease
from lemon.runtime.lease import hold
from lemon.runtime.store import Store

pytestmark = pytest.mark.usefixtures("console")

HOLDER = """
import sys, time
from lemon.runtime.lease import hold
with hold(sys.argv[1], stage="first"):
    print("held", flush=True)
    time.sleep(600)
"""
RACER = """
import sys, time
from pathlib import Path
from lemon.errors import ConfigError
from lemon.runtime.lease import hold
while time.time() < float(sys.argv[3]): pass
try:
    with hold(sys.argv[1], stage="racer"):
        inside = Path(sys.argv[2])
        inside.mkdir()  # fails where another is inside
        time.sleep(3)
        inside.rmdir()
    print("held")
except ConfigError as error:
    assert len(str(error).splitlines()) == 1
    print("refused")
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats of a tenth of a second, so that claims go stale in one."""
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(lease, "STALE_S", 1.0)
    monkeypatch.setattr(lease, "_POLL_S", 0.02)


def claims(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((output / ".lemon" / "lease").glob("*.json"))]


def start_holder(output: Path) -> subprocess.Popen[str]:
    job = subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline() == "held\n"
    return job


def write_claim(output: Path, **changes: Any) -> str:
    """The claim of a job on another machine."""
    name = f"{lease.LEASE_FOLDER}/{time.time_ns():020d}-other.json"
    content = {"stage": "curate", "job": "raysubmit_1", "host": "node7", "machine": "elsewhere", "pid": 1}
    content |= {"started": 0.0, "since": "2026-11-25T10:00:00+00:00", "holds": True, "beat": 0}
    Store(output).write_json(name, content | changes)
    return name


def test_an_output_is_held_while_the_block_runs_and_free_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with hold(str(tmp_path), stage="curate"):
            (claim,) = claims(tmp_path)
            assert claim["holds"]
        assert claims(tmp_path) == []
    with pytest.raises(RuntimeError), hold(str(tmp_path), stage="curate"):
        raise RuntimeError
    assert claims(tmp_path) == []


def test_a_second_job_is_told_in_one_line_who_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_7"}}')
    with hold(str(tmp_path), stage="curate"):
        with pytest.raises(
            ConfigError, match=r"is being written by curate \(job raysubmit_7, host .+, process \d+, since"
        ):
            with hold(str(tmp_path), stage="pretrain"):
                pass
        assert len(claims(tmp_path)) == 1


def test_a_job_killed_on_this_machine_is_succeeded_at_once(tmp_path: Path) -> None:
    job = start_holder(tmp_path)
    with pytest.raises(ConfigError, match=f"first .*process {job.pid}"), hold(str(tmp_path), stage="second"):
        pass
    job.kill()
    with hold(str(tmp_path), stage="second"):  # before the killed one is reaped: a zombie writes nothing
        assert [claim["stage"] for claim in claims(tmp_path)] == ["second"]
    job.wait()


def test_another_process_that_got_the_number_of_a_dead_one_does_not_hold(tmp_path: Path) -> None:
    write_claim(tmp_path, machine=lease._machine(), pid=os.getpid(), started=1.0)
    with hold(str(tmp_path), stage="second"):
        assert [claim["stage"] for claim in claims(tmp_path)] == ["second"]


def test_a_dead_job_of_another_machine_is_succeeded_when_its_claim_stood_still(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_claim(tmp_path)
    with hold(str(tmp_path), stage="second"):
        assert [claim["stage"] for claim in claims(tmp_path)] == ["second"]
    assert "is curate (job raysubmit_1, host node7, process 1" in capsys.readouterr().err


def test_a_live_job_of_another_machine_is_left_alone(tmp_path: Path, quick: None) -> None:
    name, ended = write_claim(tmp_path), threading.Event()

    def beat() -> None:
        content = json.loads(Store(tmp_path).read_bytes(name))
        while not ended.wait(0.2):
            content["beat"] += 1
            Store(tmp_path).write_json(name, content)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="node7"), hold(str(tmp_path), stage="second"):
            pass
    finally:
        ended.set()
        thread.join()
    assert [claim["stage"] for claim in claims(tmp_path)] == ["curate"]


def test_a_claim_has_one_length_however_long_it_beats(tmp_path: Path) -> None:
    claim, lengths = lease._Claim(Store(tmp_path), "curate"), set()
    for beat, holds in ((0, False), (9, True), (10, True), (10**9, True)):
        claim.content |= {"beat": beat, "holds": holds}
        claim.write()
        lengths.add(claim.store.size(claim.name))
    assert lengths == {lease.CLAIM_BYTES}


def test_an_output_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (str(tmp_path / "file"), "floppy://a"):
        with pytest.raises(ConfigError, match="output: cannot write to"), hold(output, stage="curate"):
            pass


@pytest.mark.slow
def test_a_job_whose_claim_was_taken_over_is_ended(tmp_path: Path) -> None:
    program = HOLDER.replace(
        "import sys, time", "import sys, time\nfrom lemon.runtime import lease\nlease.BEAT_S = 0.1"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert job.stdout is not None
    job.stdout.readline()
    for path in (tmp_path / ".lemon" / "lease").iterdir():
        path.unlink()
    _, told = job.communicate(timeout=60)
    assert job.returncode == -signal.SIGTERM
    assert "was taken over by another job" in told


@pytest.mark.slow
def test_of_many_that_start_at_once_exactly_one_holds(tmp_path: Path) -> None:
    words = [str(tmp_path / "out"), str(tmp_path / "inside"), str(time.time() + 5)]
    jobs = [
        subprocess.Popen([sys.executable, "-c", RACER, *words], stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    told = [job.communicate(timeout=120)[0].strip() for job in jobs]
    assert all(job.returncode == 0 for job in jobs)
    assert told.count("held") == 1, told
    assert claims(tmp_path / "out") == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\0", b'{"stage": 3}'], ids=str)
def test_a_claim_that_cannot_be_read_holds_while_it_changes_and_is_succeeded_when_it_stands_still(
    content: bytes, tmp_path: Path, quick: None
) -> None:
    store, name = Store(tmp_path), f"{lease.LEASE_FOLDER}/{0:020d}-damaged.json"
    store.write_bytes(name, content)
    with hold(str(tmp_path), stage="second"):
        assert not store.exists(name)
    stop = threading.Event()

    def change() -> None:
        for number in iter(int, None):
            store.write_bytes(name, content + str(number).encode() * (1 + time.time_ns() % 97))
            if stop.wait(0.05):
                return

    store.write_bytes(name, content)
    other = threading.Thread(target=change)
    other.start()
    try:
        with pytest.raises(ConfigError, match="a job whose claim is damaged"), hold(str(tmp_path), stage="second"):
            pass
    finally:
        stop.set()
        other.join()


@pytest.mark.parametrize("settings", ["", "{", "[]", '{"metadata": []}', '{"metadata": {"job_submission_id": 3}}'])
def test_settings_of_ray_that_cannot_be_read_stop_no_job(
    settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", settings)
    with hold(str(tmp_path), stage="first"):
        assert claims(tmp_path)[0]["stage"] == "first"


def test_a_job_that_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), hold(str(tmp_path / "out"), stage="test"):
        raise ConfigError("model: got no such thing")
    assert list((tmp_path / "out").iterdir()) == []
