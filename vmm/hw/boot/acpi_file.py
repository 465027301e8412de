"""ACPI tables that come from files.

Source: ACPI Specification 6.5, 5.2.6 (the header that all have).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, final

import attrs

from vmm.errors import HostFileRefused
from vmm.hw.boot import layout

if TYPE_CHECKING:
    from vmm.hw.boot.plan import BinarySource

_HEADER: Final = 36  # bytes
_CHECKSUM: Final = 9


@final
@attrs.frozen
class AcpiTable:
    """A whole table, with a header that is right."""

    name: str
    """As the user gave it; error texts say it."""
    data: bytes

    @property
    def signature(self) -> str:
        """What kind of a table it is, in four characters."""
        return self.data[:4].decode()

    @classmethod
    def read(cls, source: BinarySource) -> AcpiTable:
        """Read and check a table.

        Raises:
            HostFileRefused: it is too short or too long, or its signature, length or checksum is wrong.
        """
        if not _HEADER <= source.size <= layout.ACPI_ROOM:
            raise refused(
                source.name, f"it has {source.size} bytes, a table has {_HEADER} (its header) to {layout.ACPI_ROOM}"
            )
        data = source.read(0, source.size)
        if not re.fullmatch(rb"[A-Z0-9_]{4}", data[:4]):
            raise refused(source.name, f"its signature {data[:4]!r} is not made of capitals, digits and underscores")
        length = int.from_bytes(data[4:8], "little")
        if length != len(data):
            raise refused(source.name, f"its header says that it has {length} bytes, the file has {len(data)}")
        excess = sum(data) & 0xFF
        if excess:
            right = data[_CHECKSUM] - excess & 0xFF
            raise refused(
                source.name, f"its checksum, the byte at {_CHECKSUM}, is {data[_CHECKSUM]:#04x}, not {right:#04x}"
            )
        return cls(source.name, data)


def refused(name: str, reason: str) -> HostFileRefused:
    """Say that the table in file `name` cannot be had."""
    return HostFileRefused(action="use ACPI table", path=name, reason=reason)
