from __future__ import annotations

from pathlib import Path

import pytest

from lemon.probe.task import TaskError
from lemon.probe.tasks.catalogue import TASKS, counts_table, open_task
from tests.probe.tasks.test_folder import write_crops
from tests.probe.tasks.test_midog import write_midog25

NAMES = {
    "nucls-super": "nucls",
    "nucls-main": "nucls",
    "nucls-raw": "nucls",
    "midog25-atypical": "midog25",
    "midogpp-mitosis": "midogpp",
    "hest-bowel": "hest",
    "hest-breast": "hest",
    "hest-lung": "hest",
    "amibr": "amibr",
    "consep-type": "consep",
    "nucls15-super": "nucls15",
}


def test_every_benchmark_is_in_the_catalogue() -> None:
    assert set(TASKS.names()) == set(NAMES)


@pytest.mark.parametrize(("name", "folder"), [*NAMES.items(), ("folder:mine", "mine")])
def test_an_absent_folder_says_where_it_was_looked_for_and_how_to_obtain_the_set(
    tmp_path: Path, name: str, folder: str
) -> None:
    with pytest.raises(TaskError) as error:
        open_task(name, tmp_path)
    line = str(error.value)
    assert line.startswith(f"{name}: no folder {tmp_path / folder}; expected ")
    assert "http" in line or "labels.csv" in line or "nuclei.csv" in line
    assert "\n" not in line


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / NAMES[name]).mkdir()
    with pytest.raises(TaskError, match=r"^[^\n]*(no such file|neither)[^\n]*expected[^\n]*$"):
        open_task(name, tmp_path)


def test_an_unknown_name_is_told_the_closest_ones(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"^tasks: got 'nucls-sup'; expected one of .*; did you mean nucls-super\?$"):
        open_task("nucls-sup", tmp_path)
    listed = r"nucls-super, .*, folder:NAME, morphometry:PATH, restained:PATH, jpeg:PATH, site:PATH"
    with pytest.raises(TaskError, match=rf"^tasks: got 'qqq'; expected one of {listed}$"):
        open_task("qqq", tmp_path)
    with pytest.raises(TaskError, match=r"^tasks: got 'folder:'"):
        open_task("folder:", tmp_path)


def test_counts_are_printed_beside_the_published_ones(tmp_path: Path) -> None:
    write_midog25(tmp_path / "midog25")
    lines = counts_table(open_task("midog25-atypical", tmp_path)).splitlines()
    assert lines[0].split() == ["midog25-atypical:", "counts", "here", "published"]
    assert ["class", "atypical", "24", "1,748"] in [line.split() for line in lines]
    assert len({len(line) for line in lines if line.endswith("8")}) == 1  # columns are aligned
    assert any(line.startswith("note: the paper's folds") for line in lines)


def test_options_reach_the_loader(tmp_path: Path) -> None:
    write_crops(tmp_path)
    with pytest.raises(TaskError, match=r"no class is left"):
        open_task("folder:mine", tmp_path, min_support=31)
