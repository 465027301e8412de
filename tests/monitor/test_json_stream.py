from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.monitor.json_stream import Fault, JsonStream, Limits, Message, StreamState

if TYPE_CHECKING:
    from typing import Any

GOOD = b'{"execute":"no-such-cmd"}'
SMALL = Limits(size=60, tokens=12, depth=3)


def outcome(*pieces: bytes, limits: Limits | None = None) -> list[object]:
    """Feed the pieces; return values, and the reasons of faults marked as such."""
    stream = JsonStream(limits)
    found: list[object] = []
    for piece in pieces:
        for item in stream.feed(piece):
            found.append(item.value if isinstance(item, Message) else ("fault", item.reason))
    return found


def bytewise(data: bytes, limits: Limits | None = None) -> list[object]:
    return outcome(*(data[n : n + 1] for n in range(len(data))), limits=limits)


def faults(found: list[object]) -> int:
    return sum(isinstance(item, tuple) for item in found)


# Faulty input, and what is wrong with it (QEMU's own conformance cases come first).
BAD = [
    (b"{]\n", "byte 1 of the message: a key (a string) or '}' should follow, not ]"),
    (b"{\xff", "byte 1 of the message: '\\xff' begins no JSON value"),
    (b"{\x01", "byte 1 of the message: '\\x01' begins no JSON value"),
    (b"{'bad \xff", "byte 6 of the message: '\\xff' stands raw in a string"),
    (b"{'execute': 'nonexistent', 'id':'\n", "byte 33 of the message: '\\n' stands raw in a string"),
    (b"%p", "byte 0 of the message: '%' begins no JSON value"),
    (b"\xff", "byte 0 of the message: '\\xff' begins no JSON value"),
    (b"\x00", "byte 0 of the message: '\\x00' begins no JSON value"),
    (b"{'a': %p, 'b': {}}", "byte 6 of the message: '%' begins no JSON value"),
    (b'{"a":"\\u12"}', "byte 5 of the message: '\\\\u' is no escape in the string that begins here"),
    (b'{"a":"x\\q"}', "byte 5 of the message: '\\\\q' is no escape in the string that begins here"),
    (b'{"a":"tab\t"}', "byte 9 of the message: '\\t' stands raw in a string"),
    (b'{"a":"\\ud800"}', "byte 5 of the message: \\ud800 is half a surrogate pair in the string that begins here"),
    (b'{"a":"\\udc00x"}', "byte 5 of the message: \\udc00 is half a surrogate pair in the string that begins here"),
    (
        b'{"a":"\\ud800-\\udc00"}',
        "byte 5 of the message: \\ud800 is half a surrogate pair in the string that begins here",
    ),
    (b'{"a":"\xed\xa0\x80"}', "byte 5 of the message: byte 0xed is not UTF-8 in the string that begins here"),
    (b'{"a":"\xe9"}', "byte 5 of the message: byte 0xe9 is not UTF-8 in the string that begins here"),
    (b'{"a":1,"a":2}', 'byte 7 of the message: key "a" stands there twice'),
    (b"{'a':1,\"a\":2}", 'byte 7 of the message: key "a" stands there twice'),
    (b'{"a":NaN}', "byte 5 of the message: 'N' begins no JSON value"),
    (b'{"a":-Infinity}', "byte 5 of the message: '-' is no JSON number"),
    (b'{"a":nope}', "byte 5 of the message: 'nope' is no keyword; there are true, false and null"),
    (b'{"a":01}', "byte 5 of the message: '01' is no JSON number"),
    (b'{"a":1.}', "byte 5 of the message: '1.' is no JSON number"),
    (b'{"a":1e999}', "byte 5 of the message: 1e999 is larger than a number can be"),
    (b'{"a":1,}', "byte 7 of the message: a key (a string) should follow, not }"),
    (b'{"a" 1}', "byte 5 of the message: ':' should follow, not 1"),
    (b'{"a":}', "byte 5 of the message: a value should follow, not }"),
    (b'{"a":1 "b":2}', "byte 7 of the message: ',' or '}' should follow, not \"b\""),
    (b"{1:2}", "byte 1 of the message: a key (a string) or '}' should follow, not 1"),
    (b"[1 2]", "byte 3 of the message: ',' or ']' should follow, not 2"),
    (b"[1,]", "byte 3 of the message: a value should follow, not ]"),
    (b"[}", "byte 1 of the message: a value or ']' should follow, not }"),
    (b"}}}\n", "byte 0 of the message: a value should follow, not }"),
    (b",\n", "byte 0 of the message: a value should follow, not ,"),
    (b"{'a': \x01 'b', 'c': 1}\n", "byte 6 of the message: '\\x01' begins no JSON value"),
]


