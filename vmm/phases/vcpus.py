"""The vCPUs of a machine as tasks, started and stopped together."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol, final

import trio

from vmm.errors import VmmError, leaves
from vmm.kvm.exits import Stop
from vmm.phases.gates import Exits, GivenUp, StartingGates

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class GuestCpu(Protocol):
    """A vCPU: KVM's, or one that executes nothing."""

    @property
    def index(self) -> int:
        """Its number, from 0, the boot processor."""

    @property
    def thread_id(self) -> int:
        """The host thread that is in the guest for it; 0 while none is."""

    @property
    def has_thread(self) -> bool:
        """Whether it runs on a thread of its own, which may wait in `entered`."""

    async def run(
        self, threads: trio.CapacityLimiter, *, entered: Callable[[], object], left: Callable[[Stop], object]
    ) -> Stop:
        """Run it until it is kicked or cannot go on. `entered` is called just before it begins, on any thread.

        If `entered` raises, that comes out, and nothing has begun. `left` is called on its thread, if it has one, when
        it is out, with what `run` will return.
        """

    def kick(self) -> None:
        """Make `run` return soon. Any thread, where the vCPU has one."""

    def hold(self, seconds: float) -> None:
        """Keep it out of the guest for so long, unless it is kicked or let go."""

    def let_go(self) -> None:
        """End what `hold` has begun."""


@final
class VcpuGang:
    """All vCPUs of one machine. A resident of phase running; each vCPU has a thread of its own while it runs."""

    def __init__(self, vcpus: Sequence[GuestCpu], failed: Callable[[GuestCpu, Stop], None]) -> None:
        self.vcpus: Final = tuple(vcpus)
        self._failed = failed
        self._threads = trio.CapacityLimiter(len(self.vcpus))
        self._nursery: trio.Nursery | None = None
        self._inside = 0
        self._stopping = False
        self._all_out = trio.Event()
        self._all_out.set()
        self._entered = trio.Event()
        self._first_entry = 0
        self._gates: StartingGates | None = None
        self._exits = Exits(0)

    @property
    def running(self) -> bool:
        """Whether a vCPU is in the guest, or about to be."""
        return self._inside > 0 and self._gates is None

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be there for `start` and `stop`. A cancel takes every vCPU out of the guest before it leaves."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._give_up_waiting()

    async def stand_by(self) -> None:
        """Have each vCPU's thread wait just before the guest, so that `start_now` costs no more than to wake them.

        Until then nothing of a vCPU is touched. `stop` calls it off. Without effect while they wait so.
        """
        if self._gates is None and all(vcpu.has_thread for vcpu in self.vcpus):
            self._gates = StartingGates(len(self.vcpus))
            self._begin(self._gates)
            await self._gates.all_there()

    def start_nowait(self) -> None:
        """Begin to run every vCPU; their tasks enter the guest on their next turn."""
        if self._gates is None:
            self._begin(None)
        else:
            self._gates.open()
            self._gates = None

    def start_now(self) -> int | None:
        """Run every vCPU, at once where they stand by; return when the first was about to enter, as `entered` does.

        None if that is not known yet. For the end of a pause: keeps the loop for a moment, so that the threads need
        not contend for the interpreter with what it would go on to do.
        """
        gates = self._gates
        self.start_nowait()
        return gates.first_entry() if gates is not None else None

    def _begin(self, gates: StartingGates | None) -> None:
        assert self._nursery is not None, "the gang is started by its resident task"
        assert not self._inside
        self._all_out = trio.Event()
        self._entered = trio.Event()
        self._exits = Exits(len(self.vcpus))
        self._inside = len(self.vcpus)
        self._stopping = False
        for vcpu in self.vcpus:
            self._nursery.start_soon(self._run, vcpu, gates, name=f"vcpu{vcpu.index}")

    def _give_up_waiting(self) -> None:
        gates, self._gates = self._gates, None
        if gates is not None:
            gates.give_up()

    async def entered(self) -> int:
        """Wait until a vCPU has been about to enter the guest since the last start; return when, CLOCK_MONOTONIC in ns.

        Returns, too, if all of them are out again without it.
        """
        await self._entered.wait()
        return self._first_entry

    def _note_entry(self, loop: trio.lowlevel.TrioToken, gates: StartingGates | None) -> Callable[[], None]:
        started = self._entered

        def note() -> None:
            # On the vCPU's thread, which must not wait for the loop.
            now = time.monotonic_ns() if gates is None else gates.passed()
            loop.run_sync_soon(told, now)

        def told(now: int) -> None:
            if not started.is_set():
                self._first_entry = now
                started.set()

        return note

    async def stop(self) -> None:
        """Take every vCPU out of the guest; when this returns, no KVM_RUN is under way and no I/O half done."""
        self._kick_all()
        await self._all_out.wait()

    async def halt(self) -> None:
        """Do as `stop` does, and return as soon as the threads are out: their tasks end later.

        For the beginning of a pause: the loop is kept for a moment, in place of a turn of it or two for each vCPU.
        `stop` must come before another start.
        """
        self._kick_all()
        threads = all(vcpu.has_thread for vcpu in self.vcpus)
        if not (threads and self._inside and self._exits.are_all_kicked()):
            await self._all_out.wait()

    def _kick_all(self) -> None:
        self._give_up_waiting()
        self._stopping = True  # for those whose tasks have not had their first turn: a kick now would be forgotten
        for vcpu in self.vcpus:
            vcpu.kick()

    async def _run(self, vcpu: GuestCpu, gates: StartingGates | None) -> None:
        stop = Stop("kicked", "", {})
        try:
            if not self._stopping:
                entered = self._note_entry(trio.lowlevel.current_trio_token(), gates)
                stop = await vcpu.run(self._threads, entered=entered, left=self._exits.note)
        except* GivenUp:
            pass
        except* VmmError as group:
            stop = Stop("internal-error", "; ".join(str(error) for error in leaves(group)), {})
        finally:
            self._inside -= 1
            if not self._inside:
                self._all_out.set()
                self._entered.set()
        # Before anybody who waits for the last one to be out comes to look at the run state.
        if stop.reason != "kicked":
            self._failed(vcpu, stop)
