"""The state of a chardev that travels in a live update: bytes under way, and what its terminal was like."""

from __future__ import annotations

from typing import ClassVar, Final, final

import attrs

from vmm.terminals import TERMINAL_SETTINGS_SIZE

BUFFER_LIMIT: Final = 64 * 1024
"""Bytes that a chardev holds in either direction."""


@final
@attrs.frozen
class ChardevSchema:
    """Name and versions of a state class. Versions from `accepts` to `version` can be loaded."""

    name: str
    version: int
    accepts: int


def _at_most_a_buffer(_: object, attribute: attrs.Attribute[bytes], value: bytes) -> None:
    if len(value) > BUFFER_LIMIT:
        raise ValueError(f"{len(value)} bytes, at most {BUFFER_LIMIT} fit")


def _settings_or_nothing(_: object, attribute: attrs.Attribute[bytes], value: bytes) -> None:
    if len(value) not in (0, TERMINAL_SETTINGS_SIZE):
        raise ValueError(f"{len(value)} bytes, {TERMINAL_SETTINGS_SIZE} are a terminal's settings, or 0")


@final
@attrs.frozen(kw_only=True)
class ChardevState:
    """What a predecessor took from the guest or from its host side, and has not passed on."""

    SCHEMA: ClassVar[ChardevSchema] = ChardevSchema("chardev", version=1, accepts=1)

    output: bytes = attrs.field(default=b"", validator=_at_most_a_buffer)
    """From the guest, and not written yet."""
    input: bytes = attrs.field(default=b"", validator=_at_most_a_buffer)
    """Read, and not received by the guest's device yet."""
    escape: bool = False
    """Ctrl-A was the last key, and has no meaning yet (stdio)."""
    terminal: bytes = attrs.field(default=b"", validator=_settings_or_nothing)
    """The terminal's settings before it was made raw (stdio on a terminal), as `terminals.RawTerminal.original`."""
