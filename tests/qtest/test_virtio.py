"""The board's virtio slots and virtio-rng, driven over qtest by a driver of a few lines. No KVM."""

from __future__ import annotations

import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, final

import pytest
import trio

from tests.qtest.client import PATIENCE, QtestClient, machine
from vmm.hw import board

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")

SLOT: Final = 3
GSI: Final = board.VIRTIO_GSI + SLOT

MAGIC, VERSION, DEVICE_ID, FEATURES, FEATURES_SELECT = 0x00, 0x04, 0x08, 0x10, 0x14
DRIVER_FEATURES, DRIVER_FEATURES_SELECT = 0x20, 0x24
QUEUE_SELECT, QUEUE_SIZE_MAX, QUEUE_SIZE, QUEUE_READY, QUEUE_NOTIFY = 0x30, 0x34, 0x38, 0x44, 0x50
INTERRUPT_STATUS, INTERRUPT_ACKNOWLEDGE, STATUS = 0x60, 0x64, 0x70
DESCRIPTORS_LOW, DRIVER_LOW, DEVICE_LOW = 0x80, 0x90, 0xA0

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64

DESCRIPTORS: Final = 0x10000
AVAILABLE: Final = 0x11000
USED: Final = 0x12000
BUFFER: Final = 0x13000
SIZE: Final = 8
"""Entries of the queue."""


