from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.migration.sample_stream import COMMANDS, DIGEST, EXTENTS, MACHINE, SAMPLE_SECTIONS, build, read
from tests.migration.test_section_payload import STATES
from vmm.errors import StateRejected, StreamCorrupt
from vmm.migration.ram_file_records import RamInPlace
from vmm.migration.ram_records import RamExtents
from vmm.migration.stream import HEAD_SIZE, SKIPPABLE, StreamReader, StreamWriter, encode_record
from vmm.migration.stream_order import SECTIONS_LIMIT
from vmm.migration.stream_records import PAGES_VERSION, End, Header, Home, Recipe, Section

if TYPE_CHECKING:
    from typing import Any

GOLDEN = Path(__file__).parent.parent / "golden" / "state_stream_v1.hex"
SAMPLE = build()
PREAMBLE = SAMPLE[:12]


def split(stream: bytes) -> list[tuple[int, int, bytes]]:
    """Take a stream apart: (type, flags, payload) of each record."""
    records = []
    at = len(PREAMBLE)
    while at < len(stream):
        kind, flags, _, size, _, _ = struct.unpack_from("<HHIIII", stream, at)
        records.append((kind, flags, stream[at + HEAD_SIZE : at + HEAD_SIZE + size]))
        at += HEAD_SIZE + size
    return records


def join(records: list[tuple[int, int, bytes]]) -> bytes:
    """Put records together as an attacker would: numbers, checksums and the end are made to fit."""
    stream, checksum = PREAMBLE, crc32(PREAMBLE)
    for number, (kind, flags, payload) in enumerate(records):
        content = End(number, checksum).payload() if kind == End.TYPE else payload
        head, _ = encode_record(kind, number, content, flags)
        checksum = crc32(head, checksum)
        stream += head + content
    return stream


def refusal(stream: bytes) -> str:
    with pytest.raises(StreamCorrupt) as caught:
        read(stream)
    return str(caught.value)


def expected() -> list[Any]:
    return [Header(MACHINE, DIGEST), Recipe(COMMANDS), *SAMPLE_SECTIONS, RamExtents(EXTENTS)]


def test_what_was_written_is_read() -> None:
    *records, end = read(SAMPLE)
    assert records == expected()
    assert isinstance(end, End)
    assert end.records == len(records)


@pytest.mark.parametrize("piece", [1, 2, 19, 20, 21, 64])
def test_pieces_of_any_size_give_the_same_records(piece: int) -> None:
    assert read(SAMPLE, piece) == read(SAMPLE)


def test_format_version_1_is_as_it_was() -> None:
    golden = bytes.fromhex(GOLDEN.read_text())
    assert read(golden)[:-1] == expected()
    assert golden == SAMPLE


def test_a_record_that_is_put_together_again_is_the_same() -> None:
    assert join(split(SAMPLE)) == SAMPLE


def test_a_truncated_stream_is_corrupt_wherever_it_ends() -> None:
    for length in range(len(SAMPLE)):
        reader = StreamReader()
        reader.feed(SAMPLE[:length])
        assert not reader.ended
        with pytest.raises(StreamCorrupt, match=rf"^State stream: it ends after {length} bytes; expected "):
            reader.close()


@pytest.mark.parametrize(
    ("length", "wanted"),
    [
        (0, "the preamble of 12 bytes"),
        (11, "the preamble of 12 bytes"),
        (12, "record 0 at offset 12, after which an end record"),
        (40, "record 0 at offset 12: header of 43 bytes"),
        (75, "record 1 at offset 75, after which an end record"),
        (len(SAMPLE) - 1, f"record 6 at offset {len(SAMPLE) - 28}: end of 8 bytes"),
    ],
)
def test_a_truncated_stream_names_what_was_expected(length: int, wanted: str) -> None:
    assert refusal(SAMPLE[:length]) == f"State stream: it ends after {length} bytes; expected {wanted}"


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_a_flipped_byte_anywhere_is_corrupt(flip: int) -> None:
    for offset in range(len(SAMPLE)):
        damaged = bytearray(SAMPLE)
        damaged[offset] ^= flip
        with pytest.raises(StreamCorrupt):
            read(bytes(damaged))


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(0, len(SAMPLE) - 1), st.integers(1, 255), st.integers(1, 64))
def test_a_flipped_byte_is_corrupt_in_pieces_too(offset: int, flip: int, piece: int) -> None:
    damaged = bytearray(SAMPLE)
    damaged[offset] ^= flip
    with pytest.raises(StreamCorrupt):
        read(bytes(damaged), piece)


