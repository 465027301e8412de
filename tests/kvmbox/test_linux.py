"""Stock Linux on this VMM: it boots, is updated live under its feet, reboots, and turns the machine off."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Final

import attrs
import pytest
import trio

from tests.kvmbox.guest import READY, SHELL, command_line
from tests.kvmbox.machine import LinuxMachine, ask, quiet

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kvmbox.conftest import MakeInitramfs
    from tests.kvmbox.console import SerialConsole
    from vmm.qmp_client import QmpClient

pytestmark = pytest.mark.kvmbox

BOOT: Final = 240.0
"""Seconds that a guest may take from the start of its VMM to its script. Ten or so are usual in the box."""

ANSWER: Final = 120.0
"""Seconds for anything that a guest does at once."""

NO_FAULTS_OF_OURS: Final = (
    "PCI: Fatal: No config space access function found",  # the machine has no PCI
    "PCI: System does not support PCI",
    "amd_pstate: the _CPC object is not present in SBIOS or ACPI disabled",  # said on AMD in any virtual machine
)

PAUSE: Final = 8.0
"""Seconds that a guest stands whose watchdogs find two too long."""

LATE: Final = re.compile(
    r"\[[ \d.]+\] (hrtimer: interrupt took \d+ ns|clocksource: Long readout interval, skipping watchdog check: .*)"
)
"""Said in a guest that had to wait for a processor. Harmless, and not rare in a box on a busy machine."""

SLOW: Final = re.compile(r"trio-vmm: (saving|loading)\b.*")
"""Said of a save or a load that takes more than five seconds, as it may in a box on a busy machine."""

COUNT: Final = """\
n=0; until read -t 0.1 word; do n=$((n + 1)); read up idle </proc/uptime; echo "count $n $up"; done; echo "read $word"
"""
"""Counts in the shell's memory and tells the time, until somebody types a line. Without a process but the shell's own:
Ctrl-C would get lost if it came just as one ends."""

INTERRUPT: Final = "\x03"
CLOCK: Final = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource"


def options(kernel: Path, initramfs: Path, cpus: int) -> list[str]:
    return [
        *("-m", "256", "-smp", str(cpus), "-kernel", str(kernel), "-initrd", str(initramfs)),
        *("-append", command_line()),
    ]


@attrs.define
class Counted:
    """The lines of a counting guest, and the time (time.monotonic) when each came."""

    lines: list[str] = attrs.Factory(list)
    times: list[float] = attrs.Factory(list)
    _grown: trio.Event = attrs.Factory(trio.Event)

    async def read(self, console: SerialConsole) -> None:
        while True:
            self.lines.append(await console.line(within=ANSWER))
            self.times.append(time.monotonic())
            self._grown.set()
            self._grown = trio.Event()

    async def more(self, count: int) -> None:
        """Wait for `count` lines more."""
        wanted = len(self.lines) + count
        while len(self.lines) < wanted:
            await self._grown.wait()

    def check(self) -> None:
        """No line is lost, repeated, torn or of somebody else, and the guest's time went on as the host's did."""
        found = [re.fullmatch(r"count (\d+) (\d+\.\d\d)", line) for line in self.lines]
        assert [line for line, match in zip(self.lines, found, strict=True) if not match] == []
        counts = [(int(match[1]), float(match[2])) for match in found if match]
        assert [number for number, _ in counts] == list(range(1, len(counts) + 1))
        uptimes = [uptime for _, uptime in counts]
        assert uptimes == sorted(uptimes)
        # The host's times are those of the reader, which a busy machine holds up.
        assert uptimes[-1] - uptimes[0] == pytest.approx(self.times[-1] - self.times[0], abs=5)


async def complaints(console: SerialConsole) -> list[str]:
    """Kernel messages of level warning and worse, but those that are no fault of the machine."""
    lines = await ask(console, "dmesg -r | sed -n 's/^<[0-4]>//p'", within=ANSWER)
    return [line for line in lines if not LATE.fullmatch(line) and line.partition("] ")[2] not in NO_FAULTS_OF_OURS]


async def boots_to_a_shell(console: SerialConsole, cpus: int) -> None:
    await console.expect(f"^{READY}$", within=BOOT)
    await quiet(console)
    assert await ask(console, "nproc", within=ANSWER) == [str(cpus)]
    assert await complaints(console) == []


async def stands_and_goes_on(console: SerialConsole, monitor: QmpClient) -> None:
    """A pause longer than the guest's watchdogs allow, which they forgive if the VMM says that it was one."""
    assert await ask(console, "echo 1 >/proc/sys/kernel/watchdog_thresh", within=ANSWER) == []
    (messages,) = await ask(console, "dmesg | wc -l", within=ANSWER)
    (before,) = await ask(console, "cut -d. -f1 /proc/uptime", within=ANSWER)
    # A processor that is idle is forgiven anyway.
    await console.send("echo spinning; while :; do :; done\n")
    await console.expect("^spinning$", within=ANSWER)
    await monitor.execute("stop")
    await trio.sleep(PAUSE)
    await monitor.execute("cont")
    await console.send(f"{INTERRUPT}echo; echo interrupted\n")
    await console.expect("^interrupted$", within=ANSWER)
    # The watchdogs look five times in two seconds.
    (after,) = await ask(console, "sleep 3; cut -d. -f1 /proc/uptime", within=ANSWER)
    assert int(after) - int(before) >= PAUSE, "the guest's time stood still"
    since = await ask(console, f"dmesg | tail -n +{int(messages) + 1}", within=ANSWER)
    assert [line for line in since if not LATE.fullmatch(line)] == []


