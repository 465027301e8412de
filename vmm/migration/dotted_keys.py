"""The `key=value,…` form of options, with dots for members of members.

    main,addr.transport=socket,addr.type=unix,addr.path=a,,b
    {"channel-type": "main", "addr": {"transport": "socket", "type": "unix", "path": "a,b"}}

A comma within a value is doubled. The first value's key may be implied. All values are strings.

Source: QEMU util/keyval.c (the grammar). Unlike there, a key that is given twice is an error.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vmm.errors import OptionInvalid

if TYPE_CHECKING:
    from typing import Final

_KEY: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z][A-Za-z0-9_-]*)*")


def parse_dotted_keys(text: str, implied: str, where: str) -> dict[str, object]:
    """Return the object that `text` describes; `implied` is the key of a first value without one.

    Raises:
        OptionInvalid: an empty parameter, a key that is none, one given twice or both as a value and as an object.
    """
    result: dict[str, object] = {}
    for index, part in enumerate(_split(text)):
        key, equals, value = part.partition("=")
        if not equals:
            if index or not part:
                raise OptionInvalid(option=where, value=part, wanted="of the form key=value")
            key, value = implied, part
        if not _KEY.fullmatch(key):
            wanted = "a key: words of letters, digits, - and _ that begin with a letter, joined by dots"
            raise OptionInvalid(option=where, value=key, wanted=wanted)
        _put(result, key, value, where)
    return result


def _split(text: str) -> list[str]:
    """Split at single commas; a doubled one stands for itself. One comma at the end is nothing."""
    # No option text can hold a NUL: the kernel ends arguments there, and JSON strings with one are refused before.
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").removesuffix(",").split(",")]


def _put(result: dict[str, object], key: str, value: str, where: str) -> None:
    *outer, last = key.split(".")
    target = result
    for name in outer:
        inner = target.setdefault(name, {})
        if not isinstance(inner, dict):
            raise OptionInvalid(option=where, value=key, wanted=f"possible: {name!r} has a value already")
        target = inner
    if last in target:
        raise OptionInvalid(option=where, value=key, wanted="to be given twice")
    target[last] = value
