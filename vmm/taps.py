"""Taps of the host: network interfaces whose cable ends in a descriptor.

Facts on Linux (drivers/net/tun.c; Documentation/networking/tuntap.rst):

- An interface has carrier, and a queue of frames for whoever reads, as long as a descriptor is attached to it. A
  descriptor that was passed to another process is the same open file: nothing is attached or let go meanwhile.
- Without `IFF_MULTI_QUEUE` one open file alone can be attached; a second gets EBUSY.
- An interface that is not persistent is gone with its last descriptor.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from typing import Final

from vmm.errors import DescriptorWrongKind, OptionInvalid
from vmm.host_fds import descriptor_kind
from vmm.hostio import refused

LONGEST_NAME: Final = 15
"""Bytes of an interface's name. Source: linux/if.h, IFNAMSIZ, with a NUL at the end."""

_DEVICE: Final = "/dev/net/tun"
_REQUEST: Final = struct.Struct("16sH22x")  # struct ifreq: name, flags
_TUNSETIFF: Final = 0x400454CA
_TUNGETIFF: Final = 0x800454D2
_TAP: Final = 0x0002
_NO_INFORMATION: Final = 0x1000
_MULTI_QUEUE: Final = 0x0100
_VNET_HEADER: Final = 0x4000


def open_tap(name: str) -> int:
    """Attach to interface `name`, which is made if there is none; frames come bare. The descriptor does not block.

    Raises:
        OptionInvalid: no interface can have that name.
        HostFileRefused: somebody else is attached, or the host refused.
    """
    encoded = os.fsencode(name)
    if not 0 < len(encoded) <= LONGEST_NAME or name in (".", "..") or any(byte in b"/:%\0 \t\n" for byte in encoded):
        wanted = f"the name of an interface: 1 to {LONGEST_NAME} bytes without '/', ':', '%' and spaces"
        raise OptionInvalid(option="ifname", value=name, wanted=wanted)
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise refused("open", _DEVICE, error) from error
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _REQUEST.pack(encoded, _TAP | _NO_INFORMATION))
    except OSError as error:
        os.close(fd)
        raise refused("attach to interface", name, error) from error
    return fd


def adopt_tap(fd: int, name: str) -> str:
    """Check that `fd` is a tap, as `open_tap` makes it, and return its interface's name. It does not block afterwards.

    Raises:
        DescriptorWrongKind: it is not. `name` is what the text calls it. It stays the caller's in every case.
    """
    wanted = "a tap with one queue, whose frames come bare"
    found = descriptor_kind(fd)
    if found == "not open" or not stat.S_ISCHR(os.fstat(fd).st_mode):
        raise DescriptorWrongKind(name=name, found=found, wanted=wanted)
    try:
        answer = fcntl.ioctl(fd, _TUNGETIFF, _REQUEST.pack(b"", 0))
    except OSError as error:  # of another driver, or attached to nothing yet
        raise DescriptorWrongKind(name=name, found=found, wanted=wanted) from error
    interface, flags = _REQUEST.unpack(answer)
    if not flags & _TAP:
        found = "a tun, which has no Ethernet frames"
    elif flags & _MULTI_QUEUE:
        found = "one of several queues of a tap"
    elif flags & _VNET_HEADER:
        found = "a tap whose frames come behind a header"
    elif not flags & _NO_INFORMATION:
        found = "a tap whose frames come behind a protocol number"
    else:
        os.set_inheritable(fd, False)
        os.set_blocking(fd, False)
        return os.fsdecode(interface.rstrip(b"\0"))
    raise DescriptorWrongKind(name=name, found=found, wanted=wanted)
