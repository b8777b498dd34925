"""The slide that given nuclei are of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lemon.slides.reader import SlideReader
from tests.nuclei.given.made_up import write_made_up


@pytest.fixture(scope="package")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_made_up(tmp_path_factory.mktemp("slide") / "s.tiff")


@pytest.fixture(scope="package")
def reader(slide_path: Path) -> Iterator[SlideReader]:
    with SlideReader(slide_path) as opened:
        yield opened
