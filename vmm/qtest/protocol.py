"""The lines of qtest: what a client may send, and what is answered.

A line is a command and its words. The answer is `OK`, with a value where the command has one; `ERR` for a line that is
no command of this protocol, and `FAIL` for one that could not be carried out, each with a sentence. Sizes are checked
before anything is allocated.

Source: the interface of QEMU's qtest, as its clients (libqtest, QEMUQtestMachine) use it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, final

import attrs

from vmm.errors import MalformedRequest, OptionInvalid, Unsupported, VmmError

if TYPE_CHECKING:
    from vmm.outside import OutsideAccess

MAX_DATA: Final = 1 << 20
"""Bytes of memory that one command can be about."""

MAX_LINE: Final = 2 * MAX_DATA + 256
"""Bytes of a line: all of `MAX_DATA` in hexadecimal, and the words before it."""

_NUMBER: Final = re.compile(r"0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*")
_LONGEST_NUMBER: Final = 32  # digits; of 64 bits there are 22 in octal
_HEX: Final = re.compile(r"0[xX]((?:[0-9a-fA-F]{2})+)")
_SHOWN: Final = 40  # characters of a word that an answer repeats


class Listener(Protocol):
    """The client's wish to be told of interrupts."""

    def intercept(self, access: OutsideAccess, path: str, name: str | None, *, inputs: bool) -> None:
        """Tell the client of every change of the lines of what is at `path`."""


Use: TypeAlias = Callable[["OutsideAccess", Listener], str | None]
"""Carries a command out; returns what follows `OK`, or None."""


@final
@attrs.frozen
class Request:
    """A command that was understood."""

    command: str
    use: Use | str
    """How to carry it out; or what to answer at once, where no machine is needed for it."""


def parse(line: bytes) -> Request | None:
    """Understand one line, without its end; None for an empty one or a comment.

    Raises:
        MalformedRequest: it is no command of this protocol.
        Unsupported: there is no such command.
        OptionInvalid: a number in it is out of range.
    """
    if line.startswith(b"#"):
        return None
    try:
        words = line.decode("ascii").split()
    except UnicodeDecodeError as error:
        reason = f"Byte {line[error.start]:#04x} at {error.start} is not ASCII, as all of a line must be"
        raise MalformedRequest(reason=reason) from None
    if not words:
        return None
    name, given = words[0], words[1:]
    form = _FORMS.get(name)
    if form is None:
        raise Unsupported(what="qtest command", name=_shown(name), instead=f"there are {', '.join(_FORMS)}")
    if not form.least <= len(given) <= len(form.words):
        reason = f"{name} has {len(given)} words after it where it needs: {form.usage}"
        raise MalformedRequest(reason=reason)
    return Request(name, form.read(Words(name, dict(zip(form.words, given, strict=False)))))


def answer(value: str | None) -> str:
    """Return the line that says that a command was carried out."""
    return "OK" if value is None else f"OK {value}"


def refusal(error: VmmError) -> str:
    """Return the line that says why a command was not."""
    text = str(error).encode("ascii", "backslashreplace").decode().replace("\n", " ")
    return f"{'ERR' if isinstance(error, MalformedRequest) else 'FAIL'} {text}"


# --- words ----------------------------------------------------------------------------------------------------------


@final
class Words:
    """The words after a command, by what they are called."""

    def __init__(self, command: str, given: Mapping[str, str]) -> None:
        self.command: Final = command
        self._given: Final = given

    def text(self, name: str) -> str:
        """Return a word as it is."""
        return self._given[name]

    def optional(self, name: str) -> str | None:
        """Return a word as it is, if it was given."""
        return self._given.get(name)

    def number(self, name: str, least: int, most: int) -> int:
        """Return a number in a range; decimal, hexadecimal with 0x, or octal with 0."""
        word = self._given[name]
        if not _NUMBER.fullmatch(word) or len(word) > _LONGEST_NUMBER:
            wanted = "a number: decimal, hexadecimal after 0x, or octal after 0"
            raise MalformedRequest(reason=f"{self.command}, {name}: {_shown(word)!r} is not {wanted}")
        base = 16 if word[:2] in ("0x", "0X") else 8 if word.startswith("0") else 10
        value = int(word, base)
        if not least <= value <= most:
            wanted = f"a number from {least} to {most:#x}"
            raise OptionInvalid(option=f"{self.command}, {name}", value=word, wanted=wanted)
        return value

    def extent(self, least: int = 1) -> tuple[int, int]:
        """Return ADDR and SIZE of a piece of memory, of `least` bytes, which ends within 64 bits of address."""
        size = self.number("SIZE", least, MAX_DATA)
        return self.number("ADDR", 0, (1 << 64) - max(size, 1)), size


def _shown(word: str) -> str:
    return word if len(word) <= _SHOWN else f"{word[:_SHOWN]}..."


# --- commands -------------------------------------------------------------------------------------------------------


@final
@attrs.frozen
class _Form:
    """How a command is written, and how its words are read."""

    usage: str
    read: Callable[[Words], Use | str]

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(word.strip("[]") for word in self.usage.split()[1:])

    @property
    def least(self) -> int:
        return sum(not word.startswith("[") for word in self.usage.split()[1:])


