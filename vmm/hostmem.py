"""What guest RAM is made of: sealed memfds, of huge pages too, and files, each the RAM of one machine at a time.

Whoever maps memory that another process can shrink is killed by it (SIGBUS). So a memfd is sealed when it is made, and
one that another process sent is looked at before it is mapped. A file cannot be sealed: it belongs to who may write it.
It is locked instead, by its open file description (fcntl_locking(2), "open file description locks"): the lock goes
where the descriptor goes, is held once by all processes that share it, and is gone with the last of them.

A file in which a saved guest's RAM has been left has a page behind its end that says which state it belongs to.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
import struct
from contextlib import suppress
from typing import Final, Literal
from zlib import crc32

from vmm import host_fds, hostio
from vmm.errors import DescriptorWrongKind, HostFileRefused

PAGE_SIZE: Final = 4096
HUGE_PAGES: Final = "/sys/kernel/mm/hugepages"

RamKind = Literal["memfd", "file"]

_F_ADD_SEALS: Final = 1033
_F_GET_SEALS: Final = 1034
_F_SEAL_SHRINK: Final = 0x2
_F_SEAL_GROW: Final = 0x4
_F_SEAL_WRITE: Final = 0x8
_F_SEAL_FUTURE_WRITE: Final = 0x10
_HUGE_SHIFT: Final = 26
_FLOCK: Final = struct.Struct("hhqqi4x")
"""struct flock of x86-64: type, whence, start, length (0: to the end), pid (0, as these locks want it)."""


def page_size_of(fd: int) -> int:
    """Return the size of the pages that a mapping of `fd` has: huge ones, or 4096."""
    if _seals(fd) is None:
        return PAGE_SIZE
    # Of the two file systems that know seals, tmpfs says 4096 here, and hugetlbfs the size of its pages.
    return os.fstatvfs(fd).f_bsize


def _seals(fd: int) -> int | None:
    try:
        return fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError:
        return None


def huge_page_sizes() -> list[int]:
    """Return the sizes of huge pages that this host knows, in bytes, the smallest first."""
    try:
        names = os.listdir(HUGE_PAGES)
    except OSError:
        return []
    found = (re.fullmatch(r"hugepages-(\d+)kB", name) for name in names)
    return sorted(int(match[1]) << 10 for match in found if match)


def create_memfd(size: int, name: str, huge: int = 0) -> int:
    """Make a shared memory of `size` bytes, whose size is sealed, of huge pages of `huge` bytes if that is not 0.

    Huge pages are reserved at once, so that none is lacking later.

    Raises:
        HostFileRefused: the host won't.
    """
    if not huge:
        return hostio.create_ram(size, name)
    action, path = f"reserve {size} bytes of huge pages as", f"memfd:{name}"
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB | (huge.bit_length() - 1) << _HUGE_SHIFT
    try:
        fd = os.memfd_create(name, flags)
    except OSError as error:
        raise hostio.refused(action, path, error) from error
    try:
        os.ftruncate(fd, size)
        _reserve(fd, size)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
    except OSError as error:
        os.close(fd)
        raise _too_few(action, path, error, huge) from error
    return fd


def _reserve(fd: int, size: int) -> None:
    # A mapping reserves the pages of hugetlbfs, and they stay so when it is gone: the file has them.
    mmap.mmap(fd, size).close()


def _too_few(action: str, path: str, error: OSError, huge: int) -> HostFileRefused:
    if error.errno not in (errno.ENOMEM, errno.ENOSPC):
        return hostio.refused(action, path, error)
    where = f"{HUGE_PAGES}/hugepages-{huge >> 10}kB/nr_hugepages"
    reason = f"{os.strerror(error.errno)}; {where} says how many there are, and can be set"
    return HostFileRefused(action=action, path=path, reason=reason)


def open_ram_file(path: str, size: int) -> int:
    """Open `path` as RAM of `size` bytes, and lock it. Where there is none it is made, readable by its owner alone.

    In a directory, a file without a name is made. An empty file gets the size; another one must have it.

    Raises:
        HostFileRefused: another machine has it, it is too short, of another kind, or the host won't.
    """
    action = "use as RAM"
    nameless = os.path.isdir(path)
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | (os.O_TMPFILE if nameless else 0)
    made = False
    try:
        try:
            fd = os.open(path, flags, 0o600)
        except FileNotFoundError:
            fd, made = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True
    except OSError as error:
        raise hostio.refused(action, path, error) from error
    except ValueError as error:  # a NUL in the path
        raise HostFileRefused(action=action, path=repr(path), reason="a path has no NUL") from error
    try:
        _prepare(fd, path, size)
    except BaseException:
        os.close(fd)
        if made:
            os.unlink(path)
        raise
    return fd


def _prepare(fd: int, path: str, size: int) -> None:
    action = "use as RAM"
    kind = host_fds.descriptor_kind(fd)
    if kind != "a regular file":
        instead = "; give a file, also on a DAX file system" if kind == "a character device" else ""
        raise HostFileRefused(action=action, path=path, reason=f"it is {kind}, not a regular file{instead}")
    lock(fd, path)
    huge = page_size_of(fd)
    if size % huge:
        reason = f"its file system has pages of {huge} bytes, of which {size} is no multiple"
        raise HostFileRefused(action=action, path=path, reason=reason)
    length = os.fstat(fd).st_size
    if 0 < length < size:
        reason = f"it has {length} bytes, fewer than the {size} of the RAM; remove it, or give another size"
        raise HostFileRefused(action=action, path=path, reason=reason)
    try:
        if not length:
            os.ftruncate(fd, size)
        if huge != PAGE_SIZE:
            _reserve(fd, size)
    except OSError as error:
        raise _too_few(action, path, error, huge) from error


def lock(fd: int, path: str) -> None:
    """Lock the file behind `fd` for its open file description. To do so again changes nothing.

    Raises:
        HostFileRefused: another one has the lock: it is the RAM of another machine.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except BlockingIOError:
        reason = "it is locked: it is the RAM of another machine, which must end first"
        raise HostFileRefused(action="use as RAM", path=path, reason=reason) from None
    except OSError as error:
        raise hostio.refused("lock", path, error) from error


