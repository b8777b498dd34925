"""The atlas's page in a real browser, opened from its file without a network."""

from __future__ import annotations

import csv
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lemon.atlas import job as atlas
from lemon.atlas.cells import AtlasCells, read_cells
from lemon.atlas.fields import CATEGORIES, categories_of
from lemon.atlas.neighbours import Neighbours
from lemon.atlas.page import page_data, write_page
from lemon.atlas.projection import to_unit_square
from lemon.atlas.server import AtlasServer
from lemon.cells.labels import read_labels
from lemon.embed.clusters import palette
from lemon.runtime.store import Store
from lemon.schema import SlideRow
from tests.atlas.made_up import MALICIOUS, K, config_for, flat_images, write_embedded, write_other

pytestmark = pytest.mark.slow


class Page:
    """The page of a small atlas in a browser, and what it should show."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def expect(self, cells: AtlasCells, placed: pa.Table) -> None:
        """Take the cells and the map that the page was made from."""
        self.cells, self.ids = cells, cells.table["cell_id"].to_pylist()
        self.unit = to_unit_square(np.stack([placed["x"], placed["y"]], axis=1))

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a piece of JavaScript."""
        return self.browser.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        """The first element that fits."""
        return self.browser.find_element("css selector", selector)

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Until a condition holds, ten seconds at most."""
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, f"waited in vain until {what}"
            time.sleep(0.05)

    def place(self, cell: int) -> tuple[float, float]:
        """Where a cell is drawn, in CSS pixels of the map."""
        x, y = self.run("return [window.atlas.map.screenX(arguments[0]), window.atlas.map.screenY(arguments[0])]", cell)
        return x, y

    def actions(self) -> Any:
        """A chain of actions of the pointer."""
        from selenium.webdriver.common.action_chains import ActionChains

        return ActionChains(self.browser, duration=0)

    def move(self, actions: Any, x: float, y: float) -> Any:
        """Add a move to a place of the map, which selenium counts from its middle."""
        width, height = self.run("const m = document.getElementById('map'); return [m.clientWidth, m.clientHeight]")
        return actions.move_to_element_with_offset(self.find("#map"), round(x - width / 2), round(y - height / 2))

    def hover(self, cell: int) -> None:
        """Move the pointer to a cell."""
        self.move(self.actions(), *self.place(cell)).perform()

    def pixel(self, canvas: str, x: float, y: float) -> list[int]:
        """Red, green, blue that a canvas shows at a place in CSS pixels."""
        read = (
            "const [canvas, ...place] = arguments, [x, y] = place.map((at) => Math.floor(at * devicePixelRatio));"
            "const data = document.querySelector(canvas).getContext('2d').getImageData(x, y, 1, 1).data;"
            "return [...data].slice(0, 3)"
        )
        found: list[int] = self.run(read, canvas, x, y)
        return found

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a list."""
        from selenium.webdriver.support.ui import Select

        Select(self.find(selector)).select_by_value(value)

    def lonely(self) -> list[int]:
        """Cells that have no other within 14 pixels, so that each is drawn whole and hit alone."""
        places = np.array([self.place(cell) for cell in range(len(self.ids))])
        distance = np.linalg.norm(places[:, None] - places, axis=2) + np.eye(len(places)) * 1e9
        return np.flatnonzero(distance.min(axis=1) > 14).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    assert atlas.main(config_for(*write_embedded(folder), folder / "atlas")) == 0
    return folder


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Page]:
    config = config_for(Store(folder / "cells"), Store(folder / "embeddings"), folder / "atlas")
    browser.get((folder / "atlas" / "atlas.html").as_uri())
    opened = Page(browser)
    opened.expect(read_cells(config), pq.read_table(folder / "atlas" / "map.parquet"))
    opened.wait(lambda: opened.run("return performance.getEntriesByName('first-frame').length"), "it is drawn")
    opened.wait(lambda: opened.run("return window.atlas.isRead()"), "all is read")
    yield opened
    assert opened.run("return performance.getEntriesByType('resource').length") == 0
    # Errors, and requests that the page's policy refused. Warnings come from this test's reading of pixels.
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_every_point_is_drawn_in_the_colour_of_its_cluster(page: Page) -> None:
    assert page.run("return window.atlas.ids()") == page.ids
    codes = page.cells.table["cluster"].to_pylist()
    lonely = page.lonely()
    assert len(lonely) > 10
    for cell in lonely:
        assert page.pixel("#points", *page.place(cell)) == list(palette(K)[codes[cell]])
    # Its place is that of the map.
    scale = page.run("return window.atlas.map.camera.scale")
    places = np.array([page.place(cell) for cell in range(len(page.ids))])
    np.testing.assert_allclose(places - places[0], (page.unit - page.unit[0]) * scale, atol=0.1)


