"""Commands that make and end network back ends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Final, Literal, final

import attrs

from vmm import taps
from vmm.backends.tap import Tap
from vmm.capabilities import MayAdoptDescriptor, MayCreateBackend, MayOpenHostFile, MayQuery
from vmm.errors import DescriptorError, NameTaken, OptionInvalid, Unsupported
from vmm.monitor.command import For
from vmm.monitor.ports import Caller
from vmm.phases.commands_backends import Id
from vmm.phases.foundation import Host

HostSource = MayOpenHostFile | MayAdoptDescriptor

_ONLY: Final[Mapping[str, object]] = {
    "script": "no", "downscript": "no", "vhost": False, "vnet_hdr": False, "queues": 1,
}  # fmt: skip
"""Members of QEMU's whose one value here is this; it need not be given."""


@final
@attrs.frozen(kw_only=True)
class NetdevAdd:
    """Arguments of `netdev_add`."""

    type: Literal["tap"]
    id: str
    ifname: str | None = None
    """Name of the interface, which is made if there is none."""
    fd: str | None = None
    """Name of a descriptor that `getfd` has brought, instead."""
    script: str | None = None
    """No program sets the interface up: `no`, or left out. `downscript` likewise."""
    downscript: str | None = None
    vhost: bool | None = None
    """The kernel does not drive it: false, or left out."""
    vnet_hdr: bool | None = attrs.field(default=None, metadata={"wire": "vnet_hdr"})
    """Frames come bare: false, or left out."""
    queues: int | None = None
    """1, or left out."""

    def check(self) -> None:
        """Raise `Unsupported` or `OptionInvalid` for the first thing that cannot be."""
        for member, only in _ONLY.items():
            value = getattr(self, member)
            if value not in (None, only):
                shown = only if isinstance(only, str) else str(only).lower()
                instead = f"leave it out, or say {shown}: set the interface up beforehand"
                raise Unsupported(what="Member of netdev_add", name=f"{member}={_shown(value)}", instead=instead)
        if (self.ifname is None) == (self.fd is None):
            raise OptionInvalid(option="netdev_add", value=self.id, wanted="complete: a tap needs ifname or fd")


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


async def netdev_add(
    may: Annotated[MayCreateBackend, For("netdev")],
    host: HostSource,
    caller: Caller,
    query: MayQuery,
    args: NetdevAdd,
) -> None:
    """Make a network back end, and hold it until the machine ends or `netdev_del`. There is no network device yet.

    A live update hands it over as it is: the interface keeps its carrier and what waits in it.
    """
    args.check()
    machine = query.view(Host)
    name = f"netdev/{args.id}"
    if args.id in machine.stores.netdevs:
        raise NameTaken(what="Netdev", name=args.id)
    fd = _named(args.fd, caller) if args.fd is not None else host.obtain(name, lambda: taps.open_tap(str(args.ifname)))
    try:
        tap = Tap(fd, taps.adopt_tap(fd, name))
    except BaseException:
        os.close(fd)
        raise
    try:
        await may.adopt("netdev", args.id, tap)
    except BaseException:
        tap.close()
        raise
    # By its interface, whichever way it came: where no descriptor comes along, that is what can be opened.
    machine.recorder.record("netdev_add", {"type": "tap", "id": args.id, "ifname": tap.interface})


def _named(name: str, caller: Caller) -> int:
    """Take the descriptor that a session calls `name`, or that this process was started with under that number.

    Raises:
        DescriptorError: there is none.
        DescriptorWrongKind: it is no tap; it stays whose it was.
    """
    if caller.by_number and name.isascii() and name.isdecimal() and len(name) < 10:
        taps.adopt_tap(int(name), name)
        return int(name)
    if name not in caller.descriptors:
        known = ", ".join(sorted(caller.descriptors)) or "none"
        raise DescriptorError(reason=f"This session has no descriptor {name!r} (it has: {known}); send it by getfd")
    taps.adopt_tap(caller.descriptors[name], name)
    return caller.descriptors.pop(name)


async def netdev_del(may: Annotated[MayCreateBackend, For("netdev")], query: MayQuery, args: Id) -> None:
    """End a network back end."""
    await may.dismiss("netdev", args.id)
    query.view(Host).recorder.forget("netdev_add", "id", args.id)
