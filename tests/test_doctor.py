"""The doctor: each of its failures provoked, and that nothing ever becomes a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from lemon import doctor

ROOT = Path(__file__).resolve().parents[1]


def run_doctor(*words: str, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "lemon.doctor", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def states(told: str) -> dict[str, str]:
    """State of each check by its name, as the table tells them."""
    rows = [line for line in told.splitlines() if line[:1].strip() and not line.startswith("doctor:")]
    return {line[:14].strip(): line[14:].split()[0] for line in rows}


@pytest.mark.slow
def test_where_all_is_well_the_exit_code_is_0(tmp_path: Path) -> None:
    done = run_doctor("--path", str(tmp_path), MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("doctor: fit")
    assert done.stderr == ""
    assert set(states(done.stdout).values()) <= {"ok", "warn"}
    assert len(states(done.stdout)) == 14
    assert list(tmp_path.iterdir()) == []  # neither a probe nor a database is left


@pytest.mark.slow
def test_without_any_package_every_check_still_says_what_is_missing(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    done = run_doctor("--path", str(tmp_path), python=str(tmp_path / "bare" / "bin" / "python"))
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    found = states(done.stdout)
    for name in ("configs", "openslide", "torch", "encoder", "mlflow", "ray", "storage 1"):
        assert found[name] == "fail", done.stdout
    assert "the package torch is missing" in done.stdout
    assert found["python"] == "ok"


@pytest.mark.ray
@pytest.mark.slow
def test_ray_is_started_on_demand_and_runs_a_task() -> None:
    finding = doctor.examine(lambda: doctor.check_ray(start=True), patience_s=200)
    assert finding.state == "ok", finding
    assert "ran a task; 1 nodes" in finding.detail


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_a_cluster_that_is_not_there_is_a_failure(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    finding = doctor.check_ray(start=True)
    assert finding.state == "fail"
    assert address in finding.detail


def test_an_old_python_fails() -> None:
    assert doctor.check_python(least=(4, 0)).state == "fail"
    assert doctor.check_python().state == "ok"


def test_a_package_of_the_wrong_version_and_a_missing_one_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "lemon_nuclei-9.dist-info"
    made.mkdir()
    needs = ["numpy<1", "no-such-package>=1", "pydantic>=2", "no-such-extra; extra == 'x'"]
    lines = ["Metadata-Version: 2.1", "Name: lemon-nuclei", "Version: 9", *(f"Requires-Dist: {one}" for one in needs)]
    (made / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor.check_packages()
    assert finding.state == "fail"
    assert "no-such-package is missing" in finding.detail
    assert "is not <1" in finding.detail
    assert "pydantic" not in finding.detail
    assert "extra" not in finding.detail


def test_a_driver_that_torch_cannot_use_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that torch can use")
    assert doctor.check_torch().state == "ok"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 470.10\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    finding = doctor.check_torch()
    assert finding.state == "fail"
    assert "driver 470.10 is there" in finding.detail
    program.write_text("#!/bin/sh\nexit 9\n")  # as where the kernel module is not loaded
    assert doctor.check_torch().state == "ok"


def test_a_tracking_server_that_does_not_answer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    finding = doctor.check_mlflow()
    assert finding.state == "fail"
    assert "MLFLOW_TRACKING_URI" in finding.remedy


def test_runs_in_a_folder_that_cannot_be_made_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    assert doctor.check_mlflow().state == "fail"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/made/then/mlflow.db")
    assert doctor.check_mlflow().state == "ok"


def test_a_database_on_one_node_of_a_cluster_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert doctor.check_mlflow().state == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert doctor.check_mlflow().state == "warn"


def test_storage_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (str(tmp_path / "file" / "below"), "floppy://a"):
        finding = doctor.examine(lambda path=path: doctor.check_storage(path))  # type: ignore[misc]
        assert finding.state == "fail"
    assert doctor.check_storage(str(tmp_path / "fine")).state == "ok"


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    closed = Path("/proc/1") if os.geteuid() == 0 else Path("/")
    finding = doctor.check_folders([tmp_path / "to be made", closed])
    assert finding.state == "fail"
    assert str(closed) in finding.detail
    assert "to be made" not in finding.detail


def test_a_full_disk_fails_and_a_small_one_warns(tmp_path: Path) -> None:
    assert doctor.check_disk(tmp_path / "absent", fail_gib=1e9).state == "fail"
    assert doctor.check_disk(tmp_path, warn_gib=1e9, fail_gib=0).state in ("warn", "fail")  # fail: this disk is full


def test_little_or_no_shared_memory_warns(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(tmp_path, warn_gib=1e9).state == "warn"
    assert doctor.check_shared_memory(tmp_path / "absent").state == "warn"
    assert doctor.check_shared_memory(tmp_path, warn_gib=0).state == "ok"


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_with_fewer_cpus_than_the_machine_warns(tmp_path: Path, version: int) -> None:
    if version == 2:
        (tmp_path / "cpu.max").write_text("50000 100000\n")
    else:
        (tmp_path / "cpu").mkdir()
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    finding = doctor.check_cpus(tmp_path)
    assert finding.state == "warn"
    assert "a limit of 0.5" in finding.detail
    assert "OMP_NUM_THREADS=1" in finding.remedy


def test_no_limit_of_cpus_is_no_warning(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert "limit" not in doctor.check_cpus(tmp_path).detail
    assert "limit" not in doctor.check_cpus(tmp_path / "absent").detail


def test_a_preset_of_a_preset_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lemon.runtime import config

    (tmp_path / "presets" / "segmenter").mkdir(parents=True)
    (tmp_path / "presets" / "segmenter" / "mine.yaml").write_text("preset: absent\n")
    monkeypatch.setattr(config, "conf_dir", lambda: tmp_path)
    finding = doctor.examine(doctor.check_configs)
    assert finding.state == "fail"
    assert "got 'absent'; expected one of mine" in finding.detail


def test_what_a_check_raises_and_one_that_never_ends_are_failures() -> None:
    def breaks() -> doctor.Finding:
        raise SystemExit("two\nlines")

    finding = doctor.examine(breaks)
    assert (finding.state, finding.detail) == ("fail", "SystemExit: two lines")
    import threading

    finding = doctor.examine(lambda: threading.Event().wait() and None, patience_s=0.05)  # type: ignore[arg-type, return-value]
    assert finding.state == "fail"
    assert "no answer" in finding.detail


def test_passwords_and_keys_are_never_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    uri = "s3://AKIAX:p4ss/w@rd@bucket/x?secret_key=s3cr3t&region=r"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    for check in (lambda: doctor.check_storage(uri), doctor.check_mlflow):
        monkeypatch.setattr(doctor, "checks", lambda check=check, **_: {"one": check})
        assert doctor.main([]) == 1
    told = capsys.readouterr()
    assert "127.0.0.1" in told.out
    for secret in ("p4ss", "rd@", "AKIAX", "s3cr3t", "hunter2"):
        assert secret not in told.out + told.err