def test_the_pointer_shows_the_cell_its_image_and_its_facts(page: Page) -> None:
    names = page.cells.table["slide_id"].to_pylist()
    lonely = page.lonely()
    for cell in (lonely[0], lonely[1], next(cell for cell in lonely if names[cell] == MALICIOUS)):
        page.hover(cell)
        page.wait(lambda cell=cell: page.find("#hover .id").text == page.ids[cell], "the card is there")
        expected = page.cells.thumbnails[cell, 24, 24].astype(int)
        page.wait(
            lambda expected=expected: np.abs(np.array(page.pixel("#hover canvas", 66, 40)) - expected).max() < 10,
            "the card has the cell's image",
        )
        told = page.find("#hover dl").text
        area = page.cells.table["area_um2"][cell].as_py()
        assert f"{area:.1f} µm²" in told
        assert re.sub(r"\s+", " ", names[cell]) in re.sub(r"\s+", " ", told)
    assert page.run("return document.images.length") == 0  # the slide's name made no element


def test_a_measure_colours_by_its_scale_and_has_a_legend(page: Page) -> None:
    facts = json.loads(page.find("#facts").get_attribute("textContent"))
    field = next(field for field in facts["fields"] if field["key"] == "area_um2")
    page.choose("#color-by", "area_um2")
    assert page.find("#legend-title").text == "Area, µm²"
    ticks = page.find("#legend .ticks").text.split()
    assert float(ticks[0]) == pytest.approx(field["low"], abs=0.1)
    assert float(ticks[-1]) == pytest.approx(field["high"], abs=0.1)
    page.run("window.atlas.draw()")
    for cell in page.lonely()[:10]:
        area = page.cells.table["area_um2"][cell].as_py()
        share = np.clip((area - field["low"]) / (field["high"] - field["low"]), 0, 1)
        expected = facts["scale"][int(share * 255 + 0.5)]
        assert "#{:02x}{:02x}{:02x}".format(*page.pixel("#points", *page.place(cell))) == expected


def test_a_category_can_be_hidden_alone_and_all_shown_again(page: Page) -> None:
    codes = page.cells.table["cluster"].to_pylist()
    buttons = page.browser.find_elements("css selector", "#legend button")
    assert [button.text.split() for button in buttons] == [[str(k), str(codes.count(k))] for k in range(K)]
    buttons[0].send_keys("\n")  # by keyboard
    pressed = "return [...document.querySelectorAll('#legend button')].map((one) => one.getAttribute('aria-pressed'))"
    assert page.run(pressed) == ["false", "true", "true"]
    hidden = next(cell for cell in page.lonely() if codes[cell] == 0)
    page.hover(hidden)
    assert not page.find("#hover").is_displayed()
    page.run("window.atlas.draw()")
    assert page.pixel("#points", *page.place(hidden)) == [0xE9] * 3
    page.find("#all").click()
    page.hover(hidden)
    assert page.find("#hover").is_displayed()


