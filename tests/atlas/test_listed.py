"""A list of cells to label: it is in the atlas whatever the sample, and keys label one cell after another."""

from __future__ import annotations

import csv
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lemon import cli
from lemon.atlas import job as atlas
from lemon.atlas import listed
from lemon.atlas.cells import read_cells
from lemon.atlas.config import AtlasConfig
from lemon.atlas.neighbours import Neighbours
from lemon.atlas.served import CONTENT
from lemon.atlas.server import AtlasServer
from lemon.classify.config import ClassifyConfig
from lemon.classify.job import main as classify
from lemon.classify.labels import read_labelled
from lemon.embed.names import embeddings_name
from lemon.embed.read import open_embeddings
from lemon.runtime.config import load
from lemon.runtime.job import run_job
from lemon.runtime.store import Store
from tests.atlas.made_up import SLIDES, config_for, write_embedded
from tests.atlas.test_browser import Page

N_DRAWN = 30
CLASSES = ("immune", "stroma", "tumour")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listed")
    write_embedded(folder)
    return folder


def config_of(folder: Path, output: Path, *words: str) -> AtlasConfig:
    given = ("perplexity=5", f"n_cells={N_DRAWN}", *words)
    return config_for(Store(folder / "cells"), Store(folder / "embeddings"), output, *given)


def rank_order(folder: Path, tmp_path: Path) -> list[str]:
    """All cells, those that an atlas of few has first."""
    ids: list[str] = read_cells(config_of(folder, tmp_path, "n_cells=1000")).table["cell_id"].to_pylist()
    return ids


def write_rows(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def write_list(path: Path, ids: list[str]) -> Path:
    return write_rows(path, ["cell_id", "label", "suggested"], [[each, "", CLASSES[0]] for each in ids])


def test_listed_and_labelled_cells_come_behind_the_sample_whose_map_stays(folder: Path, tmp_path: Path) -> None:
    ids = rank_order(folder, tmp_path)
    assert atlas.main(config_of(folder, tmp_path / "out")) == 0
    map_before = (tmp_path / "out/map.parquet").read_bytes()
    wanted = [ids[100], ids[3], ids[60], ids[100]]
    labels = write_rows(tmp_path / "labels.csv", ["cell_id", "label"], [[ids[5], "a"], [ids[110], "b"]])
    words = f"show={write_list(tmp_path / 'list.csv', wanted)}", f"labels={labels}"
    config = config_of(folder, tmp_path / "out", *words)
    found = read_cells(config)
    assert found.table["cell_id"].to_pylist() == [*ids[:N_DRAWN], ids[60], ids[100], ids[110]]
    assert found.n_added == 3
    assert found.listed == listed.Listed((ids[100], ids[3], ids[60]), (CLASSES[0],))
    assert found.table["label"].to_pylist()[-1] == "b"
    whole = read_cells(config_of(folder, tmp_path, "n_cells=1000"))
    here = [ids.index(each) for each in found.table["cell_id"].to_pylist()]
    np.testing.assert_array_equal(found.vectors, whole.vectors[here])
    np.testing.assert_array_equal(found.thumbnails, whole.thumbnails[here])
    for column in ("cluster", "row", "slide_id", "x_level0_px"):
        assert found.table[column].to_pylist() == whole.table[column].take(here).to_pylist()
    assert atlas.main(config) == 0
    assert (tmp_path / "out/map.parquet").read_bytes() == map_before


def test_what_is_served_is_made_again_only_for_cells_that_it_lacks(folder: Path, tmp_path: Path) -> None:
    ids = rank_order(folder, tmp_path)
    plain = atlas._prepare(config_of(folder, tmp_path / "out", "serve=true"))
    assert plain.facts["list"] is None
    written = (tmp_path / "out" / CONTENT).stat().st_mtime_ns
    inside = write_list(tmp_path / "inside.csv", [ids[7], ids[2]])
    served = atlas._prepare(config_of(folder, tmp_path / "out", "serve=true", f"show={inside}"))
    assert served.facts["list"] == {"ids": (ids[7], ids[2]), "classes": (CLASSES[0],)}
    assert (tmp_path / "out" / CONTENT).stat().st_mtime_ns == written
    beyond = write_list(tmp_path / "beyond.csv", [ids[90]])
    served = atlas._prepare(config_of(folder, tmp_path / "out", "serve=true", f"show={beyond}"))
    assert served.count == N_DRAWN + 1
    neighbours = Neighbours(served)
    places = zip(served.mapped("slide", "<u4").tolist(), served.rows.tolist(), strict=True)
    by_row = neighbours._cells_by_row()
    assert [by_row[served.slides[slide].slide_id][row] for slide, row in places] == list(range(N_DRAWN + 1))


def test_a_list_that_names_no_cell_or_too_many_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listed, "MAX_LISTED", 3)
    plain = Store(folder / "embeddings").read_table(embeddings_name("plain"))["cell_id"][0].as_py()
    (tmp_path / "columns.csv").write_text("id\nx\n")
    lists = {"none": ["nobody", "no one"], "many": list("abcd"), "other": [plain]}
    for name, ids in lists.items():
        write_list(tmp_path / f"{name}.csv", ids)
    mistakes = {
        "none": "show: none of the 2 cells of",
        "many": "many.csv names 4 cells; expected at most 3",
        "other": f"is among the {min(SLIDES.values())} embedded ones ({plain}); expected ids of this cells",
        "columns": "columns.csv: no column 'cell_id'; it has id; expected cell_id",
        "absent": "absent.csv: no such file",
    }
    given = [f"cells={folder / 'cells'}", f"embeddings={folder / 'embeddings'}", f"output={tmp_path / 'out'}"]
    for name, told in mistakes.items():
        words = [*given, f"show={tmp_path / name}.csv", *(["select.organs=lung"] if name == "other" else [])]
        assert run_job("atlas", AtlasConfig, atlas.main, words) == 2, name
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("atlas: show: ")
        assert told in line


