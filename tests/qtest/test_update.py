"""A machine with accelerator qtest goes from one process to another, and its qtest with it. No KVM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.qtest.client import QtestClient, machine
from tests.qtest.update import hand_over, here, successor

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")


async def test_clock_lines_and_registers_are_as_if_nothing_had_been(tmp_path: Path) -> None:
    async with machine(tmp_path) as bench:
        await bench.qmp.execute("cont")
        await bench.qtest.do("clock_step 1234567890123")
        await bench.qtest.do("outb 0x70 0x00")
        seconds = await bench.qtest.do("inb 0x71")
        await bench.qtest.do("outb 0x80 0x42")
        await bench.qtest.do("set_irq_in ioapic unnamed-gpio-in 9 1")
        async with successor(tmp_path / "new") as (_, client, where):
            await hand_over(bench.qmp, where)
            await here(client)
            assert await client.execute("query-status") == {"running": True, "status": "running"}
            async with await QtestClient.connect(bench.path) as qtest:
                assert await qtest.value("clock_step 0") == 1234567890123
                assert await qtest.do("inb 0x71") == seconds
                assert await qtest.value("inb 0x80") == 0x42
                await qtest.do("irq_intercept_in ioapic")
                await qtest.do("set_irq_in ioapic unnamed-gpio-in 9 1")
                assert await qtest.changes() == []
                await qtest.do("set_irq_in ioapic unnamed-gpio-in 9 0")
                assert await qtest.changes() == ["lower 9"]