def test_the_lasso_exports_the_cells_inside_with_the_label_that_was_given(page: Page) -> None:
    x = np.sort(page.unit[:, 0])
    gaps = np.diff(x)[40:80]
    cut = 41 + int(gaps.argmax())  # the widest gap about the middle
    border = (x[cut - 1] + x[cut]) / 2
    expected = [cell_id for cell_id, place in zip(page.ids, page.unit[:, 0], strict=True) if place < border]
    width, height = page.run("const m = document.getElementById('map'); return [m.clientWidth, m.clientHeight]")
    scale, middle = page.run("return [window.atlas.map.camera.scale, window.atlas.map.camera.x]")
    right = (border - middle) * scale + width / 2
    page.find("#lasso").click()
    actions = page.move(page.actions(), 5, 60).click_and_hold()
    for x_px, y_px in ((right, 60), (right, height - 5), (5, height - 5)):
        actions = page.move(actions, x_px, y_px)
    actions.release().perform()
    assert page.find("#selected").text == f"{len(expected)} cells selected"
    assert [page.ids[cell] for cell in page.run("return window.atlas.selected()")] == expected
    page.find("#new-class").send_keys('a "b", c\n')
    page.find("#classes button").click()
    page.find("#export-csv").click()
    file = page.browser.downloads / "cells.csv"
    page.wait(file.exists, "the file is there")
    with file.open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert [row[:2] for row in rows] == [["cell_id", "label"], *([cell_id, 'a "b", c'] for cell_id in expected)]
    page.find("#clear").click()
    assert page.run("return window.atlas.selected()") is None
    # What was exported can be read back as classes.
    assert read_labels(file, key="labels") == dict.fromkeys(expected, 'a "b", c')


def test_keys_move_zoom_pin_and_select(page: Page) -> None:
    area = page.find("#map")
    scale, x = page.run("return [window.atlas.map.camera.scale, window.atlas.map.camera.x]")
    area.send_keys("+")
    assert page.run("return window.atlas.map.camera.scale") == pytest.approx(scale * 1.4)
    area.send_keys("\ue014")  # arrow to the right
    assert page.run("return window.atlas.map.camera.x") > x
    area.send_keys("0")
    assert page.run("return window.atlas.map.camera.scale") == pytest.approx(scale)
    page.find("#find").send_keys(page.ids[7] + "\n")
    page.wait(lambda: page.find("#pinned").is_displayed(), "the cell is pinned")
    assert page.find("#pinned-card .id").text == page.ids[7]
    area.send_keys("0")
    page.find("#in-view").send_keys("\n")
    assert page.find("#selected").text == f"{len(page.ids)} cells selected"
    area.send_keys("\ue00c")  # Escape
    assert not page.find("#selection").is_displayed()


def test_squares_over_more_sheets_than_are_kept_all_get_their_cells(browser: Any, tmp_path: Path) -> None:
    count = 6000  # 24 sheets
    generator = np.random.default_rng(0)
    images = flat_images(count, seed=0)[:, :48, :48]
    known = {"cluster": np.zeros(count, np.int16), "slide_id": ["a"] * count, "polygon": [b""] * count}
    known |= {"cell_id": [str(cell) for cell in range(count)], "mpp": np.full(count, 0.25)}
    known |= {"foreign_id": pa.nulls(count, pa.string())}
    known |= {name: np.zeros(count) for name in ("x_level0_px", "y_level0_px")}
    table = pa.table(known | {name: [None] * count for name in CATEGORIES if name not in known})
    slides = (SlideRow("a", "", status="done", n_cells=count),)
    cells = AtlasCells(table, generator.normal(size=(count, 8)), images, "model", slides, "")
    data = page_data(
        cells,
        unit=generator.uniform(size=(count, 2)),
        categories=categories_of(table),
        measures=[],
        title="squares",
        subtitle="",
    )
    write_page(Store(tmp_path), cells, data, side_px=0)
    browser.get((tmp_path / "atlas.html").as_uri())
    opened = Page(browser)
    opened.wait(lambda: opened.run("return window.atlas.isRead()"), "all is read")
    opened.choose("#show", "cells")
    squares = opened.run("return window.atlas.map.squaresInView()")
    assert len(squares) > 150
    middles = [(square["x"] + square["size"] / 2, square["y"] + square["size"] / 2) for square in squares]
    expected = images[[square["cell"] for square in squares], 0, 0].astype(int)
    opened.wait(
        lambda: np.abs(np.array([opened.pixel("#overlay", *at) for at in middles]) - expected).max() < 12,
        "every square has its cell's image",
    )


