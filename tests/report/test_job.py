"""The report's page: its numbers are the tables', nothing that a user wrote becomes markup, nothing is fetched."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lemon.errors import EXIT_FAILURES, EXIT_OK
from lemon.probe.job import fold_means
from lemon.probe.tables import read_scores
from lemon.report import job as report
from lemon.report.config import ReportConfig
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.schema import SWEEP_FILE
from lemon.sweep.grid import EXPERIMENT
from lemon.sweep.table import PARQUET
from tests.report.outputs import SCRIPT, write_outputs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("console")]

PAPER = """artefact,row,column,value,spread
Table 2,a0,light,0.123,0.045
Table 2,a1+gray,light,0.678,
"""


class Seen(HTMLParser):
    """The elements of a page: tag and attributes; tables as rows of cells, a cell as the texts in it by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[dict[str, str]]]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append({})

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            cell, tag = self.tables[-1][-1][-1], self._open[-1]
            kind = tag if tag in ("b", "small") else "text"
            cell[kind] = f"{cell.get(kind, '')} {data.strip()}".strip()

    def table(self, *head: str) -> list[list[dict[str, str]]]:
        """The body of the table whose first titles are these."""
        found = [each for each in self.tables if [cell.get("text") for cell in each[0][: len(head)]] == [*head]]
        return found[0][1:]


def told(cell: dict[str, str]) -> str:
    return cell.get("b") or cell.get("text", "")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        write_outputs(folder, patch)
        (folder / "paper.csv").write_text(PAPER)
        Image.new("RGB", (2400, 600), "pink").save(folder / "views.png")
        config = config_of(folder, f"paper={folder / 'paper.csv'}", f"views={folder / 'views.png'}", f"title={SCRIPT}")
        assert report.main(config) == EXIT_OK
        yield folder


def config_of(home: Path, *words: str) -> ReportConfig:
    return load("report", [f"output={home / 'report'}", *words], ReportConfig)


@pytest.fixture(scope="module")
def seen(home: Path) -> Seen:
    return Seen((home / "report" / report.NAME).read_text())


@pytest.fixture(scope="module")
def rows(home: Path) -> list[dict[str, Any]]:
    return pq.read_table(home / "out" / SWEEP_FILE).to_pylist()


def read_csv(home: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((home / "report" / name).read_text())))


def test_experiments_and_tables_bear_the_names_that_sweeps_give_them() -> None:
    assert EXPERIMENT in load("report", [], ReportConfig).experiment
    assert PARQUET == SWEEP_FILE


def scores(rows: list[dict[str, Any]], point: str, protocol: str) -> list[float]:
    chosen = [row for row in rows if (row["point"], row["protocol"]) == (point, protocol)]
    return [row["mean"] for row in chosen if row["metric"] == "balanced_accuracy"]


def test_table_2_is_the_mean_and_deviation_over_seeds_and_the_best_is_bold(
    seen: Seen, home: Path, rows: list[dict[str, Any]]
) -> None:
    table = seen.table("point", "seeds")
    assert [told(line[0]) for line in table] == ["a0", SCRIPT, "wild"]
    columns = [cell["small"] for cell in seen.tables[[t[1:] for t in seen.tables].index(table)][0][2:]]
    assert sorted(columns) == ["leak-free", "paper"]
    for at, protocol in enumerate(columns, 2):
        found = {point: scores(rows, point, protocol) for point in ("a0", SCRIPT)}
        best = max(found, key=lambda point: np.mean(found[point]))
        for line in table[:2]:
            values = found[told(line[0])]
            assert told(line[at]) == f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f})"
            assert ("b" in line[at]) == (told(line[0]) == best)
        assert told(table[2][at]) == ""
        (record,) = [
            each for each in read_csv(home, "table2.csv") if (each["point"], each["protocol"]) == ("a0", protocol)
        ]
        assert float(record["mean"]) == pytest.approx(np.mean(found["a0"]))
        assert float(record["se"]) == pytest.approx(np.std(found["a0"], ddof=1) / np.sqrt(2))
        # The other point less the first, and how it is told.
        (record,) = [each for each in read_csv(home, "table2_differences.csv") if each["protocol"] == protocol]
        gain = np.subtract(found[SCRIPT], found["a0"])
        assert float(record["mean"]) == pytest.approx(gain.mean())
        (line,) = seen.table("point", "light")
        assert f"{gain.mean():+.3f}".replace("-", "\u2212") in [told(cell) for cell in line]


def test_table_1_is_the_mean_and_deviation_over_folds_of_each_encoder(seen: Seen, home: Path) -> None:
    every = read_scores(Store(home / "probe"))
    table = seen.table("encoder", "light")
    assert [told(line[0]) for line in table] == ["enc0", "enc1"]
    for line in table:
        own = [row for row in every if row.model == told(line[0])]
        expected = {
            f"{mean:.3f} ({spread:.3f})" for _, metric, mean, spread in fold_means(own) if metric == "balanced_accuracy"
        }
        assert {told(cell) for cell in line[1:]} == expected
    for at in (1, 2):
        values = [float(told(line[at]).split()[0]) for line in table]
        bold = [value for value, line in zip(values, table, strict=True) if "b" in line[at]]
        assert set(bold) == {max(values)}


