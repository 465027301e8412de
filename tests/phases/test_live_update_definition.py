"""What a machine was told to be, it is in the next process too: CPU features, NUMA nodes, tables, clock."""

from __future__ import annotations

import mmap
import os
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from tests.hw.boot.acpi_kit import table, tables
from tests.kvm.tiny import assemble
from tests.phases.test_numa import affinity
from tests.phases.update_kit import move, open_bench
from vmm.hw.boot import layout
from vmm.hw.boot.plan import Data

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

HALF = 8 << 20

X2APIC_AND_YEAR_AFTER_A_RESET = """
 mov al, 0x40
 out 0x70, al
 in al, 0x71
 cmp al, 1
 je again
 mov al, 1
 out 0x71, al
stay: hlt
 jmp stay
again: mov al, 9
 out 0x70, al
 in al, 0x71
 xor ebx, ebx
 mov bl, al
 push bx
 mov eax, 1
 cpuid
 pop bx
 shr ecx, 21
 and cx, 1
 mov ax, bx
 shl ax, 1
 or ax, cx
 mov dx, 0x501
 out dx, ax
 jmp stay
"""
"""Marks the clock's memory, which outlives a reset. Then the status is the year in BCD, and whether there is x2APIC."""


class GuestMemory:
    """The first MiB of a guest of `pid`, whoever has it."""

    def __init__(self, pid: int) -> None:
        folder = f"/proc/{pid}/fd"
        (path,) = (
            f"{folder}/{fd}" for fd in os.listdir(folder) if os.readlink(f"{folder}/{fd}").startswith("/memfd:ram")
        )
        fd = os.open(path, os.O_RDWR)
        try:
            self._memory = mmap.mmap(fd, 1 << 20)
        finally:
            os.close(fd)

    def tables(self) -> dict[bytes, bytes]:
        return tables(Data(layout.ACPI, self._memory[layout.ACPI : layout.ACPI + layout.ACPI_ROOM]))

    def forget_tables(self) -> None:
        self._memory[layout.ACPI : layout.ACPI + layout.ACPI_ROOM] = bytes(layout.ACPI_ROOM)

    def close(self) -> None:
        self._memory.close()


async def test_a_successor_has_the_same_cpu_nodes_tables_and_clock(tmp_path: Path) -> None:
    guest, extra = tmp_path / "guest.bin", tmp_path / "table"
    guest.write_bytes(assemble(X2APIC_AND_YEAR_AFTER_A_RESET, origin=0))
    extra.write_bytes(table(b"TEST"))
    definition: dict[str, Any] = {
        "kernel": f"flat:{guest}", "memory": {"size": 2 * HALF}, "smp": {"cpus": 2},
        "rtc": {"base": "2031-05-05"}, "acpi-tables": [{"file": str(extra)}],
    }  # fmt: skip
    async with open_bench() as bench:
        source = bench.start(qmp=bench.qmp)
        async with bench.session(bench.qmp) as client:
            await client.execute("machine-set", **definition)
            await client.execute("accel-set")
            await client.execute("set-numa-node", type="node", mem=HALF)
            await client.execute("cpu-model-set", props={"x2apic": False})
            # After the choice of the CPU: the recipe that goes over has it before that.
            await client.execute("set-numa-node", type="node", mem=HALF, cpus=[1])
            await client.execute("set-numa-node", type="dist", src=0, dst=1, val=77)
            await client.execute("cont")
        with closing(GuestMemory(source.pid)) as memory:
            before = memory.tables()
            assert affinity(before[b"SRAT"]) == ([0, 1], [(0, 0, HALF), (1, HALF, HALF)])
            assert before[b"TEST"] == extra.read_bytes()
            extra.unlink()  # its descriptor went over
            heir = await move(bench, source)
            memory.forget_tables()
            async with bench.session(bench.qmp) as client:
                assert [cpu["props"]["node-id"] for cpu in await client.execute("query-cpus-fast")] == [0, 1]
                await client.execute("system_reset")
            assert await heir.ended() == 2 * (0x31 << 1 | 0) + 1
            assert memory.tables() == before
