"""The guest's side of a virtio device: registers, and a queue in a memory of its own."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, final

import attrs

from vmm.errors import GuestAddressInvalid

if TYPE_CHECKING:
    from vmm.hw.virtio.mmio import VirtioMmio

DESCRIPTORS: Final = 0x1000
DRIVER: Final = 0x2000
DEVICE: Final = 0x3000
BUFFERS: Final = 0x4000

NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4


@attrs.define(eq=False)
class FakeRam:
    """64 KiB of memory from 0; beyond is none."""

    data: bytearray = attrs.Factory(lambda: bytearray(0x1_0000))
    writes: list[tuple[int, int]] = attrs.Factory(list)
    """Address and size of each write of the device's."""

    def check(self, address: int, size: int) -> None:
        if not (address >= 0 and address + size <= len(self.data)):
            raise GuestAddressInvalid(address=address, size=size, regions=f"0x0 to {len(self.data) - 1:#x}")

    def read(self, address: int, size: int) -> bytes:
        self.check(address, size)
        return bytes(self.data[address : address + size])

    def write(self, address: int, data: bytes) -> None:
        self.check(address, len(data))
        self.writes.append((address, len(data)))
        self.data[address : address + len(data)] = data


@final
class Driver:
    """A driver that keeps to the rules, as far as it is asked to."""

    def __init__(self, device: VirtioMmio, ram: FakeRam, size: int = 8) -> None:
        self.device = device
        self.ram = ram
        self.size = size
        self.available = 0

    def read(self, offset: int) -> int:
        """Load a register."""
        with self.device.lock:
            return self.device.read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        """Store to a register."""
        with self.device.lock:
            self.device.write(offset, 4, value)

    def status(self) -> int:
        return self.read(0x70)

    def negotiate(self, high: int = 1, low: int = 0) -> int:
        """Reset, and go as far as FEATURES_OK with these features; return the status."""
        self.write(0x70, 0)
        self.write(0x70, 1)
        self.write(0x70, 3)
        for select, features in ((0, low), (1, high)):
            self.write(0x24, select)
            self.write(0x20, features)
        self.write(0x70, 11)
        return self.status()

    def set_up_queue(self) -> None:
        """Give the device the queue's addresses, and make it ready."""
        self.write(0x30, 0)
        self.write(0x38, self.size)
        for offset, address in ((0x80, DESCRIPTORS), (0x90, DRIVER), (0xA0, DEVICE)):
            self.write(offset, address & 0xFFFF_FFFF)
            self.write(offset + 4, address >> 32)
        self.write(0x44, 1)

    def start(self) -> None:
        """Do all of it, to DRIVER_OK."""
        self.negotiate()
        self.set_up_queue()
        self.write(0x70, 15)
        self.available = 0

    def describe(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        """Write a descriptor."""
        at = DESCRIPTORS + 16 * index
        self.ram.data[at : at + 16] = struct.pack("<QIHH", address, length, flags, following)

    def offer(self, head: int) -> None:
        """Make the chain at `head` available."""
        self.u16(DRIVER + 4 + 2 * (self.available % self.size), head)
        self.available = self.available + 1 & 0xFFFF
        self.u16(DRIVER + 2, self.available)

    def request(self, index: int, length: int = 16) -> int:
        """Ask for `length` bytes with descriptor `index`; return where they will be."""
        address = BUFFERS + 0x100 * index
        self.describe(index, address, length, WRITE)
        self.offer(index)
        return address

    def u16(self, address: int, value: int) -> None:
        """Store 16 bits in memory."""
        self.ram.data[address : address + 2] = struct.pack("<H", value & 0xFFFF)

    def used(self) -> list[tuple[int, int]]:
        """Return what the device has given back: each chain's head, and how much it wrote."""
        (count,) = struct.unpack_from("<H", self.ram.data, DEVICE + 2)
        entries = []
        for index in range(count):
            entries.append(struct.unpack_from("<II", self.ram.data, DEVICE + 4 + 8 * (index % self.size)))
        return entries