def test_a_failed_trial_is_listed_with_its_reason(seen: Seen) -> None:
    lost = seen.table("trial", "status", "reason")
    assert [[told(cell) for cell in line[:2]] for line in lost] == [
        ["augmentation-wild-s0", "failed"],
        ["augmentation-wild-s1", "failed"],
    ]
    assert all("TrainingStoppedError" in told(line[2]) for line in lost)


def test_what_was_used_is_read_from_the_runs_and_stands_beside_the_papers(seen: Seen, home: Path) -> None:
    facts = [
        {told(line[0]): (told(line[1]), told(line[2])) for line in table[1:]}
        for table in seen.tables
        if told(table[0][0]) == "What was used"
    ]
    (used,) = [each for each in facts if "Seeds" in each]
    assert used["Seeds"][1] == "0, 1"
    assert used["Batch"] == ("4,096", "16")
    assert used["Images seen"] == ("150 M (150 epochs of 1 M)", "128")  # 4 epochs of 2 steps of 16
    assert used["Cells"][1] == "120"
    assert used["Encoder"][1] == "vit_tiny8 (width 32, 1 block)"
    trials = {line["trial"] for line in read_csv(home, "table2_curves.csv")}
    assert {"augmentation-a0-s0", "augmentation-a0-s1"} <= trials
    provenance = {line["what"]: line for line in read_csv(home, "provenance.csv")}
    assert provenance["enc0"]["host"]
    assert provenance["augmentation-a0-s0"]["MLflow run"]


def test_numbers_of_the_paper_are_labelled_and_none_is_lost(seen: Seen) -> None:
    (line, *_) = seen.table("point", "seeds")
    assert [cell["small"].rpartition("paper ")[2] for cell in line[2:] if "paper 0" in cell["small"]] == [
        "0.123 (0.045)"
    ]
    ((row, column, score),) = seen.table("row", "column", "score")
    assert (told(row), told(column), score["small"]) == ("a1+gray", "light", "paper 0.678")


def test_names_are_text_and_nothing_is_fetched(seen: Seen, home: Path) -> None:
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in seen.elements}
    for tag, attributes in seen.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "srcset", "href", "data", "action"):
            target = attributes.get(name)
            if target and tag == "img":
                assert target.startswith("data:image/")
            elif target and not target.startswith("#"):
                assert (home / "report" / target).is_file(), target
    assert "url(" not in (home / "report" / report.NAME).read_text()


def test_every_picture_says_what_it_shows_and_lies_beside_the_page(seen: Seen, home: Path) -> None:
    images = [attributes for tag, attributes in seen.elements if tag == "img"]
    assert all(attributes["alt"] for attributes in images)
    assert len(images) == 3  # figure 2, curves of the sweep, views
    for stem in ("figure2", "table2_curves"):
        with Image.open(home / "report" / f"{stem}.png") as picture:
            assert min(picture.size) > 300
        assert "<svg" in (home / "report" / f"{stem}.svg").read_text()
    with Image.open(home / "report" / "figure5.png") as whole:
        assert whole.size == (2400, 600)


def test_folders_that_are_gone_are_told_on_the_page_and_in_a_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(home / "out"), str(tmp_path / "<b>gone")]
    config = ReportConfig(output=str(tmp_path), sweeps=folders, probes=[], atlas="nowhere")
    assert report.main(config) == EXIT_FAILURES
    printed = capsys.readouterr().out
    text = (tmp_path / report.NAME).read_text()
    assert "gone holds no sweep.parquet" in printed
    assert "&lt;b&gt;gone holds no sweep.parquet" in text
    assert "atlas: nowhere holds no atlas.png" in printed
    assert "Not made yet: lemon probe" in text


def test_a_run_whose_folder_was_removed_is_a_line_and_no_failure(home: Path, tmp_path: Path) -> None:
    moved = home / "probe-moved"
    (home / "probe").rename(moved)
    try:
        assert report.main(load("report", [f"output={tmp_path}"], ReportConfig)) == EXIT_OK
    finally:
        moved.rename(home / "probe")
    text = (tmp_path / report.NAME).read_text()
    assert text.count("missing: ") == 1
    assert f"missing: {home / 'probe'} holds no scores" in text


@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_every_picture_and_nothing_overflows(home: Path, browser: Any, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get((home / "report" / report.NAME).as_uri())
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    sizes = browser.execute_script("return [...document.images].map((image) => image.naturalWidth)")
    assert len(sizes) == 3
    assert min(sizes) > 0
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert SCRIPT in browser.find_element("css selector", "#table2").text
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
