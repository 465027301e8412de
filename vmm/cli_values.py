"""What the values of options are made of: members, sizes, switches, numbers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from vmm.cli_options import split
from vmm.errors import OptionInvalid
from vmm.migration.dotted_keys import parse_dotted_keys

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Kind: TypeAlias = Literal["switch", "number", "size", "ranges"]

_SUFFIXES: Final[Mapping[str, int]] = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_WANTED: Final[Mapping[Kind, str]] = {
    "switch": "on or off",
    "number": "a number, decimal or 0x and hexadecimal",
    "size": "a size such as 512, 512M or 2G",
    "ranges": "numbers or ranges such as 0-3",
}
_MANY: Final = 4096
"""Numbers that a range may stand for."""


def first(text: str, key: str) -> str:
    """Return the value of a short option whose first key may be left out."""
    return text.removeprefix(f"{key}=")


def parse_size(text: str, option: str) -> int:
    """Parse a size in bytes; a bare number is MiB, as QEMU's -m has it."""
    match = re.fullmatch(r"(\d{1,15})([bkmgt]?)", text.lower())
    if match is None:
        raise OptionInvalid(option=option, value=text, wanted=_WANTED["size"])
    return int(match[1]) << _SUFFIXES[match[2] or "m"]


def members(
    text: str,
    implied: str,
    option: str,
    kinds: Mapping[str, Kind] | None = None,
    *,
    lists: Collection[str] = (),
    nested: bool = False,
) -> dict[str, Any]:
    """Return the members that `text`, in the form `key=value,…`, describes.

    Args:
        implied: the key of a first value without one.
        kinds: what members hold that are not text.
        lists: members that may be given any number of times; ranges are added up.
        nested: whether a dot in a key leads into a member.

    Raises:
        OptionInvalid: there is no such form, or a value is not of its kind.
    """
    kinds = kinds or {}
    found: dict[str, Any] = {}
    plain: list[str] = []
    for part in split(text):
        key, equals, value = part.partition("=")
        if equals and key in lists:
            item = convert(value, kinds[key], f"{option}: {key}") if key in kinds else value
            found.setdefault(key, []).extend(item if isinstance(item, list) else [item])
        else:
            plain.append(part.replace(",", ",,"))
    single = parse_dotted_keys(",".join(plain), implied, option) if plain else {}
    for key, item in single.items():
        if isinstance(item, dict) and not nested:
            raise OptionInvalid(option=option, value=f"{key}.{next(iter(item))}", wanted="the name of a member")
        found[key] = convert(item, kinds[key], f"{option}: {key}") if isinstance(item, str) and key in kinds else item
    return found


def convert(value: str, kind: Kind, option: str) -> Any:
    """Return what `value` stands for. Raises `OptionInvalid`."""
    if kind == "switch" and value in ("on", "off"):
        return value == "on"
    if kind == "number" and re.fullmatch(r"-?(\d{1,20}|0[xX][0-9a-fA-F]{1,16})", value):
        return int(value, 16 if "x" in value.lower() else 10)
    if kind == "size" and re.fullmatch(r"(?i)\d{1,15}[bkmgt]?", value):
        return parse_size(value, option)
    if kind == "ranges" and (match := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", value)):
        low, high = int(match[1]), int(match[2] or match[1])
        if low <= high < low + _MANY:
            return list(range(low, high + 1))
    raise OptionInvalid(option=option, value=value, wanted=_WANTED[kind])


def guessed(value: object, text: Collection[str]) -> Any:
    """Make booleans of on and off and integers of numbers, in members and members of members but those named `text`."""
    if not isinstance(value, dict):
        if value in ("on", "off"):
            return value == "on"
        number = isinstance(value, str) and re.fullmatch(r"-?(\d{1,19}|0[xX][0-9a-fA-F]{1,16})", value)
        return convert(str(value), "number", "") if number else value
    return {key: inner if key in text else guessed(inner, text) for key, inner in value.items()}


def json_object(text: str, option: str) -> dict[str, Any]:
    """Read an option's value that is a JSON object: it begins with a brace. Raises `OptionInvalid`."""
    import json  # most machines are started without a JSON option

    try:
        value: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionInvalid(option=option, value=text, wanted=f"JSON ({error})") from error
    return value
