"""The sections that are no device's: what they hold when idle and when busy, and who reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast, final

import attrs

from vmm.backends.chardev_state import ChardevState
from vmm.hw.codec import StateCodec
from vmm.kvm.state import ChipState, VcpuState
from vmm.phases.guest_requests import GuestWishes
from vmm.phases.processors import _structure
from vmm.phases.quiesced import Pause
from vmm.phases.stores import BootStores
from vmm.qtest.state import QtestState
from vmm.terminals import TERMINAL_SETTINGS_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.backends.chardev import Chardev

Section = dict[str, Any]


@final
@attrs.frozen
class OtherCase:
    """One kind."""

    name: str
    sections: Callable[[], dict[str, Section]]
    """Makes the present version's, by `idle` and `busy`."""
    load: Callable[[int, Section], object]
    """Reads one as whoever owns the section does, and puts nothing in force."""

    def __str__(self) -> str:
        return self.name


def chardev_sections() -> dict[str, Section]:
    terminal = bytes(range(TERMINAL_SETTINGS_SIZE))
    busy = ChardevState(output=b"\x00from the guest\xff", input=b"for the guest", escape=True, terminal=terminal)
    return {"idle": attrs.asdict(ChardevState()), "busy": attrs.asdict(busy)}


def load_chardev(version: int, section: Section) -> object:
    return BootStores._loader(cast("BootStores", None), "serial0", cast("Chardev", None))(version, section)


def pause_sections() -> dict[str, Section]:
    idle = Pause(runs=True, run_state="running", failure="", wishes=GuestWishes())
    busy = Pause(False, "internal-error", "vCPU 0 failed", GuestWishes(reset=True, exit_status=3))
    return {"idle": idle.to_json(), "busy": busy.to_json()}


def load_pause(version: int, section: Section) -> object:
    assert version == Pause.VERSION
    return Pause.from_json(section)


def qtest_sections() -> dict[str, Section]:
    busy = QtestState(epoch_ns=-5, now_ns=1_000_000_007, high=0x80_0001)
    codec = StateCodec.of(QtestState)
    return {"idle": codec.dump(QtestState()), "busy": codec.dump(busy)}


def load_qtest(version: int, section: Section) -> object:
    return StateCodec.of(QtestState).load(section, version)


def kvm_sections() -> dict[str, Section]:
    """Of one vCPU. What is in KVM's structures is the kernel's business: this has no more of them than their sizes."""
    sizes = {
        "regs": 144, "xsave": 4096, "xcrs": 392, "sregs": 320, "lapic": 1024, "msrs": 64, "tsc_offset": 8,
        "debugregs": 128, "events": 64, "tsc_deadline": 8, "mp_state": 4, "tsc_khz": 8,
    }  # fmt: skip
    chips = {"pic0": 520, "pic1": 520, "ioapic": 520, "pit": 112, "clock": 48, "moment": 48}
    return {
        which: {
            "vcpus": [{name: bytes([fill]) * size for name, size in sizes.items()}],
            "chips": {name: bytes([fill]) * size for name, size in chips.items()},
        }
        for which, fill in (("idle", 0), ("busy", 0xA5))
    }


def load_kvm(version: int, section: Section) -> object:
    assert set(section) == {"vcpus", "chips"}
    vcpus = [_structure(VcpuState, vcpu, "vcpus") for vcpu in section["vcpus"]]
    return vcpus, _structure(ChipState, section["chips"], "chips")


OTHERS: Final = (
    OtherCase("chardev", chardev_sections, load_chardev),
    OtherCase("kvm", kvm_sections, load_kvm),
    OtherCase("pause", pause_sections, load_pause),
    OtherCase("qtest", qtest_sections, load_qtest),
)
