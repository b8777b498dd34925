"""Patients of the benchmarks that an encoder is scored on are left out of its cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from lemon.cells.ledger import cells_ledger
from lemon.errors import ConfigError
from lemon.pretrain.assemble import select
from lemon.pretrain.check import check
from lemon.pretrain.config import PretrainConfig
from lemon.pretrain.exclude import without_benchmarks
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.schema import SlideRow

pytestmark = pytest.mark.usefixtures("console")

SLIDES = {
    "TCGA-A2-A0SX-01Z-00-DX1": "unknown",  # of NuCLS
    "TCGA-A2-A0D0-01A-01-TS1": None,  # of NuCLS, another slide of it
    "TCGA-ZZ-0000-01Z-00-DX1": "unknown",
    "s1": "p1",
    "s2": "p1",
    "s3": "p2",
    "s4": None,
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    ledger = cells_ledger(Store(tmp_path / "cells"), config_fingerprint="x")
    for slide_id, patient in SLIDES.items():
        ledger.commit(SlideRow(slide_id, "", patient, status="done", n_cells=10, cells_digest=slide_id))
    return tmp_path


def config_of(home: Path, *words: str) -> PretrainConfig:
    places = [f"cells={home / 'cells'}", f"output={home / 'out'}", f"data={home}", f"cache={home / 'cache'}"]
    return load("pretrain", ["variant=smoke", "device=cpu", *places, *words], PretrainConfig)


def slides_of(config: PretrainConfig) -> set[str]:
    return {part.slide_id for part in select(config).parts}


@pytest.mark.parametrize(
    "words", [["tasks=nucls-super"], ["tasks=[nucls-raw,consep-type]"], ["exclude_benchmarks=nucls"]]
)
def test_nucls_is_left_out_where_a_task_or_the_user_names_it(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    config, selection = check(config_of(home, *words))
    assert {part.slide_id for part in selection.parts} == SLIDES.keys() - {*list(SLIDES)[:2]}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(": 2 of 124 patients are in the table; their 20 cells of 2 slides are left out")
    assert config.select.exclude_patients == ["TCGA-A2-A0D0", "TCGA-A2-A0SX"], "what settings and MLflow hold"
    assert config.result_settings()["select"]["exclude_patients"] == config.select.exclude_patients
    assert config.exclude_benchmarks != "auto"


def test_what_was_left_out_before_stays_so_without_a_word(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once = without_benchmarks(config_of(home, "tasks=nucls-super", "select.exclude_patients=[p2]"))
    capsys.readouterr()
    assert without_benchmarks(once) == once
    assert once.select.exclude_patients[0] == "p2"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "words", [[], ["tasks=null"], ["tasks=consep-type"], ["tasks=nucls-super", "exclude_benchmarks=[]"]]
)
def test_nothing_is_left_out_where_nothing_asks_for_it(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    config = config_of(home, *words)
    assert slides_of(without_benchmarks(config)) == SLIDES.keys()
    assert without_benchmarks(config).result_settings() == config.result_settings()
    assert capsys.readouterr() == ("", "")


def test_labelled_crops_of_ones_own_name_their_patients_and_slides(home: Path) -> None:
    (home / "mine").mkdir()
    labels = home / "mine" / "labels.csv"
    labels.write_text("image,label,slide,patient\na.png,x,other,P2\n")
    assert SLIDES.keys() - slides_of(without_benchmarks(config_of(home, "tasks=folder:mine"))) == {"s3"}
    labels.write_text("image,label,slide\na.png,x,S1\nb.png,x,s4\n")
    left_out = SLIDES.keys() - slides_of(without_benchmarks(config_of(home, "tasks=folder:mine")))
    assert left_out == {"s1", "s2", "s4"}, "with the other slide of the same patient"


def test_a_benchmark_that_cannot_be_read_is_told_and_refused_where_it_was_asked_for(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = without_benchmarks(config_of(home, "tasks=[folder:gone,nucls-main]"))
    assert config.exclude_benchmarks == ["nucls-main"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pretrain: exclude_benchmarks: folder:gone: ")
    assert line.endswith("none of its patients is left out")
    with pytest.raises(ConfigError, match=r"^exclude_benchmarks: folder:gone: [^\n]*$"):
        without_benchmarks(config_of(home, "exclude_benchmarks=folder:gone"))


@pytest.mark.parametrize("name", ["nuclx", "morphometry:cells", "folder:"])
def test_an_unknown_benchmark_is_one_line_before_anything_is_read(home: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^exclude_benchmarks: got '[^\n]*expected one of [^\n]*nucls, [^\n]*$"):
        config_of(home, f"exclude_benchmarks={name}").check_inputs()
