"""The report's page: its numbers are the tables', nothing that a user wrote becomes markup, nothing is fetched."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import stats

from lemon.errors import EXIT_FAILURES, EXIT_OK
from lemon.probe.folds import LEAK_FREE
from lemon.probe.score import OVER_FOLDS, fold_means
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
        return self.with_titles(*head)[1:]

    def with_titles(self, *head: str) -> list[list[dict[str, str]]]:
        """The same with its titles, of which those of groups may stand above."""
        for table in self.tables:
            for at in (0, 1):
                if [cell.get("text") for cell in table[at][: len(head)]] == [*head]:
                    return table[at:]
        raise AssertionError(f"no table begins with {head}")


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


def test_table_2_is_the_mean_and_deviation_over_seeds_and_no_lead_by_chance_is_bold(
    seen: Seen, home: Path, rows: list[dict[str, Any]]
) -> None:
    titles, *table = seen.with_titles("point", "seeds")
    assert [told(line[0]) for line in table] == ["a0", SCRIPT, "wild", "a1+gray"]  # the last is the paper's alone
    columns = {
        cell["small"].rpartition(", ")[2]: at for at, cell in enumerate(titles) if "accuracy" in cell.get("small", "")
    }
    assert columns.keys() == {"leak-free", "paper"}
    for protocol, at in columns.items():
        found = {point: scores(rows, point, protocol) for point in ("a0", SCRIPT)}
        gain = np.subtract(found[SCRIPT], found["a0"])
        interval = stats.ttest_1samp(gain, 0).confidence_interval(0.95)
        is_sure = interval.low > 0 or interval.high < 0
        best = max(found, key=lambda point: np.mean(found[point]))
        for line in table[:2]:
            values = found[told(line[0])]
            assert told(line[at]) == f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f})"
            assert ("b" in line[at]) == (is_sure and told(line[0]) == best)
        assert told(table[2][at]) == ""
        (record,) = [
            each for each in read_csv(home, "table2.csv") if (each["point"], each["protocol"]) == ("a0", protocol)
        ]
        assert float(record["mean"]) == pytest.approx(np.mean(found["a0"]))
        assert float(record["se"]) == pytest.approx(np.std(found["a0"], ddof=1) / np.sqrt(2))
        # The other point less the first, and how it is told.
        (record,) = [each for each in read_csv(home, "table2_differences.csv") if each["protocol"] == protocol]
        assert float(record["mean"]) == pytest.approx(gain.mean())
        (line,) = seen.table("point", "light")
        assert f"{gain.mean():+.3f}".replace("-", "\u2212") in [told(cell) for cell in line]


def test_table_1_is_the_mean_over_folds_with_the_interval_of_this_mean(seen: Seen, home: Path) -> None:
    every = read_scores(Store(home / "probe"))
    table = seen.table("encoder", "light")
    assert {told(line[0]) for line in table} == {"enc0", "enc1", "untrained_vit_32x1"}
    for line in table:
        own = [row for row in every if (row.model, row.protocol) == (told(line[0]), LEAK_FREE)]
        ((_, _, mean, spread),) = [each for each in fold_means(own) if each[1] == "balanced_accuracy"]
        over = {row.metric: row.value for row in own if row.fold == OVER_FOLDS}
        low, high = (over[f"balanced_accuracy_{end}"] for end in ("low", "high"))
        assert over["balanced_accuracy"] == pytest.approx(mean)
        assert low <= mean <= high
        assert (told(line[1]), line[1]["small"]) == (f"{mean:.3f} ({spread:.3f})", f"{low:.3f} to {high:.3f}")


def test_who_leads_follows_the_differences_of_the_shown_scores(seen: Seen, home: Path) -> None:
    table = {told(line[0]): line[1] for line in seen.table("encoder", "light")}
    means = {name: float(told(cell).split()[0]) for name, cell in table.items()}
    sure = set()
    for each in read_csv(home, "table1_differences.csv"):
        if each["protocol"] == LEAK_FREE:
            pair = (each["encoder"], each["against"])
            assert float(each["difference"]) == pytest.approx(means[pair[0]] - means[pair[1]], abs=1e-3)
            sure |= {frozenset(pair)} if float(each["low"]) > 0 or float(each["high"]) < 0 else set()
    bests = [name for name, mean in means.items() if mean == max(means.values())]
    shared = {name for name in means if any(name == best or {name, best} not in sure for best in bests)}
    assert {name for name, cell in table.items() if "b" in cell} == (shared if len(shared) < len(means) else set())
    assert "enc0 against untrained weights of the same shape: " in (home / "report" / report.NAME).read_text()


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


def test_numbers_of_the_paper_stand_in_the_next_column_with_a_word_where_they_do_not_compare(seen: Seen) -> None:
    titles, *lines = seen.with_titles("point", "seeds")
    (at,) = [at for at, cell in enumerate(titles) if cell.get("text") == "paper"]
    assert titles[at]["small"] == "\u2260 other training"
    assert titles[at - 1]["small"] == "balanced accuracy, paper"
    assert {told(line[0]): told(line[at]) for line in lines} == {
        "a0": "0.123 (0.045)",
        SCRIPT: "",
        "wild": "",
        "a1+gray": "0.678",
    }


def test_names_are_text_and_nothing_is_fetched(seen: Seen, home: Path) -> None:
    text = (home / "report" / report.NAME).read_text()
    assert not {"link", "iframe", "object"} & {tag for tag, _ in seen.elements}
    assert [tag for tag, _ in seen.elements].count("script") == 1
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text  # no other one runs
    rows = {attributes.get("id") for tag, attributes in seen.elements}
    for tag, attributes in seen.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "srcset", "href", "xlink:href", "data", "action"):
            target = attributes.get(name)
            if target and tag == "img":
                assert target.startswith("data:image/")
            elif target and target.startswith("#"):
                assert target[1:] in rows, target
            elif target and not target.startswith("http://127.0.0.1:5000/#/experiments/"):
                assert (home / "report" / target).is_file(), target
    assert text.count("url(") == text.count("url(#")


def test_every_picture_says_what_it_shows_and_lies_beside_the_page(seen: Seen, home: Path) -> None:
    pictures = [attributes.get("alt") for tag, attributes in seen.elements if tag == "img"]
    drawings = [attributes.get("aria-label") for _, attributes in seen.elements if attributes.get("class") == "drawing"]
    assert len(pictures) == 1  # views
    assert len(drawings) == 3  # scores of encoders, figure 2, curves of the sweep
    assert all([*pictures, *drawings])
    for stem in ("table1_scores", "figure2", "table2_curves"):
        with Image.open(home / "report" / f"{stem}.png") as picture:
            assert min(picture.size) > 150
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
    assert "Table 1: <code>lemon probe models=" not in text  # probes=[]: none are wanted
    assert "Figure 5: <code>" in text


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


@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_every_picture_and_nothing_overflows(home: Path, browser: Any, width: int) -> None:
    open_page(home, browser, width=width)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('img, .drawing svg')].map((each) => each.getBoundingClientRect().width)"
    )
    assert len(sizes) == 4
    assert min(sizes) > 100
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert SCRIPT in browser.find_element("css selector", "#table2").text
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_click_sorts_a_table_and_pointing_at_a_point_shows_its_run(home: Path, browser: Any) -> None:
    open_page(home, browser, width=1400)
    column = "[...document.querySelectorAll('#table1 tbody')][0].querySelectorAll('td:nth-child(2)')"
    texts = f"return [...{column}].map((cell) => Number(cell.dataset.value))"
    button = browser.find_element("css selector", "#table1 thead th:nth-child(2) button")
    for order in (-1, 1):
        browser.execute_script("arguments[0].click()", button)
        values = browser.execute_script(texts)
        assert values == sorted(values, key=lambda value: order * value)
    point = browser.find_element("css selector", ".drawing a")
    target = point.get_attribute("xlink:href") or point.get_attribute("href")
    browser.execute_script("arguments[0].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))", point)
    tip = browser.find_element("id", "tip")
    assert tip.is_displayed()
    row = browser.find_element("css selector", f"[id='{str(target).rpartition('#')[2]}']")
    assert row.find_element("css selector", "th").text in tip.text
    assert "MLflow run: " in tip.text


def open_page(home: Path, browser: Any, *, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get((home / "report" / report.NAME).as_uri())
