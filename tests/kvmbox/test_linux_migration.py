"""Stock Linux whose memory is busy is migrated from process to process over tcp, and counts on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.kvmbox.box import static_program
from tests.kvmbox.guest import SHELL
from tests.kvmbox.machine import LinuxMachine, ask
from tests.kvmbox.test_linux import ANSWER, CLOCK, COUNT, LATE, Counted, boots_to_a_shell, end_counting, options

if TYPE_CHECKING:
    from tests.kvmbox.conftest import MakeInitramfs

pytestmark = pytest.mark.kvmbox

LOAD_MIB: Final = 16
LOAD_PAGES: Final = 1000
"""Pages a second: 4 MiB, each of them a fault while it is watched which are written."""


@pytest.fixture(scope="module")
def load() -> bytes:
    """The program that keeps a guest's memory busy."""
    return static_program(Path(__file__).with_name("load.c"))


@pytest.mark.usefixtures("no_leaks")
async def test_linux_whose_memory_is_busy_is_migrated_there_and_back(
    linux_kernel: Path, initramfs: MakeInitramfs, load: bytes, tmp_path: Path
) -> None:
    image = initramfs(SHELL, programs={"load": load})
    async with LinuxMachine.running(tmp_path, *options(linux_kernel, image, 2)) as machine:
        console = machine.console
        await boots_to_a_shell(console, 2)
        (messages,) = await ask(console, "dmesg | wc -l", within=ANSWER)
        (clock,) = await ask(console, CLOCK, within=ANSWER)
        assert await ask(console, f"(load {LOAD_MIB} {LOAD_PAGES} >/tmp/load 2>&1 &)", within=ANSWER) == []

        counted = Counted()
        await console.send(COUNT)
        for moved in (False, True, True):
            if moved:
                info = await machine.migrate("kernel", "initrd")
                assert info["ram"]["normal"] > LOAD_MIB << 8
            async with trio.open_nursery() as nursery:
                nursery.start_soon(counted.read, console)
                await counted.more(5)
                nursery.cancel_scope.cancel()
        # The reader did not look while the guest moved, and the host's clock is no measure of when a line came.
        counts = [re.fullmatch(r"count (\d+) (\d+\.\d\d)", line) for line in counted.lines]
        assert [match and int(match[1]) for match in counts] == list(range(1, len(counts) + 1)), counted.lines
        uptimes = [float(match[2]) for match in counts if match]
        assert uptimes == sorted(uptimes)
        await end_counting(console)

        (said,) = await ask(
            console, "killall load; while pidof load; do :; done >/dev/null; cat /tmp/load", within=ANSWER
        )
        found = re.fullmatch(r"load: (\d+) pages, (\d+) passes, (\d+) bad", said)
        assert found, said
        assert (int(found[2]) > 0, found[3]) == (True, "0"), said
        since = await ask(console, f"dmesg | tail -n +{int(messages) + 1}", within=ANSWER)
        assert [line for line in since if not LATE.fullmatch(line)] == []
        assert await ask(console, CLOCK, within=ANSWER) == [clock]
        await console.send("poweroff -f\n")
        with trio.fail_after(ANSWER):
            assert await machine.ended() == 0
        assert machine.log.read_text() == ""