def _reads_port(size: int) -> Callable[[Words], Use]:
    def read(words: Words) -> Use:
        port = words.number("ADDR", 0, 0x10000 - size)
        return lambda access, _: f"{access.read_port(port, size):#06x}"

    return read


def _writes_port(size: int) -> Callable[[Words], Use]:
    def read(words: Words) -> Use:
        port = words.number("ADDR", 0, 0x10000 - size)
        value = words.number("VALUE", 0, (1 << 8 * size) - 1)
        return lambda access, _: access.write_port(port, size, value)

    return read


def _loads(size: int) -> Callable[[Words], Use]:
    def read(words: Words) -> Use:
        address = words.number("ADDR", 0, (1 << 64) - size)
        return lambda access, _: f"{access.load(address, size):#018x}"

    return read


def _stores(size: int) -> Callable[[Words], Use]:
    def read(words: Words) -> Use:
        address = words.number("ADDR", 0, (1 << 64) - size)
        value = words.number("VALUE", 0, (1 << 8 * size) - 1)
        return lambda access, _: access.store(address, size, value)

    return read


def _read(words: Words) -> Use:
    address, size = words.extent()
    return lambda access, _: f"0x{access.read(address, size).hex()}"


def _b64read(words: Words) -> Use:
    address, size = words.extent()
    return lambda access, _: base64.b64encode(access.read(address, size)).decode()


def _write(words: Words) -> Use:
    address, size = words.extent()
    found = _HEX.fullmatch(words.text("DATA"))
    if found is None:
        wanted = "0x and then two hexadecimal digits for each byte"
        raise MalformedRequest(reason=f"write, DATA: {_shown(words.text('DATA'))!r} is not {wanted}")
    data = _fitting("write", bytes.fromhex(found[1]), size)
    return lambda access, _: access.write(address, data.ljust(size, b"\0"))


def _b64write(words: Words) -> Use:
    address, size = words.extent()
    try:
        data = base64.b64decode(words.text("DATA"), validate=True)
    except binascii.Error:
        raise MalformedRequest(reason=f"b64write, DATA: {_shown(words.text('DATA'))!r} is not base64") from None
    _fitting("b64write", data, size)
    return lambda access, _: access.write(address, data.ljust(size, b"\0"))


def _fitting(command: str, data: bytes, size: int) -> bytes:
    if len(data) > size:
        raise MalformedRequest(reason=f"{command} has {len(data)} bytes of DATA, and SIZE has room for {size}")
    return data


def _memset(words: Words) -> Use:
    address, size = words.extent(least=0)
    value = words.number("VALUE", 0, 0xFF)
    return lambda access, _: access.write(address, bytes((value,)) * size)


def _endianness(_words: Words) -> str:
    return "little"


def _clock_step(words: Words) -> Use:
    ns = None if words.optional("NS") is None else words.number("NS", 0, (1 << 63) - 1)
    return lambda access, _: str(access.step_clock(ns))


def _clock_set(words: Words) -> Use:
    ns = words.number("NS", 0, (1 << 63) - 1)
    return lambda access, _: str(access.set_clock(ns))


def _intercepts(*, inputs: bool) -> Callable[[Words], Use]:
    def read(words: Words) -> Use:
        path, name = words.text("PATH"), words.optional("NAME")
        return lambda access, listener: listener.intercept(access, path, name, inputs=inputs)

    return read


def _set_irq_in(words: Words) -> Use:
    path, name = words.text("PATH"), words.text("NAME")
    number, level = words.number("NUM", 0, 255), words.number("LEVEL", 0, 1)
    return lambda access, _: access.drive(path, name, number, bool(level))


def _module_load(words: Words) -> Use:
    instead = "all that this program has is there from its start"
    raise Unsupported(what="Loading of module", name=_shown(words.text("NAME")), instead=instead)


def _forms() -> dict[str, _Form]:
    widths = (("b", 1), ("w", 2), ("l", 4), ("q", 8))
    forms = {
        "clock_step": _Form("clock_step [NS]", _clock_step),
        "clock_set": _Form("clock_set NS", _clock_set),
    }
    for letter, size in widths[:3]:
        forms[f"in{letter}"] = _Form(f"in{letter} ADDR", _reads_port(size))
        forms[f"out{letter}"] = _Form(f"out{letter} ADDR VALUE", _writes_port(size))
    for letter, size in widths:
        forms[f"read{letter}"] = _Form(f"read{letter} ADDR", _loads(size))
        forms[f"write{letter}"] = _Form(f"write{letter} ADDR VALUE", _stores(size))
    return forms | {
        "read": _Form("read ADDR SIZE", _read),
        "write": _Form("write ADDR SIZE DATA", _write),
        "b64read": _Form("b64read ADDR SIZE", _b64read),
        "b64write": _Form("b64write ADDR SIZE DATA", _b64write),
        "memset": _Form("memset ADDR SIZE VALUE", _memset),
        "endianness": _Form("endianness", _endianness),
        "irq_intercept_in": _Form("irq_intercept_in PATH", _intercepts(inputs=True)),
        "irq_intercept_out": _Form("irq_intercept_out PATH [NAME]", _intercepts(inputs=False)),
        "set_irq_in": _Form("set_irq_in PATH NAME NUM LEVEL", _set_irq_in),
        "module_load": _Form("module_load PREFIX NAME", _module_load),
    }


_FORMS: Final[Mapping[str, _Form]] = MappingProxyType(_forms())
