"""Monitors as back ends: over a chardev, or over a connected socket that this process was started with.

One that listens goes over to a successor in a live update, and so do its clients where that was asked for. One over a
single connection (a socket that was open already, one that was connected to) goes along with its client or not at all:
only there it is a part of the machine's recipe. One over stdio, or over a connection that is no chardev, stays with
this process. When its client has left, nobody else comes, and the machine goes on.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm import host_sockets, hostio
from vmm.backends.chardev_socket import SocketChardev
from vmm.capabilities import ADMIN
from vmm.errors import Unsupported
from vmm.monitor.session import SessionOptions
from vmm.monitor.unix import qmp_monitor
from vmm.phases.session_moves import MovingSessions

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.backends.chardev import Chardev
    from vmm.monitor.command import CommandTable
    from vmm.monitor.events import EventHub
    from vmm.monitor.session import Session, Version
    from vmm.monitor.unix import SocketMonitor

_FLUSH: Final = 1.0
"""Seconds that clients have, at the end, to read the last replies and events."""


@final
class Monitor:
    """A monitor with the sockets that it serves. Its one task ends when it is cancelled, or its only client leaves."""

    url: Final = None
    grant: Final = ADMIN.name

    def __init__(
        self,
        monitor: SocketMonitor[Any],
        *,
        chardev: Chardev | None = None,
        listener: socket.socket | None = None,
        connection: socket.socket | None = None,
        streams: tuple[int, int] | None = None,
        moving: MovingSessions | None = None,
        held: bool = False,
    ) -> None:
        """Own `listener`, `connection` and `streams`: descriptors to read and to write.

        `moving` takes clients along to a successor.
        """
        self._monitor = monitor
        self._chardev = chardev
        self._listener = listener
        self._connection = connection
        self._streams = streams
        self.moving: Final = moving
        self._nursery: trio.Nursery | None = None
        self._awaits = held and listener is None and moving is not None
        self._went_on = trio.Event()
        if held:
            self.hold()

    @property
    def chardev(self) -> str | None:
        """Label of the chardev that it speaks over."""
        return self._chardev.label if self._chardev is not None else None

    @property
    def moves(self) -> bool:
        """Whether a successor goes on with it."""
        return self._listener is not None

    @property
    def goes_along(self) -> MovingSessions | None:
        """Those who take its clients along, if there can be any."""
        return self.moving if self._listener is not None or self.clients or self._awaits else None

    @property
    def descriptors_of_clients(self) -> dict[str, dict[str, int]]:
        """What each client has named by `getfd`, by the session's name."""
        return {name: session.descriptors for name, session in self._monitor.sessions.items()}

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._monitor.sessions)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve clients; at a cancel, let them read what is unsent, for `_FLUSH` seconds at most, and hang up."""
        sessions = trio.CancelScope(shield=True)
        ended = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve_sessions, sessions, ended)
            task_status.started()
            try:
                await ended.wait()
            finally:
                with trio.CancelScope(shield=True):
                    await self._monitor.close(_FLUSH)
                sessions.cancel()

    async def _serve_sessions(self, scope: trio.CancelScope, ended: trio.Event) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self._awaits:
                    nursery.start_soon(self._went_on.wait)
                if self._listener is not None:
                    nursery.start_soon(self._monitor.serve_listener, self._listener, self._admit)
                    nursery.start_soon(self._close_when_given_up, self._listener)
                if self._connection is not None:
                    nursery.start_soon(self._monitor.serve_connection, self._connection)
                if self._streams is not None:
                    nursery.start_soon(self._monitor.serve_descriptors, *self._streams)
        self._nursery = None
        self.close()
        ended.set()

    def close(self) -> None:
        """Close all that it owns. Idempotent; `serve` does it at its end."""
        for sock in (self._listener, self._connection):
            if sock is not None:
                sock.close()
        streams, self._streams = self._streams, None
        for fd in set(streams or ()):
            os.close(fd)
        if self.moving is not None:
            self.moving.close()

    async def _close_when_given_up(self, listener: socket.socket) -> None:
        # As long as it is open somewhere, clients that nobody will accept are not refused either.
        await self._monitor.stopped_listening.wait()
        listener.close()

    def _admit(self, client: socket.socket) -> None:
        if client.family != socket.AF_UNIX:
            return  # its listener is on a loopback address: `over_chardev`
        host_sockets.admit_peer(client, self._chardev.filename if self._chardev is not None else "a monitor")

    # Live update.

    def descriptors(self) -> dict[str, int]:
        """Return nothing: the chardev gives the listener to the successor."""
        return {}

    def hold(self) -> None:
        """Accept nobody from now on."""
        self._monitor.quiesce(sessions=False)

    def go_on(self) -> None:
        """Accept again: the guest is this process's, and so is the socket's path."""
        self._monitor.resume(sessions=False)
        if self._chardev is not None:
            self._chardev.own()
        if self.moving is not None and self._nursery is not None:
            for serve in self.moving.take_up():
                self._nursery.start_soon(serve)
        self._awaits = False
        self._went_on.set()

    def give_up(self) -> None:
        """Leave the listener to the successor, and the sessions that are held; others stay until they hang up."""
        self._monitor.stop_listening()
        if self.moving is not None:
            self.moving.give_up()


def over_chardev(
    monitor: SocketMonitor[Any], chardev: Chardev, *, held: bool, moving: MovingSessions | None = None
) -> Monitor:
    """Let `monitor` serve a socket or stdio chardev, which must be at rest and stays so.

    Raises:
        Unsupported: the chardev is of another kind, or other machines can connect to it. Then nothing was taken.
    """
    if chardev.kind == "stdio":
        from vmm.backends.chardev_stdio import StdioChardev  # As whoever made it has done.

        assert isinstance(chardev, StdioChardev)
        return Monitor(monitor, chardev=chardev, streams=chardev.surrender_streams(), held=held)
    if not isinstance(chardev, SocketChardev):
        instead = "a monitor needs a chardev of kind socket or stdio"
        raise Unsupported(what="Monitor over a chardev of kind", name=chardev.kind, instead=instead)
    others = chardev.open_to_others
    if others is not None:
        instead = "whoever connects there would be the machine's administrator; use 127.0.0.1, ::1 or a unix socket"
        raise Unsupported(what="Monitor over a socket that listens on", name=others, instead=instead)
    client = chardev.surrender_client()
    listener = chardev.descriptors().get("listener")
    # Without either its client comes by itself, with what else there is of it.
    chardev.surrendered = listener is None
    return Monitor(
        monitor,
        chardev=chardev,
        listener=socket.socket(fileno=hostio.dup(listener)) if listener is not None else None,
        connection=socket.socket(fileno=client) if client is not None else None,
        moving=moving,
        held=held,
    )


@final
@attrs.frozen(eq=False)
class MonitorMaker:
    """Makes monitors that speak to one machine."""

    table: CommandTable
    events: EventHub
    version: Version
    complain: Callable[[str], None]

    def over_chardev(self, name: str, chardev: Chardev, *, held: bool) -> Monitor:
        """Make a monitor over a chardev; see `over_chardev`."""
        monitor, options = self._socket_monitor(name, anybody=isinstance(chardev, SocketChardev) and chardev.is_tcp)
        moving = MovingSessions(name, monitor, self.table, self.events, options)
        return over_chardev(monitor, chardev, held=held, moving=moving)

    def over_connection(self, name: str, fd: int) -> Monitor:
        """Make a monitor for the one client of connected socket `fd`, which is the monitor's from here on."""
        return Monitor(self._socket_monitor(name)[0], connection=socket.socket(fileno=fd))

    def _socket_monitor(self, name: str, *, anybody: bool = False) -> tuple[SocketMonitor[Session], SessionOptions]:
        options = SessionOptions(self.version, anybody=anybody)
        return qmp_monitor(name, self.table, self.events, options, self.complain), options
