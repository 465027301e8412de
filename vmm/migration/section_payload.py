"""The content of a device section as bytes: canonical JSON, then the byte strings that it refers to.

A byte string of n bytes is `{"$":n}` in the JSON; the byte strings follow the JSON in the order of their appearance.
Most of a machine's state is a few kernel structures kept as bytes: they are never looked at, only copied, and JSON
of what little is left goes through the C parser of the standard library. That keeps it within the guest's pause.

There is one encoding of each value: keys sorted, no blanks, UTF-8, integers in decimal. So two encodings are equal
exactly where the states are, and a decoder need only encode again to see everything that JSON leaves open (repeated
keys, escapes, `-0`).

The decoder takes hostile input. What it can be made to allocate is bounded before it parses anything.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, TypeAlias, final

if TYPE_CHECKING:
    from collections.abc import Mapping

StateValue: TypeAlias = "bool | int | str | bytes | list[StateValue] | dict[str, StateValue] | None"

STRUCTURE_LIMIT: Final = 256 * 1024  # bytes of JSON in one section
VALUES_LIMIT: Final = 32 * 1024  # values in one section, and in one recipe
DEPTH_LIMIT: Final = 16  # containers within each other
INT_MIN: Final = -(1 << 63)
INT_MAX: Final = (1 << 64) - 1

_BLOB: Final = "$"


class Misshapen(ValueError):
    """A value or an encoding that the format has no place for. Caught by `vmm.migration.stream`, which says where."""


def canonical(value: object) -> bytes:
    """Return the one JSON text of `value`.

    Raises:
        Misshapen: what JSON has no place for: bytes, NaN, infinity, lone surrogates, bottomless nesting.
    """
    try:
        return _ENCODER.encode(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Misshapen(f"no JSON ({error})") from error


_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def parse_canonical(text: bytes) -> object:
    """Parse JSON that `canonical` wrote, and nothing else.

    Memory: at most `VALUES_LIMIT` values, counted before parsing.

    Raises:
        Misshapen: `text` is no such JSON, or holds too many values.
    """
    _check_count(text)
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise Misshapen(f"no JSON ({error})") from error
    if canonical(value) != text:
        raise Misshapen("JSON that is not in its canonical form")
    return value


def _check_count(text: bytes) -> None:
    # A comma or an opening bracket within a string counts too, which errs on the safe side.
    if text.count(b",") + text.count(b"[") + text.count(b"{") >= VALUES_LIMIT:
        raise Misshapen(f"more than {VALUES_LIMIT} values")


def encode_state(state: Mapping[str, StateValue]) -> tuple[bytes, list[bytes]]:
    """Return the JSON of a section's content, and the byte strings that follow it.

    Raises:
        Misshapen: a value of another type, out of range or too deep, with the path to it; or too much of all.
    """
    blobs: list[bytes] = []
    structure = canonical(_strip(dict(state), None, 0, blobs))
    if len(structure) > STRUCTURE_LIMIT:
        raise Misshapen(f"{len(structure)} bytes besides byte strings, at most {STRUCTURE_LIMIT} fit")
    _check_count(structure)
    return structure, blobs


def decode_state(structure: bytes, blobs: memoryview) -> dict[str, StateValue]:
    """Undo `encode_state`; `blobs` is all that follows the JSON and must be used up.

    Raises:
        Misshapen: the bytes are nothing that `encode_state` returns.
    """
    if len(structure) > STRUCTURE_LIMIT:
        raise Misshapen(f"{len(structure)} bytes besides byte strings, at most {STRUCTURE_LIMIT} are read")
    value = parse_canonical(structure)
    if not isinstance(value, dict) or _BLOB in value:
        raise Misshapen("no object at the top")
    restorer = _Restorer(blobs)
    state = restorer.restore(value, None, 0)
    restorer.check_used_up()
    assert isinstance(state, dict)
    return state


# Where a value is: the containers around it with the key or index of each, innermost first. A string is made of it
# only for an error, since this runs within the guest's pause.
_Trail: TypeAlias = "tuple[_Trail, str | int] | None"


def _where(trail: _Trail) -> str:
    keys: list[str] = []
    while trail is not None:
        trail, key = trail
        keys.append(f"[{key}]" if isinstance(key, int) else f".{key}")
    return "".join(reversed(keys)).removeprefix(".") or "the whole"


def _strip(value: object, trail: _Trail, depth: int, blobs: list[bytes]) -> object:
    """Replace each byte string in `value` by its reference and append it to `blobs`, in the order of sorted keys."""
    if isinstance(value, bytes):
        blobs.append(value)
        return {_BLOB: len(value)}
    if value is None or isinstance(value, (int, str)):
        return _checked(value, trail)
    if not isinstance(value, (dict, list)):
        found = type(value).__name__
        raise Misshapen(f"{_where(trail)}: a {found}; state is made of None, bool, int, str, bytes, list and dict")
    _check_depth(depth, trail)
    if isinstance(value, list):
        return [_strip(item, (trail, index), depth + 1, blobs) for index, item in enumerate(value)]
    for key in value:
        if not isinstance(key, str) or key.startswith(_BLOB):
            raise Misshapen(f"{_where(trail)}: key {key!r} is not a string without a leading $")
    return {key: _strip(value[key], (trail, key), depth + 1, blobs) for key in sorted(value)}


def _checked(value: int | str | None, trail: _Trail) -> int | str | None:
    if isinstance(value, int) and not INT_MIN <= value <= INT_MAX:
        raise Misshapen(f"{_where(trail)}: an integer that has neither 64 bits nor 63 and a sign")
    return value


def _check_depth(depth: int, trail: _Trail) -> None:
    if depth == DEPTH_LIMIT:
        raise Misshapen(f"{_where(trail)}: more than {DEPTH_LIMIT} containers within each other")


@final
class _Restorer:
    """Puts the byte strings of one section back into its parsed JSON."""

    def __init__(self, blobs: memoryview) -> None:
        self._blobs = blobs
        self._used = 0

    def restore(self, value: object, trail: _Trail, depth: int) -> StateValue:
        """Return `value` with its byte strings, checked: type, range, depth."""
        if value is None or isinstance(value, (int, str)):
            return _checked(value, trail)
        if not isinstance(value, (dict, list)):
            raise Misshapen(f"{_where(trail)}: a number that is no integer")
        if isinstance(value, dict) and _BLOB in value:
            return self._blob(value, trail)
        _check_depth(depth, trail)
        if isinstance(value, list):
            return [self.restore(item, (trail, index), depth + 1) for index, item in enumerate(value)]
        for key in value:
            if key.startswith(_BLOB):
                raise Misshapen(f"{_where(trail)}: key {key!r} has a leading $")
        return {key: self.restore(item, (trail, key), depth + 1) for key, item in value.items()}

    def check_used_up(self) -> None:
        """Raise `Misshapen` if there are bytes that nothing referred to."""
        if self._used != len(self._blobs):
            raise Misshapen(f"{len(self._blobs) - self._used} bytes after the last byte string")

    def _blob(self, reference: dict[str, object], trail: _Trail) -> bytes:
        length = reference[_BLOB]
        if len(reference) != 1 or not isinstance(length, int) or isinstance(length, bool) or length < 0:
            raise Misshapen(f"{_where(trail)}: not a reference to a byte string")
        left = len(self._blobs) - self._used
        if length > left:
            raise Misshapen(f"{_where(trail)}: a byte string of {length} bytes where {left} are left")
        start = self._used
        self._used += length
        return bytes(self._blobs[start : self._used])