@pytest.mark.parametrize(
    ("offset", "text"),
    [
        (0, "it begins with 8854564d4d0d0a1a, expected 8954564d4d0d0a1a"),
        (8, "it has format version 0; versions 1 to 2 are read here"),
        (10, "its bytes 10 and 11 are 0x0001, expected 0"),
        (20, "record 0 at offset 12: a damaged record header: its checksum is "),
        (50, "record 0 at offset 12: a damaged header: its checksum is "),
        (75, "record 1 at offset 75: a damaged record header: its checksum is "),
        (120, "record 1 at offset 75: a damaged recipe: its checksum is "),
    ],
)
def test_damage_is_told_with_its_place(offset: int, text: str) -> None:
    damaged = bytearray(SAMPLE)
    damaged[offset] ^= 1
    assert refusal(bytes(damaged)).startswith(f"State stream: {text}")


def test_a_checksum_is_told_with_the_expected_one() -> None:
    damaged = bytearray(SAMPLE)
    damaged[50] ^= 1
    found, wanted = crc32(damaged[32:75]), crc32(SAMPLE[32:75])
    assert refusal(bytes(damaged)) == (
        f"State stream: record 0 at offset 12: a damaged header: its checksum is {found:#010x}, expected {wanted:#010x}"
    )


def pieces() -> list[bytes]:
    """The records of the sample with their headers, unchanged."""
    whole, at = [], len(PREAMBLE)
    for _, _, payload in split(SAMPLE):
        whole.append(SAMPLE[at : at + HEAD_SIZE + len(payload)])
        at += HEAD_SIZE + len(payload)
    return whole


ORDER = "a record is missing, repeated or out of order"


def test_a_missing_record_is_told() -> None:
    found = pieces()
    del found[3]
    assert refusal(PREAMBLE + b"".join(found)).endswith(f": its number is 4; {ORDER}")


def test_a_repeated_record_is_told() -> None:
    found = pieces()
    found.insert(3, found[2])
    assert refusal(PREAMBLE + b"".join(found)).endswith(f": its number is 2; {ORDER}")


def test_exchanged_records_are_told() -> None:
    found = pieces()
    found[2], found[3] = found[3], found[2]
    assert refusal(PREAMBLE + b"".join(found)).endswith(f": its number is 3; {ORDER}")


def test_bytes_after_the_end_are_told() -> None:
    text = f"State stream: it goes on after its end record, which ends at offset {len(SAMPLE)}"
    assert refusal(SAMPLE + b"\0") == text
    reader = StreamReader()
    reader.feed(SAMPLE)
    assert reader.ended
    with pytest.raises(StreamCorrupt, match=f"which ends at offset {len(SAMPLE)}$"):
        reader.feed(b"\0")


def test_a_second_section_of_one_name_is_told() -> None:
    records = split(SAMPLE)
    records.insert(4, records[2])
    assert refusal(join(records)).endswith(": section 'cpu0' is there a second time")


def ahead(*, again: int) -> bytes:
    """Return a stream with a section before the notice of the switchover, and so often after it."""
    writer = StreamWriter("vm", version=PAGES_VERSION)
    writer.section("uart0", 1, {"a": 1})
    writer.ram_extents([(0, 4096)], in_stream=True)
    writer.switchover()
    for _ in range(again):
        writer._names.clear()  # it would refuse what a hostile one does
        writer.section("uart0", 1, {"a": 2})
    return b"".join(writer.finish())


@pytest.mark.parametrize("again", [0, 1])
def test_a_section_may_come_once_more_after_the_notice(again: int) -> None:
    found = [record for record in read(ahead(again=again)) if isinstance(record, Section)]
    assert found == [Section("uart0", 1, {"a": 1}), *([Section("uart0", 1, {"a": 2})] * again)]


def test_a_section_that_comes_once_too_often_after_the_notice_is_told() -> None:
    assert refusal(ahead(again=2)).endswith(": section 'uart0' is there a second time")


def test_a_recipe_elsewhere_is_told() -> None:
    records = split(SAMPLE)
    records.insert(3, records[1])
    assert refusal(join(records)).endswith(": recipe, expected as record 1 or not at all")


def test_a_second_header_is_told() -> None:
    records = split(SAMPLE)
    records.insert(3, records[0])
    assert refusal(join(records)).endswith(": header, expected the header as record 0 and nowhere else")


