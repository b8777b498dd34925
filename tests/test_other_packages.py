"""Parts of another package: the one that the how-to pages write, installed as pip would install it."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import lemon
from lemon.cli import main
from lemon.encoders.registry import describe, find_entry
from lemon.errors import EXIT_OK, ConfigError
from lemon.probe.tables import read_scores
from lemon.probe.task import TaskError
from lemon.probe.tasks.catalogue import open_task
from lemon.runtime import registry
from lemon.runtime.store import Store
from lemon.slides.synthetic import make_tissue
from tests.cells_table import synthetic_crops
from tests.sweep.studies import TINY, write_cells

PAGES = Path(__file__).resolve().parents[1] / "docs" / "how-to"
BLOCK = re.compile(r"^```(python|toml)\n# (\S+).*\n([\s\S]*?)^```$", re.MULTILINE)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of ``my_package``, with the modules and entry points of all pages; its metadata lie beside it."""
    site = tmp_path_factory.mktemp("site-packages")
    folder, about = site / "my_package", site / "my_package-1.0.dist-info"
    folder.mkdir()
    about.mkdir()
    (folder / "__init__.py").touch()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    points = ["[lemon.tasks]", "gone = my_package.gone:ENTRY", "other = my_package.mydata:load"]
    for page in PAGES.glob("add-*.md"):
        for language, name, code in BLOCK.findall(page.read_text()):
            if language == "python":
                (site / name).write_text(code)
                continue
            for group, parts in tomllib.loads(code)["project"]["entry-points"].items():
                points += [f"[{group}]", *(f"{part} = {where}" for part, where in parts.items())]
    (about / "entry_points.txt").write_text("\n".join(points))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        registry._registered.cache_clear()
        yield folder
    registry._registered.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path


def write_weights(package: Path) -> torch.nn.Module:
    """Weights of the page's network, where its entry says that they are."""
    network: torch.nn.Module = import_module("my_package.network").Network(width=32)
    save_file(network.state_dict(), package / "small.safetensors")
    return network


def write_mydata(folder: Path) -> None:
    """Four slides with twenty nuclei each, in the layout of the page: one image a nucleus, at 0.5 um/px."""
    (folder / "images").mkdir(parents=True)
    lines = ["image,x,y,label,slide"]
    for number, crop in enumerate(synthetic_crops(80)):
        atypical = number % 2 == 1
        image = Image.fromarray(crop // 2 + 127 if atypical else crop).resize((40, 40))
        image.save(folder / "images" / f"{number}.png")
        lines.append(f"{number}.png,19.5,19.5,{'atypical' if atypical else 'normal'},s{number // 20}")
    (folder / "nuclei.csv").write_text("\n".join(lines))


def test_a_segmenter_finds_nuclei_with_its_settings(package: Path) -> None:
    image = make_tissue(512, seed=0).image
    n_nuclei = len(lemon.segment(image, segmenter="otsu"))
    assert n_nuclei > 20
    larger = lemon.load_segmenter("otsu", min_area_um2=60)
    assert 0 < len(lemon.segment(image, segmenter=larger)) < n_nuclei


@pytest.mark.slow
def test_a_method_pretrains_an_encoder(package: Path, here: Path) -> None:
    write_cells("cells")
    words = [word.removeprefix("pretrain.") for word in TINY if ".ssl." not in word]
    words += ["ssl=barlow", "ssl.out_dim=16", "cells=cells", "output=run", "epochs=2"]
    assert main(["pretrain", *words]) == EXIT_OK
    vectors = lemon.load_encoder("run").embed(synthetic_crops(3))
    assert vectors.std(dim=0).min() > 0


def test_an_encoder_opens_with_the_weights_of_its_package(package: Path) -> None:
    network = write_weights(package)
    cells = synthetic_crops(5)
    view = torch.from_numpy(cells[:, 10:50, 10:50].copy()).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(lemon.load_encoder("small").embed(cells), network((view - 0.5) / 0.5).detach())
    assert find_entry("owner/repository").name == "published"
    assert {"small", "published", "lemon_mini"} <= set(lemon.encoder_names())
    assert "| `small` | my-package |" in describe()
    with pytest.raises(ConfigError, match=r"^smal: no such file, folder or encoder; did you mean small"):
        lemon.load_encoder("smal")


@pytest.mark.slow
def test_a_task_is_probed_by_an_encoder_of_another_package(package: Path, here: Path) -> None:
    write_weights(package)
    write_mydata(here / "data" / "mydata")
    assert main(["probe", "models=small", "tasks=mydata", "data=data", "output=probe", "bootstrap=100"]) == EXIT_OK
    rows = [row for row in read_scores(Store("probe")) if row.metric == "macro_f1"]
    assert {(row.model, row.task) for row in rows} == {("small", "mydata")}
    assert np.mean([row.value for row in rows]) > 0.9, "bright and dark nuclei"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("mydat", r"tasks: got 'mydat'; expected one of nucls-super, .*; did you mean mydata\?"),
        ("gone", r"tasks: gone is registered as my_package.gone:ENTRY, which cannot be imported: No module named .*"),
        ("other", r"tasks: other is registered as my_package.mydata:load; expected a TaskEntry there"),
    ],
)
def test_a_task_that_is_none_is_one_line(package: Path, tmp_path: Path, name: str, line: str) -> None:
    with pytest.raises(TaskError) as told:
        open_task(name, tmp_path)
    assert re.fullmatch(line, str(told.value))
