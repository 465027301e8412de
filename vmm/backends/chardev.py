"""Chardevs: streams of bytes between a device of the guest and the host.

What all kinds have in common: output is put into a buffer by any thread and written by one task on the loop; input goes
to the frontend as far as it has room, and is not read before. That task does all it can at once, without waiting, and
then waits for everything at once (`Watch`). So it can be stopped between any two of its steps with no byte under way,
which is what a live update needs: `quiesce` here, `pending` and `descriptors` to the successor, `take_over` and
`resume` there.

A chardev whose descriptors were claimed from a predecessor begins at rest and owns nothing until it is resumed: if it
ends before, the predecessor's socket file and terminal stay as they are.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final, Protocol, TypeAlias

import trio

from vmm.backends.chardev_output import OutputBuffer
from vmm.backends.chardev_state import BUFFER_LIMIT, ChardevState
from vmm.backends.chardev_watch import Watch
from vmm.errors import BackendInUse, DescriptorsUnclaimed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vmm.backends.chardev_options import ChardevKind

Complain: TypeAlias = "Callable[[str], None]"
"""Takes one sentence for the operator: something went wrong that the machine survives."""

READ_LIMIT: Final = 4096
"""Bytes read at once."""

GATHER_TIME: Final = 0.001
"""Seconds between two writes of output, unless input or a full buffer asks for one. Nobody sees it on a console."""


class CharFrontend(Protocol):
    """The device's side of a chardev."""

    def room(self) -> int:
        """Return how many bytes `receive` can take now. Any thread."""
        ...

    def receive(self, data: bytes) -> None:
        """Take `data`, no more than `room` said; if there is less room by now, overrun. On the loop."""
        ...

    def drained(self) -> None:
        """Note that there may be room for output where there was none. On the loop; may call `put`."""
        ...


