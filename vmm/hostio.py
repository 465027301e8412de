"""The only opener of what the host has: files, sockets, memfds and terminals.

Every descriptor made here is close-on-exec. Nothing here waits for a peer, a reader or a lock, so all of it may be
called on the loop; only a file system that stalls can stall a call. An operating system error becomes a
`HostFileRefused`, whose text names the path.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import select
import socket
import stat
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Literal, Protocol

from vmm.errors import DescriptorWrongKind, HostFileRefused, PeerRefused, SocketInUse

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

MAX_SOCKET_PATH: Final = 107
"""Bytes of a unix socket's path: sun_path has 108, and the last is a NUL. Source: unix(7)."""

_BACKLOG: Final = 16
"""Clients that wait for an accept. One more than these gets EAGAIN or blocks."""

_F_ADD_SEALS: Final = 1033
_F_SEAL_SHRINK: Final = 0x2
_F_SEAL_GROW: Final = 0x4
_TIOCGPTN: Final = 0x80045430
"""The number of a pty, asked of its master. Source: ioctl_tty(2)."""

_UCRED: Final = struct.Struct("iII")
_KINDS: Final = (
    (stat.S_ISREG, "a regular file"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISCHR, "a character device"),
)

_FAMILIES: Final[Mapping[int, str]] = {
    socket.AF_UNIX: "unix",
    socket.AF_INET: "tcp",
    socket.AF_INET6: "tcp",
    socket.AF_VSOCK: "vsock",
}


def _kind(mode: int) -> str:
    return next((name for fits, name in _KINDS if fits(mode)), "of an unknown kind")


def refused(action: str, path: str, error: OSError) -> HostFileRefused:
    return HostFileRefused(action=action, path=path, reason=os.strerror(error.errno or 0))


# --- unix sockets -----------------------------------------------------------------------------------------


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
            listener.listen(_BACKLOG)
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
        listener.listen(_BACKLOG)
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
        reason = f"it is {_kind(mode)}, not a socket, and was left alone"
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
    listener.listen(_BACKLOG)


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


# --- memory -----------------------------------------------------------------------------------------------


def create_ram(size: int, name: str) -> int:
    """Make a shared memory of `size` bytes for the guest. Its size is sealed.

    Raises:
        HostFileRefused: the host won't.
    """
    action = f"reserve {size} bytes of memory as"
    path = f"memfd:{name}"
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise refused(action, path, error) from error
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
    except (OSError, OverflowError) as error:
        os.close(fd)
        reason = os.strerror(errno.EFBIG if isinstance(error, OverflowError) else error.errno or 0)
        raise HostFileRefused(action=action, path=path, reason=reason) from error
    return fd


# --- files ------------------------------------------------------------------------------------------------


def open_input_file(path: str) -> int:
    """Open regular file `path` for reading.

    Raises:
        HostFileRefused: there is none, it may not be read, or it is of another kind.
    """
    fd = _open("read", path, os.O_RDONLY)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise HostFileRefused(action="read", path=path, reason=f"it is {_kind(mode)}, not a regular file")
    return fd


def open_secret_file(path: str) -> int:
    """Open regular file `path`, which nobody but its owner may have access to, for reading.

    Raises:
        HostFileRefused: there is none, it may not be read, it is of another kind, or others have access to it.
    """
    fd = open_input_file(path)
    found = os.fstat(fd)
    reason = ""
    if found.st_mode & 0o077:
        reason = f"its mode is {stat.S_IMODE(found.st_mode):04o}, so others than its owner have access; use chmod 600"
    elif found.st_uid not in (os.geteuid(), 0):
        reason = f"it belongs to uid {found.st_uid}, neither to uid {os.geteuid()} nor to root"
    if reason:
        os.close(fd)
        raise HostFileRefused(action="take a secret from", path=path, reason=reason)
    return fd


