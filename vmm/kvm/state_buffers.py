"""The C buffers that state passes through, allocated and laid out before any pause."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from vmm.errors import KvmCallFailed, StateRejected
from vmm.kvm._kvm import ffi, lib
from vmm.kvm.state import ChipState, VcpuState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.kvm._kvm import Buffer, CData

MSR_ENTRY_SIZE = 16
TSC_KHZ_SIZE = 8


def boot_id() -> bytes:
    """Return the 16 bytes that name this boot of this host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


@final
class VcpuBuffers:
    """The state of one vCPU on its way between KVM and bytes."""

    def __init__(self, context: str, xsave_size: int, has_sregs2: bool, has_xcrs: bool, event_flags: int) -> None:
        self.context = context
        self.raw = raw = ffi.new("struct tv_state *")
        raw.has_sregs2 = has_sregs2
        raw.has_xcrs = has_xcrs
        raw.event_flags = event_flags
        raw.xsave_size = xsave_size
        self._xsave_memory = ffi.new("uint8_t[]", xsave_size)
        raw.xsave = self._xsave_memory
        self._xsave = ffi.buffer(self._xsave_memory)
        self._msrs = _member(raw, "msrs")
        self._regs = _member(raw, "regs")
        self._xcrs = _member(raw, "xcrs")
        self._sregs = _member(raw, "sregs")
        self._lapic = _member(raw, "lapic")
        self._tsc_offset = _member(raw, "tsc_offset")
        self._debugregs = _member(raw, "debugregs")
        self._events = _member(raw, "events")
        self._tsc_deadline = _member(raw, "tsc_deadline")
        self._mp_state = _member(raw, "mp_state")
        self.tsc_khz = b"\0" * TSC_KHZ_SIZE

    def prepare(self, fd: int, msr_indices: Sequence[int]) -> None:
        """Fix the list of MSRs that travel, by asking for each."""
        table = ffi.new("struct tv_msr_list *")
        table.count = len(msr_indices)
        table.indices[0 : len(msr_indices)] = msr_indices
        lib.tv_state_prepare(fd, self.raw, table)

    def save_mp_state(self, fd: int) -> None:
        """Read MP_STATE into the buffer; before all vCPUs' `save`."""
        if lib.tv_state_save_mp(fd, self.raw):
            self._fail()

    def save(self, fd: int) -> VcpuState:
        """Read all but MP_STATE, and make bytes of the whole."""
        if lib.tv_state_save(fd, self.raw):
            self._fail()
        return VcpuState(
            regs=self._regs[:],
            xsave=self._xsave[:],
            xcrs=self._xcrs[:],
            sregs=self._sregs[:],
            lapic=self._lapic[:],
            msrs=self._msrs[: self.raw.saved_msr_count * MSR_ENTRY_SIZE],
            tsc_offset=self._tsc_offset[:],
            debugregs=self._debugregs[:],
            events=self._events[:],
            tsc_deadline=self._tsc_deadline[:],
            mp_state=self._mp_state[:],
            tsc_khz=self.tsc_khz,
        )

    def check(self, state: VcpuState) -> None:
        """Compare the members' sizes with this host's.

        Raises:
            StateRejected: naming every member that does not fit.
        """
        faults = [
            f"{len(blob)} bytes, {len(buffer)} wanted @ {name}"
            for name, blob, buffer in (
                ("regs", state.regs, self._regs),
                ("xcrs", state.xcrs, self._xcrs),
                ("sregs", state.sregs, self._sregs),
                ("lapic", state.lapic, self._lapic),
                ("tsc_offset", state.tsc_offset, self._tsc_offset),
                ("debugregs", state.debugregs, self._debugregs),
                ("events", state.events, self._events),
                ("tsc_deadline", state.tsc_deadline, self._tsc_deadline),
                ("mp_state", state.mp_state, self._mp_state),
                ("tsc_khz", state.tsc_khz, self.tsc_khz),
            )
            if len(blob) != len(buffer)
        ]
        # A host with fewer features has a smaller area; what lies beyond is then zero, unless the guest used it.
        if any(state.xsave[len(self._xsave) :]):
            faults.append(f"{len(state.xsave)} bytes in use, this host has {len(self._xsave)} @ xsave")
        if len(state.msrs) % MSR_ENTRY_SIZE or len(state.msrs) > len(self._msrs):
            faults.append(
                f"{len(state.msrs)} bytes, a multiple of {MSR_ENTRY_SIZE} up to {len(self._msrs)} wanted @ msrs"
            )
        if len(state.tsc_khz) == TSC_KHZ_SIZE and not (any(state.tsc_khz[:4]) and any(state.tsc_khz[4:])):
            faults.append("a rate of 0 kHz @ tsc_khz")
        if faults:
            raise StateRejected(section=self.context, faults=tuple(faults))

    def fill(self, state: VcpuState, tsc_offset: bytes) -> None:
        """Copy a state that `check` has passed into the buffer."""
        self._regs[:] = state.regs
        if len(state.xsave) == len(self._xsave):
            self._xsave[:] = state.xsave
        else:
            self._xsave[:] = state.xsave[: len(self._xsave)].ljust(len(self._xsave), b"\0")
        self._xcrs[:] = state.xcrs
        self._sregs[:] = state.sregs
        self._lapic[:] = state.lapic
        self._msrs[: len(state.msrs)] = state.msrs
        self.raw.saved_msr_count = len(state.msrs) // MSR_ENTRY_SIZE
        self._tsc_offset[:] = tsc_offset
        self._debugregs[:] = state.debugregs
        self._events[:] = state.events
        self._tsc_deadline[:] = state.tsc_deadline
        self._mp_state[:] = state.mp_state

    def load_first(self, fd: int) -> int:
        """Write the part that comes before the chips. Return the TSC offset that the guest has now."""
        if lib.tv_state_load_first(fd, self.raw):
            self._fail()
        taken: int = self.raw.taken_tsc_offset
        return taken

    def load_last(self, fd: int) -> None:
        """Write the part that comes after the chips."""
        if lib.tv_state_load_last(fd, self.raw):
            self._fail()

    def take_up(self, fd: int) -> None:
        """Write what only the owner of the guest may write."""
        if lib.tv_state_take_up(fd, self.raw):
            self._fail()

    def _fail(self) -> None:
        context = self.context
        if self.raw.refused_msr:
            context = f"MSR {self.raw.refused_msr:#x} of {context}"
            self.raw.refused_msr = 0
        raise KvmCallFailed(ioctl=ffi.string(self.raw.failed).decode(), errno=self.raw.error, context=context)


