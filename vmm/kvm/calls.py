"""The one way an ioctl is issued from Python, and the errors that it gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm.errors import KvmCallFailed
from vmm.kvm._kvm import lib

if TYPE_CHECKING:
    from vmm.kvm._kvm import CData


def call(fd: int, name: str, argument: int = 0, *, context: str = "") -> int:
    """Issue ioctl `name` (as in linux/kvm.h) with an integer; return what it returned. Repeated on EINTR.

    Raises:
        KvmCallFailed: with `name` and `context`, such as "vCPU 1".
    """
    return checked(lib.tv_ioctl(fd, getattr(lib, name), argument), name, context)


def call_with(fd: int, name: str, argument: CData, *, context: str = "") -> int:
    """Issue ioctl `name` with a pointer to a structure; else as `call`."""
    return checked(lib.tv_ioctl_ptr(fd, getattr(lib, name), argument), name, context)


def checked(result: int, name: str, context: str = "") -> int:
    """Pass on the result of a call in C that answers with minus errno on failure."""
    if result < 0:
        raise KvmCallFailed(ioctl=name, errno=-result, context=context)
    return result
