from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmm.errors import MalformedRequest
from vmm.qtest.lines import LineReader


def read(reader: LineReader, data: bytes) -> list[bytes | str]:
    """Feed `data`; return the lines, and errors as their texts."""
    return [str(line) if isinstance(line, MalformedRequest) else line for line in reader.feed(data)]


@given(st.lists(st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"").rstrip(b"\r"))), st.data())
def test_lines_come_whole_however_they_are_cut(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    reader = LineReader(100)
    found: list[bytes | str] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += read(reader, stream[:size])
        stream = stream[size:]
    assert found == lines


def test_a_carriage_return_belongs_to_the_end() -> None:
    assert read(LineReader(10), b"a\r\nb\n") == [b"a", b"b"]


def test_a_line_that_is_too_long_is_an_error_in_its_place_and_the_next_is_read() -> None:
    too_long = "A line is longer than 4 bytes, which is the most it may have"
    reader = LineReader(4)
    assert read(reader, b"1234\n12345\nab") == [b"1234", too_long]
    assert read(reader, b"cd\n") == [b"abcd"]
    for _ in range(3):
        assert read(reader, b"123") == []
    assert read(reader, b"\nok\n") == [too_long, b"ok"]


@given(st.lists(st.binary(max_size=30), max_size=20))
def test_no_more_than_the_limit_is_held(chunks: list[bytes]) -> None:
    reader = LineReader(8)
    for chunk in chunks:
        for line in reader.feed(chunk):
            assert isinstance(line, MalformedRequest) or len(line) <= 8
        assert len(reader._begun) <= 8