def test_a_missing_header_is_told() -> None:
    records = split(SAMPLE)[1:]
    assert refusal(join(records)) == (
        "State stream: record 0 at offset 12: recipe, expected the header as record 0 and nowhere else"
    )


def test_a_wrong_end_is_told() -> None:
    records = split(SAMPLE)[:-1]
    wrong = encode_record(End.TYPE, len(records), End(5, 0x1234).payload())
    text = refusal(join(records) + b"".join(wrong))
    assert ": the end of 5 records with checksum 0x00001234, expected 6 records with checksum 0x" in text


@pytest.mark.parametrize(
    ("kind", "flags", "text"),
    [
        (77, 0, "unknown type 77, not marked as one that can be skipped"),
        (77, 2, "unknown flags 0x0002, expected 0 or 0x0001"),
        (Section.TYPE, 0x8000, "unknown flags 0x8000, expected 0 or 0x0001"),
    ],
)
def test_an_unknown_type_or_flag_is_told(kind: int, flags: int, text: str) -> None:
    records = split(SAMPLE)
    records.insert(3, (kind, flags, b"new"))
    assert refusal(join(records)).endswith(f": {text}")


def test_an_unknown_record_that_can_be_skipped_is_skipped() -> None:
    records = split(SAMPLE)
    records.insert(3, (77, SKIPPABLE, b"new"))
    assert read(join(records))[:-1] == read(SAMPLE)[:-1]


def test_what_stays_at_home_can_be_left_out_and_ram_in_place_cannot() -> None:
    writer = StreamWriter("vm")
    writer.home(COMMANDS)
    writer.ram_in_place("m0", 4096, bytes(16))
    found = read(b"".join(writer.finish()))
    assert found[1:3] == [Home(COMMANDS), RamInPlace("m0", 4096, bytes(16))]


def test_a_reader_that_does_not_know_them_leaves_out_the_one_and_refuses_the_other() -> None:
    writer = StreamWriter("vm")
    writer.take()
    writer.home(COMMANDS)
    writer.ram_in_place("m0", 4096, bytes(16))
    heads = [bytes(buffer) for buffer in writer.take()][::2]
    assert [int.from_bytes(head[2:4], "little") for head in heads] == [SKIPPABLE, 0]


def test_a_known_record_may_be_marked_skippable() -> None:
    records = split(SAMPLE)
    kind, _, payload = records[3]
    records[3] = (kind, SKIPPABLE, payload)
    assert read(join(records))[:-1] == read(SAMPLE)[:-1]


@pytest.mark.parametrize(
    ("kind", "flags", "number", "size", "text"),
    [
        (Header.TYPE, 0, 0, 290, "record 0 at offset 12: header of 290 bytes, at most 289 are read"),
        (Recipe.TYPE, 0, 1, 4194305, "record 1 at offset 35: recipe of 4194305 bytes, at most 4194304 are read"),
        (Section.TYPE, 0, 1, 16777217, "record 1 at offset 35: section of 16777217 bytes, at most 16777216 are read"),
        (
            RamExtents.TYPE,
            0,
            1,
            1048577,
            "record 1 at offset 35: list of RAM extents of 1048577 bytes, at most 1048576 are read",
        ),
        (End.TYPE, 0, 1, 9, "record 1 at offset 35: end of 9 bytes, at most 8 are read"),
        (77, 1, 1, 1 << 31, "record 1 at offset 35: record of type 77 of 2147483648 bytes, at most 16777216 are read"),
    ],
)
def test_an_overlong_record_is_told_before_its_payload_comes(
    kind: int, flags: int, number: int, size: int, text: str
) -> None:
    before = PREAMBLE if number == 0 else PREAMBLE + b"".join(encode_record(Header.TYPE, 0, b"\1x\0"))
    head = struct.pack("<HHIII", kind, flags, number, size, 0)
    reader = StreamReader()
    with pytest.raises(StreamCorrupt) as caught:
        reader.feed(before + head + struct.pack("<I", crc32(head)))
    assert str(caught.value) == f"State stream: {text}"


def test_a_malformed_payload_is_told_with_the_records_place() -> None:
    records = split(SAMPLE)
    records[2] = (Section.TYPE, 0, b"\4cpu0")
    text = refusal(join(records))
    assert text.startswith("State stream: record 2 at offset ")
    assert text.endswith(": a malformed section: 'cpu0': ends before its version and size")


