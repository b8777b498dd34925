"""Joining or starting Ray."""

from __future__ import annotations

import logging

import pytest

from lemon.runtime.cluster import start_ray


def test_starting_ray_quiets_the_console_of_ray_data_and_no_handler_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import ray.data

    logger, other = logging.getLogger("ray.data"), logging.StreamHandler()
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, other])
    monkeypatch.setattr(ray, "is_initialized", lambda: True)  # so that none is started
    start_ray()
    assert other.level == logging.NOTSET
    assert [each.level for each in logger.handlers if each.name == "console"] == [logging.ERROR]
