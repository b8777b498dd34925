"""Cells to embeddings in one process: what is stored, what is skipped, and what happens to bad shards."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import lemon
from lemon import schema
from lemon.cells.names import shard_name
from lemon.cells.shard import images_from_arrow
from lemon.embed import job as embedding
from lemon.embed import stream
from lemon.embed.config import ClusterConfig, EmbedConfig, EmbedWorkers
from lemon.embed.encode import embed_shard
from lemon.embed.ledger import EmbeddingSpec, EmbedLedger
from lemon.embed.names import embeddings_name
from lemon.embed.stream import SlideCells
from lemon.errors import ConfigError
from lemon.runtime import pool
from lemon.runtime import store as storage
from lemon.runtime.config import load
from lemon.runtime.demand import Demand, allocate
from lemon.runtime.job import framed
from lemon.runtime.ledger import Summary
from lemon.runtime.shards import ShardError
from lemon.runtime.store import Store
from lemon.schema import EMBEDDED, EmbeddedRow, Slide, SlideRow
from lemon.slides.synthetic import make_tissue, write_pyramid
from tests.embed.tables import SLIDES, WIDTH, killed_at, write_cells, write_encoder

pytestmark = pytest.mark.usefixtures("console")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches a slide, also of a small one."""
    monkeypatch.setattr(storage, "BATCH_ROWS", 16)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def config_for(model: Path, cells: Store, output: Path, *words: str) -> EmbedConfig:
    return load(
        "embed", [f"model={model}", f"cells={cells.uri}", f"output={output}", "device=cpu", *words], EmbedConfig
    )


def written(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def test_stored_embeddings_are_the_encoders_in_the_order_of_the_shard(
    model: Path, cells: Store, tmp_path: Path
) -> None:
    embedding.run(config_for(model, cells, tmp_path / "out", "dtype=float32"))
    encoder = lemon.load_encoder(model)
    for slide_id, count in SLIDES.items():
        shard = cells.read_table(shard_name(slide_id))
        stored = Store(tmp_path / "out").read_table(embeddings_name(slide_id))
        assert stored.schema.equals(schema.embeddings(WIDTH, dtype=pa.float32()))
        assert len(stored) == count
        for name in ("cell_id", "slide_id", "x_level0_px", "y_level0_px"):
            assert stored[name].equals(shard[name])
        assert set(stored["model_fingerprint"].to_pylist()) == {encoder.fingerprint}
        expected = encoder.embed(images_from_arrow(shard["image"]).copy()).numpy()
        got = np.array(stored["embedding"].to_pylist(), np.float32)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)  # batches differ, and with them the rounding


def test_slides_are_counted_with_the_seconds_in_which_the_encoder_ran(
    model: Path, cells: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[dict[str, Any]] = []
    monkeypatch.setattr(pool, "count_slide", lambda stage, **figures: counted.append({"stage": stage, **figures}))
    embedding.run(config_for(model, cells, tmp_path / "out", "format=geojson"))
    for stage in ("embed", "formats"):
        assert [each["n_cells"] for each in counted if each["stage"] == stage] == list(SLIDES.values())
    assert all(0 < each["device_s"] < each["seconds"] for each in counted if each["stage"] == "embed")


def test_half_precision_is_the_default_and_costs_a_thousandth(model: Path, cells: Store, tmp_path: Path) -> None:
    for dtype in ("float16", "float32"):
        embedding.run(config_for(model, cells, tmp_path / dtype, *(["dtype=float32"] if dtype == "float32" else [])))
    half, full = (pq.read_table(tmp_path / name / "embeddings" / "a.parquet") for name in ("float16", "float32"))
    assert half.schema.field("embedding").type == pa.list_(pa.float16(), WIDTH)
    assert pq.read_schema(tmp_path / "float16" / "embeddings" / "a.parquet").metadata[b"model"] == b"run"
    both = [np.array(table["embedding"].to_pylist(), np.float32) for table in (half, full)]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-3, atol=1e-4)


def test_bfloat16_arithmetic_gives_nearly_the_same(model: Path, cells: Store, tmp_path: Path) -> None:
    tables = []
    for precision in ("fp32", "bf16"):
        embedding.run(config_for(model, cells, tmp_path / precision, f"precision={precision}"))
        table = pq.read_table(tmp_path / precision / "embeddings" / "a.parquet")
        tables.append(np.array(table["embedding"].to_pylist(), np.float32))
    assert not np.array_equal(*tables)
    np.testing.assert_allclose(*tables, atol=0.1)


