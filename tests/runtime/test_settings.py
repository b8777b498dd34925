"""An output goes on with the settings that it was begun with."""

from __future__ import annotations

from pathlib import Path

import pytest

from lemon.errors import ConfigError
from lemon.runtime.settings import check_settings, settings_difference
from lemon.runtime.store import Store


def check(store: Store, settings: dict, *, is_empty: bool = False) -> None:
    check_settings(store, "settings.json", settings, is_empty=lambda: is_empty, remedy="choose another output")


def test_the_same_settings_go_on_whatever_json_makes_of_them(tmp_path: Path) -> None:
    settings = {"offset_px": (0, 0), "scale": None, "nested": {"sides": (1.5, 2.0)}}
    for _ in range(2):
        check(Store(tmp_path), settings)


def test_other_settings_are_refused_with_what_differs_unless_nothing_was_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    check(store, {"a": 1, "b": {"c": [1, 2]}})
    with pytest.raises(ConfigError, match=r"b\.c \[1, 2\] then, \[1, 3\] now\); choose another output"):
        check(store, {"a": 1, "b": {"c": (1, 3)}})
    check(store, {"a": 2}, is_empty=True)
    assert store.read_json("settings.json") == {"a": 2}


def test_a_setting_that_is_new_or_gone_is_a_difference() -> None:
    assert settings_difference({"a": 1}, {"b": 2}) == "a 1 then, None now, b None then, 2 now"
