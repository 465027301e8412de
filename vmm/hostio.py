"""The opener of the host's files, and of memory for guests. Sockets are in `vmm.host_sockets` and `vmm.host_tcp`.

Every descriptor made here is close-on-exec. Nothing here waits for a peer, a reader or a lock, so all of it may be
called on the loop; only a file system that stalls can stall a call. An operating system error becomes a
`HostFileRefused`, whose text names the path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal

from vmm.errors import DescriptorWrongKind, HostFileRefused

if TYPE_CHECKING:
    from collections.abc import Generator

_F_ADD_SEALS: Final = 1033
_F_SEAL_SHRINK: Final = 0x2
_F_SEAL_GROW: Final = 0x4
_KINDS: Final = (
    (stat.S_ISREG, "a regular file"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISCHR, "a character device"),
)


def kind_of(mode: int) -> str:
    """Say in words what a file of mode `mode` is."""
    return next((name for fits, name in _KINDS if fits(mode)), "of an unknown kind")


def refused(action: str, path: str, error: OSError) -> HostFileRefused:
    return HostFileRefused(action=action, path=path, reason=os.strerror(error.errno or 0))


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
        raise HostFileRefused(action="read", path=path, reason=f"it is {kind_of(mode)}, not a regular file")
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
        reason = f"it is {kind_of(mode)}, not a character device such as /dev/urandom"
        raise HostFileRefused(action="read", path=path, reason=reason)
    return fd


def adopt_random_source(fd: int, name: str) -> int:
    """Take over `fd`, that of `open_random_source`, from whoever opened it. `DescriptorWrongKind` closes it."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISCHR(mode):
        os.close(fd)
        raise DescriptorWrongKind(name=name, found=kind_of(mode), wanted="a character device")
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
        raise HostFileRefused(action="write", path=path, reason=f"it is {kind_of(mode)}, not a regular file")
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
        raise HostFileRefused(action="open", path=found, reason=f"it is {kind_of(mode)}, not {wanted}")
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
            raise HostFileRefused(action="write", path=path, reason=f"it is {kind_of(mode)}, not a regular file")
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


def sync_directory(path: str) -> None:
    """Put on disk what names are in directory `path`. Takes as long as the disk does.

    Raises:
        HostFileRefused: it cannot be opened.
        OSError: the disk won't.
    """
    fd = open_directory(path)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