def test_cells_of_a_list_that_are_not_there_are_told(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = rank_order(folder, tmp_path)
    path = write_list(tmp_path / "list.csv", ["nobody", ids[50]])
    found = read_cells(config_of(folder, tmp_path, f"show={path}"))
    assert found.listed is not None
    assert found.listed.ids == (ids[50],)
    assert f"show: 1 of 2 cells of {path} are not among the embedded ones and are left out (nobody)" in caplog.text


def suggest(folder: Path, labels: Path, output: Path, caplog: pytest.LogCaptureFixture) -> tuple[list[str], Path]:
    """Classify; returns the words of the command that is told, and the sheet of cells to label next."""
    given = [f"labels={labels}", f"embeddings={folder / 'embeddings'}", f"cells={folder / 'cells'}"]
    caplog.clear()
    with caplog.at_level("INFO"):
        assert classify(load("classify", [*given, f"output={output}", "next=6"], ClassifyConfig)) == 0
    (command,) = [line.strip() for line in caplog.messages if line.strip().startswith("lemon atlas ")]
    words = shlex.split(command)[2:]
    return words, Path(words[-1].removeprefix("show="))


@contextmanager
def address_of(words: list[str], *, is_served: bool) -> Iterator[str]:
    """Where the page of a command is, as one file or served."""
    words = [*words, f"n_cells={N_DRAWN}", "perplexity=5"]
    if not is_served:
        assert cli.main(["atlas", *words]) == 0
        (output,) = [word.removeprefix("output=") for word in words if word.startswith("output=")]
        yield (Path(output) / "atlas.html").as_uri()
        return
    served = atlas._prepare(load("atlas", [*words, "serve=true"], AtlasConfig))
    server = AtlasServer(served, Neighbours(served), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("is_served", [False, True], ids=["file", "served"])
def test_keys_label_the_cells_to_label_next_and_the_export_has_all_labels(
    browser: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_served: bool
) -> None:
    ids = rank_order(folder, tmp_path)
    before = {each: CLASSES[number % 3] for number, each in enumerate(ids[-12:])}  # none of the sample
    labels = write_rows(tmp_path / "labels.csv", ["cell_id", "label"], [list(row) for row in before.items()])
    words, sheet = suggest(folder, labels, tmp_path / "classes", caplog)
    with sheet.open(newline="") as stream:
        wanted = [row["cell_id"] for row in csv.DictReader(stream)]
    assert set(wanted) - set(ids[:N_DRAWN])
    with address_of(words, is_served=is_served) as address:
        browser.get(address)
        page = Page(browser)
        page.wait(lambda: page.run("return window.atlas?.isRead() && !document.body.inert"), "all is read")
        shown = page.run("return window.atlas.ids()")
        assert [shown[cell] for cell in page.run("return window.atlas.selected()")] == wanted
        assert page.find("#sheet").is_displayed()
        assert page.find("#turn-told").text == "0 of 6 have a class"
        names = [each.text for each in page.browser.find_elements("css selector", "#classes .name")]
        assert sorted(names) == sorted(CLASSES)

        def press(key: str, *, then: str) -> None:
            page.actions().send_keys(key).perform()
            page.wait(lambda: page.find("#pinned-card .id").text == then, f"{then} is framed after {key}")

        for number, cell_id in enumerate(wanted):  # each key labels one and goes on; the last stays
            assert page.find("#pinned-card .id").text == cell_id
            press(str(number % 3 + 1), then=wanted[min(number + 1, 5)])
        assert page.find("#turn-told").text == "6 of 6 have a class"
        page.actions().key_down("\ue009").send_keys("z").key_up("\ue009").perform()  # Ctrl
        assert page.find("#turn-told").text == "5 of 6 have a class"
        assert page.find("#pinned-card .id").text == wanted[5]
        press("\ue012", then=wanted[4])  # arrow to the left
        press("3", then=wanted[5])
        press("3", then=wanted[5])
        given = dict(zip(wanted, [names[at] for at in (0, 1, 2, 0, 2, 2)], strict=True))
        file = browser.downloads / "cells.csv"
        file.unlink(missing_ok=True)
        page.find("#turn-export").click()
        page.wait(file.exists, "the file is there")
        press("\ue00c", then=wanted[5])  # Escape
        page.wait(lambda: not page.find("#sheet").is_displayed(), "the sheet is closed")
        assert page.find("#selected").text == "6 cells selected"
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    known = read_labelled([str(file)], open_embeddings(str(folder / "embeddings")), Store(folder / "cells"))
    assert known.given == before | given
    _, after = suggest(folder, file, tmp_path / "classes", caplog)  # the next round
    assert after.name == "after_18.csv"
