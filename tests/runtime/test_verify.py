from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lemon.cells.names import shard_name
from lemon.errors import ConfigError
from lemon.runtime.store import Store
from lemon.runtime.verify import VerifyConfig, main, outputs_in
from tests.cells_table import write_slide


def flip(path: Path, *, at: float) -> None:
    """Change a byte in place, as a bad disk does: size stays."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 0x55
    path.write_bytes(content)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A cells table of two slides, and a trial's folder inside its output."""
    store = Store(tmp_path / "out")
    for name in ("a", "b"):
        write_slide(store, name, np.full((5, 60, 60, 3), 7, np.uint8))
    Store(tmp_path / "out" / "trials" / "t").write_json("result.json", {"a": 1})
    return tmp_path / "out"


def test_an_output_that_is_as_it_was_written_passes(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(VerifyConfig(output=str(output))) == 0
    assert "5 files in" in capsys.readouterr().out
    assert outputs_in(Store(output)) == {"", "trials/t"}


@pytest.mark.parametrize("at", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["cells/a.parquet", "slides/b.parquet", "trials/t/result.json"])
def test_a_flipped_byte_anywhere_is_told_with_the_remedy(
    output: Path, name: str, at: float, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(output / name, at=at)
    assert main(VerifyConfig(output=str(output))) == 3
    assert f"  {name}: is damaged or was changed; delete it" in capsys.readouterr().out


def test_lost_and_exchanged_files_are_told(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (output / "slides" / "b.parquet").unlink()
    store = Store(output)
    store.write_bytes(shard_name("a"), store.read_bytes(shard_name("b")))
    assert main(VerifyConfig(output=str(output))) == 3
    told = capsys.readouterr().out
    assert "slides/b.parquet: is gone" in told
    assert "cells: lacks the rows that the slides table states of a" in told


def test_a_folder_of_somebody_else_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds nothing that this version of lemon wrote"):
        main(VerifyConfig(output=str(tmp_path)))


def test_files_and_records_that_lemon_did_not_write_are_told(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (output / "cells" / "mine.txt").write_text("mine")
    (output / ".lemon" / "files" / "cells" / "a.parquet.json").unlink()
    (output / ".lemon" / "files" / "slides" / "a.parquet.json").write_text("{{")
    assert main(VerifyConfig(output=str(output))) == 3
    told = capsys.readouterr().out
    for name, reason in {"cells/mine.txt": "no", "cells/a.parquet": "no", "slides/a.parquet": "a damaged"}.items():
        assert f"  {name}: has {reason} record" in told
    with pytest.raises(ConfigError, match="is a file; expected the folder"):
        main(VerifyConfig(output=str(output / "cells" / "mine.txt")))
