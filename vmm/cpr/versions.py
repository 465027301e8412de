"""Which versions of the CPR protocol are spoken here, and which of them two processes speak with each other.

Message ``hello`` has the range of its sender, ``versions``: the oldest and the newest. The newest that both have is
spoken. ``version`` is the oldest, for a peer that knows of no range; and a peer that sends no range speaks ``version``
alone. Within a version a message may get members that its receiver can do without: who does not know one ignores it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

OLDEST: Final = 1
NEWEST: Final = 1


def spoken() -> dict[str, Any]:
    """Return the members of ``hello`` that say what is spoken here."""
    return {"version": OLDEST, "versions": [OLDEST, NEWEST]}


def agreed(hello: Mapping[str, Any]) -> int | None:
    """Return the newest version spoken here and by the sender of `hello`, which may be hostile; None without one."""
    theirs = _range_of(hello)
    if theirs is None:
        return None
    newest = min(theirs[1], NEWEST)
    return newest if newest >= max(theirs[0], OLDEST) else None


def disagreement(hello: Mapping[str, Any], peer: str) -> str:
    """Say why there is no version that both speak, and what would be right."""
    theirs = _range_of(hello)
    here = f"{OLDEST}" if OLDEST == NEWEST else f"{OLDEST} to {NEWEST}"
    if theirs is None:
        named = hello.get("versions", hello.get("version"))
        return f"the {peer} speaks CPR protocol version {named!r}, not {here}"
    there = f"version {theirs[0]}" if theirs[0] == theirs[1] else f"versions {theirs[0]} to {theirs[1]}"
    older = f"that of the {peer}" if theirs[1] < OLDEST else "this one"
    return f"the {peer} speaks CPR protocol {there}, not {here}; the older program is {older}: update it first"


def _range_of(hello: Mapping[str, Any]) -> tuple[int, int] | None:
    version = hello.get("version")
    match hello.get("versions", [version, version]):
        case [int(oldest), int(newest)] if type(oldest) is type(newest) is int and 0 < oldest <= newest:
            return oldest, newest
        case _:
            return None