@pytest.mark.parametrize(("data", "what"), BAD, ids=lambda value: repr(value)[:40])
def test_a_bad_message_is_one_fault_and_the_next_message_is_read(data: bytes, what: str) -> None:
    found = outcome(data, GOOD)
    assert found == [("fault", f"Malformed JSON at {what}"), {"execute": "no-such-cmd"}]
    assert bytewise(data + GOOD) == found


@pytest.mark.parametrize("split", range(1, 120))
def test_input_may_be_split_anywhere(split: int) -> None:
    data = (
        b'{"a": [1, "x\\"}{"], "\xc3\xa9": {"b": null}}{\'c\': -1.5e3}\r\n{"d"  5}\n[true] "s" 12 {\xff'
        + GOOD
        + b"{'\\u00e9': '\\''}"
    )
    assert outcome(data[:split], data[split:]) == outcome(data)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"null\n", None),
        (b"{}", {}),
        (b"[]", []),
        (b"'it\\'s \"so\"'", "it's \"so\""),
        (b'"\\" \\\\ \\/ \\b\\f\\n\\r\\t"', '" \\ / \b\f\n\r\t'),
        (b'{"id":"\\u0000"}', {"id": "\0"}),
        (b'{"id":"\xc0\x80"}', {"id": "\0"}),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b"[9223372036854775807,18446744073709551615,-9223372036854775808]", [2**63 - 1, 2**64 - 1, -(2**63)]),
        (b"[18446744073709551616,-9223372036854775809]", [18446744073709551616.0, -9223372036854775809.0]),
        (b"[" + b"9" * 100 + b"]", [1e100]),
        (b"{'a':\n\r\t [ ] }", {"a": []}),
    ],
)  # fmt: skip
def test_the_dialect_is_read(data: bytes, value: object) -> None:
    for found in (outcome(data), bytewise(data)):
        assert found == [value]
        assert [type(item) for item in _flat(found)] == [type(item) for item in _flat([value])]


def _flat(value: Any) -> list[Any]:
    return [inner for item in value for inner in _flat(item)] if isinstance(value, list) else [value]


def test_a_scalar_ends_where_something_else_begins() -> None:
    assert outcome(b"12") == []
    assert outcome(b"12", b"3 true", b"{}") == [123, True, {}]


def test_white_space_between_messages_is_free_and_not_kept() -> None:
    stream = JsonStream()
    assert stream.feed(b" \r\n\t" * 100) == []
    assert stream.save().unparsed == b""


def test_unbalanced_input_waits_until_the_client_resets_it() -> None:
    found = outcome(b'{"a" 5 ', GOOD, b"\n", b"\xff", GOOD)
    assert faults(found) == 1
    assert found[-1] == {"execute": "no-such-cmd"}


def test_a_stray_character_in_an_unbalanced_line_costs_that_line_only() -> None:
    found = outcome(b'{"execute": Foo, "b": "}"\n' + GOOD)
    assert found == [
        ("fault", "Malformed JSON at byte 12 of the message: 'F' begins no JSON value"),
        {"execute": "no-such-cmd"},
    ]


def test_a_command_inside_a_message_with_a_stray_character_is_not_a_message() -> None:
    found = outcome(b'{"execute": Foo, "x": [{"execute": "quit"}, "}"]} ' + GOOD)
    assert faults(found) == 1
    assert found[1:] == [{"execute": "no-such-cmd"}]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b'{"a": "' + b"x" * 60 + b'"}', "size limit of 60 bytes"),
        (b'{"a": [1,2,3,4,5,6,7,8]}', "token count limit of 12 tokens"),
        (b'{"a": [[[1]]]}', "nesting depth limit of 3 open brackets"),
        (b"[[[[", "nesting depth limit of 3 open brackets"),
    ],
)
def test_a_limit_exceeded_is_one_fault_and_the_rest_of_the_message_is_passed_over(data: bytes, what: str) -> None:
    rest = b"]]]]\n" if data == b"[[[[" else b"\n"
    found = outcome(data + rest + GOOD, limits=SMALL)
    assert found == [("fault", f"Malformed JSON: the message exceeds the {what}"), {"execute": "no-such-cmd"}]
    assert bytewise(data + rest + GOOD, SMALL) == found


