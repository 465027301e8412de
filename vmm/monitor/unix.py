"""QMP over stream sockets, and over pairs of plain descriptors (stdio).

Descriptors arrive with any byte of the stream (SCM_RIGHTS). Facts about that on Linux, from unix(7) and recvmsg(2):

- The kernel never merges bytes that came with different sets of descriptors into one `recvmsg`, so each result
  belongs to one message of the sender.
- The ancillary buffer bounds their number; the kernel closes those that don't fit, and says MSG_CTRUNC.
- MSG_CMSG_CLOEXEC makes them close-on-exec with no window in which a child could inherit them.

A process that is about to hand its sockets over calls `quiesce`. Both accepting and reading are two steps, to wait
until something is there and to take it; the second is not made between `quiesce` and `resume`. Since all of it happens
on the loop, nothing is taken by this process after `quiesce` has returned.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar, final

import trio

from vmm.errors import PeerRefused
from vmm.hostio import set_blocking
from vmm.monitor.session import Session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from vmm.monitor.events import EventHub
    from vmm.monitor.ports import Executor, Transport
    from vmm.monitor.session import SessionOptions

MAX_DESCRIPTORS: Final = 16
"""Descriptors taken with one message, as in QEMU."""

_CHUNK: Final = 64 << 10
_ANCILLARY: Final = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)


@final
class Gate:
    """Open while this process may accept and read."""

    def __init__(self) -> None:
        self._shut = False
        self._waiting = trio.lowlevel.ParkingLot()

    def shut(self) -> None:
        """From now on `passed` waits."""
        self._shut = True

    def open(self) -> None:
        """Let all pass."""
        self._shut = False
        self._waiting.unpark_all()

    def rattle(self) -> None:
        """Make all who wait look again, because something else has changed."""
        self._waiting.unpark_all()

    async def passed(self) -> bool:
        """Return True at once if the gate is open; else wait for a change and return False: look again."""
        if not self._shut:
            return True
        await self._waiting.park()
        return False


@final
class SocketTransport:
    """A connected stream socket, which belongs to the transport."""

    def __init__(self, sock: socket.socket, gate: Gate) -> None:
        sock.setblocking(False)
        self._sock: Final = sock
        self._gate: Final = gate
        self._descriptors: list[int] = []

    def fileno(self) -> int:
        """Return the socket's descriptor, to be handed to another process."""
        return self._sock.fileno()

    async def receive(self) -> bytes:
        """See `Transport`."""
        while True:
            self._check_open()
            await trio.lowlevel.wait_readable(self._sock)
            if not await self._gate.passed():
                continue
            try:
                data, ancillary, _, _ = self._sock.recvmsg(_CHUNK, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError(os.strerror(error.errno or 0)) from error
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    view = memoryview(payload[: len(payload) // 4 * 4]).cast("i")
                    self._descriptors.extend(view)
            return data

    def take_descriptors(self) -> list[int]:
        """See `Transport`."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def send_nowait(self, data: bytes) -> int:
        """See `Transport`."""
        self._check_open()
        try:
            return self._sock.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(os.strerror(error.errno or 0)) from error

    async def wait_sendable(self) -> None:
        """See `Transport`."""
        self._check_open()
        await trio.lowlevel.wait_writable(self._sock)

    def close(self) -> None:
        """See `Transport`."""
        if self._sock.fileno() < 0:
            return
        for fd in self.take_descriptors():
            os.close(fd)
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        self._gate.rattle()

    def _check_open(self) -> None:
        if self._sock.fileno() < 0:
            raise trio.ClosedResourceError


def _cannot_poll(fd: int) -> bool:
    """Tell whether `fd` is a regular file, /dev/null or the like, which epoll refuses because it is always ready."""
    with select.epoll() as poll:
        try:
            poll.register(fd, 0)
        except PermissionError:
            return True
    return False


@final
class PipeTransport:
    """Two descriptors, one to read and one to write (they may be the same): stdio, a tty, pipes.

    They become non-blocking, which all who share them see, and are set back and left open by `close`: they belong to
    whoever opened them.
    """

    def __init__(self, read_fd: int, write_fd: int, gate: Gate) -> None:
        self._read_fd: Final = read_fd
        self._write_fd: Final = write_fd
        self._gate: Final = gate
        self._closed = False
        self._blocking: Final = {fd: os.get_blocking(fd) for fd in (read_fd, write_fd)}
        self._always_ready: Final = {fd: _cannot_poll(fd) for fd in (read_fd, write_fd)}
        for fd in self._blocking:
            set_blocking(fd, False)

    async def receive(self) -> bytes:
        """See `Transport`."""
        while True:
            self._check_open()
            if self._always_ready[self._read_fd]:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self._read_fd)
            if not await self._gate.passed():
                continue
            self._check_open()
            try:
                return os.read(self._read_fd, _CHUNK)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno == errno.EIO:  # a tty whose other side is gone
                    return b""
                raise trio.BrokenResourceError(os.strerror(error.errno or 0)) from error

    def take_descriptors(self) -> list[int]:
        """See `Transport`: there are none."""
        return []

    def send_nowait(self, data: bytes) -> int:
        """See `Transport`."""
        self._check_open()
        try:
            return os.write(self._write_fd, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(os.strerror(error.errno or 0)) from error

    async def wait_sendable(self) -> None:
        """See `Transport`."""
        self._check_open()
        if self._always_ready[self._write_fd]:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.wait_writable(self._write_fd)

    def close(self) -> None:
        """See `Transport`."""
        if self._closed:
            return
        self._closed = True
        for fd, blocking in self._blocking.items():
            trio.lowlevel.notify_closing(fd)
            set_blocking(fd, blocking)
        self._gate.rattle()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError


async def accepted(listener: socket.socket, gate: Gate, complain: Callable[[str], None]) -> socket.socket | None:
    """Wait for a client, and for `gate` to be open; return its socket, or None if there is nobody after all."""
    await trio.lowlevel.wait_readable(listener)
    if not await gate.passed():
        return None
    try:
        return listener.accept()[0]
    except BlockingIOError:
        return None
    except OSError as error:
        # The client is gone already, or descriptors are short; waiting would help only the second.
        complain(f"cannot accept a client: {os.strerror(error.errno or 0)}")
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            await trio.sleep(0.1)
        return None


class SocketSession(Protocol):
    """What is spoken with one client: QMP, or another language."""

    @property
    def dropped(self) -> str:
        """Why the client was dropped, if it was; words that follow "the client"."""

    async def serve(self) -> None:
        """Serve the client until it hangs up."""

    async def close(self, flush_seconds: float) -> None:
        """Hang up, after the client had `flush_seconds` to read what is unsent."""

    def resume(self) -> None:
        """Send what was held back for a successor that did not come."""


SessionT = TypeVar("SessionT", bound=SocketSession)


@final
class SocketMonitor(Generic[SessionT]):
    """One monitor: any number of clients, each with its own session, from listeners and single connections.

    `make` makes the session of a client, by its name and its transport.
    `log` takes one line about a client that was refused or dropped.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[str, Transport], SessionT],
        log: Callable[[str], None],
    ) -> None:
        self.name: Final = name
        self._make: Final = make
        self._log: Final = log
        self._accepting: Final = Gate()
        self._gate: Final = Gate()
        self._listening: Final = trio.CancelScope()
        self.stopped_listening: Final = trio.Event()
        """Set once nothing is accepted any more: the listener may be closed, while sessions go on."""
        self._sessions: Final[dict[str, SessionT]] = {}
        self._connections = 0

    @property
    def sessions(self) -> Mapping[str, SessionT]:
        """The sessions under way, by name: the monitor's, and a number."""
        return self._sessions

    async def serve_listener(
        self,
        listener: socket.socket,
        admit: Callable[[socket.socket], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept clients until cancelled. The listener stays the caller's; `admit` raises `PeerRefused`."""
        listener.setblocking(False)
        async with trio.open_nursery() as nursery:
            task_status.started()
            with self._listening:
                await self._accept(listener, admit, nursery)
            self.stopped_listening.set()

    async def _accept(
        self, listener: socket.socket, admit: Callable[[socket.socket], None], nursery: trio.Nursery
    ) -> None:
        while True:
            client = await accepted(listener, self._accepting, lambda text: self._log(f"{self.name}: {text}"))
            if client is None:
                continue
            try:
                admit(client)
            except PeerRefused as refused:
                self._log(f"{self.name}: {refused}")
                client.close()
                continue
            nursery.start_soon(self.serve_connection, client)

    async def serve_connection(self, sock: socket.socket) -> None:
        """Serve the client of a connected socket, which belongs to the session, until it hangs up."""
        await self._serve(SocketTransport(sock, self._gate))

    async def serve_descriptors(self, read_fd: int, write_fd: int) -> None:
        """Serve the client of two descriptors, which stay the caller's, until it hangs up."""
        await self._serve(PipeTransport(read_fd, write_fd, self._gate))

    async def _serve(self, transport: Transport) -> None:
        self._connections += 1
        name = f"{self.name}/{self._connections}"
        session = self._make(name, transport)
        self._sessions[name] = session
        await self._serve_session(name, session)

    def take_up(
        self, number: int, sock: socket.socket, make: Callable[[str, Transport], SessionT]
    ) -> Callable[[], Awaitable[None]]:
        """Make a session that a predecessor had under `number`; return what serves it. No other has that number."""
        name = f"{self.name}/{number}"
        session = make(name, SocketTransport(sock, self._gate))
        self._connections = max(self._connections, number)
        self._sessions[name] = session
        return partial(self._serve_session, name, session)

    async def _serve_session(self, name: str, session: SessionT) -> None:
        try:
            await session.serve()
        finally:
            del self._sessions[name]
            if session.dropped:
                self._log(f"{name}: the client {session.dropped}, so it was dropped")

    def quiesce(self, *, sessions: bool = True) -> None:
        """Accept nobody from now on, and with `sessions` read nothing. Commands under way go on; replies are sent."""
        self._accepting.shut()
        if sessions:
            self._gate.shut()

    def resume(self, *, sessions: bool = True) -> None:
        """Accept again, and with `sessions` read, and let those go on that were held."""
        self._accepting.open()
        if sessions:
            self._gate.open()
            for session in self._sessions.values():
                session.resume()

    def stop_listening(self) -> None:
        """Accept nobody any more, for good; the sessions under way stay. The listener is the caller's to close."""
        self._listening.cancel()

    async def close(self, flush_seconds: float) -> None:
        """Hang up on all clients, after they had `flush_seconds` to read what is unsent; accept no more."""
        self.stop_listening()
        self._gate.shut()
        async with trio.open_nursery() as nursery:
            for session in tuple(self._sessions.values()):
                nursery.start_soon(session.close, flush_seconds)


def qmp_monitor(
    name: str, executor: Executor, hub: EventHub, options: SessionOptions, log: Callable[[str], None]
) -> SocketMonitor[Session]:
    """Make a monitor whose clients speak QMP."""

    def make(name: str, transport: Transport) -> Session:
        return Session(name, transport, executor, hub, options)

    return SocketMonitor(name, make, log)
