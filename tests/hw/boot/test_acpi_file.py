"""ACPI tables from files."""

from __future__ import annotations

import struct

import pytest

from tests.hw.boot.acpi_kit import table, tables
from tests.hw.boot.images import MIB, source
from vmm.errors import HostFileRefused
from vmm.hw.boot import layout
from vmm.hw.boot.acpi import acpi_tables
from vmm.hw.boot.acpi_file import AcpiTable
from vmm.hw.boot.numa import Numa


def test_tables_are_listed_after_the_machines_own_as_they_are() -> None:
    extra = [AcpiTable.read(source(data)) for data in (table(), table(b"SSDT", b"1"), table(b"SSDT", b"22"))]
    made = acpi_tables(1, extra=extra)
    xsdt = tables(made)[b"XSDT"]
    addresses = struct.unpack("<5Q", xsdt[36:])
    found = [bytes(made.data)[address - made.address :] for address in addresses]
    assert [each[:4] for each in found] == [b"FACP", b"APIC", b"TEST", b"SSDT", b"SSDT"]
    for each, wanted in zip(found[2:], extra, strict=True):
        assert each.startswith(wanted.data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it has 0 bytes, a table has 36 (its header) to 131072"),
        (bytes(layout.ACPI_ROOM + 1), "it has 131073 bytes, a table has 36 (its header) to 131072"),
        (bytes(36), r"its signature b'\x00\x00\x00\x00' is not made of capitals, digits and underscores"),
        (table(b"ssdt"), "its signature b'ssdt' is not made of capitals, digits and underscores"),
        (table(length=41), "its header says that it has 41 bytes, the file has 40"),
        (table()[:-1] + b"z", f"its checksum, the byte at 9, is {table()[9]:#04x}, not {table()[9] - 1:#04x}"),
    ],
)
def test_what_is_no_table_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(HostFileRefused) as caught:
        AcpiTable.read(source(data))
    assert str(caught.value) == f"Cannot use ACPI table {source(data).name}: {reason}"


@pytest.mark.parametrize("signature", [b"RSDT", b"XSDT", b"FACP", b"FACS", b"DSDT", b"APIC", b"SRAT", b"SLIT"])
def test_a_table_that_the_machine_has_is_not_there_twice(signature: bytes) -> None:
    extra = AcpiTable.read(source(table(signature)))
    if signature in (b"SRAT", b"SLIT"):
        assert signature in tables(acpi_tables(1, extra=[extra]))
    with pytest.raises(HostFileRefused) as caught:
        acpi_tables(1, numa=Numa((0,), (MIB,), ((10,),)), extra=[extra])
    text = f"Cannot use ACPI table {extra.name}: the machine has a table {signature.decode()} of its own"
    assert str(caught.value) == text
