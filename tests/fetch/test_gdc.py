"""What the GDC's API and its manifests list, and how what is wrong with them is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lemon.errors import ConfigError
from lemon.fetch import gdc
from lemon.fetch.config import DownloadConfig
from lemon.fetch.download import open_session
from lemon.fetch.gdc import GdcError, GdcFile, list_files, read_manifest, studies_of
from tests.fetch.gdc_server import GdcServer, Served, serving

UUID = "8b4f6c1a-1111-4222-8333-444455556666"
NAME = f"TCGA-A2-A0SX-01Z-00-DX1.{UUID.upper()}.svs"
MD5 = "0123456789abcdef0123456789abcdef"
HEADER = "id\tfilename\tmd5\tsize\tstate"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def listed(server: GdcServer, *studies: str) -> list[GdcFile]:
    with open_session(DownloadConfig(attempts=2, backoff_s=0.001)) as session:
        return list_files(session, server.url + "/", studies=studies, timeout_s=5)


@pytest.mark.parametrize(
    ("word", "studies"),
    [
        ("BRCA", ["BRCA"]),
        ("brca", ["BRCA"]),
        ("TCGA-LUAD", ["LUAD"]),
        ("lung", ["LUAD", "LUSC"]),
        ("Adrenal_gland", ["ACC", "PCPG"]),
    ],
)
def test_a_word_means_a_study_or_the_studies_of_an_organ(word: str, studies: list[str]) -> None:
    assert studies_of(word) == studies


@pytest.mark.parametrize(
    ("word", "part"), [("BRAC", "did you mean BRCA"), ("lungs", "did you mean lung"), ("x", "ACC")]
)
def test_a_word_that_means_nothing_is_told_with_what_was_meant(word: str, part: str) -> None:
    with pytest.raises(ConfigError, match=f"organs: got {word!r}.*{part}"):
        studies_of(word)


def test_only_open_diagnostic_slides_of_the_studies_are_listed_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gdc, "PAGE", 2)
    wanted = [Served(f"TCGA-A2-A00{number}-01Z-00-DX1.svs", b"x" * (number + 1)) for number in range(5)]
    others = [
        Served("TCGA-05-0001-01Z-00-DX1.svs", b"x", project="TCGA-LUAD"),
        Served("TCGA-A2-0002-01Z-00-DX1.svs", b"x", access="controlled"),
        Served("TCGA-A2-0003-01A-01-TS1.svs", b"x", strategy="Tissue Slide"),
    ]
    with serving(*wanted, *others) as server:
        found = listed(server, "BRCA")
        assert [request.path for request in server.requests] == ["/files"] * 3
    assert {file.file_name for file in found} == {file.name for file in wanted}
    for file, served in zip(sorted(found, key=lambda file: file.file_name), wanted, strict=True):
        assert (file.md5, file.size_bytes) == (served.md5, len(served.content))
        slide = file.slide("x.svs")
        assert (slide.slide_id, slide.project, slide.organ) == (served.slide_id, "TCGA-BRCA", "breast")
        assert (slide.patient_id, slide.site) == (served.name[:12], "A2")


class Odd(Served):
    """Its record lacks something, or has too much."""

    change: dict[str, Any]

    def record(self) -> dict[str, Any]:
        return super().record() | self.change


@pytest.mark.parametrize(
    "change",
    [{"file_name": "../up.svs"}, {"file_name": ".hidden.svs"}, {"md5sum": None}, {"file_size": 0}, {"file_id": "../x"}],
)
def test_a_file_with_a_name_or_size_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    odd = Odd(NAME, b"x")
    odd.change = change
    with serving(odd) as server, pytest.raises(GdcError, match="makes no sense"):
        listed(server, "BRCA")


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"data": null}', b'{"data": {"hits": []}}'])
def test_a_server_that_is_not_the_gdc_is_told_in_one_line(answer: bytes) -> None:
    with serving() as server:
        server.answer = answer
        with pytest.raises(GdcError) as caught:
            listed(server, "BRCA")
        assert "\n" not in str(caught.value)
        server.answer = b'{"data": {"hits": [], "pagination": {"total": 3}}}'
        with pytest.raises(GdcError, match="lists 0 of 3 files and no more"):
            listed(server, "BRCA")
        server.url += "/v0"
        with pytest.raises(GdcError, match="404"):
            listed(server, "BRCA")


def test_an_api_that_is_not_there_is_told_in_one_line() -> None:
    with serving() as server:
        pass
    with pytest.raises(GdcError, match="Connection refused"):
        listed(server, "BRCA")


def test_a_manifest_gives_slides_and_the_barcode_their_patient_and_site(tmp_path: Path) -> None:
    rows = [f"{UUID}\t{NAME}\t{MD5}\t17\treleased", f"{UUID}\treport.pdf\t{MD5}\t17\treleased"]
    (tmp_path / "m.txt").write_text("\n".join([HEADER, *rows, ""]))
    (file,) = read_manifest(tmp_path / "m.txt", organ="breast")
    slide = file.slide("there.svs")
    assert (slide.slide_id, slide.path, slide.organ) == (NAME.removesuffix(".svs"), "there.svs", "breast")
    assert (slide.patient_id, slide.site, slide.project) == ("TCGA-A2-A0SX", "A2", "TCGA")
    assert file.remote("http://h/").url == f"http://h/data/{UUID}"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "no such file"),
        ("name,filename,md5\n", "no column 'id'"),
        (f"id\tfilename\tmd5\n{UUID}\t{NAME}\t{MD5}\n", "no column 'size'"),
        (f"{HEADER}\n{UUID}\t{NAME}\t{MD5}\tlarge\tok\n", "line 2, column size: got 'large'"),
        (f"{HEADER}\n{UUID}\t{NAME}\t{MD5}\t1\tok\n{UUID}\t../{NAME}\t{MD5}\t1\tok\n", "line 3: file_name"),
        (f"{HEADER}\n{UUID}\t{NAME}\n", "line 2: has 2 values for 5 columns"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_told_in_one_line(tmp_path: Path, text: str | None, part: str) -> None:
    if text is not None:
        (tmp_path / "m.txt").write_text(text)
    with pytest.raises(ConfigError, match=part) as caught:
        read_manifest(tmp_path / "m.txt", organ=None)
    assert "\n" not in str(caught.value)
