"""The sections that are no device's: what they hold when idle and when busy, and who reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm.backends.chardev_state import ChardevState
from vmm.hw.codec import StateCodec
from vmm.kvm.state import ChipState, VcpuState
from vmm.monitor.belongings import Belongings, SessionState
from vmm.monitor.json_stream import Fault, Message, StreamState
from vmm.phases.chardev_sections import loader
from vmm.phases.fdsets_state import FdSetsState, FdState
from vmm.phases.guest_requests import GuestWishes
from vmm.phases.processors import _structure
from vmm.phases.quiesced import Pause
from vmm.phases.session_state import MonitorState, client_state
from vmm.qtest.session_state import Interception, NumberedSession, QtestServerState, QtestSessionState, Unsent
from vmm.qtest.state import QtestState
from vmm.terminals import TERMINAL_SETTINGS_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable


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
    return loader("serial0", lambda state: None)(version, section)


def pause_sections() -> dict[str, Section]:
    idle = Pause(runs=True, run_state="running", failure="", wishes=GuestWishes())
    busy = Pause(False, "internal-error", "vCPU 0 failed", GuestWishes(reset=True, exit_status=3))
    return {"idle": idle.to_json(), "busy": busy.to_json()}


def load_pause(version: int, section: Section) -> object:
    assert version == Pause.VERSION
    return Pause.from_json(section)


def fdsets_sections() -> dict[str, Section]:
    codec = StateCodec.of(FdSetsState)
    named = FdState(fdset=3, number=17, serial=2, opaque=b"rdonly:/a/file")
    busy = FdSetsState(descriptors=(named, FdState(fdset=(1 << 63) - 1, number=0, serial=9, opaque=None)))
    return {"idle": codec.dump(FdSetsState(descriptors=())), "busy": codec.dump(busy)}


def load_fdsets(version: int, section: Section) -> object:
    return StateCodec.of(FdSetsState).load(section, version)


def monitor_sections() -> dict[str, Section]:
    codec = StateCodec.of(MonitorState)
    quiet = SessionState(negotiated=False, oob=False, stream=StreamState(), waiting=(), unsent=b"")
    busy = SessionState(
        negotiated=True,
        oob=True,
        stream=StreamState(b'{"execute": "c', "balance", 0x22, 1, -1),
        waiting=(Message({"execute": "stop", "id": [1.5, None]}), Fault("Malformed JSON")),
        unsent=b'urn": {}}\r\n',
    )
    descriptors = Belongings({"a name": -1}, [-1])
    clients = (client_state(1, quiet, Belongings()), client_state(7, busy, descriptors))
    return {
        "idle": codec.dump(MonitorState(grant=b"admin", sessions=())),
        "busy": codec.dump(MonitorState(grant=b"admin", sessions=clients)),
    }


def load_monitor(version: int, section: Section) -> object:
    found = StateCodec.of(MonitorState).load(section, version)
    return [client.to_session("monitor/qmp0") for client in found.sessions]


def qtest_sections() -> dict[str, Section]:
    busy = QtestState(epoch_ns=-5, now_ns=1_000_000_007, high=0x80_0001)
    codec = StateCodec.of(QtestState)
    return {"idle": codec.dump(QtestState()), "busy": codec.dump(busy)}


def load_qtest(version: int, section: Section) -> object:
    return StateCodec.of(QtestState).load(section, version)


def qtest_server_sections() -> dict[str, Section]:
    codec = StateCodec.of(QtestServerState)
    quiet = NumberedSession(number=1, state=QtestSessionState())
    unsent = (Unsent(data=b"IRQ raise 4\nIRQ lower 4\n", events=True), Unsent(data=b"K 0x00\n", events=False))
    telling = Interception(path=b"/machine/unattached/ioapic", name=b"unnamed-gpio-in", inputs=True)
    busy = QtestSessionState(unread=b"inb 0x80\ninw", overlong=True, unsent=unsent, intercepted=telling)
    both = QtestServerState(log_began=1 << 40, sessions=(quiet, NumberedSession(number=7, state=busy)))
    return {"idle": codec.dump(QtestServerState()), "busy": codec.dump(both)}


def load_qtest_server(version: int, section: Section) -> object:
    return StateCodec.of(QtestServerState).load(section, version)


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
    OtherCase("fdsets", fdsets_sections, load_fdsets),
    OtherCase("kvm", kvm_sections, load_kvm),
    OtherCase("monitor", monitor_sections, load_monitor),
    OtherCase("pause", pause_sections, load_pause),
    OtherCase("qtest", qtest_sections, load_qtest),
    OtherCase("qtest-server", qtest_server_sections, load_qtest_server),
)