async def end_counting(console: SerialConsole) -> None:
    """Type the line that ends `COUNT`. Of what the shell has read of it when its time is up, it forgets."""
    await console.send("enough\n")
    await console.expect("^read [enough]*$", within=ANSWER)


async def counts_through_a_save(machine: LinuxMachine) -> None:
    """The machine is saved, its RAM where it is, and resumed."""
    console, counted = machine.console, Counted()
    await console.send(COUNT)
    for saved in (False, True):
        if saved:
            await machine.save_and_resume()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(counted.read, console)
            await counted.more(3)
            nursery.cancel_scope.cancel()
    found = [re.fullmatch(r"count (\d+) (\d+\.\d\d)", line) for line in counted.lines]
    assert [match and int(match[1]) for match in found] == list(range(1, len(found) + 1)), counted.lines
    await end_counting(console)


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("cpus", [1, 2])
async def test_linux_counts_through_three_live_updates_and_reboots_in_the_last_process(
    linux_kernel: Path, initramfs: MakeInitramfs, tmp_path: Path, cpus: int
) -> None:
    async with LinuxMachine.running(tmp_path, *options(linux_kernel, initramfs(SHELL), cpus)) as machine:
        console = machine.console
        await boots_to_a_shell(console, cpus)
        (messages,) = await ask(console, "dmesg | wc -l", within=ANSWER)
        (clock,) = await ask(console, CLOCK, within=ANSWER)

        counted = Counted()
        await console.send(COUNT)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(counted.read, console)
            await counted.more(3)
            # A guest's CPUs make no difference to how a process starts: the one with one goes the longest way.
            for update in (machine.update, machine.update, machine.become if cpus == 1 else machine.update):
                await update()
                await counted.more(3)
            nursery.cancel_scope.cancel()
        counted.check()
        await end_counting(console)

        since = await ask(console, f"dmesg | tail -n +{int(messages) + 1}", within=ANSWER)
        assert [line for line in since if not LATE.fullmatch(line)] == []
        assert await ask(console, CLOCK, within=ANSWER) == [clock]
        assert await ask(console, "nproc", within=ANSWER) == [str(cpus)]

        async with machine.monitor() as monitor:
            await monitor.execute("system_reset")
        await boots_to_a_shell(console, cpus)
        await console.send("poweroff -f\n")
        with trio.fail_after(ANSWER):
            assert await machine.ended() == 0
        assert machine.log.read_text() == ""


@pytest.mark.usefixtures("no_leaks")
async def test_linux_boots_by_pvh_resets_itself_is_saved_and_turns_the_machine_off(
    linux_vmlinux: Path, initramfs: MakeInitramfs, tmp_path: Path
) -> None:
    ram = f"memory-backend-file,id=ram0,size=256M,mem-path={tmp_path}/ram,share=on"
    in_file = ("-object", ram, "-machine", "memory-backend=ram0")
    async with (
        LinuxMachine.running(tmp_path, *options(linux_vmlinux, initramfs(SHELL), 2), *in_file) as machine,
        machine.monitor() as monitor,
    ):
        console = machine.console
        await boots_to_a_shell(console, 2)
        (line,) = await ask(console, "cat /proc/cmdline", within=ANSWER)
        assert line == command_line()
        await console.send("exit\n")
        with trio.fail_after(ANSWER):
            event = await monitor.wait_event(lambda event: event["event"] == "RESET")
        assert event["data"] == {"guest": True, "reason": "guest-reset"}
        await boots_to_a_shell(console, 2)
        await stands_and_goes_on(console, monitor)
        await counts_through_a_save(machine)
        async with machine.monitor() as monitor_again:
            await console.send("poweroff -f\n")
            with trio.fail_after(ANSWER):
                event = await monitor_again.wait_event(lambda event: event["event"] == "SHUTDOWN")
            assert event["data"] == {"guest": True, "reason": "guest-shutdown"}
            assert await machine.ended() == 0
        assert [line for line in machine.log.read_text().splitlines() if not SLOW.fullmatch(line)] == []
