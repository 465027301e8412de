"""Unix sockets of the host, and what every listener has: clients, their users, and whose it is.

Every socket made here is close-on-exec. Nothing here waits for a peer or a lock, so all of it may be called on the
loop. An operating system error becomes a `HostFileRefused`, whose text names the path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Protocol

from vmm.errors import DescriptorWrongKind, HostFileRefused, PeerRefused, SocketInUse
from vmm.host_fds import descriptor_kind, require_kind
from vmm.hostio import kind_of, refused

if TYPE_CHECKING:
    from collections.abc import Generator

MAX_SOCKET_PATH: Final = 107
"""Bytes of a unix socket's path: sun_path has 108, and the last is a NUL. Source: unix(7)."""

BACKLOG: Final = 16
"""Clients that wait for an accept. One more than these gets EAGAIN or blocks."""

_UCRED: Final = struct.Struct("iII")


class Socket(Protocol):
    """The part of a socket, the standard library's or trio's, that peers are asked through."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


def listen_unix(path: str) -> socket.socket:
    """Bind a stream socket to `path`, mode 0600, and listen. The socket does not block.

    A socket file that nobody answers at is replaced; anything else at `path` is left alone. Of several that start on
    one path at the same time, in whatever processes, one gets it.

    Raises:
        SocketInUse: somebody listens there, or is about to.
        HostFileRefused: the path is too long, is not a socket, or the host refused.
    """
    _check_socket_path("listen on", path)
    listener = _unix_socket("listen on", path)
    try:
        # The file gets the mode of the socket's own inode (Linux, unix_bind), so it never has wider rights than these;
        # umask would be another way, but it belongs to all threads of the process.
        os.fchmod(listener.fileno(), 0o600)
        with _sole_starter(path):
            try:
                listener.bind(path)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _remove_dead_socket(path)
                listener.bind(path)
            listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise refused("listen on", path, error) from error
    except BaseException:
        listener.close()
        raise
    return listener


def listen_abstract(name: str) -> socket.socket:
    """Listen on a stream socket under `name` in the abstract namespace. It does not block.

    Raises:
        HostFileRefused: the host refused, or somebody has that name.
    """
    listener = _unix_socket("listen on", f"@{name}")
    try:
        listener.bind(f"\0{name}")
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise refused("listen on", f"@{name}", error) from error
    return listener


@contextmanager
def _sole_starter(path: str) -> Generator[None, None, None]:
    """Keep other starters of `path` out.

    Without it two starters could find the same dead file, and the slower would remove the live one that the faster put
    in its place; and a socket that is bound and does not listen yet looks dead. The lock is a file, which only those
    who may write the directory can hold, and it is gone afterwards. If its holder is killed the file stays until the
    next starter takes it.

    Raises:
        SocketInUse: another starter is at it. It is not waited for: at most one can win.
    """
    directory, name = os.path.split(path)
    lock = os.path.join(directory, f".{name}.trio-vmm-start")
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise SocketInUse(path=path) from None
        if os.fstat(fd).st_nlink:
            break
        os.close(fd)  # its holder has removed it since it was opened: it keeps nobody out
    try:
        yield
    finally:
        os.unlink(lock)
        os.close(fd)


def _remove_dead_socket(path: str) -> None:
    """Remove what keeps `path` from being bound. The caller keeps other starters out."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        reason = f"it is {kind_of(mode)}, not a socket, and was left alone"
        raise HostFileRefused(action="listen on", path=path, reason=reason)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            pass
        except OSError as error:
            # EAGAIN: the backlog is full. EPROTOTYPE: a datagram socket. Somebody is there in both cases.
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise
            raise SocketInUse(path=path) from None
        else:
            raise SocketInUse(path=path)
    with suppress(FileNotFoundError):
        os.unlink(path)


def unlink_own(path: str, listener: socket.socket) -> bool:
    """Remove the socket file at `path` if it leads to `listener`; say whether it did. For the end of `listener`.

    Call it before `listener` is closed: while it listens no other starter takes the path. Clients that still wait for
    an accept are hung up on, as the close would do.

    The path itself is asked, by a connection, because no inode number remembered from the bind would come along with
    a listener that a predecessor passed on.
    """
    if not _leads_to(path, listener):
        return False
    try:
        os.unlink(path)
    except OSError:
        return False  # the directory is gone or read-only now; the file is dead, and the next starter replaces it
    return True


def _leads_to(path: str, listener: socket.socket) -> bool:
    try:
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError:
        return False  # no descriptor is left to ask with: the file stays, dead, and the next starter replaces it
    with probe:
        try:
            listener.setblocking(False)
            probe.bind("")  # the kernel makes up a name that no other socket has
            mark = probe.getsockname()
            while (code := probe.connect_ex(path)) == errno.EAGAIN:
                listener.accept()[0].close()
            if code:
                return False
            while True:
                client, name = listener.accept()
                client.close()
                if name == mark:
                    return True
        except OSError:
            return False  # nothing waits at the listener: the path led elsewhere


