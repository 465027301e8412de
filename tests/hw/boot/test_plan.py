from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vmm.errors import BootError
from vmm.hw.boot.plan import BinarySource, Data, FileRange

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_is_read_without_moving_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        source = BinarySource.from_fd("image", file.fileno())
        assert (source.size, source.read(2, 3), source.read(8, 9)) == (10, b"234", b"89")
        assert source.place(0x1000, 2, 3) == FileRange(0x1000, file.fileno(), 2, 3, "image")
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 0


def test_bytes_are_placed_without_a_copy() -> None:
    data = b"0123456789"
    placed = BinarySource.from_bytes("image", data).place(0x1000, 2, 3)
    assert isinstance(placed, Data)
    assert isinstance(placed.data, memoryview)
    assert (placed.data.obj is data, bytes(placed.data), placed.size) == (True, b"234", 3)


def test_what_is_not_a_regular_file_is_refused() -> None:
    inside, outside = os.pipe()
    try:
        with pytest.raises(BootError) as caught:
            BinarySource.from_fd("/dev/stdin", inside)
        assert str(caught.value) == "Cannot boot /dev/stdin: it is not a regular file"
    finally:
        os.close(inside)
        os.close(outside)
