"""Commands that make and list chardevs."""

from __future__ import annotations

from typing import Annotated, final

import attrs

from vmm import host_fds
from vmm.backends.chardev_open import make_chardev, socket_kinds
from vmm.backends.chardev_options import (
    ChardevBackend,
    ChardevSocketWrapper,
    ChardevStdioWrapper,
    FdSocketAddress,
    FdSocketAddressWrapper,
)
from vmm.capabilities import MayAdoptDescriptor, MayCreateBackend, MayOpenHostFile, MayQuery
from vmm.errors import BackendInUse, DescriptorError, DescriptorMissing, NameTaken
from vmm.monitor.command import For
from vmm.monitor.ports import Caller
from vmm.phases.foundation import Host
from vmm.phases.stores import BootStores

HostSource = MayOpenHostFile | MayAdoptDescriptor


@final
@attrs.frozen(kw_only=True)
class ChardevAdd:
    """Arguments of `chardev-add`."""

    id: str
    backend: ChardevBackend


@final
@attrs.frozen(kw_only=True)
class ChardevReturn:
    """What `chardev-add` made."""

    pty: str | None = None
    """Path of the pty's slave."""


@final
@attrs.frozen(kw_only=True)
class Id:
    """Arguments that name something."""

    id: str


@final
@attrs.frozen(kw_only=True)
class ChardevInfo:
    """QEMU's ChardevInfo."""

    label: str
    filename: str
    frontend_open: bool


async def chardev_add(
    may: Annotated[MayCreateBackend, For("chardev")],
    host: HostSource,
    caller: Caller,
    query: MayQuery,
    args: ChardevAdd,
) -> ChardevReturn:
    """Make a chardev, and run it until the machine ends or `chardev-remove`."""
    machine = query.view(Host)
    if args.id in machine.stores.chardevs:
        raise NameTaken(what="Chardev", name=args.id)
    if isinstance(args.backend, ChardevStdioWrapper) and not host.inherits:
        _require_stdio_free(machine)
    backend = args.backend
    if isinstance(backend, ChardevSocketWrapper) and isinstance(backend.data.addr, FdSocketAddressWrapper):
        backend = _with_descriptor(args.id, backend, backend.data.addr.data.name, host, caller)
    chardev = await make_chardev(args.id, backend, host, machine.complain, machine.leave_by_key)
    try:
        await may.adopt("chardev", args.id, chardev)
    except BaseException:
        chardev.close()
        raise
    return ChardevReturn(pty=chardev.pty)


def _require_stdio_free(machine: Host) -> None:
    """Raise `BackendInUse` where there is a chardev on standard input and output: each would get a part of the input.

    What a predecessor sent is another process's.
    """
    for label, held in machine.stores.chardevs.items():
        if held.chardev.kind == "stdio":
            raise BackendInUse(what="Chardev kind", name="stdio", user=f"chardev {label!r}")


def _with_descriptor(
    label: str, backend: ChardevSocketWrapper, name: str, host: HostSource, caller: Caller
) -> ChardevSocketWrapper:
    """Put the number of a descriptor in place of the name that `getfd` gave it; the chardev owns it from here on.

    Raises:
        DescriptorError, DescriptorWrongKind: there is none of that name, or it is no such socket.
        DescriptorMissing: a number in a recipe from elsewhere, which means nothing in this process.
    """
    if host.inherits:
        if host.names(f"chardev/{label}/") is None:
            raise DescriptorMissing(name=f"chardev/{label}")
        return backend
    if name.isascii() and name.isdecimal() and len(name) < 10:
        return backend
    if name not in caller.descriptors:
        known = ", ".join(sorted(caller.descriptors)) or "none"
        raise DescriptorError(reason=f"This session has no descriptor {name!r} (it has: {known}); send it by getfd")
    host_fds.require_kind(caller.descriptors[name], name, *socket_kinds(backend.data)[not backend.data.server])
    number = FdSocketAddress(str(caller.descriptors.pop(name)))
    return ChardevSocketWrapper(attrs.evolve(backend.data, addr=FdSocketAddressWrapper(number)))


async def chardev_remove(may: Annotated[MayCreateBackend, For("chardev")], query: MayQuery, args: Id) -> None:
    """End a chardev that nothing uses."""
    await may.dismiss("chardev", args.id)
    query.view(Host).recorder.forget("chardev-add", "id", args.id)


def query_chardev(may: MayQuery) -> list[ChardevInfo]:
    """List the chardevs."""
    stores = may.view(BootStores)
    served = {monitor.chardev for monitor, _ in stores.monitors.values() if monitor.clients}
    return [
        ChardevInfo(
            label=label,
            # The clients of a monitor's socket are the monitor's, and the chardev knows nothing of them.
            filename=entry.chardev.filename.removeprefix("disconnected:" if label in served else ""),
            frontend_open=entry.user is not None,
        )
        for label, entry in stores.chardevs.items()
    ]
