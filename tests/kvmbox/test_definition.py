"""What a machine was told to be, as stock Linux and a guest that asks for every CPUID bit see it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from tests.hw.boot.acpi_kit import table
from tests.kvm.test_cpu_features import seen_by
from tests.kvm.tiny import TinyMachine
from tests.kvmbox.guest import SHELL
from tests.kvmbox.machine import LinuxMachine, ask
from tests.kvmbox.test_linux import ANSWER, boots_to_a_shell, options
from vmm.kvm.cpu_features import ALWAYS, FEATURES, resolve, shown, without
from vmm.kvm.cpuid import guest_cpuid

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kvmbox.conftest import MakeInitramfs

pytestmark = [pytest.mark.kvmbox, pytest.mark.usefixtures("no_leaks")]

# All vCPUs are in one node: the box's emulated processor is an AMD before Zen, of which Linux takes all in a package to
# share a cache, whatever CPUID says, and warns of nodes that divide them.
NODES = "/sys/devices/system/node"


async def test_linux_finds_two_numa_nodes_no_feature_that_is_off_and_a_table(
    linux_kernel: Path, initramfs: MakeInitramfs, tmp_path: Path
) -> None:
    extra = tmp_path / "table"
    extra.write_bytes(table())
    machine_options = [
        *options(linux_kernel, initramfs(SHELL), 2),
        *("-cpu", "host,popcnt=off,x2apic=off", "-acpitable", f"file={extra}"),
        *("-numa", "node,cpus=0-1,mem=160M", "-numa", "node,mem=96M", "-numa", "dist,src=0,dst=1,val=33"),
    ]
    async with LinuxMachine.running(tmp_path, *machine_options) as machine:
        console = machine.console
        await boots_to_a_shell(console, 2)

        async with machine.monitor() as monitor:
            model = {"type": "full", "model": {"name": "host"}}
            offered = (await monitor.execute("query-cpu-model-expansion", **model))["model"]["props"]
        assert offered["popcnt"]
        assert offered["x2apic"]
        (flags,) = await ask(console, "sed -n 's/^flags[^:]*: //p' /proc/cpuinfo | sort -u", within=ANSWER)
        assert not {"popcnt", "x2apic"} & set(flags.split())
        assert {"sse4_1", "hypervisor", "tsc_deadline_timer"} <= set(flags.split())

        assert await ask(console, f"cat {NODES}/online {NODES}/node*/cpulist", within=ANSWER) == ["0-1", "0-1", ""]
        assert await ask(console, f"cat {NODES}/node*/distance", within=ANSWER) == ["10 33", "33 10"]
        sizes = await ask(console, f"sed -n 's/.*MemTotal: *//p' {NODES}/node*/meminfo", within=ANSWER)
        assert 64 << 10 < int(sizes[1].split()[0]) <= 96 << 10

        (digest,) = await ask(console, "md5sum </sys/firmware/acpi/tables/TEST", within=ANSWER)
        assert digest.split()[0] == hashlib.md5(table(), usedforsecurity=False).hexdigest()


def test_a_guest_sees_each_feature_that_is_offered_and_none_that_is_off() -> None:
    with TinyMachine() as machine:
        supported = machine.kvm.supported_cpuid()
        leaves = guest_cpuid(supported, 0, 1, bool(machine.kvm.extension("KVM_CAP_TSC_DEADLINE_TIMER")))
        offered = shown(leaves)
        assert len(offered) > 60
        # Beyond its last leaf an Intel processor repeats what is in that.
        there = {(leaf.function, leaf.index) for leaf in leaves}
        features = [feature for feature in FEATURES.values() if all(bit[:2] in there for bit in feature.bits)]
        assert seen_by(machine, features) == offered
    off = [name for name, on in resolve({}, offered, shown(supported), bare=True).items() if not on]
    with TinyMachine() as machine:
        machine.fds[0].set_cpuid(without(leaves, off))
        assert seen_by(machine, features) == offered & ALWAYS.keys()