def open_random_source(path: str) -> int:
    """Open character device `path` for reading, without ever waiting for it.

    Raises:
        HostFileRefused: there is none, it may not be read, or it is of another kind.
    """
    fd = _open("read", path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISCHR(mode):
        os.close(fd)
        reason = f"it is {_kind(mode)}, not a character device such as /dev/urandom"
        raise HostFileRefused(action="read", path=path, reason=reason)
    return fd


def adopt_random_source(fd: int, name: str) -> int:
    """Take over `fd`, that of `open_random_source`, from whoever opened it. `DescriptorWrongKind` closes it."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISCHR(mode):
        os.close(fd)
        raise DescriptorWrongKind(name=name, found=_kind(mode), wanted="a character device")
    set_blocking(fd, False)
    return fd


def open_output_file(path: str, append: bool) -> int:
    """Open or create `path` for writing, at its end if `append`, else emptied. The descriptor does not block.

    Pipes that have a reader, and character devices such as /dev/null, will do as well.

    Raises:
        HostFileRefused: it may not be written, or is of another kind.
    """
    fd = _open("write", path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC))
    mode = os.fstat(fd).st_mode
    if stat.S_ISBLK(mode):
        os.close(fd)
        raise HostFileRefused(action="write", path=path, reason=f"it is {_kind(mode)}, not a regular file")
    return fd


def open_pipe(path: str, end: Literal["in", "out"]) -> int:
    """Open pipe `path`.in or `path`.out, if both are there, and else `path` itself. The descriptor does not block.

    It is opened for both directions, so that a pipe has a peer. Character devices will do as well.

    Raises:
        HostFileRefused: there is none, it may not be opened, or it is of another kind.
    """
    parts = [f"{path}.in", f"{path}.out"]
    found = f"{path}.{end}" if all(map(os.path.lexists, parts)) else path
    try:
        fd = _open("open", found, os.O_RDWR)
    except HostFileRefused as error:
        if found != path or os.path.lexists(path):
            raise
        reason = f"{error.reason}, nor are there pipes {parts[0]} and {parts[1]}"
        raise HostFileRefused(action="open", path=path, reason=reason) from error
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and found == path)):
        os.close(fd)
        wanted = "a pipe or a character device" if found == path else "a pipe"
        raise HostFileRefused(action="open", path=found, reason=f"it is {_kind(mode)}, not {wanted}")
    return fd


def open_state_file(path: str, offset: int) -> int:
    """Open or create regular file `path`, readable by its owner alone, for a guest's state; it ends at byte `offset`.

    Raises:
        HostFileRefused: it may not be written, is of another kind, or cannot be so long. What was there is as it was.
    """
    flags = os.O_RDWR | os.O_CREAT
    made = not os.path.lexists(path)
    fd = _open("write", path, flags | os.O_EXCL if made else flags, 0o600)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise HostFileRefused(action="write", path=path, reason=f"it is {_kind(mode)}, not a regular file")
        _stand_at(fd, offset, "write", path)
        try:
            os.ftruncate(fd, offset)
        except OSError as error:
            raise refused("write", path, error) from error
    except HostFileRefused:
        os.close(fd)
        if made:
            os.unlink(path)
        raise
    return fd


def open_directory(path: str) -> int:
    """Open directory `path`, to put on disk what names are in it. Raises `HostFileRefused`."""
    return _open("read", path, os.O_RDONLY | os.O_DIRECTORY)


def open_saved_state(path: str, offset: int) -> int:
    """Open regular file `path` for reading, and stand at byte `offset`.

    Raises:
        HostFileRefused: as `open_input_file`, or it cannot be so long.
    """
    fd = open_input_file(path)
    try:
        _stand_at(fd, offset, "read", path)
    except HostFileRefused:
        os.close(fd)
        raise
    return fd


def lock_saved_state(fd: int, path: str) -> bool:
    """Lock the whole file behind `fd`, until that is closed. Return False if another one has the lock.

    Raises:
        HostFileRefused: the host won't.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise refused("lock", path, error) from error
    return True


def _stand_at(fd: int, offset: int, action: str, path: str) -> None:
    # How long a file can be is its file system's to say: fewer than 2^63 bytes.
    try:
        os.lseek(fd, offset, os.SEEK_SET)
    except OSError as error:
        raise HostFileRefused(action=action, path=path, reason=f"no file there can have {offset} bytes") from error


def _open(action: str, path: str, flags: int, mode: int = 0o666) -> int:
    # Not to block on a pipe without a peer, and never to get a terminal that sends us its signals.
    try:
        return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode)
    except OSError as error:
        raise refused(action, path, error) from error
    except ValueError as error:  # a NUL in the path
        raise HostFileRefused(action=action, path=repr(path), reason="a path has no NUL") from error


