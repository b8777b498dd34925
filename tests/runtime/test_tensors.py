"""Weights from a file that is damaged or meant to harm: a line, and no code is run."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lemon.encoders.export import CONFIG, WEIGHTS, load_exported
from lemon.encoders.open import RELEASED, load_encoder
from lemon.errors import ConfigError, DamagedError
from lemon.nuclei.hoverfast import load_checkpoint
from lemon.runtime.tensors import read_weights

STATE = {"state_dict": {"a": torch.arange(6.0), "b": torch.zeros(2, 2)}, "epoch": 3}


def saved(**options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(STATE, stream, **options)
    return stream.getvalue()


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code was run')",))


CONTENTS = {
    "zip": saved(),
    "legacy": saved(_use_new_zipfile_serialization=False),
    "pickle": pickle.dumps({"state_dict": [1, 2, 3]}),
}


def told(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert not any(advice in text for advice in ("weights_only", "safe_globals", "trust"))
    return text


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(CONTENTS)), st.data())
def test_whatever_bytes_are_wrong_it_is_one_line(kind: str, data: st.DataObject) -> None:
    content = bytearray(CONTENTS[kind])
    for _ in range(data.draw(st.integers(0, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    fault: DamagedError | None = None
    try:
        read_weights(bytes(content), label="x.pth")
    except DamagedError as error:
        fault = error
    assert fault is None or told(fault).startswith("x.pth: ")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_a_pickle_of_any_bytes_is_one_line(content: bytes) -> None:
    with pytest.raises(DamagedError) as caught:
        read_weights(b"\x80\x02" + content, label="x.pth")
    told(caught.value)


def hostile(folder: Path) -> dict[str, Path]:
    """Files by what is wrong with them, under the endings that encoders have."""
    whole = CONTENTS["zip"]
    contents = {
        "empty": b"",
        "junk": b"no weights " * 50,
        "cut": whole[: len(whole) // 2],
        "code": pickle.dumps(Harm()),
    }
    contents |= {"page": b"<!doctype html><html>", "pointer": b"version https://git-lfs.github.com/spec/v1\n"}
    made = {f"{name}{ending}": content for name, content in contents.items() for ending in (".pth.tar", ".pt", ".pth")}
    made |= {f"{name}.safetensors": content for name, content in contents.items()}
    made |= {"long.safetensors": (1 << 60).to_bytes(8, "little") + b"{}"}
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in made}


@pytest.mark.slow
def test_an_encoder_or_segmenter_of_such_a_file_is_one_line_with_its_name(tmp_path: Path) -> None:
    for name, path in hostile(tmp_path).items():
        for opened in (str(path), f"uni:{path}", f"volta:{path}"):
            with pytest.raises(ConfigError) as caught:
                load_encoder(opened)
            assert name in told(caught.value)
        with pytest.raises(ConfigError) as caught:
            load_checkpoint(path)
        assert name in told(caught.value)


CONFIGS = {
    "empty": b"",
    "cut": b'{"architecture": "vit',
    "binary": b"\xff\xfe\x00",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "no section": b"{}",
    "a section of another kind": b'{"lemon": []}',
    "no numbers": b'{"lemon": {"mean": ["a", 0, 0], "std": [1, 1, 1], "um_per_px": 0.25, "crop_px": 40}}',
    "no network": b'{"architecture": "nothing", "lemon": {"mean": [0, 0, 0], "std": [1, 1, 1]}}',
    "sizes": b'{"lemon": {"mean": [0, 0, 0], "std": [1, 1, 1], "crop_px": 1000000}}',
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_damaged_config_is_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes(CONFIGS[kind])
    (tmp_path / WEIGHTS).write_bytes((RELEASED / "lemon_mini" / WEIGHTS).read_bytes())
    with pytest.raises(ConfigError) as caught:
        load_encoder(tmp_path)
    assert str(tmp_path / CONFIG) in told(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, (1 << 40).to_bytes(8, "little")], ids=["empty", "zeros", "long"])
def test_damaged_weights_of_an_export_are_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes((RELEASED / "lemon_mini" / CONFIG).read_bytes())
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_exported(tmp_path)
    assert str(tmp_path / WEIGHTS) in told(caught.value)


def test_other_weights_in_an_export_are_one_line(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes((RELEASED / "lemon_mini" / CONFIG).read_bytes())
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match="missing keys"):
        load_exported(tmp_path)