def allocate(fd: int, size: int, path: str) -> None:
    """Have the host find room for `size` bytes of `fd` now. May take long: for a thread.

    Raises:
        HostFileRefused: there is none. A file that had nothing in it is empty then, and fills no disk.
    """
    was_empty = os.fstat(fd).st_blocks == 0
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if was_empty:
            with suppress(OSError):  # a memfd's size is sealed, and its pages go with it
                os.ftruncate(fd, 0)
        raise hostio.refused(f"allocate {size} bytes of", path, error) from error


def require_ram(fd: int, name: str, kind: RamKind, size: int, page_size: int = PAGE_SIZE) -> None:
    """Check that `fd`, which another process sent as `name`, is RAM that this one can map safely.

    Raises:
        DescriptorWrongKind: it is not; it stays open.
    """
    if found := _fault_of(fd, kind, size, page_size):
        what = "a memfd" if kind == "memfd" else "a regular file"
        pages = f" in pages of {page_size}" if page_size != PAGE_SIZE else ""
        seals = ", sealed against shrinking and not against writing" if kind == "memfd" else ""
        wanted = f"{what} of {size} bytes or more{pages}{seals}, open to read and write"
        raise DescriptorWrongKind(name=name, found=found, wanted=wanted)


def _fault_of(fd: int, kind: RamKind, size: int, page_size: int) -> str:
    mode = os.fstat(fd)
    seals = _seals(fd)
    if not stat.S_ISREG(mode.st_mode):
        return host_fds.descriptor_kind(fd)
    if kind == "memfd":
        if seals is None or mode.st_nlink:
            return "a file"
        if not seals & _F_SEAL_SHRINK:
            return "not sealed against shrinking"
        if seals & (_F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE):
            return "sealed against writing"
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        return "not open to read and write"
    if (pages := page_size_of(fd)) != page_size and kind == "memfd":
        return f"in pages of {pages} bytes"
    if size % pages:
        return f"in pages of {pages} bytes, of which {size} is no multiple"
    if mode.st_size < size:
        return f"{mode.st_size} bytes long"
    return ""


# --- which state a file of RAM belongs to -------------------------------------------------------------------

_MARK: Final = struct.Struct("<16s16sQ")
_MARK_MAGIC: Final = b"trio-vmm RAM \x00\x01\x1a"
IDENTITY_SIZE: Final = 16
"""Bytes."""


def _mark_of(fd: int, size: int) -> tuple[bytes, int] | None:
    """Return the identity in a file's last page, and where that page is; None where there is no mark.

    It is behind the RAM, where no guest can write it.
    """
    at = os.fstat(fd).st_size - PAGE_SIZE
    if at < size or page_size_of(fd) != PAGE_SIZE:
        return None
    found = os.pread(fd, _MARK.size + 4, at)
    magic, identity, length = _MARK.unpack_from(found)
    if magic != _MARK_MAGIC or length != at or found[_MARK.size :] != crc32(found[: _MARK.size]).to_bytes(4, "little"):
        return None
    return identity, at


def mark_of(fd: int, size: int) -> bytes | None:
    """Return which state the RAM, the first `size` bytes of a file, has been left for; None if none, or it was used."""
    found = _mark_of(fd, size)
    return found and found[0]


def mark(fd: int, size: int, identity: bytes) -> None:
    """Write all of a file of RAM to its disk, then that it belongs to the state `identity`, also to disk. For a thread.

    Raises:
        HostFileRefused: the disk did not take it.
    """
    unmark(fd, size)
    try:
        os.fsync(fd)
        length = os.fstat(fd).st_size
        text = _MARK.pack(_MARK_MAGIC, identity, length)
        page = (text + crc32(text).to_bytes(4, "little")).ljust(PAGE_SIZE, b"\0")
        if os.pwrite(fd, page, length) < PAGE_SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    except OSError as error:
        raise _unwritten(fd, error) from error


def unmark(fd: int, size: int) -> None:
    """Undo `mark`, on disk too, if the file is marked: what it holds is about to change. Raises `HostFileRefused`."""
    found = _mark_of(fd, size)
    if found is None:
        return
    try:
        os.ftruncate(fd, found[1])
        os.fsync(fd)
    except OSError as error:
        raise _unwritten(fd, error) from error


def _unwritten(fd: int, error: OSError) -> HostFileRefused:
    return hostio.refused("write", os.readlink(f"/proc/self/fd/{fd}"), error)
