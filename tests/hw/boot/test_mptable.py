from __future__ import annotations

import struct

import pytest

from vmm.errors import BootError
from vmm.hw.boot.mptable import mp_tables

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def entries(table: bytes) -> list[bytes]:
    """The entries of a configuration table, by the sizes of their types."""
    at, found = 44, []
    while at < len(table):
        found.append(table[at : at + SIZES[table[at]]])
        at += SIZES[table[at]]
    return found


def configuration(cpus: int) -> bytes:
    data = bytes(mp_tables(cpus).data)
    (at,) = struct.unpack_from("<I", data, 4)
    table = data[at - 0x9FC00 :]
    assert struct.unpack_from("<H", table, 4) == (len(table),)
    return table


def test_the_floating_pointer_lies_at_the_ebda_and_adds_up() -> None:
    made = mp_tables(1)
    data = bytes(made.data)
    assert made.address == 0x9FC00
    assert data[:4] == b"_MP_"
    assert data[8:10] == b"\x01\x04"
    assert sum(data[:16]) % 256 == 0


@pytest.mark.parametrize("cpus", [1, 2, 8])
def test_the_configuration_table_lists_what_it_says_and_adds_up(cpus: int) -> None:
    table = configuration(cpus)
    assert table[:4] == b"PCMP"
    assert sum(table) % 256 == 0
    assert struct.unpack_from("<HI", table, 34) == (len(entries(table)), 0xFEE00000)


@pytest.mark.parametrize("cpus", [1, 2, 8])
def test_processors_come_in_order_and_the_first_boots(cpus: int) -> None:
    found = [entry for entry in entries(configuration(cpus)) if entry[0] == 0]
    assert [(entry[1], entry[3]) for entry in found] == [(n, 3 if n == 0 else 1) for n in range(cpus)]


def test_the_ioapic_has_an_identifier_of_its_own() -> None:
    (entry,) = [entry for entry in entries(configuration(4)) if entry[0] == 2]
    assert struct.unpack("<BBBBI", entry) == (2, 4, 0x11, 1, 0xFEC00000)


def test_interrupt_n_is_on_pin_n_as_kvm_routes_it_by_default() -> None:
    found = [struct.unpack("<BBHBBBB", entry) for entry in entries(configuration(2)) if entry[0] == 3]
    assert [(irq, pin) for _, _, _, _, irq, _, pin in found] == [(n, n) for n in range(24) if n != 2]
    assert {(kind, flags, bus, apic) for _, kind, flags, bus, _, apic, _ in found} == {(0, 0, 0, 2)}


def test_local_interrupts_are_the_pics_and_nmi() -> None:
    found = [struct.unpack("<BBHBBBB", entry) for entry in entries(configuration(2)) if entry[0] == 4]
    assert [(kind, apic, pin) for _, kind, _, _, _, apic, pin in found] == [(3, 0, 0), (1, 0xFF, 1)]


def test_more_processors_than_the_ebda_has_room_for() -> None:
    mp_tables(37)
    with pytest.raises(BootError) as caught:
        mp_tables(38)
    assert str(caught.value) == (
        "Cannot boot the machine: the MP table of 38 processors takes 1020 bytes, there is room for 1008"
    )