def test_a_stream_beyond_its_limit_is_told_at_once() -> None:
    reader = StreamReader(limit=100)
    reader.feed(SAMPLE[:100])
    with pytest.raises(StreamCorrupt) as caught:
        reader.feed(SAMPLE[100:101])
    assert str(caught.value) == "State stream: it has more than 100 bytes, the most that is read here"


def test_the_number_of_sections_is_limited_on_both_sides() -> None:
    writer = StreamWriter("vm")
    for number in range(SECTIONS_LIMIT):
        writer.section(f"s{number}", 1, {})
    with pytest.raises(StateRejected) as caught:
        writer.section("more", 1, {})
    assert str(caught.value) == "Section more: 4096 sections are in the stream already"
    whole = b"".join(writer.finish())
    assert len(read(whole)) == SECTIONS_LIMIT + 2
    records = split(whole)
    records.insert(-1, (Section.TYPE, 0, Section("more", 1, {}).payload()))
    assert refusal(join(records)).endswith(": section 'more', at most 4096 sections are read")


def test_the_number_of_records_is_limited() -> None:
    header, *_, end = split(SAMPLE)
    records = [header, *[(77, SKIPPABLE, b"")] * (3 * SECTIONS_LIMIT + 1), end]
    assert refusal(join(records)).endswith(": at most 12288 records are read")


def test_after_a_corruption_the_reader_says_the_same_again() -> None:
    reader = StreamReader()
    with pytest.raises(StreamCorrupt) as first:
        reader.feed(b"GET / HTTP/1.1\r\n")
    assert str(first.value) == "State stream: it begins with 474554202f204854, expected 8954564d4d0d0a1a"
    for again in (lambda: reader.feed(SAMPLE), reader.close):
        with pytest.raises(StreamCorrupt) as caught:
            again()
        assert caught.value is first.value


def test_a_stream_can_be_taken_while_it_is_written() -> None:
    writer = StreamWriter("vm")
    first = b"".join(writer.take())
    writer.section("cpu0", 1, {"a": b"x"})
    second = b"".join(writer.take())
    records = read(first + second + b"".join(writer.finish()))
    assert records[:-1] == [Header("vm"), Section("cpu0", 1, {"a": b"x"})]


def test_a_writer_refuses_a_second_section_of_one_name() -> None:
    writer = StreamWriter("vm")
    writer.section("cpu0", 1, {})
    with pytest.raises(StateRejected) as caught:
        writer.section("cpu0", 1, {})
    assert str(caught.value) == "Section cpu0: it is in the stream already"


def test_a_writer_takes_a_section_once_more_after_the_notice() -> None:
    writer = StreamWriter("vm", version=PAGES_VERSION)
    writer.section("cpu0", 1, {})
    writer.switchover()
    writer.section("cpu0", 1, {})
    with pytest.raises(StateRejected):
        writer.section("cpu0", 1, {})


def test_misuse_of_a_writer_is_a_bug() -> None:
    writer = StreamWriter("vm")
    writer.section("cpu0", 1, {})
    with pytest.raises(ValueError, match="the recipe comes before all sections"):
        writer.recipe(())
    writer.finish()
    with pytest.raises(ValueError, match="has its end record already"):
        writer.section("cpu1", 1, {})


def test_a_refused_section_leaves_the_writer_as_it_was() -> None:
    writer = StreamWriter("vm")
    with pytest.raises(StateRejected):
        writer.section("cpu0", 1, {"a": 1.5})  # type: ignore[dict-item]
    writer.section("cpu0", 1, {"a": 1})
    assert read(b"".join(writer.finish()))[1:-1] == [Section("cpu0", 1, {"a": 1})]


@settings(deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.text("abc/0-é", min_size=1, max_size=9), STATES, max_size=5), st.integers(1, 200))
def test_any_sections_are_read_back(sections: dict[str, dict[str, Any]], piece: int) -> None:
    writer = StreamWriter("vm")
    for name, state in sections.items():
        writer.section(name, 1, state)
    records = read(b"".join(writer.finish()), piece)
    assert {record.name: record.state for record in records if isinstance(record, Section)} == sections


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 77, 0xFFFF]), st.integers(0, 1), st.binary(max_size=30)), max_size=4
    )
)
def test_any_records_are_read_or_refused(records: list[tuple[int, int, bytes]]) -> None:
    header, *_, end = split(SAMPLE)
    try:
        read(join([header, *records, end]))
    except StreamCorrupt:
        return


@settings(deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=100))
def test_any_bytes_are_refused(data: bytes) -> None:
    refusal(data)
    refusal(PREAMBLE + data)