def test_squares_show_cells_by_their_place(page: Page) -> None:
    page.choose("#show", "cells")
    cell = page.lonely()[0]
    x, y = page.place(cell)
    page.move(page.actions(), x, y).perform()
    page.wait(lambda: page.find("#hover").is_displayed(), "the square's cell is told")
    shown = page.ids.index(page.find("#hover .id").text)
    there = page.place(shown)
    assert np.hypot(there[0] - x, there[1] - y) < 90  # of the same square
    expected = page.cells.thumbnails[shown, 24, 24].astype(int)
    # The pointer may lie on the square's frame: look around it.
    around = [(x + dx, y + dy) for dx in (-8, 0, 8) for dy in (-8, 0, 8)]
    page.wait(
        lambda: any(np.abs(np.array(page.pixel("#overlay", *at)) - expected).max() < 12 for at in around),
        "the square has the cell's image",
    )


def tissue_place(page: Page, cell: int) -> tuple[float, float]:
    """Where a cell lies, in CSS pixels of the tissue from its middle, as selenium counts."""
    x, y = page.run("return window.atlas.tissuePlace(arguments[0])", cell)
    width, height = page.run("const t = document.getElementById('tissue'); return [t.clientWidth, t.clientHeight]")
    return round(x - width / 2), round(y - height / 2)


def show_plain(page: Page) -> list[int]:
    """Show the slide whose file is there; returns its cells."""
    names = page.cells.table["slide_id"].to_pylist()
    page.choose("#slide-name", str([row.slide_id for row in page.cells.slides].index("plain")))
    page.wait(lambda: page.run("return window.atlas.isTissueThere()"), "the slide is there")
    page.wait(lambda: not page.find("#slide-note").text, "it is the slide that has a file")
    return [cell for cell, name in enumerate(names) if name == "plain"]


def test_a_cell_pinned_on_the_tissue_is_pinned_on_the_map_and_its_neighbours_are_those_of_the_embedding(
    page: Page,
) -> None:
    cell = show_plain(page)[0]
    time.sleep(0.5)  # the slide comes to rest
    page.actions().move_to_element_with_offset(page.find("#tissue"), *tissue_place(page, cell)).click().perform()
    page.wait(lambda: page.find("#pinned").is_displayed(), "the cell is pinned")
    assert page.find("#pinned-card .id").text == page.ids[cell]
    vectors = page.cells.vectors.astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = np.argsort(-(unit @ unit[cell]))[1:13]
    assert len(set(page.run("return window.atlas.neighboursOf(arguments[0], 12)", cell)) & set(nearest.tolist())) >= 10


