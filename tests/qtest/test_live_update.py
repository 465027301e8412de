"""A machine with KVM and a qtest is handed to another process: the socket, its client and the log go along."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import trio

from tests.phases.update_kit import due, move, open_bench
from tests.qtest.client import QtestClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]


async def test_the_socket_the_client_and_the_log_of_a_qtest_go_over() -> None:
    async with open_bench() as bench, due("the whole of it"):
        path, log = Path(bench.folder) / "qt", Path(bench.folder) / "log"
        console = bench.console()
        with closing(console):
            process = bench.machine(console, "-qtest", f"unix:{path},server=on", "-qtest-log", str(log))
            await console.beats(1)
            async with await QtestClient.connect(path) as before:
                assert await before.do("readl 0x0") != ""
                await move(bench, process)
                # The old process has ended.
                await before.do("outb 0x80 0x41")
                assert await before.value("inb 0x80") == 0x41
            async with await QtestClient.connect(path) as after:
                await after.do("outb 0x80 0x42")
                assert await after.value("inb 0x80") == 0x42
            text = await trio.Path(log).read_text()
            assert "outb 0x80 0x42" in text
            assert "readl 0x0" in text
