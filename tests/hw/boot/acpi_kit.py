"""What the tests of ACPI tables share: one of them, and all that a guest finds."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm.hw.boot.plan import Data


def tables(made: Data) -> dict[bytes, bytes]:
    """Every table by its signature, found as a guest finds them, with its checksum proved."""
    blob = bytes(made.data)

    def at(address: int) -> bytes:
        (size,) = struct.unpack_from("<I", blob, address - made.address + 4)
        return blob[address - made.address : address - made.address + size]

    assert blob[:8] == b"RSD PTR "
    assert (sum(blob[:20]) % 256, sum(blob[:36]) % 256) == (0, 0)
    (xsdt,) = struct.unpack_from("<Q", blob, 24)
    found = {b"XSDT": at(xsdt)}
    for (address,) in struct.iter_unpack("<Q", found[b"XSDT"][36:]):
        found[at(address)[:4]] = at(address)
    (dsdt,) = struct.unpack_from("<Q", found[b"FACP"], 140)
    found[b"DSDT"] = at(dsdt)
    assert all(sum(table) % 256 == 0 for table in found.values())
    (facs,) = struct.unpack_from("<I", found[b"FACP"], 36)
    assert facs % 64 == 0
    found[b"FACS"] = at(facs)
    return found


def table(signature: bytes = b"TEST", body: bytes = b"body", length: int | None = None) -> bytes:
    """A table with the header that all have."""
    size = 36 + len(body) if length is None else length
    data = struct.pack("<4sIBB6s8sI4sI", signature, size, 1, 0, b"OEMID ", b"OEMTABLE", 1, b"TEST", 1) + body
    return data[:9] + bytes([-sum(data) & 0xFF]) + data[10:]
