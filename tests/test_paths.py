"""Every key that names a file or folder, in every job, with what must not be taken for one."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from lemon.atlas.config import AtlasConfig
from lemon.curate.config import CurateConfig
from lemon.demo.config import DemoConfig
from lemon.describe.config import DescribeConfig
from lemon.embed.config import EmbedConfig
from lemon.errors import ConfigError
from lemon.fetch.config import FetchConfig
from lemon.pretrain.config import FitStainConfig, PretrainConfig
from lemon.probe.config import ProbeConfig
from lemon.report.config import ReportConfig
from lemon.runtime.config import Frozen, validate
from lemon.runtime.job import run_job
from lemon.runtime.verify import VerifyConfig
from lemon.sweep.config import SweepConfig

CURATE = {"slides": "s", "output": "o", "segmenter": {"name": "hematoxylin"}}
PRETRAIN = {
    "cells": "c",
    "output": "o",
    "ssl": {"name": "mocov3"},
    "views": {"name": "v"},
    "encoder": {"name": "e", "dim": 192, "depth": 1, "heads": 3},
}
PROBE = {"cells": "c", "labels": "l"}
KEYS: list[tuple[type[Frozen], dict[str, Any], str]] = [
    *((CurateConfig, CURATE, key) for key in ("slides", "output", "tissue.masks", "scratch")),
    (CurateConfig, CURATE | {"segmenter": {"name": "hoverfast"}}, "segmenter.checkpoint"),
    *((EmbedConfig, {"model": "m", "output": "o", "cells": "c"}, key) for key in ("model", "output", "cells")),
    (EmbedConfig, {"model": "m", "output": "o"}, "slides"),
    *((FetchConfig, {"output": "o", "manifest": "m", "slides_per_organ": 1}, key) for key in ("output", "manifest")),
    (FetchConfig, {"output": "o", "manifest": "m", "slides_per_organ": 1, "stream": True}, "cells"),
    (FitStainConfig, {}, "cells"),
    (DemoConfig, {}, "output"),
    (VerifyConfig, {}, "output"),
    *((PretrainConfig, PRETRAIN, key) for key in ("cells", "output", "cache", "views.stain.statistics")),
    *(
        (PretrainConfig, PRETRAIN | {"probe": {"cells": "c", "labels": "l"}}, f"probe.{key}")
        for key in ("cells", "labels")
    ),
    *((ProbeConfig, {"models": "m", "tasks": "t"}, key) for key in ("models", "data", "output")),
    *((ReportConfig, {}, key) for key in ("sweeps", "probes", "atlas", "views", "paper", "output")),
    *(
        (AtlasConfig, {"embeddings": "e", "cells": "c"}, key)
        for key in ("embeddings", "against", "cells", "output", "labels")
    ),
    *((DescribeConfig, {"embeddings": "e", "cells": "c"}, key) for key in ("embeddings", "cells", "output", "labels")),
    *((CurateConfig, CURATE | {"cells_from": {"path": "p"}}, f"cells_from.{key}") for key in ("path", "alignment")),
    *((SweepConfig, {"sweep": {"name": "s", "points": []}}, key) for key in ("cells", "data", "output")),
]
HOSTILE = {
    "nothing": "",
    "blanks": "  ",
    "a file address without a file": "file://",
    "a device": "/dev/null",
    "a pipe": "{here}/pipe",
    "a loop of links": "{here}/loop",
    "5,000 characters": "a" * 5000,
    "a zero byte": "a\0b",
    "a byte that is no UTF-8": "a\udcffb",
    "a key": "s3://KEY:pl4nted@bucket/x",
    "a key with a slash": "s3://KEY:a/pl4nted@bucket/x",
    "a signed address": "s3://bucket/x?X-Amz-Signature=pl4nted",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    return folder


def with_key(values: dict[str, Any], key: str, value: str) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return values | {first: with_key(values.get(first, {}), rest, value) if rest else value}


@pytest.mark.parametrize(("model", "values", "key"), KEYS, ids=lambda each: getattr(each, "__name__", None))
def test_what_is_no_path_is_refused_in_one_line_that_names_the_key(
    model: type[Frozen], values: dict[str, Any], key: str, here: Path
) -> None:
    for kind, text in HOSTILE.items():
        with pytest.raises(ConfigError) as caught:
            validate(with_key(values, key, text.replace("{here}", str(here))), model)
        (line,) = [line for line in str(caught.value).splitlines() if line.startswith(key)]
        assert all(word in line for word in ("got", "expected")), (kind, line)
        assert "pl4nted" not in str(caught.value), kind
        assert len(line) < 400, kind


@pytest.mark.parametrize("path", ["a", "~/a", "/a b/c", "s3://bucket", "s3://bucket/a@b/ü", "file:///a", "a/*.svs"])
def test_what_may_be_a_path_is_taken(path: str) -> None:
    assert validate(CURATE | {"output": path}, CurateConfig).output == path


@pytest.mark.parametrize("address", ["http://host/x", "gs://bucket/x", "S3://bucket/x", "s3://", "s3:///x"])
def test_an_address_of_another_kind_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="expected a local path or s3://bucket/prefix"):
        validate(CURATE | {"output": address}, CurateConfig)


@pytest.mark.parametrize(
    "word",
    [
        "region_px=${oc.env:PLANTED_TOKEN}",
        "output=${oc.env:PLANTED_TOKEN}",
        "region_px=${oc.decode:${oc.env:PLANTED_TOKEN}}",
        "region_px=a${oc.env:HARMLESS,pl4nted-s3cret}",
        "output=s3://KEY:pl4nted-s3cret@bucket/x",
        "region_px=pl4nted-s3cret",
        "pl4nted-s3cret=1",
        "pl4nted-s3cret",
        "segmenter=pl4nted-s3cret",
        "variant=pl4nted-s3cret",
    ],
)
def test_a_word_of_the_command_line_never_leads_to_a_secret_that_is_told(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLANTED_TOKEN", "pl4nted-s3cret")
    assert run_job("curate", CurateConfig, lambda config: 0, ["slides=s", "output=o", word]) == 2
    told = "".join(capsys.readouterr())
    assert len(told.splitlines()) == 1
    assert "s3cret" not in told


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG])
def test_a_path_that_is_something_else_is_one_line(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: CurateConfig) -> int:
        raise OSError(number, "what the system says", str(tmp_path / "x"))

    assert run_job("curate", CurateConfig, main, ["slides=s", "output=o"]) == 2
    assert capsys.readouterr().err == f"curate: stopped: {tmp_path / 'x'}: what the system says\n"
