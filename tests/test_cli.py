"""The command ``lemon``: a subcommand for every stage, which does what the stage's job does."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lemon.cli import STAGES, main, run_stage
from lemon.curate.config import CurateConfig
from lemon.errors import EXIT_BAD_CONFIG, EXIT_OK, ConfigError
from lemon.runtime.config import conf_dir
from lemon.runtime.job import run_job
from lemon.version import __version__

ROOT = Path(__file__).resolve().parents[1]
JOBS = {path.stem: path for path in sorted((ROOT / "jobs").glob("*.py"))}


def run_lemon(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lemon.cli", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def run_file(path: Path, *words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a file of jobs/, run in this process."""
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    return int(str(ended.value.code))


def test_every_job_and_every_config_is_a_stage_and_every_stage_has_both() -> None:
    names = [stage.name for stage in STAGES]
    assert sorted(names) == sorted(JOBS)
    assert set(names) >= {path.name for path in (conf_dir() / "stages").iterdir()}
    assert len({stage.command for stage in STAGES}) == len(STAGES)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.command)
def test_a_subcommand_tells_the_help_of_its_job(
    stage: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, name = stage.command, stage.name  # type: ignore[attr-defined]
    assert main([command, "--help"]) == EXIT_OK
    told = capsys.readouterr().out
    assert run_file(JOBS[name], "--help", monkeypatch=monkeypatch) == EXIT_OK
    assert capsys.readouterr().out == told
    assert "key=value" in told


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.command)
def test_a_subcommand_and_its_job_end_alike_where_a_key_is_wrong(
    stage: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, name = stage.command, stage.name  # type: ignore[attr-defined]
    assert main([command, "no_such_key=1"]) == EXIT_BAD_CONFIG
    told = capsys.readouterr().err
    assert run_file(JOBS[name], "no_such_key=1", monkeypatch=monkeypatch) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err == told
    assert all(line.startswith(f"{name}: ") for line in told.splitlines())


def test_verify_ends_with_the_code_of_its_job_where_the_output_is_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = f"output={tmp_path / 'absent'}"
    assert main(["verify", word]) == run_file(JOBS["verify"], word, monkeypatch=monkeypatch) != EXIT_OK


def test_help_lists_the_stages_in_the_order_of_the_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == EXIT_OK
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    order = "fetch curate train-segmenter fit-stain pretrain embed probe sweep atlas find classify describe report ui"
    assert listed == [*order.split(), "demo", "verify", "doctor"]


def test_without_a_command_the_help_is_told_and_the_exit_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == EXIT_BAD_CONFIG
    assert capsys.readouterr().out.startswith("usage: lemon COMMAND")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == EXIT_OK
    assert capsys.readouterr().out == f"lemon {__version__}\n"


@pytest.mark.parametrize(
    ("word", "meant"), [("curat", "curate"), ("Probe", "probe"), ("fit_stian", "fit_stain"), ("docter", "doctor")]
)
def test_an_unknown_command_is_one_line_with_the_nearest_name(
    word: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word, "output=o"]) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err == f"lemon: {word!r}: no such command; did you mean {meant}?\n"


def test_a_command_like_no_other_is_one_line_that_says_where_they_are_listed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["slides=a"]) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err == "lemon: 'slides=a': no such command; lemon --help lists them\n"


def test_the_names_of_jobs_are_taken_too(capsys: pytest.CaptureFixture[str]) -> None:
    for name in JOBS:
        assert main([name, "--help"]) == EXIT_OK
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["curate", "--help"]])
def test_who_reads_only_the_first_line_of_the_help_sees_no_traceback(words: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "lemon.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    process.stdout.close()  # before anything is written
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == EXIT_OK


def test_the_list_of_commands_needs_only_the_standard_library() -> None:
    code = (
        "import sys; from lemon.cli import main; before = set(sys.modules); assert main(['--help']) == 0;"
        "outside = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names);"
        "assert {name for name in outside if not name.startswith('_')} & "
        "{'numpy', 'pydantic', 'yaml', 'pyarrow', 'torch', 'ray', 'mlflow'} == set(), outside"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.name != "verify"], ids=lambda stage: stage.name)
def test_a_wrong_key_is_told_before_torch_ray_or_mlflow_are_imported(stage: object) -> None:
    name = stage.command  # type: ignore[attr-defined]
    code = (
        f"import sys; from lemon.cli import main; code = main([{name!r}, 'no_such_key=1']);"
        "assert not {'torch', 'ray', 'mlflow', 'sklearn'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_BAD_CONFIG, done.stderr
    assert "no_such_key: unknown key" in done.stderr


def test_the_doctor_is_a_command_of_its_own() -> None:
    done = run_lemon("doctor", "--help")
    assert done.returncode == EXIT_OK
    assert done.stdout.startswith("usage: lemon doctor [-h] [--ray]")
    assert run_lemon("doctor", "--rya").returncode == EXIT_BAD_CONFIG


def test_a_missing_package_of_an_extra_is_one_line_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "lemon.report.job", raising=False)
    assert main(["report", f"output={tmp_path / 'report'}"]) == EXIT_BAD_CONFIG
    told = capsys.readouterr().err
    assert told == "report: the package jinja2 is not installed; expected pip install 'lemon-nuclei[pipeline]'\n"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_that_no_extra_has_is_a_fault_of_the_code_and_is_raised() -> None:
    def start(config: CurateConfig) -> int:
        raise ModuleNotFoundError("No module named 'no_such_package'", name="no_such_package")

    with pytest.raises(ModuleNotFoundError):
        run_job("curate", CurateConfig, start, ["slides=s", "output=o"])


def test_a_stage_is_called_with_its_config_and_gives_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from lemon.runtime import verify

    seen = []

    def start(config: verify.VerifyConfig) -> int:
        seen.append(config.output)
        return 3

    monkeypatch.setattr(verify, "main", start)
    assert run_stage("verify", ["output=a"]) == 3
    assert seen == ["a"]

    def refuse(config: verify.VerifyConfig) -> int:
        raise ConfigError("output: is wrong")

    monkeypatch.setattr(verify, "main", refuse)
    assert main(["verify", "output=a"]) == EXIT_BAD_CONFIG
