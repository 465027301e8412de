"""One client of the monitor: greeting, negotiation, requests and their replies, events.

Without `oob`, requests are answered one after another in the session's own task, and none is read while one is under
way. With it, two tasks take turns: one reads, runs out-of-band requests at once and queues the others; the
other, as soon as it has a request, leaves the reading to the first and goes on with the queue. So an idle session
answers a request in the task that read it.

What the client has sent before it hung up is still carried out, as long as replies could be delivered; a command under
way is never undone.

A session can be handed to another process: `hold` it, wait for its `rest`, `save` it, then either `give_up` or
`resume`. A request that waits then has had no effect, and is carried out by whoever goes on with the session.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, Literal, final

import attrs
import trio

from vmm.capabilities import ADMIN, Grant
from vmm.errors import CommandDeferred, CommandNotFound, MalformedRequest, VmmError
from vmm.monitor.arguments import structure
from vmm.monitor.belongings import Belongings, SessionState
from vmm.monitor.json_stream import Fault, JsonStream, Limits, Message
from vmm.monitor.json_text import encode
from vmm.monitor.output import Bounds, Output
from vmm.monitor.requests import is_out_of_band, read_request

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.monitor.events import EventHub, Occurrence
    from vmm.monitor.ports import Executor, Transport

MAX_QUEUED: Final = 8
"""In-band requests that wait while one is under way, with `oob`; then reading stops."""

_LINGER: Final = 5.0
"""Seconds for a client that has hung up its sending side to read the last replies."""


@final
@attrs.frozen
class Version:
    """What the greeting says: the QEMU release whose protocol is spoken, and what this program is."""

    major: int
    minor: int
    micro: int
    package: str

    def to_json(self) -> dict[str, object]:
        """Return QAPI's VersionInfo."""
        return {"qemu": {"micro": self.micro, "minor": self.minor, "major": self.major}, "package": self.package}


@final
@attrs.frozen
class SessionOptions:
    """What the sessions of one monitor have in common."""

    version: Version
    oob: bool = True
    """Whether out-of-band execution is offered."""
    pretty: bool = False
    """Whether output is spread over indented lines (`qemu.qmp` can't read that)."""
    framed: bool = False
    """Whether each input is a frame, which holds one message."""
    anybody: bool = False
    """Whether clients may be anything that can connect to a port, a browser with a request of some web page's too. Who
    begins with anything but a JSON object is hung up on then: a page chooses what follows, but not how that begins."""
    grant: Grant = ADMIN
    """What the clients may be lent."""
    limits: Limits = attrs.Factory(Limits)
    bounds: Bounds = attrs.Factory(Bounds)


@final
@attrs.frozen(kw_only=True)
class Capabilities:
    """The arguments of `qmp_capabilities`."""

    enable: list[Literal["oob"]] = attrs.Factory(list)


@final
@attrs.frozen
class Negotiation:
    """`qmp_capabilities` as the schema and `query-commands` have to list it. The session itself carries it out."""

    name: str = "qmp_capabilities"
    arguments: type = Capabilities
    returns: None = None
    oob: bool = False


