"""What a job makes of its ledger: its exit code and the words of its outcome."""

from __future__ import annotations

from pathlib import Path

import pytest

from lemon.errors import EXIT_FAILURES, EXIT_OK, ConfigError
from lemon.runtime.console import installed, stage_logger
from lemon.runtime.ledger import Ledger, Summary
from lemon.runtime.store import Store
from lemon.schema import DownloadRow, EmbeddedRow


def summary(*statuses: str, share: float = 0.0, **more: object) -> Summary[EmbeddedRow]:
    rows = [
        EmbeddedRow(slide_id=f"s{number}", status=status, n_cells=1, error=None if status == "done" else "it is bad")
        for number, status in enumerate(statuses)
    ]
    return Summary(rows=rows, n_skipped=1, max_failed_share=share, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (summary(), EXIT_OK),
        (summary("done", "partial"), EXIT_OK),
        (summary("done", "failed"), EXIT_FAILURES),
        (summary("done", "failed", share=0.5), EXIT_OK),
        (summary("failed", "failed", share=0.5), EXIT_FAILURES),
        (summary("done", "partial", failures=("partial", "failed")), EXIT_FAILURES),
        (summary("done", before=[summary("done"), summary("failed")]), EXIT_FAILURES),
        (summary("done", before=[summary("done")]), EXIT_OK),
    ],
)
def test_more_failed_rows_than_may_be_or_a_failed_stage_before_are_exit_code_3(found: Summary, code: int) -> None:
    assert found.exit_code == code


def test_reasons_are_told_before_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with installed():
        told = summary("done", "failed", "partial").log_and_describe(stage_logger("lemon.curate.x", "curate"))
    assert capsys.readouterr().out == "  s1: failed: it is bad\n  s2: partial: it is bad\n"
    assert told == "3 slides (1 done, 1 partial, 1 failed; 1 of an earlier run)"


def test_an_output_with_rows_in_the_ledger_s_own_folder_takes_no_other_settings(tmp_path: Path) -> None:
    ledger = Ledger(Store(tmp_path), DownloadRow, folder="downloads")
    ledger.prepare_output("settings.json", {"a": 1}, folders=["downloads"], overwrite=False)
    # Nothing was made in it.
    ledger.prepare_output("settings.json", {"a": 2}, folders=["downloads"], overwrite=False)
    file = {"file_id": "f", "file_name": "s.svs", "url": "u", "size_bytes": 1, "md5": "0"}
    ledger.commit(DownloadRow(slide_id="s", status="done", total_s=0.0, **file))
    with pytest.raises(ConfigError, match=r"begun with other settings \(a 2 then, 3 now\)"):
        ledger.prepare_output("settings.json", {"a": 3}, folders=["downloads"], overwrite=False)
    assert ledger.begin("s", run_id="r") == 0
    assert ledger.begin("s", run_id="r") == 1
    ledger.prepare_output("settings.json", {"a": 3}, folders=["downloads"], overwrite=True)
    assert (ledger.rows(), ledger.begin("s", run_id="r")) == ({}, 0)
