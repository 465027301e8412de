"""The connected clients of a qtest, as they go to a successor in a live update.

They belong to the machine, as what drives it, and so they always go along. In the destination they are there as soon as
the guest is; their lines are carried out from the moment on in which a phase is open that grants what these need.
"""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import trio

from vmm import host_sockets
from vmm.errors import DescriptorWrongKind, StateRejected
from vmm.hw.codec import StateCodec
from vmm.monitor.unix import SocketTransport
from vmm.qtest.session_state import NumberedSession, QtestServerState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vmm.monitor.unix import SocketMonitor
    from vmm.phases.luggage import Luggage
    from vmm.phases.qtest import TrafficLog
    from vmm.qtest.session import QtestSession
    from vmm.qtest.session_state import QtestSessionState

SECTION: Final = "qtest-server/"


@final
class QtestClients:
    """All clients of one qtest. Owns the connections of those that have come and are not served yet."""

    def __init__(
        self,
        name: str,
        monitor: SocketMonitor[QtestSession],
        make: Callable[[str, SocketTransport, QtestSessionState | None], QtestSession],
        log: TrafficLog,
        *,
        held: bool,
    ) -> None:
        self.name = name
        self._monitor: Final = monitor
        self._make: Final = make
        self._log: Final = log
        self.held = held
        """Whether no line is carried out."""
        self._comes = held
        self._codec: Final = StateCodec.of(QtestServerState)
        self._arrived: list[tuple[int, QtestSessionState, socket.socket]] = []

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve those that come from a predecessor, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def close(self) -> None:
        """Close what has come and is not served: its predecessor goes on with it."""
        while self._arrived:
            self._arrived.pop()[2].close()

    # Leaving.

    def descriptors(self) -> dict[str, int]:
        """Return the connection of every client that there is now, by the last part of its name."""
        return {f"session-{number}": fd for number, fd, _ in self._sessions()}

    def hold(self) -> None:
        """Read nothing and carry out nothing from now on."""
        self.held = True
        self._monitor.quiesce()
        for _, _, session in self._sessions():
            session.hold()

    def save(self) -> Mapping[str, Any]:
        """Return the section's content. Call it held; nothing is sent until `go_on`."""
        sessions = tuple(NumberedSession(number=number, state=held.save()) for number, _, held in self._sessions())
        return self._codec.dump(QtestServerState(log_began=self._log.began_ns, sessions=sessions))

    def give_up(self) -> None:
        """Leave them to the successor, without a word."""
        for _, _, session in self._sessions():
            session.give_up()

    def _sessions(self) -> list[tuple[int, int, QtestSession]]:
        found = []
        for name, session in self._monitor.sessions.items():
            transport = session.transport
            if isinstance(transport, SocketTransport) and transport.fileno() >= 0:
                found.append((int(name.rpartition("/")[2]), transport.fileno(), session))
        return found

    # Arriving.

    def load(self, luggage: Luggage, version: int, section: Mapping[str, Any]) -> Callable[[], None]:
        """Check a hostile section, whose connections are in `luggage`; return what takes them out.

        Raises:
            StateRejected: naming what does not fit, or did not come.
        """
        where = f"{SECTION}{self.name}"
        state = self._codec.load(section, version, where)
        names = {f"monitor/{self.name}/session-{one.number}": one for one in state.sessions}
        faults = ["a session is there twice"] if len(names) < len(state.sessions) else []
        for name in names:
            try:
                if name not in luggage:
                    faults.append(f"descriptor {name} did not come")
                else:
                    host_sockets.require_stream_socket(luggage[name], name)
            except DescriptorWrongKind as error:
                faults.append(str(error))
        if faults:
            raise StateRejected(section=where, faults=tuple(faults))

        def apply() -> None:
            self._log.began_ns = state.log_began
            for name, one in names.items():
                self._arrived.append((one.number, one.state, socket.socket(fileno=luggage.claim(name))))

        return apply

    def go_on(self) -> None:
        """Take up those that have come, or let those that stay go on: the machine is this process's."""
        while self._arrived:
            number, state, sock = self._arrived.pop(0)
            serve = self._monitor.take_up(number, sock, partial(self._made_of, state))
            self._nursery.start_soon(serve)
        if not self._comes:
            self.begin()

    def begin(self) -> None:
        """Carry out what they want: what that needs is granted now."""
        self.held = self._comes = False
        self._monitor.resume()

    def _made_of(self, state: QtestSessionState, name: str, transport: SocketTransport) -> QtestSession:
        return self._make(name, transport, state)