@final
class Driver:
    """A guest's driver, without the guest."""

    def __init__(self, client: QtestClient) -> None:
        self.client = client
        self._base = board.virtio_addresses(SLOT).start
        self._offered = 0

    async def read(self, register: int) -> int:
        return await self.client.value(f"readl {self._base + register:#x}")

    async def write(self, register: int, value: int) -> None:
        await self.client.do(f"writel {self._base + register:#x} {value:#x}")

    async def negotiate(self, features: int = 1 << 32) -> int:
        """Go as far as FEATURES_OK; return the status."""
        for status in (0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            await self.write(STATUS, status)
        for half in (0, 1):
            await self.write(DRIVER_FEATURES_SELECT, half)
            await self.write(DRIVER_FEATURES, features >> 32 * half & 0xFFFF_FFFF)
        await self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return await self.read(STATUS)

    async def start(self) -> None:
        """Negotiate, set the queue up, and say that all is well."""
        await self.negotiate()
        await self.client.do(f"memset {DESCRIPTORS:#x} 0x10000 0")
        await self.write(QUEUE_SELECT, 0)
        await self.write(QUEUE_SIZE, SIZE)
        for register, address in ((DESCRIPTORS_LOW, DESCRIPTORS), (DRIVER_LOW, AVAILABLE), (DEVICE_LOW, USED)):
            await self.write(register, address)
            await self.write(register + 4, 0)
        await self.write(QUEUE_READY, 1)
        await self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    async def request(self, size: int, *, flags: int = 2) -> None:
        """Offer a buffer of `size` bytes (flags 2: to be written), and notify the device."""
        head = self._offered % SIZE
        descriptor = struct.pack("<QIHH", BUFFER + 0x1000 * head, size, flags, 0)
        await self.client.do(f"write {DESCRIPTORS + 16 * head:#x} 16 0x{descriptor.hex()}")
        await self.client.do(f"writew {AVAILABLE + 4 + 2 * head:#x} {head}")
        self._offered += 1
        await self.client.do(f"writew {AVAILABLE + 2:#x} {self._offered}")
        await self.write(QUEUE_NOTIFY, 0)

    async def used(self) -> list[tuple[int, int]]:
        """What was given back: head, and bytes written."""
        count = await self.client.value(f"readw {USED + 2:#x}")
        data = bytes.fromhex((await self.client.do(f"read {USED + 4:#x} {8 * SIZE}"))[2:])
        return [struct.unpack_from("<II", data, 8 * index) for index in range(count)]


@asynccontextmanager
async def plugged(tmp_path: Path) -> AsyncGenerator[Driver, None]:
    """A machine with virtio-rng in a slot."""
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("device_add", driver="virtio-rng-device", id="rng", bus=f"virtio-mmio-bus.{SLOT}")
        await bench.qtest.do("irq_intercept_in ioapic")
        yield Driver(bench.qtest)


async def test_each_slot_says_what_is_in_it(tmp_path: Path) -> None:
    async with plugged(tmp_path) as driver:
        found = []
        for slot in range(board.VIRTIO_SLOTS):
            base = board.virtio_addresses(slot).start
            found.append([await driver.client.value(f"readl {base + register:#x}") for register in (0, 4, 8)])
        assert found == [[0x7472_6976, 2, 4 if slot == SLOT else 0] for slot in range(board.VIRTIO_SLOTS)]


async def test_a_register_is_read_as_32_bits_or_not_at_all(tmp_path: Path) -> None:
    async with plugged(tmp_path) as driver:
        base = board.virtio_addresses(SLOT).start
        assert await driver.client.value(f"readb {base:#x}") == 0
        assert await driver.client.value(f"readw {base:#x}") == 0
        assert await driver.client.do(f"read {base:#x} 12") == "0x766972740200000004000000"


async def test_without_version_1_the_driver_is_refused(tmp_path: Path) -> None:
    async with plugged(tmp_path) as driver:
        await driver.write(FEATURES_SELECT, 1)
        assert await driver.read(FEATURES) == 1
        assert await driver.negotiate(0) == ACKNOWLEDGE | DRIVER
        assert await driver.negotiate(1 << 32 | 1 << 5) == ACKNOWLEDGE | DRIVER
        assert await driver.negotiate() == ACKNOWLEDGE | DRIVER | FEATURES_OK


async def test_a_request_is_filled_and_interrupts_until_it_is_acknowledged(tmp_path: Path) -> None:
    async with plugged(tmp_path) as driver:
        await driver.start()
        assert await driver.client.changes() == []
        await driver.request(64)
        assert await driver.client.interrupt() == f"raise {GSI}"
        assert await driver.read(INTERRUPT_STATUS) == 1
        assert await driver.used() == [(0, 64)]
        assert await driver.client.do(f"read {BUFFER:#x} 64") != f"0x{'00' * 64}"
        assert await driver.client.do(f"read {BUFFER + 64:#x} 64") == f"0x{'00' * 64}"
        await driver.write(INTERRUPT_ACKNOWLEDGE, 1)
        assert await driver.client.changes() == [f"lower {GSI}"]


async def test_requests_are_given_back_in_their_order(tmp_path: Path) -> None:
    async with plugged(tmp_path) as driver:
        await driver.start()
        for number, size in enumerate((1, 16, 4096), 1):
            await driver.request(size)
            assert await driver.client.interrupt() == f"raise {GSI}"
            assert len(await driver.used()) == number
            await driver.write(INTERRUPT_ACKNOWLEDGE, 1)
            assert await driver.client.interrupt() == f"lower {GSI}"
        assert await driver.used() == [(0, 1), (1, 16), (2, 4096)]


async def test_a_request_that_breaks_the_rules_stops_the_device_until_it_is_reset(tmp_path: Path) -> None:
    async with plugged(tmp_path) as driver:
        await driver.start()
        await driver.request(16, flags=0)  # nothing to write to
        assert await driver.client.interrupt() == f"raise {GSI}"
        assert await driver.read(INTERRUPT_STATUS) == 2
        assert await driver.read(STATUS) & NEEDS_RESET
        assert await driver.used() == []
        await driver.write(STATUS, 0)
        assert await driver.read(STATUS) == 0
        assert await driver.client.changes() == [f"lower {GSI}"]


async def test_a_device_that_is_unplugged_leaves_an_empty_slot_and_a_low_line(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("device_add", driver="virtio-rng-device", id="rng", bus=f"virtio-mmio-bus.{SLOT}")
        await bench.qtest.do("irq_intercept_in ioapic")
        driver = Driver(bench.qtest)
        await driver.start()
        await driver.request(8)
        assert await driver.client.interrupt() == f"raise {GSI}"
        with trio.fail_after(PATIENCE):
            await bench.qmp.execute("device_del", id="rng")
        assert await driver.client.changes() == [f"lower {GSI}"]
        assert await driver.read(DEVICE_ID) == 0


@pytest.mark.kvm
async def test_with_kvm_it_is_the_same_device(tmp_path: Path) -> None:
    async with machine(tmp_path, accel="kvm") as bench:
        await bench.qmp.execute("device_add", driver="virtio-rng-device", id="rng", bus=f"virtio-mmio-bus.{SLOT}")
        await bench.qtest.do("irq_intercept_in ioapic")
        driver = Driver(bench.qtest)
        await driver.start()
        await driver.request(64)
        assert await driver.client.interrupt() == f"raise {GSI}"
        assert await driver.used() == [(0, 64)]
