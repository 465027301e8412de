"""Commands that make and list chardevs."""

from __future__ import annotations

from typing import Annotated, final

import attrs

from vmm.backends.chardev_open import open_chardev
from vmm.backends.chardev_options import ChardevBackend
from vmm.capabilities import MayAdoptDescriptor, MayCreateBackend, MayOpenHostFile, MayQuery
from vmm.errors import NameTaken
from vmm.monitor.command import For
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
    may: Annotated[MayCreateBackend, For("chardev")], host: HostSource, query: MayQuery, args: ChardevAdd
) -> ChardevReturn:
    """Make a chardev, and run it until the machine ends or `chardev-remove`."""
    machine = query.view(Host)
    if args.id in machine.stores.chardevs:
        raise NameTaken(what="Chardev", name=args.id)
    chardev = open_chardev(args.id, args.backend, host, machine.complain, machine.leave_by_key)
    try:
        await may.adopt("chardev", args.id, chardev)
    except BaseException:
        chardev.close()
        raise
    return ChardevReturn(pty=chardev.pty)


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