def connect_unix(path: str) -> socket.socket:
    """Connect a stream socket to `path`. The socket does not block.

    Raises:
        HostFileRefused: the path is too long, or nobody answers.
    """
    _check_socket_path("connect to", path)
    client = _unix_socket("connect to", path)
    try:
        client.connect(path)
    except BlockingIOError as error:
        client.close()
        raise HostFileRefused(action="connect to", path=path, reason="too many clients wait there") from error
    except OSError as error:
        client.close()
        raise refused("connect to", path, error) from error
    return client


def _unix_socket(action: str, path: str) -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise refused(action, path, error) from error


def _check_socket_path(action: str, path: str) -> None:
    # An empty path and one that begins with NUL would be names of another kind, without a file and without its rights.
    size = len(os.fsencode(path))
    if not path or "\0" in path:
        raise HostFileRefused(action=action, path=repr(path), reason="a socket path is not empty and has no NUL")
    if size > MAX_SOCKET_PATH:
        reason = f"a socket path has at most {MAX_SOCKET_PATH} bytes, and this one has {size}"
        raise HostFileRefused(action=action, path=path, reason=reason)


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """Make two unix stream sockets that are connected to each other.

    Raises:
        HostFileRefused: the host has no descriptor left.
    """
    try:
        return socket.socketpair()
    except OSError as error:
        raise refused("create", "a pair of sockets", error) from error


def unconnected_unix() -> socket.socket:
    """Make a unix stream socket. Raises as `connected_pair`."""
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise refused("create", "a socket", error) from error


def adopt_listener(fd: int, name: str, *kinds: str) -> socket.socket:
    """Make a socket of the listening descriptor `fd`, and own it. `name` is what error texts call it.

    Raises:
        DescriptorWrongKind: it is none of `kinds`, in the words of `descriptor_kind`; it stays the caller's.
    """
    require_kind(fd, name, *kinds)
    listener = socket.socket(fileno=fd)
    listener.setblocking(False)
    return listener


def sign_listener(listener: socket.socket) -> None:
    """Make `listener`, which another process may have made, name this one to its clients (SO_PEERCRED).

    To listen again on a listening socket changes nothing else. Clients that have connected already saw what they saw.
    """
    listener.listen(BACKLOG)


def accept(listener: socket.socket, path: str) -> int | None:
    """Accept one client and return its descriptor, which does not block; None if nobody waits.

    Raises:
        PeerRefused: the client, of a unix socket, is of another user; it was hung up on.
        HostFileRefused: the host has no descriptor left for it.
    """
    try:
        client, _ = listener.accept()
    except (BlockingIOError, ConnectionAbortedError):
        return None
    except OSError as error:
        raise refused("accept a client on", path, error) from error
    try:
        if client.family == socket.AF_UNIX:
            admit_peer(client, path)
        client.setblocking(False)
        return client.detach()
    finally:
        client.close()


def peer_credentials(sock: Socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of the process that connected to (or listened on) the other end. Source: unix(7)."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid


def admit_peer(sock: Socket, path: str) -> None:
    """Let pass a peer of our own user, and root. `path` is where it connected.

    Raises:
        PeerRefused: it is another user's; the socket stays open.
    """
    _, uid, _ = peer_credentials(sock)
    own = os.geteuid()
    if uid not in (own, 0):
        raise PeerRefused(path=path, uid=uid, wanted=own)


def require_stream_socket(fd: int, name: str, besides: str = "") -> None:
    """Check that descriptor `name` is a stream socket, of whatever family. `besides` is what it might also be.

    Raises:
        DescriptorWrongKind: it is not; it stays open.
    """
    wanted = f"a stream socket{besides}"
    try:
        found = socket.socket(fileno=fd)
    except OSError as error:
        raise DescriptorWrongKind(name=name, found=descriptor_kind(fd), wanted=wanted) from error
    kind = found.type
    found.detach()
    if kind != socket.SOCK_STREAM:
        raise DescriptorWrongKind(name=name, found="a socket of another type", wanted=wanted)


def adopt_connection(fd: int) -> int:
    """Take over connected unix socket number `fd`, which this process was started with, as close-on-exec.

    Raises:
        DescriptorWrongKind: it is none; it stays as it is.
    """
    require_kind(fd, str(fd), "a connected unix socket")
    os.set_inheritable(fd, False)
    return fd


def adopt_socket(fd: int, *kinds: str) -> int:
    """Take over socket number `fd`, which this process was started with or was sent: close-on-exec, and not blocking.

    Raises:
        DescriptorWrongKind: it is none of `kinds`, in the words of `descriptor_kind`; it stays as it is.
    """
    require_kind(fd, str(fd), *kinds)
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)
    return fd