@final
class ChipBuffers:
    """The state of a VM's chips on its way between KVM and bytes."""

    def __init__(self) -> None:
        self.raw = raw = ffi.new("struct tv_chips *")
        self._pic0, self._pic1, self._ioapic = (ffi.buffer(ffi.addressof(raw.chips, n)) for n in range(3))
        self._pit = _member(raw, "pit")
        self._clock = _member(raw, "clock")
        self._moment = _member(raw, "moment")
        self.boot_id = boot_id()

    def save(self, fd: int) -> ChipState:
        """Read all, and make bytes of it."""
        self._moment[: len(self.boot_id)] = self.boot_id
        if lib.tv_chips_save(fd, self.raw):
            self._fail()
        return ChipState(
            pic0=self._pic0[:],
            pic1=self._pic1[:],
            ioapic=self._ioapic[:],
            pit=self._pit[:],
            clock=self._clock[:],
            moment=self._moment[:],
        )

    def check(self, state: ChipState) -> None:
        """Compare the members' sizes with this host's.

        Raises:
            StateRejected: naming every member that does not fit.
        """
        faults = tuple(
            f"{len(blob)} bytes, {len(buffer)} wanted @ {name}"
            for name, blob, buffer in (
                ("pic0", state.pic0, self._pic0),
                ("pic1", state.pic1, self._pic1),
                ("ioapic", state.ioapic, self._ioapic),
                ("pit", state.pit, self._pit),
                ("clock", state.clock, self._clock),
                ("moment", state.moment, self._moment),
            )
            if len(blob) != len(buffer)
        )
        if faults:
            raise StateRejected(section="chips", faults=faults)

    def load(self, fd: int, state: ChipState, time: int) -> None:
        """Write all. `time` is one of TV_TIME_*."""
        self.check(state)
        self._pic0[:] = state.pic0
        self._pic1[:] = state.pic1
        self._ioapic[:] = state.ioapic
        self._pit[:] = state.pit
        self._clock[:] = state.clock
        self._moment[:] = state.moment
        if lib.tv_chips_load(fd, self.raw, time):
            self._fail()

    def _fail(self) -> None:
        raise KvmCallFailed(ioctl=ffi.string(self.raw.failed).decode(), errno=self.raw.error)


def _member(structure: CData, name: str) -> Buffer:
    pointer = ffi.addressof(structure, name)
    return ffi.buffer(pointer)
