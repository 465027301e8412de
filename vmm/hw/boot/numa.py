"""ACPI's tables of NUMA nodes: what is in which (SRAT), and how far they are from each other (SLIT).

Source: ACPI Specification 6.5: 5.2.16 (SRAT), 5.2.17 (SLIT).
"""

from __future__ import annotations

import struct
from typing import Final, final

import attrs

from vmm.kvm.memory import ram_layout

LOCAL: Final = 10
"""Distance of a node from itself, to which all others are relative."""
REMOTE: Final = 20
"""Distance of any two nodes of which nobody says anything; a guest without a SLIT assumes the same."""

_ENABLED: Final = 1


@final
@attrs.frozen
class Numa:
    """The nodes of a machine, which are numbered from 0 without gaps."""

    cpus: tuple[int, ...]
    """Node of each processor."""
    memory: tuple[int, ...]
    """Bytes of RAM of each node, 0 or a multiple of 4096. They follow each other from address 0 on, over the holes."""
    distances: tuple[tuple[int, ...], ...]
    """From each node (rows) to each."""

    def srat(self) -> bytes:
        """Return the body of the System Resource Affinity Table."""
        entries = [struct.pack("<BBBBI4xI", 0, 16, node & 0xFF, cpu, _ENABLED, 0) for cpu, node in enumerate(self.cpus)]
        for node, address, size in self.ranges():
            entries.append(struct.pack("<BBI2xQQ4xI8x", 1, 40, node, address, size, _ENABLED))
        return struct.pack("<I8x", 1) + b"".join(entries)

    def slit(self) -> bytes:
        """Return the body of the System Locality Information Table."""
        return struct.pack("<Q", len(self.distances)) + b"".join(map(bytes, self.distances))

    def ranges(self) -> list[tuple[int, int, int]]:
        """Return (node, address, size) of each piece of RAM that is in one node."""
        found: list[tuple[int, int, int]] = []
        left = list(self.memory)
        node = 0
        for region in ram_layout(sum(self.memory)):
            address, end = region.address, region.address + region.size
            while address < end:
                size = min(left[node], end - address)
                if size:
                    found.append((node, address, size))
                address += size
                left[node] -= size
                node += not left[node]
        return found
