"""Files within a directory that is open: whatever becomes of its path, they are in that directory."""

from __future__ import annotations

import os

from vmm import host_fds, hostio
from vmm.errors import DescriptorWrongKind, HostFileRefused


def adopt_directory(fd: int, name: str) -> int:
    """Take over `fd`, that of `hostio.open_directory`, from whoever opened it. `DescriptorWrongKind` closes it."""
    found = host_fds.descriptor_kind(fd)
    if found != "a directory":
        os.close(fd)
        raise DescriptorWrongKind(name=name, found=found, wanted="a directory")
    return fd


def create_within(directory: int, name: str, path: str) -> int:
    """Create file `name`, which is not there yet, in `directory`, for its owner alone. `path` is for texts.

    Raises:
        HostFileRefused: it cannot be, or is there.
    """
    try:
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError as error:
        raise hostio.refused("write", path, error) from error


def open_within(directory: int, name: str, path: str) -> int:
    """Open regular file `name`, no link to one, in `directory` for reading. Raises `HostFileRefused`."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        raise hostio.refused("read", path, error) from error
    found = host_fds.descriptor_kind(fd)
    if found != "a regular file":
        os.close(fd)
        raise HostFileRefused(action="read", path=path, reason=f"it is {found}, not a regular file")
    return fd
