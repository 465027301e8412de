"""One client of qtest: reads lines, has them carried out one after the other, answers, and tells of interrupts.

A client that does not read holds up nobody but itself: its next line is not carried out before there is room for the
answer, and once too many interrupts wait for it, it is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, TypeVar, final

import trio

from vmm.errors import InvalidState, VmmError
from vmm.monitor.output import Bounds, Output
from vmm.qtest.lines import LineReader
from vmm.qtest.protocol import MAX_LINE, answer, parse, refusal

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
class QtestSession:
    """A client's session, which the transport belongs to."""

    def __init__(self, name: str, transport: Transport, lender: Lender, log: Log) -> None:
        self.name: Final = name
        self._transport: Final = transport
        self._lender: Final = lender
        self._log: Final = log
        self._output: Final = Output(transport, BOUNDS)
        self._intercepted: tuple[str, str | None, bool] | None = None
        self._end_interception: Callable[[], object] = lambda: None
        self._loop: trio.lowlevel.TrioToken | None = None

    @property
    def dropped(self) -> str:
        """Why the client was dropped, if it was; words that follow "the client"."""
        return self._output.dropped

    async def serve(self) -> None:
        """Serve the client until it hangs up; half a line that it leaves is forgotten."""
        self._loop = trio.lowlevel.current_trio_token()
        self._log.note("I", "OPENED")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._output.flush)
                await self._converse()
                nursery.cancel_scope.cancel()
        finally:
            self._end_interception()
            self._output.hang_up()
            self._log.note("I", "CLOSED")

    async def close(self, flush_seconds: float) -> None:
        """Hang up, after the client had `flush_seconds` to read what is unsent."""
        with trio.move_on_after(flush_seconds):
            await self._output.wait_flushed()
        self._output.hang_up()

    def resume(self) -> None:
        """Do nothing: nothing was held back."""

    async def _converse(self) -> None:
        lines = LineReader(MAX_LINE)
        try:
            while data := await self._transport.receive():
                for line in lines.feed(data):
                    await self._output.wait_room()
                    if self._output.gone:
                        return
                    await self._take(line)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    async def _take(self, line: bytes | MalformedRequest) -> None:
        try:
            if isinstance(line, VmmError):
                raise line
            self._log.note("R", line.decode("ascii", "backslashreplace"))
            request = parse(line)
            if request is None:
                return
            reply = answer(await self._carry_out(request))
        except VmmError as error:
            reply = refusal(error)
        self._send(reply)

    async def _carry_out(self, request: Request) -> str | None:
        use = request.use
        if isinstance(use, str):
            return use
        return await self._lender.lend(request.command, self.name, lambda access: use(access, self))

    def _send(self, line: str, *, event: bool = False) -> None:
        if not self._output.gone:
            self._log.note("S", line)
            self._output.put(f"{line}\n".encode(), event=event)

    # Interrupts.

    def intercept(self, access: OutsideAccess, path: str, name: str | None, *, inputs: bool) -> None:
        """Tell the client of every change of the lines of what is at `path`; one path, for the rest of the session."""
        wanted = (path, name, inputs)
        if self._intercepted is not None and self._intercepted != wanted:
            raise InvalidState(
                what=f"Interception at {path!r}",
                state=f"once there is one at {self._intercepted[0]!r}",
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
