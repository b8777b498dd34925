"""The served atlas: it answers its own page and nobody else, reads no file but its own, and neighbours are true."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.processes import free_ports
from lemon.atlas import job as atlas
from lemon.atlas import projection
from lemon.atlas.cells import choose_cells, read_cells
from lemon.atlas.config import AtlasConfig
from lemon.atlas.neighbours import Neighbours
from lemon.atlas.projection import map_cells
from lemon.atlas.served import CONTENT, open_served
from lemon.atlas.server import AtlasServer
from lemon.atlas.tissue import Tissue
from lemon.embed.read import open_embeddings
from lemon.runtime.job import run_job
from lemon.runtime.store import Store
from lemon.slides.synthetic import write_pyramid
from tests.atlas.made_up import MALICIOUS, SLIDE_PX, config_for, write_embedded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_embedded(folder)
    atlas._prepare(config_of(folder))
    return folder


def config_of(folder: Path, *words: str) -> AtlasConfig:
    return config_for(Store(folder / "cells"), Store(folder / "embeddings"), folder / "atlas", "serve=true", *words)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[AtlasServer]:
    served = open_served(Store(folder / "atlas"))
    server = AtlasServer(served, Neighbours(served), port=0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server: AtlasServer, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    for name, value in ({"Host": f"127.0.0.1:{server.port}"} | headers).items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    assert method != "HEAD" or int(answer.headers["Content-Length"]) > 0
    connection.close()
    return answer.status, content


def test_it_sends_the_page_and_the_arrays_of_all_cells(server: AtlasServer, folder: Path) -> None:
    cells = read_cells(config_of(folder))
    status, page = ask(server, "/")
    assert status == 200
    assert b"connect-src 'self'" in page
    assert MALICIOUS[:12].encode() not in page
    ids = json.loads(ask(server, "/data/ids")[1])
    assert ids == cells.table["cell_id"].to_pylist()
    np.testing.assert_array_equal(np.frombuffer(ask(server, "/data/area_um2")[1], "<f4"), cells.table["area_um2"])
    slots = np.frombuffer(ask(server, "/data/slots")[1], "<u4")
    sheet = np.asarray(Image.open(io.BytesIO(ask(server, "/data/sheet-0")[1])).convert("RGB"))
    for cell, slot in enumerate(slots):
        shown = sheet[48 * (slot // 16) + 24, 48 * (slot % 16) + 24].astype(int)
        assert np.abs(shown - cells.thumbnails[cell, 24, 24]).max() < 10
    assert ask(server, "/data/ids", "HEAD") == (200, b"")


def test_it_refuses_other_hosts_other_pages_and_whatever_writes(server: AtlasServer) -> None:
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", f"127.0.0.1:{server.port}.evil", ""):
        assert ask(server, "/", Host=host)[0] == 403, host
        assert ask(server, "/data/ids", Host=host)[0] == 403, host
    assert ask(server, "/", Host=f"localhost:{server.port}")[0] == 200
    for site in ("cross-site", "same-site"):
        assert ask(server, "/data/ids", Sec_Fetch_Site=site)[0] == 403
    assert ask(server, "/data/ids", Sec_Fetch_Site="same-origin")[0] == 200
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT"):
        assert ask(server, "/data/ids", method)[0] == 501, method
    two = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    two.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nHost: evil.example\r\n\r\n".encode())
    assert b" 403 " in two.recv(100)
    two.close()
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "path",
    [
        "/../content.json",
        "/data/../content.json",
        "/data/content",
        "/data/content.json",
        "/data/positions.bin",
        "/data/%2e%2e/content.json",
        "//etc/passwd",
        "/etc/passwd",
        "/data//etc/passwd",
        "/served/positions.bin",
        "/data/sheet-1",
        "/data/sheet--1",
        "/data/slide-2",
        "/tissue/2/9/0/0",
        "/tissue/0/99/0/0",
        "/tissue/0/9/999/0",
        "/neighbours/",
    ],
)
def test_what_is_no_name_of_its_data_is_not_found(server: AtlasServer, path: str) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("query", ["", "?cell=1", "?cell=-1&k=5", "?cell=120&k=5", "?cell=a&k=5", "?cell=1&k=100000"])
def test_a_question_for_neighbours_that_makes_no_sense_is_refused(server: AtlasServer, query: str) -> None:
    assert ask(server, f"/neighbours{query}")[0] == 400


def nearest(folder: Path, cell: int, wanted: int) -> list[int]:
    vectors = read_cells(config_of(folder)).vectors.astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    order = np.argsort(-(unit @ unit[cell]))
    return order[order != cell][:wanted].tolist()


def test_neighbours_are_those_of_the_embedding(
    server: AtlasServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lemon.atlas.neighbours.BLOCK", 17)  # several blocks
    shares = []
    for cell in (0, 7, 119):
        found = json.loads(ask(server, f"/neighbours?cell={cell}&k=12")[1])
        assert len({*found} - {cell}) == 12
        shares.append(len({*found} & {*nearest(folder, cell, 12)}) / 12)
    assert np.mean(shares) > 0.85  # a byte a component
    assert len(json.loads(ask(server, "/neighbours?cell=3&k=1000")[1])) == 119


def test_the_index_of_find_answers_for_the_cells_of_the_atlas(folder: Path) -> None:
    pytest.importorskip("faiss", reason="the extra find is not installed")
    from lemon.find.index import known_index, open_index

    embeddings = open_embeddings(str(folder / "embeddings"))
    assert known_index(embeddings) is None
    open_index(embeddings, None)
    index = known_index(embeddings)
    served = open_served(Store(folder / "atlas"))
    by_index = Neighbours(served, embeddings=embeddings, index=index)
    for cell in (0, 64, 119):
        found = by_index.of(cell, 12).tolist()
        assert len({*found} & {*nearest(folder, cell, 12)}) >= 11  # 8-bit values
    # An atlas of fewer cells than were embedded.
    config = config_of(folder, "n_cells=40", f"output={folder / 'few'}")
    atlas._prepare(config)
    few = open_served(Store(folder / "few"))
    found = Neighbours(few, embeddings=embeddings, index=index).of(3, 5).tolist()
    assert len({*found} & {cell for cell in nearest(folder, 3, 119) if cell < 40}) == 5
    assert [cell for cell in nearest(folder, 3, 119) if cell < 40][:1] == found[:1]


def test_tiles_are_the_slide_and_a_slide_without_a_file_is_white(server: AtlasServer, tmp_path: Path) -> None:
    number = [row.slide_id for row in server.served.slides].index("plain")
    told = json.loads(ask(server, f"/data/slide-{number}")[1])
    assert (told["width"], told["height"], told["jpeg"]) == (*SLIDE_PX, None)
    assert "file not found" in json.loads(ask(server, f"/data/slide-{1 - number}")[1])["fault"]
    image = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8).repeat(100, 0).repeat(100, 1)
    path = tmp_path / "slide.tiff"
    write_pyramid(path, image, mpp=0.25)
    tissue = Tissue([replace(server.served.slides[number], path=str(path))])
    for level, column, size in ((10, 0, (512, 400)), (10, 1, (88, 400)), (9, 0, (300, 200))):
        jpeg = tissue.tile(0, level, column, 0)
        assert jpeg is not None
        tile, step = Image.open(io.BytesIO(jpeg)), 2 ** (10 - level)
        assert tile.size == size
        for x, y in ((x, y) for x in range(50, 600, 100) for y in range(50, 400, 100)):  # middles of squares
            at = x // step - 512 * column, y // step
            if 0 <= at[0] < size[0]:
                assert np.abs(np.array(tile.getpixel(at)) - image[y, x].astype(int)).max() < 12
    tissue.close()


def test_what_is_served_is_made_again_only_when_it_changes(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    written = (folder / "atlas" / CONTENT).stat().st_mtime_ns
    atlas._prepare(config)
    assert (folder / "atlas" / CONTENT).stat().st_mtime_ns == written
    labels = tmp_path / "labels.csv"
    first = choose_cells(config).selection
    ids = next(iter(first.batches(first.parts[0], ["cell_id"])))["cell_id"].to_pylist()
    labels.write_text("cell_id,label\n" + "".join(f'"{each.replace(chr(34), chr(34) * 2)}",a\n' for each in ids[:5]))
    atlas._prepare(config_of(folder, f"labels={labels}", f"output={folder / 'labelled'}"))
    assert "label" in open_served(Store(folder / "labelled")).files
    before = (folder / "labelled" / CONTENT).stat().st_mtime_ns
    labels.write_text(labels.read_text().replace(",a", ",b"))
    atlas._prepare(config_of(folder, f"labels={labels}", f"output={folder / 'labelled'}"))
    assert (folder / "labelled" / CONTENT).stat().st_mtime_ns > before


def test_cells_beyond_those_of_the_map_lie_among_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "MAPPED", 300)
    monkeypatch.setattr(projection, "PIECE", 70)
    generator = np.random.default_rng(0)
    group = generator.integers(0, 3, 500)
    vectors = (np.eye(3, 16)[group] + generator.normal(0, 0.05, (500, 16))).astype(np.float16)

    def place(part: np.ndarray, **_: object) -> np.ndarray:
        assert len(part) == 300
        return (10 * part[:, :2] + generator.normal(0, 0.1, (300, 2))).astype(np.float32)

    found = map_cells(place, vectors, perplexity=30, seed=0, threads=1)
    assert (found.dtype, found.shape) == (np.float32, (500, 2))
    centres = np.stack([found[:300][group[:300] == each].mean(axis=0) for each in range(3)])
    near = np.linalg.norm(found[300:, None] - centres, axis=2).argmin(axis=1)
    assert (near == group[300:]).all()


def test_a_taken_port_and_an_output_at_s3_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [f"cells={folder / 'cells'}", f"embeddings={folder / 'embeddings'}", f"output={folder / 'atlas'}"]
        assert run_job("atlas", AtlasConfig, atlas.main, [*words, "serve=true", f"port={port}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"atlas: port: {port} on 127.0.0.1: ")


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c_and_ends_in_one_line(folder: Path) -> None:
    (port,) = free_ports(1)
    words = [f"cells={folder / 'cells'}", f"embeddings={folder / 'embeddings'}", f"output={folder / 'atlas'}"]
    # Ctrl-C is ignored in what a shell starts in the background, as these tests may be; the command would inherit that.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from lemon.cli import main; exit(main())"
    command = [sys.executable, "-c", code, "atlas", *words, "variant=smoke", "serve=true", f"port={port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ})
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Ctrl-C" in line:
            break
    assert re.search(rf"http://127\.0\.0\.1:{port}/", lines[-1]), lines
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/")
            assert connection.getresponse().status == 200
            break
        except ConnectionError:
            time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(timeout=20) == 0
    assert len(rest.strip().splitlines()) == 1, rest
    assert "Traceback" not in rest
    assert pq.read_table(folder / "atlas" / "map.parquet").num_rows == 120
