"""What a descriptor is: in words, for checks of those that come from elsewhere."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import stat
from typing import TYPE_CHECKING, Final

from vmm.errors import DescriptorWrongKind
from vmm.hostio import kind_of

if TYPE_CHECKING:
    from collections.abc import Mapping

_TIOCGPTN: Final = 0x80045430
"""The number of a pty, asked of its master. Source: ioctl_tty(2)."""

_FAMILIES: Final[Mapping[int, str]] = {
    socket.AF_UNIX: "unix",
    socket.AF_INET: "tcp",
    socket.AF_INET6: "tcp",
    socket.AF_VSOCK: "vsock",
}


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
        return kind_of(mode)
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


def require_writable(fd: int, name: str) -> None:
    """Check that descriptor `name` can be written to.

    Raises:
        DescriptorWrongKind: it cannot; it stays open.
    """
    _require_not(os.O_RDONLY, fd, name, "read", "something to write to")


def require_readable(fd: int, name: str) -> None:
    """Check that descriptor `name` can be read from.

    Raises:
        DescriptorWrongKind: it cannot; it stays open.
    """
    _require_not(os.O_WRONLY, fd, name, "written", "something to read from")


def _require_not(mode: int, fd: int, name: str, done: str, wanted: str) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE == mode:
        found = f"{descriptor_kind(fd)} that was opened to be {done}"
        raise DescriptorWrongKind(name=name, found=found, wanted=wanted)


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


def pty_slave_name(master: int) -> str:
    """Return the path of the slave of a pty. Raises `OSError` if `master` is none."""
    number = array.array("I", [0])
    fcntl.ioctl(master, _TIOCGPTN, number)
    return f"/dev/pts/{number[0]}"
