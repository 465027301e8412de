"""Stock Linux finds what is plugged into the machine's slots, there from the start or later, and keeps it through a
live update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.kvmbox.guest import SHELL
from tests.kvmbox.machine import LinuxMachine, ask
from tests.kvmbox.test_linux import ANSWER, boots_to_a_shell, complaints, options

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kvmbox.conftest import MakeInitramfs
    from tests.kvmbox.console import SerialConsole

pytestmark = pytest.mark.kvmbox

MODULES: Final = ("virtio_mmio", "virtio_rng")
DRIVER: Final = "/sys/bus/platform/drivers/virtio-mmio"
RNG: Final = "/sys/class/misc/hw_random"


async def reads_random_bytes(console: SerialConsole) -> None:
    """Two reads of the device that Linux has chosen give bytes, and other ones."""
    read = "dd if=/dev/hwrng bs=32 count=1 2>/dev/null | md5sum; dd if=/dev/hwrng bs=32 count=1 2>/dev/null | wc -c"
    (first, size), (second, _) = await ask(console, read, within=ANSWER), await ask(console, read, within=ANSWER)
    assert size == "32"
    assert first != second


@pytest.mark.usefixtures("no_leaks")
async def test_linux_uses_its_random_number_generators_from_the_start_hot_plugged_and_after_a_live_update(
    linux_kernel: Path, initramfs: MakeInitramfs, tmp_path: Path
) -> None:
    made = [
        *options(linux_kernel, initramfs(SHELL, MODULES), 1),
        *("-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-device,id=a,rng=rng0"),
    ]
    async with LinuxMachine.running(tmp_path, *made) as machine:
        console = machine.console
        await boots_to_a_shell(console, 1)
        assert await ask(console, f"cat {RNG}/rng_current", within=ANSWER) == ["virtio_rng.0"]
        await reads_random_bytes(console)
        assert await ask(console, f"ls {DRIVER} | grep LNRO", within=ANSWER) == ["LNRO0005:00"]
        (interrupts,) = await ask(console, "grep virtio0 /proc/interrupts", within=ANSWER)
        assert interrupts.split()[2:] == ["IO-APIC", "16-fasteoi", "virtio0"]

        async with machine.monitor() as monitor:
            await monitor.execute("device_add", driver="virtio-rng-device", id="b", bus="virtio-mmio-bus.7")
        assert await ask(console, f"echo LNRO0005:07 >{DRIVER}/bind", within=ANSWER) == []
        (known,) = await ask(console, f"cat {RNG}/rng_available", within=ANSWER)
        assert known.split()[:2] == ["virtio_rng.0", "virtio_rng.1"]
        assert await ask(console, f"echo virtio_rng.1 >{RNG}/rng_current", within=ANSWER) == []
        await reads_random_bytes(console)

        await machine.update()
        await reads_random_bytes(console)
        assert await ask(console, f"echo virtio_rng.0 >{RNG}/rng_current", within=ANSWER) == []
        await reads_random_bytes(console)

        # The driver first, as the guest's administrator would: what is taken off then was of no use any more.
        assert await ask(console, f"echo LNRO0005:07 >{DRIVER}/unbind", within=ANSWER) == []
        async with machine.monitor() as monitor:
            await monitor.execute("device_del", id="b")
        assert await ask(console, f"echo LNRO0005:07 >{DRIVER}/bind", within=ANSWER) == [
            "sh: write error: No such device"
        ]
        assert await complaints(console) == []
        await console.send("poweroff -f\n")
        assert await machine.ended() == 0
        assert machine.log.read_text() == ""
