"""One JSON text of QEMU's dialect to a value, and a value to a line of output.

The dialect is JSON (RFC 8259) with these differences: strings may also stand in single quotes, `\\'` is an escape,
the bytes C0 80 are a NUL (as in Java's UTF-8), a key given twice is an error, half a surrogate pair is an error, and an
integer that neither int64 nor uint64 holds becomes a float. What Python's json accepts beyond it (NaN, Infinity) is
refused, and so is a number that no float can hold.

Python's json does the work where it agrees; a parser of our own decides the rest and words the faults. It keeps its own
stack, because a message may nest deeper than Python recurses. The other way round, `encode` has the same two halves.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import attrs

from vmm.monitor.arguments import unstructure

if TYPE_CHECKING:
    from collections.abc import Iterator


@attrs.frozen
class Malformed(Exception):
    """A text that is no value. `reason` is the whole sentence. Internal to the JSON modules."""

    reason: str


class _Unfit(ValueError):
    """Python's json met what the parser of our own has to judge."""


# --- reading ----------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _Unfit
    return members


def _integer(digits: str) -> int | float:
    if len(digits) > 20:
        return _float(digits)
    value = int(digits)
    return value if -(1 << 63) <= value < (1 << 64) else float(value)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _Unfit
    return value


def _no_constant(name: str) -> object:
    raise _Unfit(name)


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_float, parse_constant=_no_constant
)

_HALF_PAIR: Final = (b"\\ud", b"\\uD")


def agrees(data: bytes | bytearray) -> bool:
    """Tell whether `data` is free of what Python's json accepts with no hook to refuse it: half surrogate pairs."""
    return _HALF_PAIR[0] not in data and _HALF_PAIR[1] not in data


def nests_within(value: object, depth: int) -> bool:
    """Tell whether the arrays and objects of `value` nest no deeper than `depth`."""
    level = [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        if depth == 0:
            return False
        depth -= 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return True


def decode_prefix(text: str, start: int) -> tuple[object, int] | None:
    """Parse the value that begins at `start`, as far as Python's json can; return it and its end.

    None: it is incomplete, wrong, or in the dialect; somebody else has to judge. Precondition: `agrees`.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


def parse(data: bytes | bytearray) -> object:
    """Parse `data`, exactly one value with white space around it.

    Raises:
        Malformed: it is not one.
    """
    if agrees(data):
        try:
            return _DECODER.decode(data.decode())
        except (ValueError, RecursionError):
            pass
    return _parse_dialect(bytes(data))


_TOKEN: Final = re.compile(
    rb"[ \t\r\n]*+(?:"
    rb"(?P<mark>[{}\[\]:,])"
    rb"""|(?P<string>"(?:[^"\\\x00-\x1f]|\\.)*+"|'(?:[^'\\\x00-\x1f]|\\.)*+')"""
    rb"|(?P<number>-?(?:0|[1-9][0-9]*+)(?P<fraction>(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?))"
    rb"|(?P<word>[a-z]++)"
    rb"|(?P<end>\Z)"
    rb")",
    re.DOTALL,
)

_WORDS: Final = (("true", True), ("false", False), ("null", None))

_ESCAPE: Final = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|(.?))", re.DOTALL)
_ESCAPED: Final = (b"\"\\/'bfnrt", "\"\\/'\b\f\n\r\t")


@attrs.frozen
class _Token:
    kind: str
    value: Any
    at: int
    text: bytes

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else _shown(self.text)


def _shown(data: bytes) -> str:
    """Shorten `data` for an error text."""
    text = data.decode(errors="replace")
    return text if len(text) <= 40 else text[:37] + "..."


def _tokens(data: bytes) -> Iterator[_Token]:
    position = 0
    while True:
        match = _TOKEN.match(data, position)
        if match is None:
            bad = len(data) - len(data[position:].lstrip(b" \t\r\n"))
            raise _fault(f"{_shown(data[bad : bad + 1])!r} begins no JSON value", bad)
        kind = str(match.lastgroup)
        position = match.end()
        if kind == "fraction":
            kind = "number"
        text = match[kind]
        at = match.start(kind)
        if kind == "mark":
            yield _Token(text.decode(), None, at, text)
        elif kind == "string":
            yield _Token(kind, _string(text, at), at, text)
        elif kind == "number":
            digits = text.decode()
            try:
                number = _float(digits) if match["fraction"] else _integer(digits)
            except _Unfit:
                raise _fault(f"{_shown(text)} is larger than a number can be", at) from None
            yield _Token("value", number, at, text)
        elif kind == "word":
            for word, value in _WORDS:
                if text == word.encode():
                    yield _Token("value", value, at, text)
                    break
            else:
                raise _fault(f"{_shown(text)!r} is no keyword; there are true, false and null", at)
        else:
            yield _Token(kind, None, at, text)
            return


def _fault(what: str, at: int) -> Malformed:
    return Malformed(f"Malformed JSON at byte {at} of the message: {what}")


