"""The lines of qtest, one at a time."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, final

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.qtest.fakes import FakeAccess
from vmm.errors import InvalidState, VmmError
from vmm.qtest.protocol import MAX_DATA, answer, parse, refusal

if TYPE_CHECKING:
    from vmm.outside import OutsideAccess

COMMANDS = (
    *("clock_step", "clock_set", "inb", "outb", "inw", "outw", "inl", "outl", "readb", "writeb", "readw", "writew"),
    *("readl", "writel", "readq", "writeq", "read", "write", "b64read", "b64write", "memset", "endianness"),
    *("irq_intercept_in", "irq_intercept_out", "set_irq_in", "module_load"),
)

NOT_A_NUMBER = "is not a number: decimal, hexadecimal after 0x, or octal after 0"


@final
@attrs.define(eq=False)
class FakeListener:
    """A client that notes what it was to be told of."""

    wanted: list[tuple[str, str | None, bool]] = attrs.Factory(list)

    def intercept(self, access: OutsideAccess, path: str, name: str | None, *, inputs: bool) -> None:
        self.wanted.append((path, name, inputs))


def ask(line: str | bytes, access: FakeAccess | None = None, listener: FakeListener | None = None) -> str | None:
    """Answer one line as a session does."""
    try:
        request = parse(line.encode() if isinstance(line, str) else line)
        if request is None:
            return None
        if isinstance(request.use, str):
            return answer(request.use)
        return answer(request.use(access or FakeAccess(), listener or FakeListener()))
    except VmmError as error:
        return refusal(error)


@pytest.mark.parametrize(
    ("line", "reply", "done"),
    [
        ("inb 0x3f8", "OK 0x00f8", ()),
        ("inw 1016", "OK 0x03f8", ()),
        ("inl 01770", "OK 0x03f8", ()),
        ("inl 0xfffc", "OK 0xfffc", ()),
        ("outb 0x3f8 0x41", "OK", ("out", 0x3F8, 1, 0x41)),
        ("outw 0 65535", "OK", ("out", 0, 2, 65535)),
        ("outl 0XfC 0xFFFFFFFF", "OK", ("out", 0xFC, 4, 0xFFFFFFFF)),
        ("readb 0x12", "OK 0x0000000000000012", ()),
        ("readw 0x1234", "OK 0x0000000000001234", ()),
        ("readl 0x12345678", "OK 0x0000000012345678", ()),
        ("readq 0xfffffffffffffff8", "OK 0xfffffffffffffff8", ()),
        ("writeb 1 0", "OK", ("store", 1, 1, 0)),
        ("writew 1 0xffff", "OK", ("store", 1, 2, 0xFFFF)),
        ("writel 1 2", "OK", ("store", 1, 4, 2)),
        ("writeq 0xfffffffffffffff8 0xffffffffffffffff", "OK", ("store", (1 << 64) - 8, 8, (1 << 64) - 1)),
        ("read 0x10 3", "OK 0x101112", ()),
        ("b64read 0x10 3", "OK EBES", ()),
        ("write 5 2 0xabCD", "OK", ("write", 5, b"\xab\xcd")),
        ("write 5 3 0xab", "OK", ("write", 5, b"\xab\0\0")),
        ("b64write 5 3 EBES", "OK", ("write", 5, b"\x10\x11\x12")),
        ("b64write 5 4 EBES", "OK", ("write", 5, b"\x10\x11\x12\0")),
        ("memset 5 3 0x7f", "OK", ("write", 5, b"\x7f\x7f\x7f")),
        ("memset 5 0 0x7f", "OK", ("write", 5, b"")),
        ("endianness", "OK little", ()),
        ("clock_step", "OK 1000", ("step", None)),
        ("clock_step 7", "OK 7", ("step", 7)),
        ("clock_set 8", "OK 8", ("set", 8)),
        ("set_irq_in ioapic unnamed-gpio-in 5 1", "OK", ("drive", "ioapic", "unnamed-gpio-in", 5, True)),
        ("  inb   0x3f8  ", "OK 0x00f8", ()),
    ],
)
def test_a_line_is_carried_out_and_answered(line: str, reply: str, done: tuple[Any, ...]) -> None:
    access = FakeAccess()
    assert ask(line, access) == reply
    assert access.done == ([done] if done else [])


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("irq_intercept_in ioapic", ("ioapic", None, True)),
        ("irq_intercept_out uart0", ("uart0", None, False)),
        ("irq_intercept_out uart0 sysbus-irq", ("uart0", "sysbus-irq", False)),
    ],
)
def test_an_interception_is_the_clients(line: str, wanted: tuple[str, str | None, bool]) -> None:
    listener = FakeListener()
    assert ask(line, listener=listener) == "OK"
    assert listener.wanted == [wanted]


@pytest.mark.parametrize("line", ["", " ", "#", "# inb 0", "#\xff"])
def test_empty_lines_and_comments_have_no_answer(line: str) -> None:
    assert ask(line.encode("latin-1")) is None


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("inb", "ERR inb has 0 words after it where it needs: inb ADDR"),
        ("outb 1", "ERR outb has 1 words after it where it needs: outb ADDR VALUE"),
        ("outb 1 2 3", "ERR outb has 3 words after it where it needs: outb ADDR VALUE"),
        ("clock_step 1 2", "ERR clock_step has 2 words after it where it needs: clock_step [NS]"),
        ("irq_intercept_out", (
            "ERR irq_intercept_out has 0 words after it where it needs: irq_intercept_out PATH [NAME]"
        )),
        ("inb x", f"ERR inb, ADDR: 'x' {NOT_A_NUMBER}"),
        ("inb 0x", f"ERR inb, ADDR: '0x' {NOT_A_NUMBER}"),
        ("inb 08", f"ERR inb, ADDR: '08' {NOT_A_NUMBER}"),
        ("inb -1", f"ERR inb, ADDR: '-1' {NOT_A_NUMBER}"),
        ("inb 1_0", f"ERR inb, ADDR: '1_0' {NOT_A_NUMBER}"),
        ("inb " + "9" * 60, f"ERR inb, ADDR: '{'9' * 40}...' {NOT_A_NUMBER}"),
        ("inb 0x10000", "FAIL inb, ADDR: '0x10000' is not a number from 0 to 0xffff"),
        ("inw 0xffff", "FAIL inw, ADDR: '0xffff' is not a number from 0 to 0xfffe"),
        ("outb 0 256", "FAIL outb, VALUE: '256' is not a number from 0 to 0xff"),
        ("writew 0 0x10000", "FAIL writew, VALUE: '0x10000' is not a number from 0 to 0xffff"),
        ("readq 0xfffffffffffffff9", (
            "FAIL readq, ADDR: '0xfffffffffffffff9' is not a number from 0 to 0xfffffffffffffff8"
        )),
        ("read 0 0", "FAIL read, SIZE: '0' is not a number from 1 to 0x100000"),
        ("read 0 0x100001", "FAIL read, SIZE: '0x100001' is not a number from 1 to 0x100000"),
        ("memset 0 99999999999 0", "FAIL memset, SIZE: '99999999999' is not a number from 0 to 0x100000"),
        ("memset 0 1 256", "FAIL memset, VALUE: '256' is not a number from 0 to 0xff"),
        ("read 0xffffffffffffffff 2", (
            "FAIL read, ADDR: '0xffffffffffffffff' is not a number from 0 to 0xfffffffffffffffe"
        )),
        ("write 0 2 0x1", "ERR write, DATA: '0x1' is not 0x and then two hexadecimal digits for each byte"),
        ("write 0 2 12", "ERR write, DATA: '12' is not 0x and then two hexadecimal digits for each byte"),
        ("write 0 2 0x", "ERR write, DATA: '0x' is not 0x and then two hexadecimal digits for each byte"),
        ("write 0 1 0xaabb", "ERR write has 2 bytes of DATA, and SIZE has room for 1"),
        ("b64write 0 1 E", "ERR b64write, DATA: 'E' is not base64"),
        ("b64write 0 1 E*==", "ERR b64write, DATA: 'E*==' is not base64"),
        ("b64write 0 2 EBES", "ERR b64write has 3 bytes of DATA, and SIZE has room for 2"),
        ("clock_set 0x8000000000000000", (
            "FAIL clock_set, NS: '0x8000000000000000' is not a number from 0 to 0x7fffffffffffffff"
        )),
        ("set_irq_in ioapic unnamed-gpio-in 1 2", "FAIL set_irq_in, LEVEL: '2' is not a number from 0 to 0x1"),
        ("module_load block- x", (
            "FAIL Loading of module 'x' is not supported here; all that this program has is there from its start"
        )),
        ("INB 0", f"FAIL qtest command 'INB' is not supported here; there are {', '.join(COMMANDS)}"),
        ("x" * 50, f"FAIL qtest command '{'x' * 40}...' is not supported here; there are {', '.join(COMMANDS)}"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(line: str, reply: str) -> None:
    access = FakeAccess()
    assert ask(line, access) == reply
    assert not access.done


def test_a_line_is_ascii() -> None:
    assert ask(b"inb \xff") == "ERR Byte 0xff at 4 is not ASCII, as all of a line must be"


def test_the_text_of_a_refusal_is_one_line_of_ascii() -> None:
    error = InvalidState(what="caf\xe9\n", state="a\nb", instead="\u2014")
    assert refusal(error) == "FAIL caf\\xe9  is not possible a b; \\u2014"


def test_the_longest_data_can_be_written_and_read() -> None:
    access = FakeAccess()
    data = bytes(range(256)) * (MAX_DATA // 256)
    assert ask(f"write 0 {MAX_DATA} 0x{data.hex()}", access) == "OK"
    assert ask(f"b64write 0 {MAX_DATA} {base64.b64encode(data).decode()}", access) == "OK"
    assert access.done == [("write", 0, data)] * 2
    assert ask(f"read 0 {MAX_DATA}", access) == f"OK 0x{data.hex()}"


word = st.one_of(
    st.sampled_from(COMMANDS),
    st.integers(-5, 1 << 65).map(str),
    st.integers(0, 1 << 65).map(hex),
    st.binary(max_size=8).map(lambda data: f"0x{data.hex()}"),
    st.binary(max_size=8).map(lambda data: base64.b64encode(data).decode()),
    st.text(st.characters(max_codepoint=0x7F, exclude_characters="\n"), max_size=6),
)


@given(st.one_of(st.lists(word, max_size=6).map(lambda words: " ".join(words).encode()), st.binary(max_size=40)))
def test_any_line_has_one_line_of_answer_or_none(line: bytes) -> None:
    line = line.replace(b"\n", b"")
    reply = ask(line)
    if reply is None:
        assert line.startswith(b"#") or not line.decode("ascii").split()
    else:
        assert reply.split(" ")[0] in ("OK", "FAIL", "ERR")
        assert reply.isascii()
        assert "\n" not in reply


@given(st.integers(0, (1 << 64) - 9), st.binary(min_size=1, max_size=64))
def test_bytes_go_through_both_encodings(address: int, data: bytes) -> None:
    access = FakeAccess()
    address -= min(address, len(data))
    ask(f"write {address:#x} {len(data)} 0x{data.hex()}", access)
    ask(f"b64write {address} {len(data)} {base64.b64encode(data).decode()}", access)
    assert access.done == [("write", address, data)] * 2
