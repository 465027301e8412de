from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.migration.sample_stream import COMMANDS
from vmm.errors import MigrationRefused, OptionInvalid, StateRejected
from vmm.migration.ram_file_records import RamInPlace
from vmm.migration.ram_records import CONTENT_SIZE, EXTENTS_LIMIT, RamContent, RamExtents
from vmm.migration.section_payload import Misshapen
from vmm.migration.stream_records import RECIPE_LIMIT, SECTION_LIMIT, End, Header, Home, Recipe, Section, recipe_digest

if TYPE_CHECKING:
    from typing import Any


@pytest.mark.parametrize("record", [Header("vm"), Header("é" * 127, bytes(32))])
def test_a_header_is_read_back(record: Header) -> None:
    assert Header.decode(record.payload()) == record


@pytest.mark.parametrize("name", ["", "x" * 256, "é" * 128, "\ud800"])
def test_a_machine_name_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        Header(name).payload()
    assert str(caught.value) == f"Machine name: {name!r} is not 1 to 255 bytes of UTF-8"


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"", "no name of 1 to 255 bytes at its beginning"),
        (b"\0", "no name of 1 to 255 bytes at its beginning"),
        (b"\3vm", "no name of 1 to 255 bytes at its beginning"),
        (b"\1\xff\0", "a name that is not UTF-8"),
        (b"\2vm", "no recipe digest of 0 or 32 bytes after the name"),
        (b"\2vm\1x", "no recipe digest of 0 or 32 bytes after the name"),
        (b"\2vm\x20" + bytes(31), "no recipe digest of 0 or 32 bytes after the name"),
        (b"\2vm\0x", "no recipe digest of 0 or 32 bytes after the name"),
    ],
)
def test_a_malformed_header_is_refused(payload: bytes, text: str) -> None:
    with pytest.raises(Misshapen) as caught:
        Header.decode(payload)
    assert str(caught.value) == text


def test_a_digest_of_another_size_is_a_bug() -> None:
    with pytest.raises(ValueError, match="a recipe's digest has 32 bytes, not 3"):
        Header("vm", b"abc").payload()


def test_a_recipe_is_read_back_in_order() -> None:
    recipe = Recipe(({"execute": "stop"}, {"execute": "a", "arguments": {"x": 1.5, "y": [None]}}, {"execute": "stop"}))
    assert Recipe.decode(recipe.payload()) == recipe


def test_a_digest_tells_recipes_apart_by_content_alone() -> None:
    turned = tuple(dict(reversed(command.items())) for command in COMMANDS)
    assert recipe_digest(COMMANDS) == recipe_digest(turned)
    assert recipe_digest(COMMANDS) != recipe_digest(COMMANDS[::-1])
    assert len(recipe_digest(())) == 32


def deep(depth: int) -> Any:
    return {} if depth == 0 else {"a": deep(depth - 1)}


FORM = "element 0 is not {execute: name} with or without arguments: {…}"


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ({}, FORM),
        ({"execute": 1}, FORM),
        ({"execute": "a", "arguments": None}, FORM),
        ({"execute": "a", "id": 1}, FORM),
        ({"execute": "a", "arguments": {"b": b""}}, "no JSON (Object of type bytes is not JSON serializable)"),
        ({"execute": "a", "arguments": deep(63)}, "element 0 has more than 64 containers within each other"),
        ({"execute": "a", "arguments": {"b": "x" * RECIPE_LIMIT}}, "4194342 bytes, at most 4194304 fit"),
        ({"execute": "a", "arguments": {"b": [0] * 40_000}}, "more than 32768 values"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(command: dict[str, Any], text: str) -> None:
    with pytest.raises(MigrationRefused) as caught:
        Recipe((command,)).payload()
    assert str(caught.value) == f"The recipe does not fit into a state stream: {text}"


@pytest.mark.parametrize("payload", [b"", b"{}", b"[1]", b'[{"execute":"a","arguments":[]}]', b"[" * 900, b"[[]"])
def test_a_malformed_recipe_is_refused(payload: bytes) -> None:
    with pytest.raises(Misshapen):
        Recipe.decode(payload)


def test_a_section_is_read_back() -> None:
    section = Section("x" * 255, 0xFFFF_FFFF, {"regs": bytes(1000), "level": True})
    assert Section.decode(section.payload()) == section


@pytest.mark.parametrize(
    ("section", "text"),
    [
        (Section("", 1, {}), "Section : its name has 0 bytes, 1 to 255 fit"),
        (
            Section("uart0", 1, {"a": [1.5]}),  # type: ignore[list-item]
            "Section uart0: a[0]: a float; state is made of None, bool, int, str, ",
        ),
        (Section("uart0", 1, {"a": bytes(SECTION_LIMIT)}), "Section uart0: 16777250 bytes, at most 16777216 fit"),
    ],
)
def test_a_section_that_does_not_fit_is_refused(section: Section, text: str) -> None:
    with pytest.raises(StateRejected) as caught:
        section.payload()
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"\4cpu0", "'cpu0': ends before its version and size"),
        (b"\4cpu0" + b"\1\0\0\0" + b"\3\0\0\0" + b"{}", "'cpu0': 3 bytes of JSON where 2 are left"),
        (b"\4cpu0" + b"\1\0\0\0" + b"\2\0\0\0" + b"{}x", "'cpu0': 1 bytes after the last byte string"),
    ],
)
def test_a_malformed_section_is_refused(payload: bytes, text: str) -> None:
    with pytest.raises(Misshapen) as caught:
        Section.decode(payload)
    assert str(caught.value) == text