def _string(quoted: bytes, at: int) -> str:
    body = quoted[1:-1]
    parts: list[str] = []
    position = 0
    high = ""  # the first half of a surrogate pair, whose second half must follow at once
    for match in _ESCAPE.finditer(body):
        plain = body[position : match.start()]
        code = int(match[1], 16) if match[1] else 0
        if high and (plain or not 0xDC00 <= code < 0xE000):
            break
        parts.append(_plain(plain, at))
        position = match.end()
        if match[1] is None:
            index = _ESCAPED[0].find(match[2]) if match[2] else -1
            if index < 0:
                raise _fault(f"{_shown(match[0])!r} is no escape in the string that begins here", at)
            parts.append(_ESCAPED[1][index])
        elif high:
            parts.append((high + chr(code)).encode("utf-16", "surrogatepass").decode("utf-16"))
            high = ""
        elif 0xD800 <= code < 0xDC00:
            high = chr(code)
        elif 0xDC00 <= code < 0xE000:
            high = chr(code)
            break
        else:
            parts.append(chr(code))
    if high:
        raise _fault(f"\\u{ord(high):04x} is half a surrogate pair in the string that begins here", at)
    parts.append(_plain(body[position:], at))
    return "".join(parts)


def _plain(data: bytes, at: int) -> str:
    try:
        return data.replace(b"\xc0\x80", b"\0").decode()
    except UnicodeDecodeError as error:
        raise _fault(f"byte {data[error.start]:#04x} is not UTF-8 in the string that begins here", at) from None


def _parse_dialect(data: bytes) -> object:
    """Parse with a stack of open containers; `expect` is what the grammar admits next.

    It is one of: value, value] (or the end of an empty array), key, key} (likewise), :, more (a comma or an end), end.
    """
    stack: list[dict[str, object] | list[object]] = []
    keys: list[str] = []  # the key whose value is awaited, one for each open object
    result: object = None
    expect = "value"
    for token in _tokens(data):
        kind = token.kind
        if expect in ("value", "value]") and (kind in ("value", "string", "{", "[")):
            fresh: object = {} if kind == "{" else [] if kind == "[" else token.value
            if not stack:
                result = fresh
            elif isinstance(stack[-1], dict):
                stack[-1][keys.pop()] = fresh
            else:
                stack[-1].append(fresh)
            if isinstance(fresh, (dict, list)):
                stack.append(fresh)
                expect = "key}" if kind == "{" else "value]"
            else:
                expect = "more" if stack else "end"
        elif expect in ("key", "key}") and kind == "string":
            if token.value in stack[-1]:
                raise _fault(f"key {token} stands there twice", token.at)
            keys.append(token.value)
            expect = ":"
        elif expect == ":" and kind == ":":
            expect = "value"
        elif expect == "more" and kind == ",":
            expect = "key" if isinstance(stack[-1], dict) else "value"
        elif (kind == "}" and (expect == "key}" or (expect == "more" and isinstance(stack[-1], dict)))) or (
            kind == "]" and (expect == "value]" or (expect == "more" and isinstance(stack[-1], list)))
        ):
            stack.pop()
            expect = "more" if stack else "end"
        elif expect == "end" and kind == "end":
            return result
        else:
            raise _fault(f"{_wanted(expect, stack)} should follow, not {token}", token.at)
    raise AssertionError("the token 'end' is always the last")


def _wanted(expect: str, stack: list[dict[str, object] | list[object]]) -> str:
    if expect == "more":
        return "',' or '}'" if isinstance(stack[-1], dict) else "',' or ']'"
    for prefix, name in (("value", "a value"), ("key", "a key (a string)")):
        if expect.startswith(prefix):
            closing = expect[len(prefix) :]
            return f"{name} or {closing!r}" if closing else name
    return "nothing" if expect == "end" else repr(expect)


# --- writing ----------------------------------------------------------------------------------------------

_ENCODER: Final = json.JSONEncoder(allow_nan=False, check_circular=False, default=unstructure)
_PRETTY: Final = json.JSONEncoder(allow_nan=False, check_circular=False, default=unstructure, indent=4)

_SURROGATE: Final = re.compile(r"\\\\|\\u(d[89ab]..)\\u(d[c-f]..)|\\ud[89a-f]..")


def encode(value: object, *, pretty: bool = False) -> str:
    """Write `value` (JSON, attrs objects, or a mixture) in pure ASCII, on one line unless `pretty`.

    A character that is no Unicode (half a surrogate pair, from an undecodable file name) becomes U+FFFD.
    """
    try:
        text = (_PRETTY if pretty else _ENCODER).encode(value)
    except RecursionError:
        text = "".join(_encode_deep(value))
    return text if "\\ud" not in text else _SURROGATE.sub(_replace_half, text)


def _replace_half(match: re.Match[str]) -> str:
    return match[0] if match[1] or match[0] == "\\\\" else "\\ufffd"


def _encode_deep(value: object) -> Iterator[str]:
    """Encode a value that nests deeper than Python recurses (a client may have us echo one as `id`)."""
    work: list[tuple[bool, object]] = [(False, value)]  # (is finished text, item), the next one last
    while work:
        finished, item = work.pop()
        if finished:
            yield str(item)
        elif isinstance(item, dict):
            yield "{"
            work.append((True, "}"))
            for index, (key, member) in reversed(list(enumerate(item.items()))):
                work.append((False, member))
                work.append((True, f"{', ' if index else ''}{_ENCODER.encode(key)}: "))
        elif isinstance(item, (list, tuple)):
            yield "["
            work.append((True, "]"))
            for index, member in reversed(list(enumerate(item))):
                work.append((False, member))
                work.append((True, ", " if index else ""))
        elif attrs.has(type(item)):
            work.append((False, unstructure(item)))
        else:
            yield _ENCODER.encode(item)