def test_a_lasso_on_the_tissue_selects_on_both_and_is_written_for_qupath(page: Page) -> None:
    cells = show_plain(page)
    time.sleep(0.5)
    x = page.cells.table["x_level0_px"].to_numpy()
    expected = [cell for cell in cells if x[cell] < 300]
    left, right = (tissue_place(page, cells[int(i)])[0] for i in (x[cells].argmin(), x[cells].argmax()))
    border = round(left + (right - left) * (300 - x[cells].min()) / np.ptp(x[cells]))
    width, height = page.run("const t = document.getElementById('tissue'); return [t.clientWidth, t.clientHeight]")
    half = height // 2 - 50
    page.find("#lasso").click()
    actions = page.actions().move_to_element_with_offset(page.find("#tissue"), -width // 2 + 5, -half).click_and_hold()
    for place in ((border, -half), (border, half), (-width // 2 + 5, half)):
        actions = actions.move_to_element_with_offset(page.find("#tissue"), *place)
    actions.release().perform()
    page.wait(lambda: page.run("return window.atlas.selected()"), "cells are selected")
    assert page.run("return window.atlas.selected()") == expected
    page.choose("#export-what", "selection")
    page.find("#export-geojson").click()
    file = page.browser.downloads / "cells.geojson"
    page.wait(file.exists, "the file is there")
    features = json.loads(file.read_text())["features"]
    assert [feature["properties"]["name"] for feature in features] == [page.ids[cell] for cell in expected]
    ring = np.array(features[0]["geometry"]["coordinates"][0])
    np.testing.assert_allclose((ring.min(axis=0) + ring.max(axis=0))[0] / 2, x[expected[0]], atol=2)
    assert (ring[0] == ring[-1]).all()


def test_digits_label_undo_takes_back_and_filters_hide(page: Page) -> None:
    area = page.find("#map")
    for name in ("lymphocyte", "tumour"):
        page.find("#new-class").send_keys(name + "\n")
    page.find("#find").send_keys(page.ids[3] + "\n")
    area.send_keys("2")
    count = "return [...document.querySelectorAll('#classes .count')].map((one) => one.textContent)"
    assert page.run(count) == ["0", "1"]
    area.send_keys("0")
    page.find("#in-view").click()
    area.send_keys("1")
    assert page.run(count) == [str(len(page.ids)), "0"]
    page.find("#undo").click()
    assert page.run(count) == ["0", "1"]
    page.choose("#color-by", "area_um2")
    page.find("#legend .limits input").send_keys("50\n")
    shown = int((page.cells.table["area_um2"].to_numpy() >= 50).sum())
    assert page.find("#shown").text == f"{shown} of {len(page.ids)} cells shown"
    page.find("#filters button").click()
    assert page.find("#shown").text == f"{len(page.ids)} of {len(page.ids)} cells shown"


def test_the_served_page_is_the_same_page(browser: Any, folder: Path, tmp_path: Path) -> None:
    config = config_for(Store(folder / "cells"), Store(folder / "embeddings"), tmp_path, "serve=true")
    served = atlas._prepare(config)
    server = AtlasServer(served, Neighbours(served), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.get(f"http://127.0.0.1:{server.port}/")
        page = Page(browser)
        page.expect(read_cells(config), pq.read_table(tmp_path / "map.parquet"))
        page.wait(lambda: page.run("return window.atlas?.isRead()"), "all is read")
        assert page.run("return window.atlas.ids()") == page.ids
        cell = show_plain(page)[0]
        page.find("#find").send_keys(page.ids[cell] + "\n")
        page.wait(lambda: page.find("#pinned").is_displayed(), "the cell is pinned")
        assert page.find("#pinned-card .id").text == page.ids[cell]
        expected = page.cells.thumbnails[cell, 24, 24].astype(int)
        page.wait(
            lambda: np.abs(np.array(page.pixel("#pinned-card canvas", 66, 40)) - expected).max() < 10,
            "the card has the cell's image",
        )
        page.find("#select-like").click()
        page.wait(lambda: page.run("return window.atlas.selected()"), "its neighbours are selected")
        assert page.run("return window.atlas.selected()") == sorted([cell, *Neighbours(served).of(cell, 50).tolist()])
        ground = [230, 180, 210]  # of the made-up slide, by tiles
        shown = page.run("const c = document.querySelector('#slide canvas'); return [c.width / 2, c.height / 2]")
        page.wait(lambda: np.abs(np.array(page.pixel("#slide canvas", *shown)) - ground).max() < 6, "tiles are there")
        names = page.run("return performance.getEntriesByType('resource').map((one) => new URL(one.name).pathname)")
        assert any(name.startswith("/tissue/") for name in names)
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        server.shutdown()
        server.server_close()
    page.run("window.atlas.neighboursOf(0, 3).catch(() => {})")
    page.wait(lambda: page.find("#server-note").is_displayed(), "the page says that its server is gone")
    browser.get_log("browser")


def test_what_is_selected_on_one_map_is_marked_on_the_other(browser: Any, folder: Path, tmp_path: Path) -> None:
    other = write_other(folder)
    config = config_for(Store(folder / "cells"), Store(folder / "embeddings"), tmp_path, f"against={other.uri}")
    assert atlas.main(config) == 0
    browser.get((tmp_path / "atlas.html").as_uri())
    page = Page(browser)
    page.expect(read_cells(config), pq.read_table(tmp_path / "map.parquet"))
    page.wait(lambda: page.run("return window.atlas.isRead()"), "all is read")
    assert page.find("#other").is_displayed()
    assert "in common" in page.find("#overlap").text
    # A click on the other map pins the cell that lies there.
    unit = to_unit_square(np.stack([pq.read_table(tmp_path / "map-against.parquet")[axis] for axis in "xy"], axis=1))
    place = "const o = window.atlas.other; return [o.screenX(arguments[0]), o.screenY(arguments[0])]"
    places = np.array([page.run(place, cell) for cell in range(len(page.ids))])
    scale = page.run("return window.atlas.other.camera.scale")
    np.testing.assert_allclose(places - places[0], (unit - unit[0]) * scale, atol=0.1)
    distance = np.linalg.norm(places[:, None] - places, axis=2) + np.eye(len(places)) * 1e9
    cell = int(np.flatnonzero(distance.min(axis=1) > 14)[0])
    width, height = page.run("const m = document.getElementById('other'); return [m.clientWidth, m.clientHeight]")
    at = round(places[cell][0] - width / 2), round(places[cell][1] - height / 2)
    page.actions().move_to_element_with_offset(page.find("#other"), *at).click().perform()
    page.wait(lambda: page.find("#pinned").is_displayed(), "the cell is pinned")
    assert page.find("#pinned-card .id").text == page.ids[cell]
    # A lasso on it selects, and both maps fade the others.
    page.find("#other-lasso").click()
    x, y = places[cell]
    corners = [(x - 9, y - 9), (x + 9, y - 9), (x + 9, y + 9), (x - 9, y + 9)]
    offsets = [(round(left - width / 2), round(top - height / 2)) for left, top in corners]
    actions = page.actions().move_to_element_with_offset(page.find("#other"), *offsets[0]).click_and_hold()
    for offset in offsets[1:]:
        actions = actions.move_to_element_with_offset(page.find("#other"), *offset)
    actions.release().perform()
    page.wait(lambda: page.run("return window.atlas.selected()"), "cells are selected")
    assert cell in page.run("return window.atlas.selected()")
    page.run("window.atlas.draw()")
    codes = page.cells.table["cluster"].to_pylist()
    page.find("#unpin").click()
    page.run("window.atlas.draw()")
    assert page.pixel("#other canvas", *places[cell]) == list(palette(K)[codes[cell]])
    faded = next(one for one in page.lonely() if one not in page.run("return window.atlas.selected()"))
    assert page.pixel("#points", *page.place(faded)) != list(palette(K)[codes[faded]])
    # The cells with the fewest neighbours in common, as a sheet.
    page.find("#least").click()
    assert page.find("#sheet").is_displayed()
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_zoom_ends_with_cells_in_view_and_cells_grow(page: Page) -> None:
    cell = page.lonely()[0]
    page.find("#find").send_keys(page.ids[cell] + "\n")
    for _ in range(40):
        page.find("#map").send_keys("+")
    squares = page.run("return window.atlas.map.squaresInView()")
    assert squares
    assert max(square["size"] for square in squares) > 100
    width = page.run("return document.getElementById('map').clientWidth")
    page.browser.set_window_size(420, 800)
    page.wait(lambda: page.run("return window.innerWidth") < 600, "it is a phone's width")
    assert page.run("return document.getElementById('map').clientHeight") > 280
    page.browser.set_window_size(1300, 850)
    page.wait(lambda: page.run("return document.getElementById('map').clientWidth") == width, "it is wide again")
