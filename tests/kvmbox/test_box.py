"""That the box itself is sound: another VMM boots the tests' guest in it. If this fails, look no further."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from tests.kvm.tiny import TinyMachine
from tests.kvmbox.console import ConsoleSocket
from tests.kvmbox.guest import COUNTER, READY, SHELL, command_line

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kvmbox.conftest import MakeInitramfs

pytestmark = pytest.mark.kvmbox

BOOT = 240.0
"""Seconds that a guest may take from the start of its VMM to its script. Ten or so are usual."""


def microvm(kernel: Path, initramfs: Path, console: Path) -> list[str]:
    """QEMU's command line for a guest with a serial port, and no keyboard controller to reset by."""
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "microvm,acpi=off,rtc=on", "-accel", "kvm", "-cpu", "host", "-m", "256"),
        *("-kernel", str(kernel), "-initrd", str(initramfs), "-append", command_line("reboot=t")),
        *("-chardev", f"socket,id=console,path={console}", "-serial", "chardev:console"),
    ]


@pytest.mark.usefixtures("no_leaks")
async def test_qemu_boots_the_bzimage_and_the_guest_counts(
    linux_kernel: Path, initramfs: MakeInitramfs, tmp_path: Path
) -> None:
    async with ConsoleSocket.listening(tmp_path / "console") as socket, trio.open_nursery() as nursery:
        command = microvm(linux_kernel, initramfs(COUNTER.format(microseconds=1000)), socket.path)
        await nursery.start(partial(trio.run_process, command))
        async with socket.accepted(within=60) as console:
            await console.expect(f"^{READY}$", within=BOOT)
            for number in range(1, 4):
                assert await console.line(within=60) == f"count {number}"
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("no_leaks")
async def test_qemu_boots_the_elf_kernel_and_the_guest_resets_itself_when_its_shell_ends(
    linux_vmlinux: Path, initramfs: MakeInitramfs, tmp_path: Path
) -> None:
    async with ConsoleSocket.listening(tmp_path / "console") as socket, trio.open_nursery() as nursery:
        command = microvm(linux_vmlinux, initramfs(SHELL, modules=["virtio_net"]), socket.path)
        qemu: trio.Process = await nursery.start(partial(trio.run_process, command))
        async with socket.accepted(within=60) as console:
            await console.expect(f"^{READY}$", within=BOOT)
            await console.send("grep -o '^virtio_net' /proc/modules; echo $((6 * 7)); exit 3\n")
            await console.expect("^virtio_net$", within=60)
            await console.expect("^42$", within=60)
            await console.expect("^guest: script ended with status 3$", within=60)
            with trio.fail_after(60):
                assert await qemu.wait() == 0


@pytest.mark.usefixtures("no_leaks")
async def test_machines_come_and_go_while_one_runs() -> None:
    """The box dies of this within seconds if `steady_kvm.c` is not at work."""
    with TinyMachine() as machine:
        machine.boot("l: out 0x80, al\n jmp l")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, lambda: machine.run())
            try:
                for _ in range(40):
                    with TinyMachine(chips=False):
                        await trio.lowlevel.checkpoint()
            finally:
                machine.vcpus[0].kick()
        assert machine.ports.written
