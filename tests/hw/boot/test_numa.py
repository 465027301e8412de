"""NUMA tables, byte for byte."""

from __future__ import annotations

import struct

from tests.hw.boot.acpi_kit import tables
from tests.hw.boot.images import MIB
from vmm.hw.boot.acpi import acpi_tables
from vmm.hw.boot.numa import Numa

GIB = 1 << 30


def test_the_srat_puts_each_processor_and_all_memory_into_a_node() -> None:
    numa = Numa((0, 1), (48 * MIB, 16 * MIB), ((10, 20), (20, 10)))
    srat = tables(acpi_tables(2, numa=numa))[b"SRAT"]
    assert (srat[:4], srat[8]) == (b"SRAT", 3)
    assert srat[36:] == (
        bytes([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        + bytes([0, 16, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        + bytes([0, 16, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        + bytes([1, 40, 0, 0, 0, 0, 0, 0])
        + struct.pack("<QQ", 0, 48 * MIB)
        + bytes([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
        + bytes([1, 40, 1, 0, 0, 0, 0, 0])
        + struct.pack("<QQ", 48 * MIB, 16 * MIB)
        + bytes([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    )


def test_the_slit_is_the_matrix_of_distances() -> None:
    numa = Numa((0,), (MIB, MIB, MIB), ((10, 21, 31), (21, 10, 255), (31, 40, 10)))
    slit = tables(acpi_tables(1, numa=numa))[b"SLIT"]
    assert (slit[:4], slit[8]) == (b"SLIT", 1)
    assert slit[36:] == bytes([3, 0, 0, 0, 0, 0, 0, 0, 10, 21, 31, 21, 10, 255, 31, 40, 10])


def test_nodes_go_on_behind_the_hole_below_4_gib() -> None:
    numa = Numa((0,), (2 * GIB, 0, 2 * GIB), ((10,),))
    assert numa.ranges() == [(0, 0, 2 * GIB), (2, 2 * GIB, GIB), (2, 4 * GIB, GIB)]


def test_a_machine_without_nodes_has_neither_table() -> None:
    assert not {b"SRAT", b"SLIT"} & tables(acpi_tables(2)).keys()
