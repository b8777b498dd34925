from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from lemon.runtime.limits import allow_open_files


@pytest.fixture(autouse=True)
def few_files() -> Iterator[int]:
    """A process that may have 300 files open, and could more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_limit_rises_to_what_is_asked_for_besides_those_of_all_else() -> None:
    assert allow_open_files(500) == 500
    assert 500 < resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1000
    assert allow_open_files(10) == 10
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 500, "it does not fall"


def test_more_than_the_system_allows_is_not_promised(few_files: int) -> None:
    if few_files == resource.RLIM_INFINITY:
        pytest.skip("any number is allowed")
    assert allow_open_files(few_files + 10) < few_files
