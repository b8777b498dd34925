"""The atlas's data: the cells of lowest rank, in order; positions, thumbnails and facts of a cell stay together."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lemon.atlas import job as atlas
from lemon.atlas.cells import read_cells
from lemon.atlas.config import AtlasConfig
from lemon.atlas.fields import MISSING, categories_of, measures_of
from lemon.atlas.figure import EDGE_PX, grid_of_cells
from lemon.atlas.page import SHEET_SIDE, script_json, sheets_of
from lemon.atlas.projection import (
    COMPACT_DIM,
    LEVELS,
    compact,
    curve_order,
    map_tsne,
    nearest_in_squares,
    open_method,
    quantise,
    to_unit_square,
)
from lemon.cells.select import rank_of
from lemon.embed.clusters import palette
from lemon.embed.names import embeddings_name
from lemon.errors import ConfigError
from lemon.runtime.job import run_job
from lemon.runtime.store import Store
from tests.atlas.made_up import MALICIOUS, SLIDES, K, config_for, flat_images, write_embedded

N_CELLS = sum(SLIDES.values())


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    return write_embedded(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def output(tables: tuple[Store, Store], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("atlas")
    assert atlas.main(config_for(*tables, folder)) == 0
    return folder


def script(page: str, name: str) -> str:
    (text,) = re.findall(f'<script type="[a-z/]+" id="{name}">(.*?)</script>', page, re.DOTALL)
    return text


def array(page: str, name: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(script(page, f"data-{name}")), dtype)


def test_the_cells_are_those_of_lowest_rank_in_order_and_few_lie_inside_many(
    tables: tuple[Store, Store], tmp_path: Path
) -> None:
    cells, embeddings = tables
    few, many = (read_cells(config_for(*tables, tmp_path, f"n_cells={count}")) for count in (30, 80))
    every = [cell_id for name in cells.list("cells") for cell_id in cells.read_table(name)["cell_id"].to_pylist()]
    in_order = np.array(every, object)[np.argsort(rank_of(every))].tolist()
    assert few.table["cell_id"].to_pylist() == in_order[:30]
    assert many.table["cell_id"].to_pylist() == in_order[:80]
    np.testing.assert_array_equal(many.thumbnails[:30], few.thumbnails)
    assert [row.slide_id for row in few.slides] == sorted(SLIDES)
    # What belongs to a cell stays with it.
    for slide_id in SLIDES:
        embedded = embeddings.read_table(embeddings_name(slide_id))
        own = dict(zip(embedded["cell_id"].to_pylist(), embedded["embedding"].to_pylist(), strict=True))
        rows = [index for index, found in enumerate(many.table["slide_id"].to_pylist()) if found == slide_id]
        expected = np.array([own[many.table["cell_id"][index].as_py()] for index in rows])
        np.testing.assert_array_equal(many.vectors[rows], expected)


def test_positions_fill_the_unit_square_and_are_stored_within_half_a_level() -> None:
    positions = np.random.default_rng(0).normal(3, [50, 10], (1000, 2))
    unit = to_unit_square(positions)
    assert unit.min(axis=0)[0] == 0
    assert unit.max(axis=0)[0] == 1
    # Both axes have one scale, y points down.
    scale = np.ptp(positions[:, 0])
    np.testing.assert_allclose(np.diff(unit[:, 0]), np.diff(positions[:, 0]) / scale, atol=1e-12)
    np.testing.assert_allclose(np.diff(unit[:, 1]), -np.diff(positions[:, 1]) / scale, atol=1e-12)
    assert np.abs(quantise(unit) / LEVELS - unit).max() <= 0.5 / LEVELS + 1e-12
    assert to_unit_square(np.ones((5, 2))).tolist() == [[0.5, 0.5]] * 5


def test_neighbours_on_the_map_share_a_sheet() -> None:
    unit = np.random.default_rng(0).uniform(size=(16 * SHEET_SIDE**2, 2))
    order = curve_order(quantise(unit))
    assert sorted(order) == list(range(len(unit)))
    first = unit[order[: SHEET_SIDE**2]]
    assert np.ptp(first, axis=0).max() < 0.35  # a 16th of the map is a square with a side of a quarter


def test_sheets_show_each_cell_at_its_place() -> None:
    count = SHEET_SIDE**2 + 20
    images = flat_images(count, seed=0)[:, :48, :48]
    sheets = [np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB")) for sheet in sheets_of(images, np.arange(count))]
    assert [sheet.shape for sheet in sheets] == [(SHEET_SIDE * 48, SHEET_SIDE * 48, 3)] * 2
    for cell in range(count):
        place = cell % SHEET_SIDE**2
        top, left = 48 * (place // SHEET_SIDE), 48 * (place % SHEET_SIDE)
        middle = sheets[cell // SHEET_SIDE**2][top + 16 : top + 32, left + 16 : left + 32].mean(axis=(0, 1))
        assert np.abs(middle - images[cell, 0, 0]).max() < 8, cell
    assert sheets[1][-1, -1].min() > 250


def test_a_square_shows_the_cell_nearest_its_centre() -> None:
    generator = np.random.default_rng(0)
    unit, squares = generator.uniform(size=(60, 2)), 6
    unit[0] = 1  # the corner belongs to the last square
    chosen = nearest_in_squares(unit, squares=squares)
    for row in range(squares):
        for column in range(squares):
            inside = [i for i, (x, y) in enumerate(unit) if (min(int(x * 6), 5), min(int(y * 6), 5)) == (column, row)]
            distance = [np.hypot(unit[i, 0] * 6 - column - 0.5, unit[i, 1] * 6 - row - 0.5) for i in inside]
            assert chosen[row, column] == (inside[int(np.argmin(distance))] if inside else -1)
    images, colors = flat_images(60, seed=1)[:, :48, :48], np.zeros((60, 3), np.uint8)
    sheet = grid_of_cells(unit, images, colors=colors, squares=squares)
    pitch = 48 + 2 * EDGE_PX
    assert sheet.shape == (6 * pitch, 6 * pitch, 3)
    for (row, column), cell in np.ndenumerate(chosen):
        expected = images[cell, 0, 0] if cell >= 0 else [255] * 3
        assert sheet[row * pitch + pitch // 2, column * pitch + pitch // 2].tolist() == list(expected)


def test_tsne_parts_groups_by_direction_and_is_the_same_in_every_run() -> None:
    generator = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], 40)
    vectors = np.eye(3, 16)[group] + generator.normal(0, 0.05, (120, 16))
    vectors *= generator.uniform(0.1, 10, (120, 1))  # length does not count
    first = map_tsne(vectors.astype(np.float16), perplexity=30, seed=0, threads=1)
    np.testing.assert_array_equal(first, map_tsne(vectors.astype(np.float16), perplexity=30, seed=0, threads=1))
    distance = np.linalg.norm(first[:, None] - first, axis=2) + np.eye(120) * 1e9
    assert (group[distance.argmin(axis=1)] == group).all()


def test_categories_have_names_counts_and_the_colours_of_qupath(tables: tuple[Store, Store], tmp_path: Path) -> None:
    table = read_cells(config_for(*tables, tmp_path)).table
    found = {category.key: category for category in categories_of(table)}
    assert list(found) == ["cluster", "organ", "slide_id"]  # no label was given, no site is known
    clusters = found["cluster"]
    assert clusters.names == tuple(str(number) for number in range(K))
    assert clusters.colors == tuple(palette(K))
    assert clusters.codes.tolist() == table["cluster"].to_pylist()
    assert found["slide_id"].names == ("plain", MALICIOUS)  # the most frequent first
    assert found["organ"].names == ("lung",)
    assert (found["organ"].codes == MISSING).sum() == SLIDES["plain"]
    area = measures_of(table)[0]
    assert (area.key, area.unit) == ("area_um2", "µm²")
    assert area.low == pytest.approx(np.percentile(table["area_um2"], 1))


def test_the_page_holds_every_cell_with_its_place_image_and_facts(
    output: Path, tables: tuple[Store, Store], tmp_path: Path
) -> None:
    page = (output / "atlas.html").read_text()
    cells = read_cells(config_for(*tables, tmp_path))
    facts: dict[str, Any] = json.loads(script(page, "facts"))
    ids = json.loads(script(page, "data-ids"))
    assert ids == cells.table["cell_id"].to_pylist()
    placed = pq.read_table(output / "map.parquet")
    assert placed["cell_id"].to_pylist() == ids
    assert facts["count"] == len(ids)
    unit = to_unit_square(np.stack([placed["x"], placed["y"]], axis=1))
    assert np.abs(array(page, "positions", np.uint16).reshape(-1, 2) / LEVELS - unit).max() < 1 / LEVELS
    np.testing.assert_array_equal(array(page, "area_um2", np.float32), cells.table["area_um2"])
    assert array(page, "cluster", np.uint16).tolist() == cells.table["cluster"].to_pylist()
    slots = array(page, "slots", np.uint32)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(script(page, "data-sheet-0")))).convert("RGB"))
    for cell, slot in enumerate(slots):
        shown = sheet[48 * (slot // SHEET_SIDE) + 24, 48 * (slot % SHEET_SIDE) + 24].astype(int)
        assert np.abs(shown - cells.thumbnails[cell, 24, 24]).max() < 10, cell


def test_the_page_refers_to_nothing_outside_and_a_slides_name_cannot_get_out_of_its_quotes(output: Path) -> None:
    page = (output / "atlas.html").read_text()
    assert not re.findall(
        r"https?:|//[a-z]+\.|src=|url\(|import ",
        re.sub(r'id="(facts|vendored|data-ids|data-slide-\d+)">.*?</script>', "", page, flags=re.DOTALL),
    )
    assert "onerror" in page  # the name is there,
    assert MALICIOUS[:12] not in page  # but not as markup
    assert page.count("<script") == page.count("</script>")
    assert json.loads(script_json({"a": [MALICIOUS, "<!--<script>"]})) == {"a": [MALICIOUS, "<!--<script>"]}
    assert not set("<>&") & set(script_json([MALICIOUS]))


def test_title_and_subtitle_are_escaped(tables: tuple[Store, Store], tmp_path: Path) -> None:
    assert atlas.main(config_for(*tables, tmp_path, "title='<b>A & \"B\"</b>'")) == 0
    page = (tmp_path / "atlas.html").read_text()
    assert "<h1>&lt;b&gt;A &amp; &quot;B&quot;&lt;/b&gt;</h1>" in page
    assert "<b>" not in page


@pytest.mark.parametrize(
    "title",
    [
        "{{data}}",
        "{{style}} {{title}}",
        "{{subtitle}}{{nothing}}",
        "{0} {x!r} %s %(a)d",
        "</script><script>",
        "$\\frac{",
        "\\g<0>",
    ],
)
def test_a_title_is_text_whatever_templates_would_make_of_it(
    title: str, tables: tuple[Store, Store], tmp_path: Path
) -> None:
    config = config_for(*tables, tmp_path).model_copy(update={"title": title})
    assert atlas.main(config) == 0
    page = (tmp_path / "atlas.html").read_text()
    assert f"<h1>{html.escape(title)}</h1>" in page
    assert json.loads(script(page, "facts"))["title"] == title
    assert page.count("<style>") == page.count('id="facts"') == 1


def test_the_picture_is_there_as_png_and_svg(output: Path) -> None:
    picture = Image.open(output / "atlas.png")
    assert picture.width > picture.height > 500
    assert np.asarray(picture.convert("L")).std() > 10
    assert "<svg" in (output / "atlas.svg").read_text()[:2000]


def test_labels_become_classes_and_cost_no_new_map(
    tables: tuple[Store, Store], output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = pq.read_table(output / "map.parquet")["cell_id"].to_pylist()
    rows = ["cell_id,label", *(f'"{cell_id.replace(chr(34), chr(34) * 2)}",1' for cell_id in ids[:40]), "other,2"]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(rows))
    before = (output / "map.parquet").read_bytes()

    def no_map(*args: Any, **kwargs: Any) -> np.ndarray:
        raise AssertionError("the map was there")

    monkeypatch.setattr(atlas, "open_method", lambda method: no_map)
    assert atlas.main(config_for(*tables, output, f"labels={labels}")) == 0
    assert (output / "map.parquet").read_bytes() == before
    page = (output / "atlas.html").read_text()
    field = next(field for field in json.loads(script(page, "facts"))["fields"] if field["key"] == "label")
    assert field["names"] == ["1"]
    assert json.loads(script(page, "facts"))["fields"][0] == field  # the page opens coloured by it
    assert array(page, "label", np.uint16).tolist() == [0] * 40 + [MISSING] * (N_CELLS - 40)
    with pytest.raises(AssertionError):  # another seed is another map
        atlas.main(config_for(*tables, output, "seed=1"))


def test_slides_and_organs_can_be_chosen(tables: tuple[Store, Store], tmp_path: Path) -> None:
    assert set(read_cells(config_for(*tables, tmp_path, "select.slides=plain")).table["slide_id"].to_pylist()) == {
        "plain"
    }
    organs = read_cells(config_for(*tables, tmp_path, "select.organs=lung")).table["slide_id"].to_pylist()
    assert set(organs) == {MALICIOUS}


def test_without_clusters_the_map_is_coloured_by_what_is_known(tables: tuple[Store, Store], tmp_path: Path) -> None:
    cells, embeddings = tables
    bare = Store(tmp_path / "bare")
    for name in ("embed.json", *embeddings.list("embeddings")):
        bare.write_bytes(name, embeddings.read_bytes(name))
    found = read_cells(config_for(cells, bare, tmp_path / "out"))
    assert [category.key for category in categories_of(found.table)] == ["organ", "slide_id"]
    assert atlas.main(config_for(cells, bare, tmp_path / "out")) == 0


def test_a_byte_a_component_keeps_the_neighbours_of_the_whole_vectors() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(600, 384)) @ np.diag(0.97 ** np.arange(384)) + 3  # correlated, and far from the origin
    vectors *= rng.uniform(0.1, 10, (600, 1))  # length does not count
    packed, weights = compact(vectors.astype(np.float16))
    assert (packed.dtype, packed.shape, weights.shape) == (np.int8, (600, COMPACT_DIM), (COMPACT_DIM,))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    whole = 2 - 2 * unit[:50] @ unit.T
    differences = packed[:50, None].astype(np.float64) - packed[None]
    found = (weights * differences**2).sum(axis=2)
    assert np.corrcoef(whole.ravel(), found.ravel())[0, 1] > 0.99
    nearest = [set(row[1:13]) for row in whole.argsort(axis=1)]
    kept = [len(near & set(row[1:13])) for near, row in zip(nearest, found.argsort(axis=1), strict=True)]
    assert np.mean(kept) / 12 > 0.85


@pytest.mark.slow
def test_umap_keeps_groups_of_vectors_apart() -> None:
    pytest.importorskip("umap", reason="make setup installs it")
    rng = np.random.default_rng(0)
    groups = np.repeat(np.eye(3, 16), 50, axis=0)
    vectors = (groups + rng.normal(0, 0.05, groups.shape)).astype(np.float32)
    found = open_method("umap")(vectors, perplexity=15, seed=0, threads=1)
    assert (found.dtype, found.shape) == (np.float32, (150, 2))
    centre = found.reshape(3, 50, 2).mean(axis=1)
    nearest = np.linalg.norm(found[:, None] - centre[None], axis=2).argmin(axis=1)
    assert (nearest == np.repeat(range(3), 50)).all()


def test_mistakes_are_one_line_that_says_how_to_mend_them(
    tables: tuple[Store, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, embeddings = tables
    monkeypatch.setitem(sys.modules, "umap", None)
    (tmp_path / "none.csv").write_text("cell_id,label\nother,a\n")
    (tmp_path / "two.csv").write_text("cell_id,label\nx,a\nx,b\n")
    (tmp_path / "columns.csv").write_text("id,class\nx,a\n")
    mistakes = {
        "method=umap": "method: got umap, which is not installed; expected pip install umap-learn",
        f"embeddings={cells.uri}": "has no embed.json; expected an output of lemon embed",
        f"cells={embeddings.uri}": "expected the output of lemon curate",
        f"labels={tmp_path}/absent.csv": "absent.csv: no such file; expected a CSV or Parquet file with cell_id, label",
        f"labels={tmp_path}/none.csv": "none of the 1 labelled cells",
        f"labels={tmp_path}/two.csv": "x has two labels, a and b; expected one row a cell",
        f"labels={tmp_path}/columns.csv": "no column 'cell_id'; it has id, class; expected cell_id, label",
        "select.slides=[gone]": "got 'gone', which the table does not have",
        "n_cells=1000000": "n_cells: got 1000000; expected at most 100000, or serve=true",
    }
    given = [f"cells={cells.uri}", f"embeddings={embeddings.uri}", f"output={tmp_path / 'out'}"]
    for word, told in mistakes.items():
        words = [word if word.split("=")[0] == one.split("=")[0] else one for one in given]
        words += [] if word in words else [word]
        assert run_job("atlas", AtlasConfig, atlas.main, words) == 2, word
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("atlas: ")
        assert told in line


def test_embeddings_of_other_cells_are_told(tables: tuple[Store, Store], tmp_path: Path) -> None:
    cells, embeddings = tables
    other = Store(tmp_path / "other")
    for name in ("embed.json", *embeddings.list("embeddings")):
        other.write_bytes(name, embeddings.read_bytes(name))
    name = embeddings_name("plain")
    table = embeddings.read_table(name)
    other.write_table(name, table.set_column(0, table.schema.field(0), pa.array([f"x{i}" for i in range(len(table))])))
    with pytest.raises(ConfigError, match=r"is of other cells than .*plain\.parquet; the same lemon embed"):
        read_cells(config_for(cells, other, tmp_path / "out"))
    other.write_bytes(name, b"no Parquet")
    with pytest.raises(ConfigError, match=r"plain\.parquet: cannot be read"):
        read_cells(config_for(cells, other, tmp_path / "out"))