def open_eventfd() -> int:
    """Make an eventfd that does not block.

    Raises:
        HostFileRefused: the host has no descriptor left.
    """
    try:
        return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    except OSError as error:
        raise refused("create", "an eventfd", error) from error


def open_epoll() -> select.epoll:
    """Make an epoll set.

    Raises:
        HostFileRefused: the host has no descriptor left.
    """
    try:
        return select.epoll()
    except OSError as error:
        raise refused("create", "an epoll set", error) from error


@contextmanager
def importing(module: str) -> Generator[None, None, None]:
    """Make the imports of the block, for a machine that may have a guest already, which must survive them.

    Raises:
        HostFileRefused: the host does not let a module's file be read; mostly, because no descriptor is left.
    """
    try:
        yield
    except OSError as error:
        raise refused("import", module, error) from error
    except ImportError as error:  # what the loader of shared objects makes of it
        raise HostFileRefused(action="import", path=module, reason=str(error)) from error


# --- descriptors ------------------------------------------------------------------------------------------


def dup(fd: int) -> int:
    """Duplicate a descriptor. Both share the file's position and whether it blocks.

    Raises:
        HostFileRefused: `fd` is not open, or no descriptor is left.
    """
    try:
        return os.dup(fd)
    except OSError as error:
        raise refused("duplicate", f"descriptor {fd}", error) from error


def set_blocking(fd: int, blocking: bool) -> None:
    """Make reads and writes wait or not, for all who share the open file (other processes, too)."""
    os.set_blocking(fd, blocking)


def descriptor_kind(fd: int) -> str:
    """Say in words what `fd` is: "a pty master", "a connected unix socket", "a regular file" ..."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return "not open"
    if stat.S_ISCHR(mode) and os.isatty(fd):
        try:
            pty_slave_name(fd)
        except OSError:
            return "a terminal"
        return "a pty master"
    if not stat.S_ISSOCK(mode):
        return _kind(mode)
    found = socket.socket(fileno=fd)
    try:
        family = _FAMILIES.get(found.family)
        if family is None or found.type != socket.SOCK_STREAM:
            return "a socket of another family"
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return f"a {'listening' if listens else 'connected'} {family} socket"
    finally:
        found.detach()


def require_kind(fd: int, name: str, *wanted: str) -> None:
    """Check that descriptor `name` is one of `wanted`, in the words of `descriptor_kind`.

    Raises:
        DescriptorWrongKind: it is not; it stays open.
    """
    found = descriptor_kind(fd)
    if found not in wanted:
        raise DescriptorWrongKind(name=name, found=found, wanted=" or ".join(wanted))


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


def opened_as(fd: int) -> str:
    """Return what the kernel calls the open file: a path, or the like of `anon_inode:[io_uring]`. Source: proc(5)."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        return os.strerror(error.errno or 0)


def why_not_passed(fd: int) -> str:
    """Say why the kernel does not pass `fd` to another process (SCM_RIGHTS); empty if it does.

    It is asked, by sending the descriptor to nobody: which kinds it refuses (io_uring) is for it to know. That too many
    are under way is no reason.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with ours, theirs:
        try:
            ours.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        except OSError as error:
            return "" if error.errno == errno.ETOOMANYREFS else os.strerror(error.errno or 0)
    return ""


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


def require_writable(fd: int, name: str) -> None:
    """Check that descriptor `name` can be written to.

    Raises:
        DescriptorWrongKind: it cannot; it stays open.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_RDONLY:
        found = f"{descriptor_kind(fd)} that was opened to be read"
        raise DescriptorWrongKind(name=name, found=found, wanted="something to write to")


def require_readable(fd: int, name: str) -> None:
    """Check that descriptor `name` can be read from.

    Raises:
        DescriptorWrongKind: it cannot; it stays open.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
        found = f"{descriptor_kind(fd)} that was opened to be written"
        raise DescriptorWrongKind(name=name, found=found, wanted="something to read from")


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


def pty_slave_name(master: int) -> str:
    """Return the path of the slave of a pty. Raises `OSError` if `master` is none."""
    number = array.array("I", [0])
    fcntl.ioctl(master, _TIOCGPTN, number)
    return f"/dev/pts/{number[0]}"
