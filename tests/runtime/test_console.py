"""Where what is logged is told: on the console of a job, and nowhere without one."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from lemon.errors import EXIT_FAILURES, FatalError
from lemon.runtime.console import install_in_worker, installed, stage_logger
from lemon.runtime.job import framed

library = logging.getLogger("lemon.cells.of_this_test")
stage = stage_logger("lemon.curate.of_this_test", "curate")


def tell() -> int:
    stage.info("3 slides, 100 % of them")
    stage.info("  a: failed: no reason")
    stage.warning("it will take long")
    library.info("slides: passed over 1 file")
    library.warning("cache: it is made anew")
    library.debug("for nobody")
    return 0


def test_a_stage_s_lines_have_its_name_and_warnings_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert framed("demo", tell) == 0
    told = capsys.readouterr()
    assert told.out == "curate: 3 slides, 100 % of them\n  a: failed: no reason\nslides: passed over 1 file\n"
    assert told.err == "curate: it will take long\ncache: it is made anew\n"


def test_a_table_is_told_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with installed():
        stage.info("| a | b |\n| 1 | 2 |")
    assert capsys.readouterr().out == "| a | b |\n| 1 | 2 |\n"


def test_a_frame_within_a_frame_tells_each_line_once_and_none_is_told_after(capsys: pytest.CaptureFixture[str]) -> None:
    framed("demo", lambda: framed("curate", tell))
    assert capsys.readouterr().out.count("3 slides") == 1
    stage.info("after the job")
    assert capsys.readouterr() == ("", "")


def test_handlers_of_others_get_the_same_records_and_levels_of_users_stay(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lemon")
    with caplog.at_level(logging.DEBUG, "lemon"):
        framed("demo", tell)
        assert logger.level == logging.DEBUG
    assert [record.name for record in caplog.records].count(library.name) == 3
    assert "3 slides, 100 % of them" in caplog.messages


def test_a_secret_is_not_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SOME_TOKEN", "abcdef123456")
    with installed():
        stage.warning("refused: abcdef123456")
    assert capsys.readouterr().err == "curate: refused: ***\n"


def test_a_stream_that_is_closed_ends_the_job_as_print_would(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    with installed():
        monkeypatch.setattr(sys, "stdout", Closed())
        with pytest.raises(BrokenPipeError):
            stage.info("x")


def test_a_fatal_error_is_told_by_the_frame_with_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    class OfItselfError(FatalError):
        remedy = ""

    def stop(error: FatalError) -> int:
        raise error

    assert framed("curate", lambda: stop(FatalError("the disk is full"))) == EXIT_FAILURES
    assert framed("pretrain", lambda: stop(OfItselfError("the loss became nan"))) == EXIT_FAILURES
    assert capsys.readouterr().err.splitlines() == [
        "curate: stopped: the disk is full; what is committed stays, rerun goes on",
        "pretrain: stopped: the loss became nan",
    ]


def test_in_a_worker_lines_come_once_also_where_the_root_logger_tells_them(capsys: pytest.CaptureFixture[str]) -> None:
    logger, root = logging.getLogger("lemon"), logging.getLogger()
    before, own = logger.handlers[:], logging.StreamHandler(sys.stdout)  # as Ray Train's
    root.addHandler(own)
    try:
        install_in_worker()
        install_in_worker()
        stage.info("put aside")
    finally:
        root.removeHandler(own)
        logger.handlers, logger.propagate = before, True
        logger.setLevel(logging.NOTSET)
    assert capsys.readouterr().out == "curate: put aside\n"


SCRIPT = """
import logging, sys
if "basic" in sys.argv: logging.basicConfig(level="INFO", stream=sys.stdout)
from lemon.slides.cohort import list_slides
print([slide.slide_id for slide in list_slides(sys.argv[1])])
"""


@pytest.mark.parametrize(("word", "n_lines"), [("plain", 1), ("basic", 2)])
def test_a_call_from_a_notebook_prints_nothing_unless_logging_is_asked_for(
    tmp_path: object, word: str, n_lines: int
) -> None:
    for name in ("a.svs", "b.txt.csv"):
        (tmp_path / name).touch()  # type: ignore[operator]
    words = [sys.executable, "-c", SCRIPT, str(tmp_path), word]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (len(done.stdout.splitlines()), done.stderr) == (n_lines, "")
    assert ("INFO:lemon.slides.cohort:slides: passed over" in done.stdout) == (word == "basic")
