"""One client of qtest: reads lines, has them carried out one after the other, answers, and tells of interrupts.

A client that does not read holds up nobody but itself: its next line is not carried out before there is room for the
answer, and once too many interrupts wait for it, it is dropped.

In a live update the client goes along. From `hold` on no line is carried out here; one that was about to be waits, to
be carried out by whichever process has the machine afterwards. The client does not notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, TypeVar, final

import trio

from vmm.errors import InvalidState, VmmError
from vmm.monitor.output import Bounds, Output
from vmm.qtest.lines import LineReader
from vmm.qtest.protocol import MAX_LINE, answer, parse, refusal
from vmm.qtest.session_state import Interception, QtestSessionState, Unsent

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.errors import MalformedRequest
    from vmm.monitor.ports import Transport
    from vmm.outside import OutsideAccess
    from vmm.qtest.protocol import Request

ResultT = TypeVar("ResultT")

BOUNDS: Final = Bounds(events=10_000, event_bytes=1 << 20, reading_stops_at=1)


class Lender(Protocol):
    """Lends a machine, by the token that all commands need."""

    async def lend(self, command: str, holder: str, use: Callable[[OutsideAccess], ResultT]) -> ResultT:
        """Return what `use` returns. Raises `VmmError`: there is no token, or `use` raised it."""


class Log(Protocol):
    """Takes every line."""

    def note(self, kind: str, line: str) -> None:
        """Note a line: `R` received, `S` sent, `I` about the client."""


@final
class _Held(Exception):
    """The line is not for this process to carry out."""


@final
class QtestSession:
    """A client's session, which the transport belongs to."""

    def __init__(
        self, name: str, transport: Transport, lender: Lender, log: Log, state: QtestSessionState | None = None
    ) -> None:
        """With `state` go on where a predecessor stopped."""
        self.name: Final = name
        self._transport: Final = transport
        self._lender: Final = lender
        self._log: Final = log
        self._output: Final = Output(transport, BOUNDS)
        self._state: Final = state
        self._lines: Final = LineReader(MAX_LINE, overlong=state is not None and state.overlong)
        self._unread: Final = bytearray(state.unread if state is not None else b"")
        """Input in which no line has been looked for."""
        self._line: bytes | None = None
        """What is being carried out, or waits for it."""
        self._intercepted: Interception | None = None
        self._end_interception: Callable[[], object] = lambda: None
        self._loop: trio.lowlevel.TrioToken | None = None
        self._serving: Final = trio.CancelScope()
        self._given_up = False
        self._held = False
        self._released = trio.Event()

    @property
    def dropped(self) -> str:
        """Why the client was dropped, if it was; words that follow "the client"."""
        return self._output.dropped

    @property
    def transport(self) -> Transport:
        """The wire, for its descriptor to be handed over."""
        return self._transport

    async def serve(self) -> None:
        """Serve the client until it hangs up; half a line that it leaves is forgotten."""
        self._loop = trio.lowlevel.current_trio_token()
        if self._state is None:
            self._log.note("I", "OPENED")
        else:
            self._output.put_runs((run.data, run.events) for run in self._state.unsent)
        try:
            with self._serving:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._output.flush)
                    await self._converse()
                    nursery.cancel_scope.cancel()
        finally:
            self._end_interception()
            self._output.hang_up()
            if not self._given_up:
                self._log.note("I", "CLOSED")

    async def close(self, flush_seconds: float) -> None:
        """Hang up, after the client had `flush_seconds` to read what is unsent."""
        with trio.move_on_after(flush_seconds):
            await self._output.wait_flushed()
        self._output.hang_up()

    # Live update.

    def hold(self) -> None:
        """Carry out no line from now on, and answer none."""
        if not self._held:
            self._held = True
            self._released = trio.Event()

    def save(self) -> QtestSessionState:
        """Return what a successor needs besides the connection, and send nothing until `resume`. Call it held."""
        self._output.hold()
        return QtestSessionState(
            unread=self._lines.begun + (b"" if self._line is None else self._line + b"\n") + self._unread,
            overlong=self._lines.overlong,
            unsent=tuple(Unsent(data=data, events=events) for data, events in self._output.unsent_runs),
            intercepted=self._intercepted,
        )

    def resume(self) -> None:
        """Undo `hold` and `save`: the machine is this process's."""
        self._held = False
        self._output.release()
        self._released.set()

    def give_up(self) -> None:
        """Leave the client to the successor, without a word. Makes `serve` return."""
        self._given_up = True
        self._serving.cancel()

    # In.

    async def _converse(self) -> None:
        try:
            if self._state is not None and self._state.intercepted is not None:
                await self._take_up(self._state.intercepted)
            while True:
                while self._unread:
                    await self._output.wait_room()
                    if self._held:
                        await self._released.wait()
                        continue
                    if self._output.gone:
                        return
                    # A line at a time: what is behind it goes to a successor as it came.
                    end = self._unread.find(b"\n") + 1 or len(self._unread)
                    part = bytes(self._unread[:end])
                    del self._unread[:end]
                    for line in self._lines.feed(part):
                        await self._take(line)
                data = await self._transport.receive()
                if not data:
                    return
                self._unread.extend(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    async def _take(self, line: bytes | MalformedRequest) -> None:
        try:
            if isinstance(line, VmmError):
                raise line
            self._line = line
            request = parse(line)
            if request is None:
                self._note_received()
                return
            reply = answer(await self._carry_out(request))
        except VmmError as error:
            self._note_received()
            reply = refusal(error)
        finally:
            self._line = None
        self._send(reply)

    def _note_received(self) -> None:
        if self._line is not None:
            self._log.note("R", self._line.decode("ascii", "backslashreplace"))
            self._line = None

    async def _carry_out(self, request: Request) -> str | None:
        use = request.use

        def use_noted(access: OutsideAccess) -> str | None:
            self._note_received()
            assert not isinstance(use, str)
            return use(access, self)

        if isinstance(use, str):
            self._note_received()
            return use
        return await self._lend(request.command, use_noted)

    async def _lend(self, command: str, use: Callable[[OutsideAccess], ResultT]) -> ResultT:
        """Have `use` called once the machine is this process's. Raises as `Lender.lend` does."""

        def unless_held(access: OutsideAccess) -> ResultT:
            if self._held:
                raise _Held
            return use(access)

        while True:
            if self._held:
                await self._released.wait()
            try:
                return await self._lender.lend(command, self.name, unless_held)
            except _Held:
                continue
            except VmmError:
                # One that was refused because the machine is on its way is not lost.
                if not self._held:
                    raise

    async def _take_up(self, wanted: Interception) -> None:
        def use(access: OutsideAccess) -> None:
            name = None if wanted.name is None else wanted.name.decode()
            self.intercept(access, wanted.path.decode(), name, inputs=wanted.inputs)

        await self._lend("irq_intercept_in" if wanted.inputs else "irq_intercept_out", use)

    def _send(self, line: str, *, event: bool = False) -> None:
        if not self._output.gone:
            self._log.note("S", line)
            self._output.put(f"{line}\n".encode(), event=event)

    # Interrupts.

    def intercept(self, access: OutsideAccess, path: str, name: str | None, *, inputs: bool) -> None:
        """Tell the client of every change of the lines of what is at `path`; one path, for the rest of the session."""
        encoded = None if name is None else name.encode()
        wanted = Interception(path=path.encode(), name=encoded, inputs=inputs)
        if self._intercepted is not None and self._intercepted != wanted:
            raise InvalidState(
                what=f"Interception at {path!r}",
                state=f"once there is one at {self._intercepted.path.decode()!r}",
                instead="connect anew to choose another",
            )
        if self._intercepted is None:
            self._end_interception = access.watch(path, name, inputs=inputs, tell=self._tell_from_anywhere)
            self._intercepted = wanted

    def _tell_from_anywhere(self, number: int, level: bool) -> None:
        if trio.lowlevel.in_trio_task():
            self._tell(number, level)
        elif self._loop is not None:
            self._loop.run_sync_soon(self._tell, number, level)

    def _tell(self, number: int, level: bool) -> None:
        self._send(f"IRQ {'raise' if level else 'lower'} {number}", event=True)