def test_the_same_job_again_writes_nothing(
    model: Path, cells: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(model, cells, tmp_path / "out", "format=[h5ad,geojson]")
    assert embedding.main(config) == 0
    told = capsys.readouterr().out
    assert "3 slides (3 done, 0 partial, 0 failed; 0 of an earlier run), 71 cells" in told
    assert "cells/s" in told
    before = written(tmp_path / "out")
    assert embedding.main(config) == 0
    assert "3 of an earlier run), 71 cells (none of them now), 32 values each by run" in capsys.readouterr().out
    assert written(tmp_path / "out") == before


def test_a_job_killed_in_the_middle_of_a_slide_goes_on_with_that_slide(
    model: Path, cells: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(model, cells, tmp_path / "out")
    with killed_at(5), pytest.raises(KeyboardInterrupt):  # in the second slide, whose first batch is written
        embedding.run(config)
    out = Store(tmp_path / "out")
    assert out.list("embeddings") == [embeddings_name("a")]
    # kill -9 leaves more behind than an interrupt: a temporary file, and embeddings without their row.
    (tmp_path / "out" / "embeddings" / ".lemon-tmp-01234567-b c.parquet").write_bytes(b"PAR1 half")
    out.write_bytes(embeddings_name("d"), b"whole, but its row was not written")
    first = written(tmp_path / "out")[str(tmp_path / "out" / "embeddings" / "a.parquet")]
    assert embedding.main(config) == 0
    assert written(tmp_path / "out")[str(tmp_path / "out" / "embeddings" / "a.parquet")] == first
    assert [path.name for path in (tmp_path / "out" / "embeddings").iterdir() if path.name.startswith(".")] == []
    assert {name: len(out.read_table(embeddings_name(name))) for name in SLIDES} == SLIDES


def test_a_slide_that_was_curated_anew_is_embedded_anew_and_so_are_its_files(
    model: Path, cells: Store, tmp_path: Path
) -> None:
    config = config_for(model, cells, tmp_path / "out", "format=[h5ad]")
    embedding.run(config)
    write_cells(cells, "a", 50, seed=9)
    summary = embedding.run(config)
    assert (summary.n_skipped, summary.n_embedded) == (2, 50)
    assert len(Store(tmp_path / "out").read_table("clusters/a.parquet")) == 50


def test_the_same_weights_in_another_folder_are_the_same_model(model: Path, cells: Store, tmp_path: Path) -> None:
    embedding.run(config_for(model, cells, tmp_path / "out"))
    copy = shutil.copytree(model, tmp_path / "copy of the run")
    assert embedding.run(config_for(copy, cells, tmp_path / "out")).n_skipped == len(SLIDES)


def test_an_output_begun_with_another_model_or_type_is_refused_until_told_otherwise(
    model: Path, cells: Store, tmp_path: Path
) -> None:
    embedding.run(config_for(model, cells, tmp_path / "out"))
    other = write_encoder(tmp_path / "other", seed=1)
    prints = [lemon.load_encoder(path).fingerprint for path in (model, other)]
    with pytest.raises(ConfigError, match=rf"run then, other now, model_fingerprint {prints[0]} then, {prints[1]} now"):
        embedding.run(config_for(other, cells, tmp_path / "out"))
    with pytest.raises(ConfigError, match="dtype float16 then, float32 now"):
        embedding.run(config_for(model, cells, tmp_path / "out", "dtype=float32"))
    summary = embedding.run(config_for(other, cells, tmp_path / "out", "overwrite=true"))
    assert summary.n_skipped == 0
    stored = pq.read_table(tmp_path / "out" / "embeddings" / "a.parquet")
    assert set(stored["model_fingerprint"].to_pylist()) == {prints[1]}


def test_overwriting_with_a_wrong_table_deletes_nothing(model: Path, cells: Store, tmp_path: Path) -> None:
    embedding.run(config_for(model, cells, tmp_path / "out"))
    before = written(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"cells: .*/nothing holds no cells; expected the output of lemon curate"):
        embedding.run(config_for(model, Store(tmp_path / "nothing"), tmp_path / "out", "overwrite=true"))
    assert written(tmp_path / "out") == before


def test_a_bad_shard_becomes_a_row_with_its_reason_and_the_others_are_complete(
    model: Path, cells: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells.write_bytes(shard_name("a"), cells.read_bytes(shard_name("a"))[:5000])
    assert embedding.main(config_for(model, cells, tmp_path / "out")) == 3
    told = capsys.readouterr().out
    assert "  a: failed: cells/a.parquet: cannot be read: " in told
    assert "3 slides (2 done, 0 partial, 1 failed; 0 of an earlier run), 31 cells" in told
    out = Store(tmp_path / "out")
    assert out.list("embeddings") == [embeddings_name("b c"), embeddings_name("d")]
    assert out.read_table("slides/a.parquet").schema.equals(EMBEDDED)
    # A larger allowance: the bad one alone is tried again.
    assert embedding.main(config_for(model, cells, tmp_path / "out", "max_failed_share=0.4")) == 0
    assert "2 of an earlier run" in capsys.readouterr().out
    write_cells(cells, "a", 40)
    assert embedding.main(config_for(model, cells, tmp_path / "out")) == 0
    assert [row["error"] for row in out.read_table("slides/a.parquet").to_pylist()] == [None]


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
def test_a_shard_with_flipped_bytes_is_a_failed_row_and_the_others_are_embedded(
    model: Path, cells: Store, tmp_path: Path, at: float
) -> None:
    path = Path(cells.path(shard_name("a")))
    content = bytearray(path.read_bytes())
    start = int(at * len(content))
    content[start : start + 40] = bytes(byte ^ 0x55 for byte in content[start : start + 40])
    path.write_bytes(content)
    rows = {row.slide_id: row for row in embedding.run(config_for(model, cells, tmp_path / "out")).rows}
    assert rows.pop("a").status == "failed"
    assert {row.status for row in rows.values()} == {"done"}


def test_a_shard_of_another_slide_under_its_name_is_a_failed_row(model: Path, cells: Store, tmp_path: Path) -> None:
    cells.write_bytes(shard_name("a"), cells.read_bytes(shard_name("d")))
    rows = {row.slide_id: row for row in embedding.run(config_for(model, cells, tmp_path / "out")).rows}
    assert "holds other rows than its ledger says" in rows["a"].error


def test_every_kind_of_bad_shard_says_what_is_wrong(model: Path, cells: Store, tmp_path: Path) -> None:
    encoder = lemon.load_encoder(model)
    table = cells.read_table(shard_name("a"))

    def reason(n_cells: int = 40) -> str:
        with pytest.raises(ShardError) as caught:
            embed_shard(SlideCells(cells, shard_name("x"), n_cells, encoder), output=Store(tmp_path / "o"), name="x")
        assert not (tmp_path / "o" / "x").exists()
        return str(caught.value)

    assert "cells/x.parquet: cannot be read" in reason()
    cells.write_table(shard_name("x"), table)
    assert reason(41) == "cells/x.parquet: holds 40 cells; expected 41, as the slides table says"
    cells.write_table(shard_name("x"), table.drop_columns("image"))
    assert reason() == "cells/x.parquet: has no column image"
    column = pa.array([b"png"] * 40)
    cells.write_table(shard_name("x"), table.drop_columns("image").append_column("image", column))
    assert reason() == "image: got binary; expected fixed-size binary of 10800 bytes"
    cells.write_table(shard_name("x"), table)
    with torch.no_grad():
        next(module for name, module in encoder.named_modules() if name.endswith("model.norm")).weight.mul_(1e6)
    assert "embeddings do not fit float16" in reason()
    assert "try dtype=float32" in reason()


def test_an_unexpected_error_becomes_the_slides_row(
    model: Path, cells: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stream.encode_images

    def strange(column: pa.Array, **kwargs: object) -> np.ndarray:
        if len(column) == 1:
            raise ZeroDivisionError("a strange\nslide")
        return real(column, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "encode_images", strange)
    rows = {row.slide_id: row for row in embedding.run(config_for(model, cells, tmp_path / "out")).rows}
    assert (rows["d"].status, rows["d"].error) == ("failed", "unexpected ZeroDivisionError: a strange slide")
    assert rows["a"].status == "done"


def test_a_full_disk_stops_the_job_and_is_no_fault_of_the_slide(
    model: Path, cells: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: pq.ParquetWriter, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    assert framed("embed", lambda: embedding.main(config_for(model, cells, tmp_path / "out"))) == 3
    assert "embed: stopped: cannot write to " in capsys.readouterr().err
    assert Store(tmp_path / "out").list("slides") == []


def test_a_slide_is_curated_first_where_no_table_is_given(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray is left out: what curation is asked for is checked, and a table put where it writes one."""
    asked = []

    def curated(config: object, *, slides: object) -> Summary:
        asked.append(config)
        write_cells(Store(config.output), "s", 20)  # type: ignore[attr-defined]
        return Summary(rows=[], n_skipped=0)

    monkeypatch.setattr(embedding.curate, "check_and_allocate", lambda config, key: [None])
    monkeypatch.setattr(embedding.curate, "run", curated)
    words = [f"model={model}", f"output={tmp_path / 'out'}", f"slides={tmp_path / 's.svs'}", "device=cpu"]
    config = load("embed", [*words, "segmenter.min_area_um2=7", "curation.region_px=512"], EmbedConfig)
    assert embedding.main(config) == 0
    assert "20 cells" in capsys.readouterr().out
    (given,) = asked
    assert (given.slides, given.output) == (str(tmp_path / "s.svs"), str(tmp_path / "out" / "cells"))
    assert (given.segmenter.min_area_um2, given.region_px, given.cells_per_slide) == (7, 512, None)


def test_cells_of_other_settings_are_refused_with_the_key_that_discards_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(config: object, *, slides: object) -> Summary:
        raise ConfigError("output: was made with other settings; choose another output or overwrite=true")

    monkeypatch.setattr(embedding.curate, "run", refused)
    words = [f"model={model}", f"output={tmp_path / 'out'}", "slides=s.svs", "overwrite=true"]
    with pytest.raises(ConfigError, match=r"or curation\.overwrite=true$"):
        embedding.run(load("embed", words, EmbedConfig))


def test_slides_without_any_cell_end_with_the_exit_code_of_curation(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding.curate, "check_and_allocate", lambda config, key: [None])
    lost = [SlideRow("bad", "bad.svs", status="failed", n_cells=0, error="no slide")]
    monkeypatch.setattr(embedding.curate, "run", lambda config, *, slides: Summary(rows=lost, n_skipped=0))
    words = [f"model={model}", f"output={tmp_path / 'out'}", "slides=bad.svs", "device=cpu"]
    assert embedding.main(load("embed", words, EmbedConfig)) == 3


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "config: got neither cells=... nor slides=...; expected exactly one of the two"),
        (["cells=c", "slides=s"], "config: got cells=... and slides=...; expected exactly one of the two"),
        (["slides=s", "curation.regionpx=512"], "config: curation.regionpx: unknown key; did you mean region_px?"),
        (["slides=s", "curation.output=x"], "config: curation.output: expected output=... instead"),
        (
            ["slides=s", "curation.region_px=16"],
            "config: curation.region_px: got 16; expected greater than or equal to 256",
        ),
        (
            ["cells=c", "format=[parquet,csv]"],
            "format.1: got 'csv'; expected 'parquet', 'h5ad', 'geojson' or 'spatialdata'",
        ),
        (["cells=c", "clusters.k=1"], "clusters.k: got 1; expected greater than or equal to 2"),
    ],
)
def test_what_is_wrong_with_a_config_is_one_line(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("embed", ["model=m", "output=o", *words], EmbedConfig)
    assert str(caught.value) == line


def test_one_format_needs_no_brackets() -> None:
    assert load("embed", ["model=m", "output=o", "cells=c", "format=h5ad"], EmbedConfig).format == ["h5ad"]


def test_output_may_not_be_the_table_of_cells(model: Path, cells: Store) -> None:
    with pytest.raises(ConfigError, match="output: got the folder of cells; expected another one"):
        embedding.run(config_for(model, cells, Path(cells.uri)))


def test_a_model_that_is_not_there_is_told_before_anything_is_written(cells: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model: "):
        embedding.run(config_for(tmp_path / "no" / "model", cells, tmp_path / "out"))
    assert written(tmp_path / "out") == {}


def test_a_models_path_is_made_absolute_and_a_name_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    (tmp_path / "lemon").mkdir()
    assert embedding.absolute_model_path("run") == str(model)
    assert embedding.absolute_model_path("run/encoder/config.json") == str(model / "encoder" / "config.json")
    assert (
        embedding.absolute_model_path("volta:run/encoder/config.json") == f"volta:{model / 'encoder' / 'config.json'}"
    )
    monkeypatch.chdir(tmp_path)
    assert embedding.absolute_model_path("lemon") == "lemon"
    assert embedding.absolute_model_path("hf-hub:owner/name") == "hf-hub:owner/name"


@pytest.mark.parametrize(
    ("workers", "n_slides", "cluster", "expected"),
    [
        ({}, 16, False, True),
        ({}, 17, False, False),
        ({}, 1, True, False),
        ({"actors": 2}, 2, False, False),
        ({"launcher": "process"}, 1000, True, True),
        ({"launcher": "ray"}, 1, False, False),
    ],
)
def test_few_slides_on_one_machine_need_no_ray(
    workers: dict[str, object], n_slides: int, cluster: bool, expected: bool
) -> None:
    assert EmbedWorkers.model_validate(workers).in_process(n_slides, cluster=cluster) is expected


@pytest.mark.parametrize("variant", ["default", "smoke"])
@pytest.mark.parametrize("source", ["cells", "slides"])
def test_every_shipped_config_composes_and_validates(variant: str, source: str) -> None:
    words = ["model=m", "output=o", f"{source}=x", f"variant={variant}", "segmenter=hematoxylin"]
    assert load("embed", words, EmbedConfig).model == "m"


class CrashingWorker(pool.Worker[Slide, EmbeddedRow]):
    """Its process dies at one slide, as of a segmentation fault."""

    def __init__(self, ledger: EmbedLedger) -> None:
        self.ledger = ledger

    def work(self, item: Slide) -> EmbeddedRow:
        if item.slide_id == "bad":
            os._exit(1)
        return self.ledger.commit(EmbeddedRow(slide_id=item.slide_id, status="done", n_cells=1))

    def fail(self, item: Slide, reason: str) -> EmbeddedRow:
        return self.ledger.commit(EmbeddedRow(slide_id=item.slide_id, status="failed", n_cells=0, error=reason))


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_the_tables_are_the_same_and_a_slide_that_kills_its_actor_is_given_up(
    model: Path, cells: Store, tmp_path: Path
) -> None:
    here = embedding.run(config_for(model, cells, tmp_path / "here", "format=[h5ad]"))
    words = ["workers.launcher=ray", "workers.cpus=1", "format=[h5ad]", "max_attempts=2"]
    config = config_for(model, cells, tmp_path / "ray", *words)
    there = embedding.run(config)
    assert there.exit_code == 0
    for kind in ("embeddings", "clusters"):
        tables = [pq.read_table(tmp_path / name / kind).sort_by("cell_id") for name in ("here", "ray")]
        assert tables[0]["cell_id"].equals(tables[1]["cell_id"])
    assert len(list((tmp_path / "ray" / "h5ad").glob("*.h5ad"))) == len(SLIDES)
    assert [row.n_cells for row in here.rows] == [row.n_cells for row in there.rows]

    ledger = EmbedLedger(Store(tmp_path / "crash"), EmbeddingSpec("m", "f", WIDTH, "float16", "fp32"))
    make, actors = functools.partial(CrashingWorker, ledger), pool.ActorPool(allocate(Demand(1), stage="embed"))
    rows = list(pool.run([Slide("bad", ""), Slide("good", "")], make, actors=actors, max_attempts=2))
    told = {row.slide_id: row.error for row in rows if row}
    assert told == {"bad": "given up after 2 crashes of its worker", "good": None}
    assert embedding.run(config.model_copy(update={"clusters": ClusterConfig(k=None)})).n_skipped == len(SLIDES)


@pytest.mark.ray
@pytest.mark.slow
def test_a_slide_goes_all_the_way_to_embeddings(model: Path, tmp_path: Path) -> None:
    write_pyramid(tmp_path / "s.tiff", make_tissue(600, seed=1, border_px=60).image, mpp=0.25)
    words = [f"model={model}", f"output={tmp_path / 'out'}", f"slides={tmp_path / 's.tiff'}", "variant=smoke"]
    config = load("embed", [*words, "format=[h5ad,geojson]", "curation.region_px=512"], EmbedConfig)
    summary = embedding.run(config)
    assert summary.exit_code == 0
    (row,) = summary.rows
    assert row.n_cells == len(pq.read_table(tmp_path / "out" / "embeddings" / "s.parquet")) > 10
    assert (tmp_path / "out" / "h5ad" / "s.h5ad").exists()
    assert embedding.run(config).n_skipped == 1
