"""The connected clients of a monitor, as they go from one process to the next.

In the source: they are held, which is before the guest's pause, and come to rest; what they are then is saved with the
machine's state. In the destination they are made of that when the guest is taken, get what was unsent and see what
happens from there on; their commands are begun as soon as a phase is open that grants what these need.
"""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import trio

from vmm import host_sockets
from vmm.errors import DescriptorWrongKind, MigrationRefused, StateRejected
from vmm.monitor.belongings import Belongings
from vmm.monitor.session import Session
from vmm.monitor.unix import SocketTransport

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from vmm.deferral import Deferral
    from vmm.hw.codec import StateCodec
    from vmm.monitor.belongings import SessionState
    from vmm.monitor.events import EventHub
    from vmm.monitor.ports import Executor, Transport
    from vmm.monitor.session import SessionOptions
    from vmm.monitor.unix import SocketMonitor
    from vmm.phases.luggage import Luggage
    from vmm.phases.session_state import ClientState, MonitorState

SECTION: Final = "monitor/"
VERSION: Final = 1
"""Of `MonitorState`."""


@final
class MovingSessions:
    """The sessions of one monitor whose clients speak QMP."""

    def __init__(
        self,
        name: str,
        monitor: SocketMonitor[Session],
        executor: Executor,
        hub: EventHub,
        options: SessionOptions,
    ) -> None:
        self.name = name
        self._monitor: Final = monitor
        self._executor: Final = executor
        self._hub: Final = hub
        self._options: Final = options
        self._codec: StateCodec[MonitorState] | None = None
        self._leaving = False
        self._arrived: list[tuple[ClientState, SessionState, socket.socket, Belongings]] = []

    def prepare(self) -> None:
        """Do now what would else be done in the guest's pause: compile the codec."""
        self._codec_of_state()

    def _codec_of_state(self) -> StateCodec[MonitorState]:
        if self._codec is None:
            from vmm.hw.codec import StateCodec  # Which a monitor does not need until then.
            from vmm.phases.session_state import MonitorState

            self._codec = StateCodec.of(MonitorState)
        return self._codec

    # Leaving.

    def descriptors(self) -> dict[str, int]:
        """Return the descriptors of every session that there is now, by the last part of their names."""
        found: dict[str, int] = {}
        for number, session in self._sessions():
            found[f"session-{number}"] = _fileno(session)
            for serial, fd in session.belongings.by_serial.items():
                found[f"session-{number}.fd-{serial}"] = fd
        return found

    def hold(self) -> None:
        """Accept and read nothing, begin no command and send nothing, until `resume`, or `give_up`."""
        self._leaving = True
        self._monitor.quiesce()
        for _, session in self._sessions():
            session.hold()

    async def rest(self) -> None:
        """Wait until no session has a command under way.

        Raises:
            MigrationRefused: there is more than a successor would take in.
        """
        for _, session in self._sessions():
            await session.rest()
        from vmm.phases.session_state import too_much

        reason = too_much(self._clients())
        if reason:
            reason = (
                f"migrate: monitor {self.name} has {reason} go along; leave migrate-sessions out, or let them leave"
            )
            raise MigrationRefused(reason=reason)

    @property
    def busy(self) -> list[str]:
        """Names of the sessions that have a command under way."""
        return [session.name for _, session in self._sessions() if session.busy]

    def save(self) -> Mapping[str, Any] | None:
        """Return the section; None where the sessions stay."""
        if not self._leaving:
            return None
        from vmm.phases.session_state import MonitorState

        state = MonitorState(grant=self._options.grant.name.encode(), sessions=self._clients())
        return self._codec_of_state().dump(state)

    def resume(self) -> None:
        """Undo `hold`. Also lets those go on that have come: what their commands need is granted now."""
        self._leaving = False
        self._monitor.resume()

    def give_up(self) -> None:
        """Leave the clients to the successor, without a word, if they go along."""
        if self._leaving:
            for _, session in self._sessions():
                session.give_up()

    def _clients(self) -> tuple[ClientState, ...]:
        from vmm.phases.session_state import client_state

        return tuple(client_state(number, session.save(), session.belongings) for number, session in self._sessions())

    def _sessions(self) -> list[tuple[int, Session]]:
        return [
            (int(name.rpartition("/")[2]), session)
            for name, session in self._monitor.sessions.items()
            if _fileno(session) >= 0
        ]

    # Arriving.

    def load(self, luggage: Luggage, version: int, section: Mapping[str, Any]) -> Callable[[], None]:
        """Check a section, whose descriptors are in `luggage`; return what claims them. Raises `StateRejected`."""
        where = f"{SECTION}{self.name}"
        state = self._codec_of_state().load(section, version, where)
        grant = self._options.grant.name
        if state.grant != grant.encode():
            fault = f"its clients were lent {state.grant!r}, and {grant!r} would be lent here"
            raise StateRejected(section=where, faults=(fault,))
        names = [f"{where}/{name}" for client in state.sessions for name in client.descriptors]
        faults = [f"descriptor {name} did not come" for name in names if name not in luggage]
        if len(set(names)) < len(names):
            faults.append("a session or a descriptor is there twice")
        for client in state.sessions if not faults else ():
            faults += client.faults()
            name = f"{where}/{client.socket}"
            try:
                host_sockets.require_stream_socket(luggage[name], name)
            except DescriptorWrongKind as error:
                faults.append(str(error))
        if faults:
            raise StateRejected(section=where, faults=tuple(faults))
        clients = [(client, client.to_session(where)) for client in state.sessions]
        return partial(self._claim, clients, luggage)

    def _claim(self, clients: list[tuple[ClientState, SessionState]], luggage: Luggage) -> None:
        for client, state in clients:

            def claim(last: str) -> int:
                return luggage.claim(f"{SECTION}{self.name}/{last}")

            named = {item.name.decode(): claim(f"{client.socket}.fd-{item.serial}") for item in client.named}
            unclaimed = [claim(f"{client.socket}.fd-{serial}") for serial in client.unclaimed]
            sock = socket.socket(fileno=claim(client.socket))
            self._arrived.append((client, state, sock, Belongings(named, unclaimed)))

    def take_up(self) -> list[Callable[[], Awaitable[None]]]:
        """Go on with those that have come, held for now; return what serves each."""
        served = []
        while self._arrived:
            client, state, sock, belongings = self._arrived.pop(0)
            make = partial(self._make, state, belongings)
            served.append(self._monitor.take_up(client.number, sock, make))
        return served

    def _make(self, state: SessionState, belongings: Belongings, name: str, transport: Transport) -> Session:
        session = Session(name, transport, self._executor, self._hub, self._options, state, belongings)
        session.take_up()
        return session

    def close(self) -> None:
        """Close what has come and was not taken up: its predecessor goes on with it."""
        while self._arrived:
            _, _, sock, belongings = self._arrived.pop()
            sock.close()
            belongings.close()


def _fileno(session: Session) -> int:
    """Return the descriptor of its socket; -1 once the client has been hung up on."""
    assert isinstance(session.transport, SocketTransport), "no other goes along"
    return session.transport.fileno()


_REST: Final = 1.0
"""Seconds for commands under way to finish, before the guest is paused: none that is admitted then takes long."""


async def come_to_rest(moves: Sequence[MovingSessions], deferral: Deferral) -> None:
    """Hold the clients of monitors, and wait until none has a command under way. What only waits is deferred.

    Undone by `go_on`, whatever the outcome.

    Raises:
        MigrationRefused: one has for too long, or has more than goes along.
    """
    for move in moves:
        move.hold()
    deferral.begin()
    with trio.move_on_after(_REST) as patience:
        for move in moves:
            await move.rest()
    if patience.cancelled_caught:
        busy = ", ".join(name for move in moves for name in move.busy)
        raise MigrationRefused(reason=f"migrate: a command of {busy} did not finish within {_REST:g} s")


def go_on(moves: Sequence[MovingSessions], deferral: Deferral) -> None:
    """Let the clients go on that are here, as all that their commands need is granted; and what else was deferred."""
    deferral.end()
    for move in moves:
        move.resume()
