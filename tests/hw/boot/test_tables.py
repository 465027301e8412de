from __future__ import annotations

import struct
from itertools import pairwise

import pytest

from vmm.errors import OptionInvalid
from vmm.hw.boot import layout, tables
from vmm.hw.boot.bzimage import CODE_64
from vmm.hw.boot.pvh import CODE_32


def test_descriptors_are_those_of_the_manual() -> None:
    assert CODE_32.descriptor() == 0x00CF9B000000FFFF
    assert CODE_64.descriptor() == 0x00AF9B000000FFFF
    assert tables.FLAT_DATA.descriptor() == 0x00CF93000000FFFF
    assert tables.TASK.descriptor() == 0x00008B0000000067


def test_the_gdt_has_each_descriptor_at_its_selector() -> None:
    data, where = tables.gdt(CODE_64)
    table = struct.unpack("<6Q", data.data)
    assert (where.start, len(where)) == (layout.GDT, 48)
    for segment in (CODE_64, tables.FLAT_DATA, tables.TASK):
        assert table[segment.selector // 8] == segment.descriptor()


def test_the_bios_data_area_says_where_the_ebda_is() -> None:
    data = tables.bios_data()
    assert struct.unpack_from("<H", data.data, 0x40E - data.address) == (0x9FC0,)
    assert struct.unpack_from("<H", data.data, 0x413 - data.address) == (639,)


def test_a_size_of_ram_that_is_no_number_of_pages() -> None:
    with pytest.raises(OptionInvalid):
        tables.memory_map((4 << 20) + 1)


@pytest.mark.parametrize(
    ("size", "text"),
    [(1, "1 bytes"), (2048, "2 KiB"), (1536 << 10, "1.5 MiB"), (1 << 30, "1 GiB"), (3 << 29, "1.5 GiB")],
)
def test_sizes_are_worded_in_the_unit_that_fits(size: int, text: str) -> None:
    assert layout.size_text(size) == text


def test_fixed_places_do_not_overlap() -> None:
    places = [
        range(layout.BIOS_DATA, layout.BIOS_DATA + 0x100),
        range(layout.GDT, layout.GDT + 48),
        range(layout.START_INFO, layout.START_INFO + 0x1000),
        range(layout.BOOT_PARAMS, layout.BOOT_PARAMS + 0x1000),
        range(layout.PAGE_TABLES, layout.PAGE_TABLES + 6 * 0x1000),
        range(layout.FLAT_IMAGE, layout.COMMAND_LINE),
        range(layout.COMMAND_LINE, layout.COMMAND_LINE + layout.COMMAND_LINE_ROOM),
        range(layout.EBDA, layout.EBDA + layout.EBDA_SIZE),
        range(layout.HIGH_MEMORY, layout.HIGH_MEMORY + 1),
    ]
    assert all(a.stop <= b.start for a, b in pairwise(places))
