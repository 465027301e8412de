"""Commands that make and list chardevs and monitors."""

from __future__ import annotations

from typing import Annotated, Literal, final

import attrs

from vmm import hostio
from vmm.backends.chardev_open import open_chardev
from vmm.backends.chardev_options import ChardevBackend
from vmm.capabilities import MayAdoptDescriptor, MayCreateBackend, MayOpenHostFile, MayQuery
from vmm.errors import BackendInUse, NameTaken, OptionInvalid, Unsupported
from vmm.monitor.command import For
from vmm.monitor.ports import Caller
from vmm.phases.foundation import Host
from vmm.phases.stores import MONITOR, BootStores

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


@final
@attrs.frozen(kw_only=True)
class MonitorAddress:
    """Where a websocket monitor listens."""

    host: str
    """127.0.0.1 or ::1."""
    port: str
    """Number of the port; 0 for any that is free."""


@final
@attrs.frozen(kw_only=True)
class ObjectAdd:
    """Arguments of `object-add`, for the types there are, which are monitors."""

    qom_type: str
    id: str
    chardev: str | None = None
    fd: int | None = None
    """A connected socket that this process was started with; an extension, and not part of the recipe."""
    addr: MonitorAddress | None = None
    """Of a monitor-websocket."""
    token_file: str | None = None
    """A file with the token that clients of a monitor-websocket must know."""
    grant: Literal["observe", "operate", "migrate", "admin"] | None = None
    """What clients of a monitor-websocket may do; by default observe, and no more without a token."""


async def object_add(
    may: Annotated[MayCreateBackend, For("monitor")], host: HostSource, query: MayQuery, args: ObjectAdd
) -> None:
    """Make an object: `monitor-qmp`, a monitor over the socket of a chardev, or `monitor-websocket`."""
    if args.qom_type not in ("monitor-qmp", "monitor-websocket"):
        raise Unsupported(what="Object type", name=args.qom_type, instead="there are monitor-qmp and monitor-websocket")
    machine = query.view(Host)
    if args.id in machine.stores.monitors:
        raise NameTaken(what="Monitor", name=args.id)
    if args.qom_type == "monitor-websocket":
        from vmm.phases.websocket import make_websocket  # The websocket library, which few machines need.

        backend, arguments = make_websocket(machine.monitors, host, args)
        try:
            await may.adopt("monitor", args.id, backend)
        except BaseException:
            backend.close()
            raise
        machine.recorder.record("object-add", arguments)
        return
    if (args.addr, args.token_file, args.grant) != (None, None, None):
        wanted = "a monitor-websocket: addr, token-file and grant are for that type"
        raise OptionInvalid(option="object-add", value=args.id, wanted=wanted)
    if (args.chardev is None) == (args.fd is None):
        raise OptionInvalid(option="object-add", value=args.id, wanted="complete: a monitor-qmp needs chardev or fd")
    if args.fd is not None:
        fd = hostio.adopt_connection(args.fd)
        await may.adopt("monitor", args.id, machine.monitors.over_connection(args.id, fd))
        return
    label = str(args.chardev)
    chardev = machine.stores.take_chardev(label, f"{MONITOR}{args.id}")
    try:
        await chardev.quiesce()
        monitor = machine.monitors.over_chardev(args.id, chardev, held=host.inherits)
        await may.adopt("monitor", args.id, monitor)
    except BaseException:
        machine.stores.free_chardev(label)
        raise
    machine.recorder.record("object-add", {"qom-type": "monitor-qmp", "id": args.id, "chardev": label})


async def object_del(
    may: Annotated[MayCreateBackend, For("monitor")], caller: Caller, query: MayQuery, args: Id
) -> None:
    """End a monitor. A session cannot end its own."""
    if caller.name.startswith(f"{args.id}/"):
        raise BackendInUse(what="Monitor", name=args.id, user="this session; use another one")
    await may.dismiss("monitor", args.id)
    query.view(Host).recorder.forget("object-add", "id", args.id)