@pytest.mark.parametrize("extents", [(), ((0, 4096),), ((0, 0xA0000), (0xA0000, 4096), ((1 << 64) - 4096, 4096))])
def test_ram_extents_are_read_back(extents: tuple[tuple[int, int], ...]) -> None:
    assert RamExtents.decode(RamExtents(extents).payload()) == RamExtents(extents)


@pytest.mark.parametrize(
    "extents",
    [
        ((0, 0),),
        ((1, 4096),),
        ((0, 1),),
        ((4096, 4096), (0, 4096)),
        ((0, 8192), (4096, 4096)),
        (((1 << 64) - 4096, 8192),),
    ],
)
def test_extents_that_are_none_are_refused(extents: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(Misshapen, match="is empty, misaligned or out of order"):
        RamExtents(extents).payload()


def test_extents_beyond_one_record_are_refused() -> None:
    extents = tuple((n * 8192, 4096) for n in range(EXTENTS_LIMIT // 16))
    with pytest.raises(ValueError, match="65536 extents do not fit into one record; write several"):
        RamExtents(extents).payload()


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"", "0 bytes, expected 4 and 16 for each extent"),
        (bytes(5), "5 bytes, expected 4 and 16 for each extent"),
        (b"\2\0\0\0", "content of kind 2, only 0 (in shared memory) and 1 (in this stream) are read here"),
    ],
)
def test_malformed_extents_are_refused(payload: bytes, text: str) -> None:
    with pytest.raises(Misshapen) as caught:
        RamExtents.decode(payload)
    assert str(caught.value) == text


def test_content_is_read_back() -> None:
    content = RamContent(((0, 4096), (0x10000, 8192)), (b"a" * 4096, b"b" * 8192))
    again = RamContent.decode(content.payload())
    assert again.runs == content.runs
    assert [bytes(piece) for piece in again.data] == [*content.data]
    assert RamContent.decode(content.table() + b"".join(content.data)) == again


def test_as_much_content_as_a_record_holds_fits() -> None:
    runs = tuple((n * 8192, 4096) for n in range(CONTENT_SIZE // 4096))
    payload = RamContent(runs, (bytes(4096),) * len(runs)).payload()
    assert len(payload) == RamContent.LIMIT


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"", "no table of 1 to 256 runs at its beginning"),
        (bytes(4), "no table of 1 to 256 runs at its beginning"),
        (b"\1\1\0\0" + bytes(1 << 20), "no table of 1 to 256 runs at its beginning"),
        (b"\xff\xff\xff\xff" + bytes(100), "no table of 1 to 256 runs at its beginning"),
        (b"\2\0\0\0" + bytes(31), "no table of 1 to 256 runs at its beginning"),
        (b"\1\0\0\0" + bytes(16), "extent 0x0 of 0x0 bytes is empty, misaligned or out of order"),
        (
            b"\1\0\0\0" + bytes(8) + (4096).to_bytes(8, "little") + b"x",
            "1 bytes of content, its table says 4096",
        ),
        (
            b"\1\0\0\0" + bytes(8) + ((1 << 64) - 4096).to_bytes(8, "little"),
            "0 bytes of content, its table says 18446744073709547520",
        ),
    ],
)
def test_malformed_content_is_refused(payload: bytes, text: str) -> None:
    with pytest.raises(Misshapen) as caught:
        RamContent.decode(payload)
    assert str(caught.value) == text


@pytest.mark.parametrize("name", ["m", "é" * 127])
def test_a_notice_of_ram_in_place_is_read_back(name: str) -> None:
    record = RamInPlace(name, (1 << 64) - 1, bytes(range(16)))
    assert RamInPlace.decode(record.payload()) == record
    assert len(record.payload()) <= RamInPlace.LIMIT


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"", "no name of 1 to 255 bytes at its beginning"),
        (b"\1m" + bytes(23), "23 bytes after the name, expected 24"),
        (b"\1m" + bytes(25), "25 bytes after the name, expected 24"),
    ],
)
def test_a_malformed_notice_of_ram_in_place_is_refused(payload: bytes, text: str) -> None:
    with pytest.raises(Misshapen) as caught:
        RamInPlace.decode(payload)
    assert str(caught.value) == text


def test_an_identity_of_another_size_is_a_bug() -> None:
    with pytest.raises(ValueError, match="an identity has 16 bytes, not 3"):
        RamInPlace("m", 4096, b"abc").payload()


def test_what_stays_at_home_is_read_back_and_checked_as_a_recipe() -> None:
    assert Home.decode(Home(COMMANDS).payload()) == Home(COMMANDS)
    assert Home.decode(Home(()).payload()) == Home(())
    with pytest.raises(Misshapen, match="no list of commands"):
        Home.decode(b"{}")


def test_an_end_has_one_size() -> None:
    assert End.decode(End(7, 0xFFFF_FFFF).payload()) == End(7, 0xFFFF_FFFF)
    with pytest.raises(Misshapen, match="7 bytes, expected 8"):
        End.decode(bytes(7))
