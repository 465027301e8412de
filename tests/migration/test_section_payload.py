from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.migration.section_payload import (
    DEPTH_LIMIT,
    INT_MAX,
    INT_MIN,
    STRUCTURE_LIMIT,
    VALUES_LIMIT,
    Misshapen,
    decode_state,
    encode_state,
)

if TYPE_CHECKING:
    from typing import Any

KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda key: not key.startswith("$"))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(INT_MIN, INT_MAX)
    | st.binary(max_size=40)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))
STATES = st.dictionaries(KEYS, VALUES, max_size=6)


def decode(structure: bytes, blobs: bytes = b"") -> dict[str, Any]:
    return decode_state(structure, memoryview(blobs))


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


@settings(deadline=None, derandomize=True, database=None)
@given(STATES)
def test_decoding_undoes_encoding(state: dict[str, Any]) -> None:
    structure, blobs = encode_state(state)
    decoded = decode(structure, b"".join(blobs))
    assert decoded == state
    assert repr(sorted(decoded.items())) == repr(sorted({key: in_order(item) for key, item in state.items()}.items()))


def in_order(value: Any) -> Any:
    """`value` with the keys of its dicts sorted, so that its text tells 1 from True."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    return [in_order(item) for item in value] if isinstance(value, list) else value


@settings(deadline=None, derandomize=True, database=None)
@given(STATES)
def test_equal_states_have_equal_encodings(state: dict[str, Any]) -> None:
    turned = dict(reversed(state.items()))
    assert encode_state(turned) == encode_state(state)


def test_the_encoding_is_compact_and_readable() -> None:
    structure, blobs = encode_state({"z": 1, "regs": b"\0\1", "a": [b"", None, True, "é"]})
    assert structure == '{"a":[{"$":0},null,true,"é"],"regs":{"$":2},"z":1}'.encode()
    assert blobs == [b"", b"\0\1"]


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"a": 1.5}, "a: a float; state is made of None, bool, int, str, bytes, list and dict"),
        ({"a": [{"b": (1,)}]}, "a[0].b: a tuple; state is made of None, bool, int, str, bytes, list and dict"),
        ({"a": bytearray(1)}, "a: a bytearray; state is made of None, bool, int, str, bytes, list and dict"),
        ({"a": {"b": INT_MAX + 1}}, "a.b: an integer that has neither 64 bits nor 63 and a sign"),
        ({"a": INT_MIN - 1}, "a: an integer that has neither 64 bits nor 63 and a sign"),
        ({"a": {1: 2}}, "a: key 1 is not a string without a leading $"),
        ({"$": 2}, "the whole: key '$' is not a string without a leading $"),
        ({"a": nested(DEPTH_LIMIT)}, "a" + "[0]" * 15 + ": more than 16 containers within each other"),
        ({"a": "x" * STRUCTURE_LIMIT}, "262152 bytes besides byte strings, at most 262144 fit"),
        ({"a": [0] * VALUES_LIMIT}, "more than 32768 values"),
    ],
)
def test_what_has_no_place_in_a_state_is_refused_with_its_path(state: dict[str, Any], text: str) -> None:
    with pytest.raises(Misshapen) as caught:
        encode_state(state)
    assert str(caught.value) == text


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(Misshapen, match="no JSON"):
        encode_state({"a": "\ud800"})


@pytest.mark.parametrize("depth", [1, DEPTH_LIMIT - 1])
def test_containers_may_be_nested_up_to_the_limit(depth: int) -> None:
    state = {"a": nested(depth)}
    assert decode(encode_state(state)[0]) == state


@pytest.mark.parametrize(
    ("structure", "blobs", "text"),
    [
        (b"", b"", "no JSON"),
        (b"{", b"", "no JSON"),
        (b"\xff", b"", "no JSON"),
        (b"[" * 20_000, b"", "no JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", b"", "no JSON"),
        (b"[]", b"", "no object at the top"),
        (b'{"$":0}', b"", "no object at the top"),
        (b'{"a": 1}', b"", "JSON that is not in its canonical form"),
        (b'{"a":1,"a":1}', b"", "JSON that is not in its canonical form"),
        (b'{"b":1,"a":1}', b"", "JSON that is not in its canonical form"),
        (b'{"a":-0}', b"", "JSON that is not in its canonical form"),
        (b'{"a":"\\u0061"}', b"", "JSON that is not in its canonical form"),
        (b'{"a":"\\ud800"}', b"", "no JSON"),
        (b'{"a":NaN}', b"", "no JSON"),
        (b'{"a":1.5}', b"", "a: a number that is no integer"),
        (b'{"a":18446744073709551616}', b"", "a: an integer that has neither 64 bits nor 63 and a sign"),
        (b'{"a":{"$":3}}', b"ab", "a: a byte string of 3 bytes where 2 are left"),
        (b'{"a":{"$":1}}', b"ab", "1 bytes after the last byte string"),
        (b'{"a":{"$":-1}}', b"", "a: not a reference to a byte string"),
        (b'{"a":{"$":true}}', b"a", "a: not a reference to a byte string"),
        (b'{"a":{"$":[]}}', b"", "a: not a reference to a byte string"),
        (b'{"a":{"$":0,"b":1}}', b"", "a: not a reference to a byte string"),
        (b'{"a":[{"$b":0}]}', b"", "a[0]: key '$b' has a leading $"),
        (b'{"$b":1}', b"", "the whole: key '$b' has a leading $"),
        (b'{"a":' + b"[" * 16 + b"]" * 16 + b"}", b"", "more than 16 containers within each other"),
        (b'{"a":[' + b"0," * VALUES_LIMIT + b"0]}", b"", "more than 32768 values"),
        (b'"' + b"x" * STRUCTURE_LIMIT + b'"', b"", "262146 bytes besides byte strings, at most 262144 are read"),
    ],
)
def test_hostile_encodings_are_refused(structure: bytes, blobs: bytes, text: str) -> None:
    with pytest.raises(Misshapen) as caught:
        decode(structure, blobs)
    assert text in str(caught.value)


@settings(deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=60), st.binary(max_size=5))
def test_any_bytes_are_decoded_or_refused(structure: bytes, blobs: bytes) -> None:
    try:
        state = decode(structure, blobs)
    except Misshapen:
        return
    assert encode_state(state)[0] == structure


@settings(deadline=None, derandomize=True, database=None)
@given(st.text(alphabet='{}[]":,$-019.eab truefalsn\\u', max_size=30))
def test_any_json_like_text_is_decoded_or_refused(text: str) -> None:
    try:
        state = decode(text.encode())
    except Misshapen:
        return
    assert encode_state(state)[0] == text.encode()
