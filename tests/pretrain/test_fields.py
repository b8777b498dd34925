"""An encoder of fields: trained from slides, taken by context=field, refused where images of nuclei are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lemon.embed import job as embedding
from lemon.embed.config import EmbedConfig
from lemon.encoders.config import LEMON_MEAN, LEMON_STD, VIT_TINY8
from lemon.encoders.export import CellInput
from lemon.encoders.open import Encoder
from lemon.encoders.vit import build_vit
from lemon.errors import EXIT_OK, ConfigError
from lemon.pretrain import job as pretraining
from lemon.pretrain.check import check
from lemon.pretrain.config import PretrainConfig
from lemon.probe import job as probing
from lemon.probe.config import ProbeConfig
from lemon.runtime.config import load
from lemon.runtime.store import Store
from tests.cells_table import synthetic_crops, table_of_a_slide
from tests.sweep.studies import TINY

pytestmark = pytest.mark.usefixtures("console")


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return table_of_a_slide(tmp_path)


def config_in(folder: Path, *words: str) -> PretrainConfig:
    places = [f"cells={folder / 'cells'}", f"output={folder / 'run'}", f"cache={folder / 'cache'}"]
    tiny = [word.removeprefix("pretrain.") for word in TINY]
    unset = [word for word in tiny if not word.startswith(("probe", "tasks", "register_as"))]
    return load("pretrain", [*unset, "epochs=2", *places, *words], PretrainConfig)


def embed_config(folder: Path, *words: str) -> EmbedConfig:
    fixed = [f"cells={folder / 'cells'}", f"output={folder / 'out'}", "device=cpu", "clusters.k=2"]
    return load("embed", [*fixed, *words], EmbedConfig)


def field_encoder() -> Encoder:
    return Encoder(build_vit(VIT_TINY8), CellInput(LEMON_MEAN, LEMON_STD, um_per_px=1.4), name="wide")


@pytest.mark.slow
def test_an_encoder_trained_on_fields_says_so_and_is_for_fields_alone(
    cells: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(tmp_path, "field_um=56")
    for _ in range(2):
        assert pretraining.main(config) == EXIT_OK
    assert json.loads((tmp_path / "run/encoder/config.json").read_text())["lemon"]["um_per_px"] == pytest.approx(1.4)
    told = capsys.readouterr().out
    assert "fields of 56 um are cut from the slides" in told
    assert "registered" not in told
    with pytest.raises(ConfigError, match=r"begun with other settings \(.*field_um 56\.0 then, 60\.0 now"):
        pretraining.main(config_in(tmp_path, "field_um=60"))
    words = ["model=lemon_mini", "context=field", f"context.model={tmp_path / 'run'}"]
    assert embedding.main(embed_config(tmp_path, *words)) == EXIT_OK
    assert "was trained on crops" not in capsys.readouterr().out  # as it would be told of another width
    assert embedding.main(embed_config(tmp_path, *words, "context.um=30", "overwrite=true")) == EXIT_OK
    assert "run was trained on crops of 56 um and sees 30 um here" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"model: run was trained on fields of 56 um.*context=field context\.model="):
        embedding.main(embed_config(tmp_path, f"model={tmp_path / 'run'}"))
    task = f"morphometry:{cells.uri}"
    words = [f"models={tmp_path / 'run'}", f"tasks=['{task}']", f"output={tmp_path / 'probe'}", "device=cpu"]
    with pytest.raises(ConfigError, match="none of them can be opened"):
        probing.main(load("probe", words, ProbeConfig))
    assert "run was trained on fields of 56 um" in capsys.readouterr().err


def test_an_encoder_of_fields_takes_no_images_of_nuclei() -> None:
    wide = field_encoder()
    assert repr(wide).splitlines()[1] == (
        "  embed_fields(uint8 [N, S, S, 3], RGB, S px being 56 um) -> torch.float32 [N, 192]"
    )
    assert wide.embed_fields(np.zeros((2, 224, 224, 3), np.uint8)).shape == (2, wide.width)
    with pytest.raises(ConfigError, match=r"^wide was trained on fields of 56 um and does not take images of nuclei"):
        wide.embed(synthetic_crops(2))


def test_an_encoder_of_fields_is_neither_scored_nor_registered(tmp_path: Path) -> None:
    wide, plain = config_in(tmp_path, "field_um=56"), config_in(tmp_path)
    assert (wide.probe, wide.tasks, wide.register_as) == (None, None, None)
    assert plain.register_as == "lemon"
    assert "field_um" not in plain.result_settings()  # runs from before there was the key go on


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tasks=[amibr]"], r"tasks: got \['amibr'\]; expected null with field_um=56"),
        (["tasks=auto"], r"tasks: got 'auto'; expected null with field_um=56"),
        (["probe.n_cells=100"], r"probe: .*expected null with field_um=56"),
        (["register_as=wide"], "register_as: got 'wide'; expected null with field_um=56"),
        (["field_um=3"], "field_um"),
    ],
)
def test_what_fields_cannot_be_trained_with_is_told_with_its_key(
    tmp_path: Path, words: Sequence[str], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        config_in(tmp_path, "field_um=56", *words)


def test_fields_that_the_cache_cannot_hold_are_refused(cells: Store, tmp_path: Path) -> None:
    assert cells.list("cells")
    with pytest.raises(ConfigError, match=r"^cache_gb: got 0; expected 0\.000346 at least with field_um"):
        check(config_in(tmp_path, "field_um=56", "cache_gb=0"))
