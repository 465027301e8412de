from __future__ import annotations

import json
from typing import TYPE_CHECKING

import attrs
import pytest

from vmm.monitor.json_text import encode

if TYPE_CHECKING:
    from typing import Any


@attrs.frozen
class Info:
    frontend_open: bool
    label: str | None = None


def test_output_is_pure_ascii_on_one_line() -> None:
    assert encode({"a": "é\U0001f600\n", "b": [1, None]}) == '{"a": "\\u00e9\\ud83d\\ude00\\n", "b": [1, null]}'


def test_half_a_surrogate_pair_becomes_the_replacement_character() -> None:
    assert json.loads(encode(["\udc80x\U0001f600\\ud800"])) == ["\ufffdx\U0001f600\\ud800"]


def test_attrs_objects_are_encoded_wherever_they_stand() -> None:
    assert encode({"return": [Info(True)]}) == '{"return": [{"frontend-open": true}]}'


def test_a_value_deeper_than_python_recurses_is_encoded() -> None:
    deep: Any = {"x": [1, "é", Info(False, "l")]}
    for _ in range(1000):
        deep = [deep, {"k": 1, "l": None}]
    text = encode({"id": deep})
    assert text.count("[") == text.count("]") == 1001
    assert '{"x": [1, "\\u00e9", {"frontend-open": false, "label": "l"}]}, {"k": 1, "l": null}]' in text


def test_a_number_that_is_none_is_a_bug() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        encode(float("nan"))