@pytest.mark.parametrize("data", [b'{"a": [[1],[]]}', b'{"a": "' + b"x" * 50 + b'"}', b"{'a':[1,2,3]}"])
def test_what_keeps_the_limits_is_read(data: bytes) -> None:
    assert faults(outcome(data, limits=SMALL)) == 0
    assert faults(bytewise(data, SMALL)) == 0


def test_the_depth_limit_is_met_exactly_and_deeper_than_python_recurses() -> None:
    for depth, expected in ((1024, 0), (1025, 1)):
        data = b"[" * depth + b"]" * depth + b"\n"
        assert faults(outcome(data)) == expected
        assert faults(outcome(b'{"id":' + data[1:-2] + b"}\n")) == expected


def test_a_message_that_arrives_whole_keeps_the_depth_limit_too() -> None:
    found = outcome(b'{"a": [[[1]]]}' + GOOD, limits=Limits(depth=3))
    assert found[0] == ("fault", "Malformed JSON: the message exceeds the nesting depth limit of 3 open brackets")
    assert found[1:] == [{"execute": "no-such-cmd"}]
    assert faults(outcome(b'{"a": [[1], [2], [3]]}', limits=Limits(depth=3))) == 0


def test_a_wide_message_is_not_a_deep_one() -> None:
    value = [{"n": n} for n in range(2000)]
    assert outcome(json.dumps({"a": value}).encode()) == [{"a": value}]


def test_a_stream_at_rest_goes_on_elsewhere() -> None:
    data = b'{"a": 1}{\'b\': %p, "c": "}\\"{"} [1, \'x\\\'\'] {"a": Foo\n' + GOOD
    whole = outcome(data)
    for split in range(len(data)):
        first = JsonStream()
        found = first.feed(data[:split])
        found += JsonStream(state=first.save()).feed(data[split:])
        assert [item.value if isinstance(item, Message) else ("fault", item.reason) for item in found] == whole


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=3, alphabet="ab-é"), JSON, max_size=3), max_size=4),
    st.booleans(),
    st.data(),
)
def test_valid_documents_round_trip_however_they_are_split(
    values: list[Any], ascii_only: bool, data: st.DataObject
) -> None:
    raw = "\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in values).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=4)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert outcome(*pieces) == values
    assert bytewise(raw) == values


PARTS = [*b'{ } [ ] : , " \' \\ a 1 - true \xff \x01 % "a" \xc3\xa9'.split(b" "), b" ", b"\n"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=25))
def test_any_input_gives_the_same_whole_and_bytewise_and_can_be_reset(parts: list[bytes]) -> None:
    data = b"".join(parts) + b"\xff\n" + GOOD
    found = outcome(data)
    assert bytewise(data) == found
    assert found[-1] == {"execute": "no-such-cmd"}


def test_items_are_messages_or_faults() -> None:
    first, second = JsonStream().feed(b"{}{]")
    assert isinstance(first, Message)
    assert isinstance(second, Fault)


MORE = "A frame must hold one message, and this one holds more"
NONE = "A frame must hold one message, and this one holds none"
INSIDE = "Malformed JSON: the frame ends inside the message"


@pytest.mark.parametrize(
    ("frame", "found"),
    [
        (b'{"execute":"x"}', Message({"execute": "x"})),
        (b' {"a":[1]}\r\n', Message({"a": [1]})),
        (b"12", Message(12)),
        (b"true", Message(True)),
        (b'"abc"', Message("abc")),
        (b"", Fault(NONE)),
        (b" \r\n", Fault(NONE)),
        (b"{}{}", Fault(MORE)),
        (b'{"a":1} x', Fault(MORE)),
        (b'{"a":', Fault(INSIDE)),
        (b'{"a":1', Fault(INSIDE)),
        (b'"abc', Fault(INSIDE)),
        (b"[1,2", Fault(INSIDE)),
        (b"nul", Fault("Malformed JSON at byte 0 of the message: 'nul' is no keyword; there are true, false and null")),
        (b"\0{}", Fault("Malformed JSON at byte 0 of the message: '\\x00' begins no JSON value")),
        (
            b'{"a":"' + b"x" * 200 + b'"}',
            Fault("Malformed JSON: the message exceeds the size limit of 100 bytes"),
        ),
    ],
)
def test_a_frame_is_one_message_and_ends_whatever_it_is(frame: bytes, found: Message | Fault) -> None:
    stream = JsonStream(Limits(size=100))
    for _ in range(2):
        assert stream.feed_frame(frame) == found
        assert stream.save() == StreamState()
        assert stream.feed_frame(b'{"next":1}') == Message({"next": 1})