class Chardev(ABC):
    """A byte stream to the host. Made by `open_chardev`; `serve` is its one task."""

    kind: ClassVar[ChardevKind]

    def __init__(self, label: str, complain: Complain, *, inherited: bool) -> None:
        """Begin at rest if `inherited`."""
        self.label = label
        self.surrendered = False
        """Whether its one connection was given away for good: nothing of it is left for a device, or a successor."""
        self._complain: Final = complain
        self._watch: Final = Watch()
        self._output: Final = OutputBuffer(self._watch.ring)
        self._input = bytearray()
        self._frontend: CharFrontend | None = None
        self._starved = False
        self._failing = False
        self._wrote = False
        self._owner = not inherited
        self._quiesced = inherited
        self._closed = False
        self._resumed = trio.Event()
        self._rested = trio.Event()
        self._rested.set()
        self._pumping: trio.CancelScope | None = None
        if inherited:
            self._output.refuse()
        else:
            self._resumed.set()

    # --- for the frontend ---

    @property
    @abstractmethod
    def filename(self) -> str:
        """What is on the host's side, as `query-chardev` shows it."""

    @property
    def pty(self) -> str | None:
        """Path of the pty's slave, which `chardev-add` answers with; None for other kinds."""
        return None

    @property
    def frontend_open(self) -> bool:
        """Whether a device is attached."""
        return self._frontend is not None

    def attach(self, frontend: CharFrontend) -> None:
        """Connect a device. On the loop.

        Raises:
            BackendInUse: there is one.
        """
        if self._frontend is not None:
            raise BackendInUse(what="Chardev", name=self.label, user="another device")
        self._frontend = frontend
        self._watch.ring()

    def detach(self) -> None:
        """Disconnect the device, if any. What it put is still written."""
        self._frontend = None

    def put(self, data: bytes) -> int:
        """Take output from the front of `data`; return how many bytes. Any thread; never waits.

        When all is not taken, the frontend's `drained` is called once there is room. While nobody reads (a socket
        without a client) all is taken and dropped; while the chardev is at rest nothing is taken.
        """
        return self._output.put(data)

    def room(self) -> int:
        """Return how many bytes `put` would take now; if none, `drained` tells when that changes. Any thread."""
        return self._output.room()

    def accept_input(self) -> None:
        """Note that the frontend has room again. Any thread; costs next to nothing unless input waits for it."""
        if self._starved:
            self._starved = False
            self._watch.ring()

    # --- the task ---

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry bytes until cancelled, or given up. Started once it does.

        At a cancel, what can be written without waiting is, and all is closed and put back as it was (see `close`).
        """
        try:
            if self._owner:
                self._begin()
            task_status.started()
            while not self._closed:
                await self._resumed.wait()
                if not self._quiesced:
                    self._rested = trio.Event()
                    with trio.CancelScope() as self._pumping:
                        await self._pump()
                    self._pumping = None
                    self._rested.set()
        finally:
            self._rested.set()
            self.close()

    async def _pump(self) -> None:
        while True:
            while self._step():
                await trio.lowlevel.checkpoint()
            if not self._wrote:
                await self._watch.wait()
                continue
            # A guest's console comes byte by byte. Waking up for each of them would cost the vCPU thread ten times what
            # `put` does, by contention for the interpreter; so the first byte goes at once, and others gather. Measured
            # with a byte every 13 us: 0.5 us each in place of 5 to 10.
            self._wrote = False
            with self._output.gathering(), trio.move_on_after(GATHER_TIME):
                await self._watch.wait()

    def close(self) -> None:
        """End: flush, close the descriptors, remove the own socket file, restore the own terminal. Waits for nothing.

        For a chardev that is never served; `serve` does it at its end. At rest nothing is flushed, and one that was
        inherited and never resumed has no socket file or terminal of its own.
        """
        if not self._closed:
            self._closed = True
            self._frontend = None
            self._output.drop_new()
            if self._owner and not self._quiesced:
                while self._write_some():
                    pass
            self._output.drop()
            self._release(owner=self._owner)
            self._watch.close()

    # --- live update, on the loop ---

    async def quiesce(self) -> None:
        """Come to rest: afterwards no byte is read, written or accepted here. A cancellation leaves it on the way.

        `resume` undoes it, whether it was finished or not.
        """
        if not self._quiesced:
            self._quiesced = True
            self._output.refuse()
            self._resumed = trio.Event()
            if self._pumping is not None:
                self._pumping.cancel()
        await self._rested.wait()

    def resume(self) -> None:
        """Carry bytes (again), and own what the descriptors stand for."""
        assert not self._closed, "the descriptors are gone"
        if self._quiesced:
            self._quiesced = False
            self.own()
            self._open_output()
            self._resumed.set()
            if self._frontend is not None:
                self._frontend.drained()

    def set_free(self) -> None:
        """Carry bytes (again) for whoever is to use it next: a monitor, which had it at rest, does not any more.

        Nothing happens where nothing is left to carry, or where another process owns what the descriptors stand for.
        """
        if self._owner and not self._closed and not self.surrendered:
            self.resume()

    def own(self) -> None:
        """Own what the descriptors stand for, and stay at rest: somebody else uses them (a monitor its listener)."""
        self._owner = True

    def pending(self) -> ChardevState:
        """Return what is under way. Complete only at rest."""
        return ChardevState(output=self._output.peek(BUFFER_LIMIT), input=bytes(self._input))

    @abstractmethod
    def descriptors(self) -> dict[str, int]:
        """Return what a successor needs, by names that are never used for another open file. They stay ours."""

    def take_over(self, pending: ChardevState, new: Mapping[str, int] | None = None, gone: Iterable[str] = ()) -> None:
        """Take what the predecessor had under way when it came to rest. Call it at rest, before `resume`.

        `new` and `gone` are the names that its `descriptors` had gained and lost since those that this chardev was made
        from; `new` is the chardev's from here on, even if an error is raised.

        Raises:
            DescriptorsUnclaimed: a name in `new` means nothing to this kind.
            DescriptorWrongKind: a descriptor in `new` is not what its name promises.
        """
        assert self._quiesced, "its own bytes would mix with these"
        self._exchange(dict(new or {}), frozenset(gone))
        self._output.load(pending.output)
        self._input[:0] = pending.input
        self._load(pending)

    def take_bytes(self, pending: ChardevState) -> None:
        """Take the bytes that another chardev had under way when its guest left. Call it at rest, before `resume`."""
        assert self._quiesced, "its own bytes would mix with these"
        self._output.load(pending.output)
        self._input[:0] = pending.input

    def give_up(self) -> None:
        """Close our copies of the descriptors, and leave all else: it is the successor's now. `serve` returns."""
        assert self._quiesced, "a chardev that carries bytes can't be given up"
        if not self._closed:
            self._closed = True
            self._frontend = None  # and the output goes on refusing: what is put here now would be lost
            self._release(owner=False)
            self._watch.close()
            self._resumed.set()

    # --- what a kind adds ---

    def _begin(self) -> None:
        """Do what precedes the first byte of a chardev that was not inherited."""
        return

    @abstractmethod
    def _step(self) -> bool:
        """Read and write what can be at once, or a part of it; say whether there was anything. Never waits."""

    @abstractmethod
    def _write_some(self) -> bool:
        """Write or drop a part of the output; False if there is none, or no room for it. Never waits."""

    def _open_output(self) -> None:
        """Keep or drop output from now on."""
        self._output.keep()

    def _exchange(self, new: dict[str, int], gone: frozenset[str]) -> None:
        """Replace descriptors by those that the predecessor had in the end."""
        if new:
            for fd in new.values():
                os.close(fd)
            raise DescriptorsUnclaimed(names=tuple(sorted(f"chardev/{self.label}/{name}" for name in new)))

    def _load(self, pending: ChardevState) -> None:
        """Take what of the state is this kind's own."""
        return

    def _write_failed(self, error: OSError) -> None:
        """Deal with an error of a write: here, drop what is held and go on, and complain at the first of a series."""
        self._drop_held()
        if not self._failing:
            self._failing = True
            reason = os.strerror(error.errno or 0)
            self._complain(f"Chardev {self.label!r} cannot write {self._sink_name}: {reason}; its output is dropped")

    @property
    def _sink_name(self) -> str:
        """What output goes to, for texts."""
        return self.filename

    @abstractmethod
    def _release(self, *, owner: bool) -> None:
        """Close the descriptors. The owner puts back what it changed on the host."""

    # --- steps that kinds share ---

    def _read_from(self, fd: int) -> bool:
        if self._input:
            return self._feed()
        room = self._room()
        if room <= 0:
            return False
        try:
            data = os.read(fd, min(room, READ_LIMIT))
        except OSError:  # EAGAIN: there is nothing. EIO: nobody is at the other end, who may come back.
            return False
        self._input += data
        return self._feed()

    def _write_to(self, fd: int, limit: int = BUFFER_LIMIT) -> bool:
        chunk = self._output.peek(limit)
        if not chunk:
            return False
        try:
            count = os.write(fd, chunk)
        except BlockingIOError:
            self._watch.wants_room(fd, True)
            return False
        except OSError as error:
            self._write_failed(error)
            return True
        self._failing = False
        self._watch.wants_room(fd, False)
        self._forget(count)
        return True

    def _forget(self, count: int) -> None:
        """Take `count` bytes off the output."""
        self._wrote = True
        if self._output.sent(count) and self._frontend is not None:
            self._frontend.drained()

    def _drop_held(self) -> bool:
        """Drop what is held of the output; say whether it was anything."""
        held = self._output.held
        self._forget(held)
        return held > 0

    def _room(self) -> int:
        """Return how much the frontend takes. If nothing, its `accept_input` wakes the task."""
        if self._frontend is None:
            return 0
        # In this order: room that another thread makes after we asked must find the flag set.
        self._starved = True
        room = self._frontend.room()
        if room > 0:
            self._starved = False
        return room

    def _feed(self) -> bool:
        """Give the frontend of the input what it takes; say whether it was anything."""
        if not self._input:
            return False
        room = self._room()
        if room <= 0 or self._frontend is None:
            return False
        data = bytes(self._input[:room])
        del self._input[:room]
        self._frontend.receive(data)
        return True
