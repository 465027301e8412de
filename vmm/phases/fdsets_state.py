"""What goes over of the descriptor sets, beside the descriptors: the section `fdsets`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, final

import attrs

from vmm.hw.state import Integer, Items, Octets, Schema

_Number = Annotated[int, Integer(0, 0x7FFF_FFFF)]


MOST_DESCRIPTORS: Final = 8192

MOST_OPAQUE: Final = 1 << 20
"""Bytes of a client's word on one descriptor."""


@final
@attrs.frozen(kw_only=True)
class FdState:
    """One descriptor, which travels as `fdset/FDSET/SERIAL`."""

    fdset: Annotated[int, Integer(0, (1 << 63) - 1)]
    number: _Number
    """By which clients know it."""
    serial: _Number
    opaque: Annotated[bytes, Octets(MOST_OPAQUE)] | None

    @property
    def text(self) -> str | None:
        """The client's word on it, or none; None if it is no UTF-8."""
        try:
            return (self.opaque or b"").decode()
        except UnicodeDecodeError:
            return None


@final
@attrs.frozen(kw_only=True)
class FdSetsState:
    """The sets."""

    SCHEMA: ClassVar[Schema] = Schema("fdsets", version=1, accepts=1)

    descriptors: Annotated[tuple[FdState, ...], Items(MOST_DESCRIPTORS)]