@final
class Session:
    """One client. It is the `Caller` of its commands."""

    by_number: Final = False

    def __init__(
        self,
        name: str,
        transport: Transport,
        executor: Executor,
        hub: EventHub,
        options: SessionOptions,
        state: SessionState | None = None,
        belongings: Belongings | None = None,
    ) -> None:
        """Make a session; with a predecessor's `state` (and the client's `belongings`), one that is held."""
        self.name: Final = name
        self.belongings: Final = belongings or Belongings()
        """The client's descriptors."""
        self.held = state is not None
        """Whether no command is begun. One that has been begun, and only waits, may be deferred until `resume`."""
        self._transport: Final = transport
        self._executor: Final = executor
        self._hub: Final = hub
        self._options: Final = options
        self._output: Final = Output(transport, options.bounds)
        self._stream: Final = JsonStream(options.limits, state.stream if state else None)
        self._read: Final[deque[Message | Fault]] = deque(state.waiting if state else ())
        self._negotiated = state is not None and state.negotiated
        self._oob = state is not None and state.oob
        begun = state is not None and bool(state.negotiated or state.stream.unparsed or state.waiting)
        self._unproven = options.anybody and not begun
        self._state: Final = state
        self._scope: Final = trio.CancelScope()
        self._under_way = 0
        self._standing: Final[dict[bool, Message | Fault]] = {}  # not begun because held; by whether out of band
        self._resumed = trio.lowlevel.ParkingLot()
        # With oob, what the two tasks share:
        self._someone_reads = False
        self._executing = False
        self._ended = False
        self._closing = False
        self._queue: Final[deque[Message | Fault]] = deque()
        self._turn = trio.lowlevel.ParkingLot()
        self._queue_has_room = trio.lowlevel.ParkingLot()
        self._at_rest = trio.lowlevel.ParkingLot()

    # --- what the world sees ------------------------------------------------------------------------------

    @property
    def transport(self) -> Transport:
        """The wire, for its descriptor to be handed over."""
        return self._transport

    @property
    def descriptors(self) -> dict[str, int]:
        """Those that the client has named."""
        return self.belongings.named

    @property
    def grant(self) -> Grant:
        """What the client may be lent, whatever the phases grant."""
        return self._options.grant

    @property
    def dropped(self) -> str:
        """Why the client was dropped, if it was; words that follow "the client"."""
        return self._output.dropped

    def take_descriptors(self) -> list[int]:
        """Hand over the descriptors that came by SCM_RIGHTS and nobody claimed."""
        return self.belongings.take()

    async def serve(self) -> None:
        """Greet the client and answer it until it hangs up, or until `close`.

        Closes the transport and the session's descriptors. A cancellation ends the session where it is.
        """
        self._hub.subscribe(self._tell)
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._output.flush)
                    if self._state is None:
                        self._greet()
                    await self._converse()
                    with trio.move_on_after(_LINGER):
                        await self._output.wait_flushed()
                    nursery.cancel_scope.cancel()
        finally:
            self._hub.unsubscribe(self._tell)
            self._transport.close()
            self.belongings.close()

    async def close(self, flush_seconds: float) -> None:
        """Hang up and make `serve` return, once commands under way are answered and the client has read all.

        That is given `flush_seconds`; a cancellation hangs up at once. Requests that wait are not begun.
        """
        self._closing = True
        try:
            with trio.move_on_after(flush_seconds):
                while self._under_way:
                    await self._at_rest.park()
                await self._output.wait_flushed()
        finally:
            self._output.hang_up()

    def hold(self) -> None:
        """Begin no command, and send nothing, until `resume`; what would be sent piles up."""
        self.held = True
        self._output.hold()

    async def rest(self) -> None:
        """Wait until no command is under way. For a session that is held."""
        while self._under_way:
            await self._at_rest.park()

    def save(self) -> SessionState:
        """Return the state for another process. Precondition: held and at rest, and the monitor is quiesced."""
        standing = [[self._standing[oob]] if oob in self._standing else [] for oob in (False, True)]
        return SessionState(
            negotiated=self._negotiated,
            oob=self._oob,
            stream=self._stream.save(),
            waiting=(*standing[False], *self._queue, *standing[True], *self._read),
            unsent=self._output.unsent,
        )

    def take_up(self) -> None:
        """Go on where a predecessor stood: send what it had not, and tell what happens. Commands await `resume`."""
        assert self._state is not None, "a session of our own has nothing to take up"
        if self._state.unsent:
            self._output.put(self._state.unsent)
        self._hub.subscribe(self._tell)

    def resume(self) -> None:
        """Undo `hold`: send what has piled up, and begin commands again."""
        self.held = False
        self._output.release()
        self._resumed.unpark_all()

    def give_up(self) -> None:
        """Leave the client to another process: close our own descriptors without a word. Makes `serve` return."""
        self._output.hang_up()
        self._scope.cancel()

    @property
    def busy(self) -> bool:
        """Whether a command is under way."""
        return self._under_way > 0

    # --- in -----------------------------------------------------------------------------------------------

    async def _converse(self) -> None:
        while not self._oob:
            item = await self._next()
            if item is None:
                return
            self._executing = True
            await self._answer(item)
            self._finish()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_turns)
            nursery.start_soon(self._take_turns)

    async def _next(self) -> Message | Fault | None:
        """Wait for the next message; None if there will be none."""
        if self._read:
            await trio.lowlevel.checkpoint()  # a client that sends many at once does not keep the loop from others
        while True:
            if not self._output.has_room:
                await self._output.wait_room()
            if self._output.gone or self._closing:
                return None
            if self._read:
                return self._read.popleft()
            try:
                data = await self._transport.receive()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._output.hang_up()
                return None
            fresh = self._transport.take_descriptors()
            if fresh:
                self.belongings.put(fresh)
            if not data or (self._unproven and not self._begins_well(data)):
                return None
            if self._options.framed:
                self._read.append(self._stream.feed_frame(data))
            else:
                self._read.extend(self._stream.feed(data))

    def _begins_well(self, data: bytes) -> bool:
        """Look at the first input that is not blank, and hang up if no message can begin so."""
        begun = data.lstrip(b" \t\r\n")[:1]
        self._unproven = not begun
        if begun in (b"", b"{"):
            return True
        self._output.drop(f"began with {data[:16]!r}, which is no QMP")
        return False

    async def _take_turns(self) -> None:
        while True:
            while self._someone_reads:
                await self._turn.park()
            self._someone_reads = True
            item = None if self._ended else await self._next_in_band()
            self._someone_reads = False
            self._turn.unpark()
            if item is None:
                self._ended = True
                return
            await self._answer(item)
            while self._queue and not (self._output.gone or self._closing):
                item = self._queue.popleft()
                self._queue_has_room.unpark_all()
                await self._answer(item)
            self._finish()

    def _finish(self) -> None:
        self._executing = False
        self._queue.clear()  # if there is something left, nobody is there to be answered
        self._queue_has_room.unpark_all()

    async def _next_in_band(self) -> Message | Fault | None:
        """Read until there is a request for the task that asks; None at the end of the input."""
        while (item := await self._next()) is not None:
            if is_out_of_band(item):
                await self._answer(item, out_of_band=True)
            elif self._executing:
                self._queue.append(item)
                while len(self._queue) >= MAX_QUEUED:
                    await self._queue_has_room.park()
            else:
                self._executing = True
                return item
        return None

    # --- one request --------------------------------------------------------------------------------------

    async def _answer(self, item: Message | Fault, *, out_of_band: bool = False) -> None:
        """Carry out a request and reply, in the end: as long as the session is held it stands."""
        answered = False
        while not answered:
            while self.held:
                self._standing[out_of_band] = item
                await self._resumed.park()
                del self._standing[out_of_band]
                if self._output.gone or self._closing:
                    return
            self._under_way += 1
            try:
                answered = await self._carry_out(item, out_of_band=out_of_band)
            finally:
                self._under_way -= 1
                self._at_rest.unpark_all()

    async def _carry_out(self, item: Message | Fault, *, out_of_band: bool) -> bool:
        """Reply to a request; False if it was deferred, and has done nothing."""
        if isinstance(item, Fault):
            self._reply({"error": {"class": "GenericError", "desc": item.reason}}, {})
            return True
        value = item.value
        request = value if isinstance(value, dict) else {}
        try:
            name, arguments = read_request(value, oob=self._oob)
            result = await self._run(name, arguments, out_of_band=out_of_band)
        except CommandDeferred:
            return False
        except VmmError as error:
            # An error that is not expected is a bug, and goes on up past every client.
            self._reply({"error": {"class": error.qmp_class, "desc": str(error)}}, request)
        else:
            self._reply({"return": {} if result is None else result}, request)
        return True

    async def _run(self, name: str, arguments: Mapping[str, object], *, out_of_band: bool) -> object:
        if not self._negotiated and name != "qmp_capabilities":
            reason = f"Command {name!r} has to wait: the session begins with 'qmp_capabilities'"
            raise CommandNotFound(reason=reason)
        own = name == "qmp_capabilities"
        if not own and not self._executor.knows(name):
            raise CommandNotFound(reason=f"There is no command {name[:80]!r}; query-commands lists those there are")
        if out_of_band and (own or not self._executor.admits_oob(name)):
            raise MalformedRequest(reason=f"Command {name!r} can't be run out of band; use 'execute'")
        if own:
            self._negotiate(arguments)
            return None
        return await self._executor.execute(self, name, arguments)

    def _greet(self) -> None:
        offered = ["oob"] if self._options.oob else []
        self._reply({"QMP": {"version": self._options.version.to_json(), "capabilities": offered}}, {})

    def _negotiate(self, arguments: Mapping[str, object]) -> None:
        if self._negotiated:
            raise CommandNotFound(reason="Command 'qmp_capabilities' was given already; this session is negotiated")
        wanted = structure(Capabilities, arguments, "qmp_capabilities")
        assert isinstance(wanted, Capabilities)
        if wanted.enable and not self._options.oob:
            raise MalformedRequest(
                reason="Capability 'oob' is not available on this monitor, whose greeting offers none"
            )
        self._negotiated = True
        self._oob = bool(wanted.enable)

    # --- out ----------------------------------------------------------------------------------------------

    def _reply(self, body: dict[str, Any], request: dict[str, Any]) -> None:
        if "id" in request:
            body["id"] = request["id"]
        self._output.put(self._line(body))

    def _tell(self, occurrence: Occurrence) -> None:
        if self._negotiated:
            line = self._line(occurrence.body) if self._options.pretty else occurrence.line
            self._output.put(line, event=True)

    def _line(self, body: Mapping[str, object]) -> bytes:
        text = encode(body, pretty=self._options.pretty)
        if self._options.pretty:
            text = text.replace("\n", "\r\n")
        return f"{text}\r\n".encode()
