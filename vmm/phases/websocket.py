"""A websocket monitor as a back end: made by `object-add`, run by phase boot, its port handed over by a live update.

The port goes to the successor as a descriptor, and so does the file with the token, which the successor could not open
by its path. Sessions stay behind: they are closed with "service restart" as soon as the guest has left, and whoever
connects again to the same port speaks to the successor.

This module imports the websocket library: import it where a websocket monitor is made.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, final

import trio

from vmm import host_tcp, hostio
from vmm.capabilities import ADMIN, MIGRATE, OBSERVE, OPERATE
from vmm.errors import OptionInvalid
from vmm.monitor.json_stream import Limits
from vmm.monitor.output import Bounds
from vmm.monitor.session import SessionOptions
from vmm.monitor.upgrade import Door, check_token
from vmm.monitor.websocket import GOING_AWAY, RESTART, WebSocketMonitor

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from vmm.capabilities import Grant, MayAdoptDescriptor, MayOpenHostFile
    from vmm.phases.commands_objects import MonitorWebsocket
    from vmm.phases.monitors import MonitorMaker

GRANTS: Final[Mapping[str, Grant]] = {grant.name: grant for grant in (OBSERVE, OPERATE, MIGRATE, ADMIN)}

LIMITS: Final = Limits(size=1 << 20, tokens=64 << 10, depth=64)
"""For one message. Less than a unix socket's: its clients are of our own user, those of a port need not be."""

BOUNDS: Final = Bounds(event_bytes=4 << 20)

_FLUSH: Final = 1.0
"""Seconds that clients have, at the end, to read the last replies and events."""


@final
class WebSocketBackend:
    """A websocket monitor with its port. Its one task ends when it is cancelled, or the port has been given up."""

    chardev: Final = None
    moves: Final = True
    """Whether a successor goes on with it; its clients connect again."""

    def __init__(
        self, monitor: WebSocketMonitor, listener: socket.socket, token: int | None, *, url: str, grant: str, held: bool
    ) -> None:
        """Own `listener` and `token`, the descriptor of the file with the token."""
        self._monitor: Final = monitor
        self._listener: Final = listener
        self._token: Final = token
        self._given_up = trio.Event()
        self.url: Final = url
        """Where clients connect, with the real port."""
        self.grant: Final = grant
        if held:
            self.hold()

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._monitor.sessions)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve clients; at a cancel, let them read what is unsent, for `_FLUSH` seconds at most, and close."""
        connections = trio.CancelScope(shield=True)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_connections, connections)
                task_status.started()
                try:
                    await self._given_up.wait()
                finally:
                    with trio.CancelScope(shield=True):
                        if self._given_up.is_set():
                            reason = "the machine goes on in another process; connect again"
                            await self._monitor.close(_FLUSH, RESTART, reason)
                        else:
                            await self._monitor.close(_FLUSH, GOING_AWAY, "the monitor ends")
                    connections.cancel()
        finally:
            self.close()

    async def _serve_connections(self, scope: trio.CancelScope) -> None:
        with scope:
            await self._monitor.serve_listener(self._listener)

    def close(self) -> None:
        """Close the port and the file with the token. `serve` does it at its end."""
        if self._listener.fileno() >= 0:
            self._listener.close()
            if self._token is not None:
                os.close(self._token)

    # Live update.

    def descriptors(self) -> dict[str, int]:
        """Return what a successor needs, by the last part of its name."""
        if self._listener.fileno() < 0:
            return {}
        token = {} if self._token is None else {"token": self._token}
        return {"listener": self._listener.fileno(), **token}

    def hold(self) -> None:
        """Accept nobody from now on."""
        self._monitor.hold()

    def go_on(self) -> None:
        """Accept again: the guest is this process's."""
        self._monitor.go_on()

    def give_up(self) -> None:
        """Leave the port to the successor, and send the clients there."""
        self._given_up.set()


def make_websocket(
    maker: MonitorMaker, host: MayOpenHostFile | MayAdoptDescriptor, args: MonitorWebsocket
) -> tuple[WebSocketBackend, dict[str, Any]]:
    """Make the monitor that `args` ask for; return it, and the arguments that make it again, with the real port.

    Whoever does not serve it must `close` it.

    Raises:
        OptionInvalid: something of `args` can't be.
        HostFileRefused: the port is taken, or the token can't be read.
        DescriptorMissing, DescriptorWrongKind: the predecessor sent others than needed.
    """
    address, port = _address(args)
    grant = GRANTS[args.grant or OBSERVE.name]
    path = args.token_file
    if path is None and grant is not OBSERVE:
        wanted = "possible without a token-file: everybody on this machine can connect; only observe is"
        raise OptionInvalid(option="object-add, grant", value=grant.name, wanted=wanted)
    with ExitStack() as undo:
        token: bytes | None = None
        token_fd: int | None = None
        if path is not None:
            token_fd = host.obtain(f"monitor/{args.id}/token", lambda: hostio.open_secret_file(path))
            undo.callback(os.close, token_fd)
            token = check_token(os.pread(token_fd, 4096, 0), path)
        fd = host.obtain(f"monitor/{args.id}/listener", lambda: host_tcp.listen_loopback(address, port).detach())
        try:
            listener = host_tcp.adopt_loopback_listener(fd, f"monitor/{args.id}/listener", address, port)
        except BaseException:
            os.close(fd)
            raise
        undo.callback(listener.close)
        real = listener.getsockname()[1]
        door = Door(address, real, token)
        options = SessionOptions(maker.version, framed=True, grant=grant, limits=LIMITS, bounds=BOUNDS)
        monitor = WebSocketMonitor(args.id, maker.table, maker.events, options, door, maker.complain)
        backend = WebSocketBackend(
            monitor, listener, token_fd, url=f"ws://{door.authority}/", grant=grant.name, held=host.inherits
        )
        undo.pop_all()
    if port == 0:
        maker.complain(f"monitor {args.id} is at {backend.url} (grant {grant.name})")
    arguments = {"qom-type": args.qom_type, "id": args.id, "addr": {"host": address, "port": str(real)}}
    if path is not None:
        arguments["token-file"] = path
    return backend, {**arguments, "grant": grant.name}


def _address(args: MonitorWebsocket) -> tuple[str, int]:
    if args.addr.host not in host_tcp.LOOPBACK:
        wanted = f"a loopback address; a websocket monitor listens on {' or '.join(host_tcp.LOOPBACK)} only"
        raise OptionInvalid(option="object-add, addr.host", value=args.addr.host, wanted=wanted)
    port = args.addr.port
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        wanted = "a port from 1 to 65535, or 0 for any that is free"
        raise OptionInvalid(option="object-add, addr.port", value=port, wanted=wanted)
    return args.addr.host, int(port)
