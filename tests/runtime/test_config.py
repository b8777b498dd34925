from __future__ import annotations

import errno
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from lemon.curate.config import CurateConfig
from lemon.errors import EXIT_BAD_CONFIG, ConfigError, Fault
from lemon.nuclei.config import SEGMENTERS, SegmenterConfig
from lemon.pretrain.config import PretrainConfig
from lemon.probe.config import ProbeConfig
from lemon.report.config import ReportConfig
from lemon.runtime.config import describe, load, variant_names
from lemon.runtime.job import run_job
from lemon.sweep.config import SweepConfig

GOOD = ["slides=s.svs", "output=out"]


def test_the_default_config_needs_only_slides_and_output() -> None:
    config = load("curate", GOOD, CurateConfig)
    assert config.segmenter.name == "auto"
    assert config.cells_per_slide == 1000


@pytest.mark.parametrize("variant", variant_names("curate"))
@pytest.mark.parametrize(
    "segmenter",
    ["segmenter=auto", "segmenter=hematoxylin", "segmenter=hoverfast", "segmenter=hoverfast segmenter.checkpoint=x.pt"],
)
def test_every_shipped_variant_composes_and_validates(variant: str, segmenter: str) -> None:
    load("curate", [*GOOD, f"variant={variant}", *segmenter.split()], CurateConfig)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("cells_per_slide=many", ["cells_per_slide", "'many'", "integer"]),
        ("cells_per_slide=0", ["cells_per_slide", "got 0", "greater than or equal to 1"]),
        ("celsl_per_slide=3", ["celsl_per_slide", "unknown key", "did you mean cells_per_slide"]),
        ("workers.gpu=1", ["workers.gpu", "unknown key", "gpus"]),
        ("segmenter=hovernet", ["segmenter", "'hovernet'", "hematoxylin, hoverfast"]),
        ("segmenter.checkpoint=a.pth", ["segmenter.checkpoint", "unknown key"]),
        ("variant=huge", ["variant", "'huge'", "default, smoke"]),
        ("overlap_px=900", ["overlap_px=900", "region_px=1024"]),
        ("verbose", ["'verbose'", "key=value"]),
    ],
)
def test_a_mistake_is_told_in_one_line_with_key_value_and_expectation(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load("curate", [*GOOD, override], CurateConfig)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_several_mistakes_give_a_line_each() -> None:
    with pytest.raises(ConfigError) as caught:
        load("curate", ["output=out", "region_px=a", "foo=1"], CurateConfig)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("path", ["slides/**/*.svs", "a b (1)/x=3.svs", "it's/here.svs", "s3://bucket/a"])
def test_a_path_is_taken_literally_whatever_characters_it_has(path: str) -> None:
    assert load("curate", [f"slides={path}", "output=out"], CurateConfig).slides == path


@pytest.mark.parametrize("word", ["tasks=[amibr,consep-type]", "tasks=amibr,consep-type"])
def test_a_list_needs_no_brackets(word: str) -> None:
    config = load("probe", ["models=runs/x", word], ProbeConfig)
    assert config.tasks == ["amibr", "consep-type"]
    assert config.models == ["runs/x"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["ssl.out_dim=-4"], "ssl.out_dim: got -4; expected greater than or equal to 1"),
        (["ssl=dinov2", "ssl.prototypes=many"], "ssl.prototypes: got 'many'; expected integer"),
        (["ssl=dinov2", "ssl.protoypes=9"], "ssl.protoypes: unknown key"),
    ],
)
def test_a_fault_inside_a_choice_is_named_by_the_key_that_the_user_wrote(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("pretrain", ["cells=c", "output=o", *words], PretrainConfig)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_field_with_the_name_of_a_stage_can_be_null(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["cells=c", "output=o"]
    assert load("pretrain", [*given, "probe=null"], PretrainConfig).probe is None
    probe = load("pretrain", [*given, "probe={cells: c, labels: l.csv}"], PretrainConfig).probe
    assert probe is not None
    assert (probe.cells, probe.labels) == ("c", "l.csv")
    with pytest.raises(ConfigError, match=r"^probe: got 'smoke'; expected"):
        load("pretrain", [*given, "probe=smoke"], PretrainConfig)


def test_help_offers_no_stage_as_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    run_job("pretrain", PretrainConfig, lambda config: 1, ["--help"])
    shown = capsys.readouterr().out
    assert re.search(r"^  ssl +default mocov3 +one of dinov2, .*mocov3$", shown, re.MULTILINE)
    assert re.search(r"^  ssl.out_dim +default 256 ", shown, re.MULTILINE)
    assert re.search(r"^  cells +required ", shown, re.MULTILINE)
    assert shown.count("required") == 2  # cells and output: all else has a default


def test_settings_that_only_change_the_speed_do_not_change_the_fingerprinted_settings() -> None:
    slow = load("curate", [*GOOD, "workers.cpus=1", "geojson=false"], CurateConfig)
    fast = load("curate", [*GOOD, "workers.cpus=8", "geojson=true"], CurateConfig)
    other = load("curate", [*GOOD, "region_px=512"], CurateConfig)
    assert slow.result_settings() == fast.result_settings() != other.result_settings()


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job("curate", CurateConfig, lambda config: 1, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in CurateConfig.model_fields)


def test_a_job_with_a_bad_config_exits_with_2_and_one_line_before_torch_or_ray_are_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from lemon.curate.config import CurateConfig; from lemon.runtime.job import run_job;"
        "code = run_job('curate', CurateConfig, lambda config: 0, ['slides=x', 'output=y', 'region_px=8']);"
        "assert not {'torch', 'ray', 'mlflow'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == EXIT_BAD_CONFIG
    assert done.stderr.strip() == "curate: region_px: got 8; expected greater than or equal to 256"


def test_importing_lemon_is_light() -> None:
    code = "import sys, lemon; assert not {'torch', 'ray', 'mlflow', 'numpy', 'yaml'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_key_that_bears_the_name_of_another_stages_folder_is_a_plain_value() -> None:
    config = load("report", ["views=a b.png", "atlas=out/atlas", "output=o"], ReportConfig)
    assert (config.views, config.atlas, config.output) == ("a b.png", "out/atlas", "o")
    assert "one of a0" not in describe("report", ReportConfig)
    assert "one of a0" in describe("pretrain", PretrainConfig)


def test_a_full_disk_is_one_line_and_exit_code_3_and_another_error_of_the_system_is_raised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ends_with(error: OSError) -> int:
        def main(config: CurateConfig) -> int:
            raise error

        return run_job("curate", CurateConfig, main, GOOD)

    assert ends_with(OSError(errno.ENOSPC, "No space left on device", "cells/a.parquet")) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("curate: stopped: [Errno 28] No space left on device: 'cells/a.parquet'")
    with pytest.raises(ChildProcessError):
        ends_with(ChildProcessError(errno.ECHILD, "No child processes"))


@pytest.mark.parametrize("given", ["a,b.svs", "a, b.svs", "with,comma/*.svs", "with,comma"])
def test_a_comma_in_the_name_of_a_file_is_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with,comma").mkdir()
    for name in ("a,b.svs", "a, b.svs", "with,comma/c.svs"):
        (tmp_path / name).touch()
    assert load("curate", [f"slides={given}", "output=o"], CurateConfig).slides == given
    assert load("curate", ["slides=c.svs,d.svs", "output=o"], CurateConfig).slides == ["c.svs", "d.svs"]


@pytest.mark.parametrize(
    "script", sorted((Path(__file__).parents[2] / "jobs").glob("*.py")), ids=lambda path: path.stem
)
def test_of_every_job_a_wrong_word_is_the_only_fault(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "no_such_key=1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == EXIT_BAD_CONFIG
    told = capsys.readouterr().err
    assert "no_such_key: unknown key" in told
    assert told.count("unknown key") == 1  # none of the job's own file


PRETRAIN = ["cells=c", "output=o"]


def test_another_choice_drops_what_the_variant_set_for_its_own_and_keeps_what_the_user_gives() -> None:
    laptop = load("pretrain", [*PRETRAIN, "variant=laptop"], PretrainConfig)
    assert (laptop.ssl.name, laptop.ssl.model_dump()["out_dim"]) == ("mocov3", 128)
    tiny = load("pretrain", [*PRETRAIN, "ssl.prototypes=64", "ssl=dinov2_tiny", "variant=laptop"], PretrainConfig)
    assert (tiny.ssl.name, tiny.ssl.model_dump()["prototypes"], tiny.ssl.model_dump()["hidden_dim"]) == (
        *("dinov2", 64),
        512,
    )
    wide = load("pretrain", [*PRETRAIN, "variant=laptop", "ssl.hidden_dim=64"], PretrainConfig)
    assert wide.ssl == laptop.ssl.model_copy(update={"hidden_dim": 64})


def test_nested_values_and_words_say_the_same() -> None:
    words = load("pretrain", [*PRETRAIN, "ssl=dinov2", "ssl.local_crops=4", "select.organs=a,b"], PretrainConfig)
    nested = {"ssl": {"preset": "dinov2", "local_crops": 4}, "select": {"organs": ["a", "b"]}}
    assert load("pretrain", [{"cells": "c", "output": "o"}, nested], PretrainConfig) == words
    assert load("pretrain", [words.model_dump(mode="json")], PretrainConfig) == words


def test_of_layers_the_later_wins_and_a_choice_comes_before_keys_of_any_layer() -> None:
    layers = [{"ssl": {"local_crops": 4}}, {"epochs": 20}, {"ssl": "dinov2"}, {"epochs": 30}]
    config = load("pretrain", [*PRETRAIN, *layers], PretrainConfig)
    assert (config.epochs, config.ssl.model_dump()["local_crops"]) == (30, 4)


@pytest.mark.parametrize(("text", "kept"), [("2024", "2024"), ("007", "007"), ("1.50", "1.50"), ("1e3", "1e3")])
def test_a_path_of_digits_is_text(text: str, kept: str) -> None:
    assert load("curate", ["slides=s.svs", f"output={text}"], CurateConfig).output == kept


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1.50", 1.5), ("0.25", 0.25), ("2", 2.0)])
def test_a_number_may_be_written_in_any_form(text: str, value: float) -> None:
    assert load("curate", [*GOOD, f"default_mpp={text}"], CurateConfig).default_mpp == value


def test_a_preset_of_ones_own_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("preset: a1\nname: mine\nview_a: {grayscale_p: 0.7}\n")
    views = load("pretrain", [*PRETRAIN, f"views={tmp_path / 'mine.yaml'}"], PretrainConfig).views
    assert (views.name, views.view_a.grayscale_p, views.view_a.rotation_degrees) == ("mine", 0.7, 360)
    (tmp_path / "mine.yaml").write_text("- a1\n")
    with pytest.raises(ConfigError, match=r"^views: .*mine.yaml: expected keys with values$"):
        load("pretrain", [*PRETRAIN, f"views={tmp_path / 'mine.yaml'}"], PretrainConfig)


@pytest.mark.parametrize("text", ["[0012,NO,1.50,2021-03-12,1_000,12:30]", "0012,NO,1.50,2021-03-12,1_000,12:30"])
def test_ids_in_a_list_stay_as_they_are_typed(text: str, tmp_path: Path) -> None:
    ids = ["0012", "NO", "1.50", "2021-03-12", "1_000", "12:30"]
    assert load("pretrain", [*PRETRAIN, f"select.slides={text}"], PretrainConfig).select.slides == ids
    (tmp_path / "mine.yaml").write_text("name: 0012\npoints: [{name: 007, value: NO}]\n")
    study = load("scaling_sweep", [*PRETRAIN, "tasks=amibr", f"sweep={tmp_path / 'mine.yaml'}"], SweepConfig).sweep
    assert (study.name, study.points[0].name, study.points[0].value) == ("0012", "007", "NO")


def test_a_mapping_in_one_word_is_the_same_as_a_word_for_each_of_its_keys() -> None:
    one = ["variant=smoke", "encoder={depth: 2, heads: 6}", "ssl=dinov2", "ssl={chunk: 4, warmup_epochs: 1}"]
    each = ["variant=smoke", "encoder.depth=2", "encoder.heads=6", "ssl=dinov2", "ssl.chunk=4", "ssl.warmup_epochs=1"]
    assert load("pretrain", [*PRETRAIN, *one], PretrainConfig) == load("pretrain", [*PRETRAIN, *each], PretrainConfig)


@pytest.mark.parametrize(("word", "n"), [("1e6", 10**6), ("2.5e3", 2500), ("1E2", 100), ("12", 12)])
def test_a_whole_number_may_have_an_exponent(word: str, n: int) -> None:
    assert load("pretrain", [*PRETRAIN, f"select.n_cells={word}"], PretrainConfig).select.n_cells == n
    with pytest.raises(ConfigError, match=r"^select.n_cells: got 1.5"):
        load("pretrain", [*PRETRAIN, "select.n_cells=15e-1"], PretrainConfig)


@pytest.mark.parametrize("word", ["null", "Null", "NULL"])
def test_null_may_be_written_in_any_case(word: str) -> None:
    assert load("pretrain", [*PRETRAIN, f"register_as={word}"], PretrainConfig).register_as is None


def test_a_file_of_presets_that_cannot_be_one_is_told_in_one_line(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    for text, told in (
        (f"preset: {mine}\n", "names itself as its preset"),
        ("preset: null\n", "got 'None'; expected one of dinov2"),
        ("hidden_dim: 3\n", "mine.yaml: expected name=..., or preset=... that it changes"),
        ("a: [\n", "not YAML"),
    ):
        mine.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load("pretrain", [*PRETRAIN, f"ssl={mine}"], PretrainConfig)
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "base.yaml").write_text("preset: mocov3\nhidden_dim: 7\n")
    mine.write_text("preset: base.yaml\nout_dim: 5\n")
    ssl = load("pretrain", [*PRETRAIN, f"ssl={mine}"], PretrainConfig).ssl.model_dump()
    assert (ssl["hidden_dim"], ssl["out_dim"]) == (7, 5)


def test_a_fault_in_a_list_is_named_by_its_place() -> None:
    with pytest.raises(ConfigError, match=r"sweep.points.0.nmae: unknown key; did you mean name"):
        load("scaling_sweep", [*PRETRAIN, "tasks=amibr", "sweep.points=[{nmae: x, name: y}]"], SweepConfig)


@pytest.mark.parametrize("word", ["output=${oc.env:HOME}", "output=a${b}"])
def test_an_interpolation_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"^output: got an interpolation"):
        load("curate", ["slides=s", word], CurateConfig)


def test_a_fault_has_its_key_value_and_expectation_as_fields() -> None:
    with pytest.raises(ConfigError) as caught:
        load("pretrain", [*PRETRAIN, "ssl=dinov2", "ssl.prototypes=1", "batch=many"], PretrainConfig)
    assert caught.value.faults == (
        Fault("ssl.prototypes", 1, "greater than or equal to 2"),
        Fault("batch", "many", "integer, unable to parse string as an integer"),
    )


class Mine(SegmenterConfig):
    """A segmenter of another package."""

    name: Literal["mine"] = "mine"
    threshold: float = Field(0.5, gt=0)


def test_a_segmenter_of_another_package_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEGMENTERS.builtin, "mine", f"{__name__}:Mine")
    config = load("curate", [*GOOD, "segmenter.name=mine", "segmenter.threshold=0.7"], CurateConfig)
    assert config.segmenter == Mine(threshold=0.7)
    assert load("curate", [*GOOD, "segmenter=mine"], CurateConfig).segmenter == Mine()
    monkeypatch.setitem(SEGMENTERS.builtin, "gone", "no_such_package:Gone")  # one not importable hides no fault
    own = "auto, cellvit, hematoxylin, hoverfast, instanseg, stardist"
    with pytest.raises(ConfigError, match=rf"^segmenter: got 'foo'; expected one of {own}, mine, gone"):
        load("curate", [*GOOD, "segmenter=foo"], CurateConfig)
    with pytest.raises(ConfigError, match=r"^segmenter: gone is registered as no_such_package:Gone, which cannot be"):
        load("curate", [*GOOD, "segmenter=gone"], CurateConfig)
    with pytest.raises(ConfigError, match=r"^segmenter.threshold: got 0; expected greater than 0$"):
        load("curate", [*GOOD, "segmenter.name=mine", "segmenter.threshold=0"], CurateConfig)


NO_CELLS = "cells: {here}/nowhere holds no cells; expected the output of lemon curate"


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        ("pretrain", ["cells=nowhere", "output=o"], NO_CELLS),
        ("fit_stain", ["cells=nowhere"], NO_CELLS),
        ("embed", ["cells=nowhere", "output=o", "model=lemon_mini"], NO_CELLS),
        ("scaling_sweep", ["cells=nowhere", "output=o", "tasks=amibr"], NO_CELLS),
        ("atlas", ["cells=nowhere", "embeddings=e"], NO_CELLS),
        ("describe", ["cells=nowhere", "embeddings=e"], NO_CELLS),
        ("embed", ["slides=s", "output=o", "model=lemon_mnii"], "lemon_mnii: no such file, folder or encoder; did you"),
        ("probe", ["models=lemon_mnii", "tasks=amibr"], "lemon_mnii: no such file, folder or encoder; did you"),
        ("probe", ["models=lemon_mini", "tasks=ambir"], "tasks: got 'ambir'; expected one of nucls-super, "),
    ],
)
def test_cells_and_names_that_are_not_there_are_told_before_torch_is_imported(
    script: str, words: list[str], told: str, tmp_path: Path
) -> None:
    job = Path(__file__).parents[2] / "jobs" / f"{script}.py"
    code = (
        f"import runpy, sys; sys.argv = ['{script}', *{words!r}]\n"
        f"try: runpy.run_path({str(job)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 2, end\n"
        "assert not {'torch', 'ray', 'sklearn'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: {told.format(here=tmp_path)}")
    assert not list(tmp_path.iterdir())
