"""Commands that make and end objects: monitors, and back ends of devices."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias, final

import attrs

from vmm import host_dirs, host_sockets, hostio
from vmm.capabilities import MayAdoptDescriptor, MayCreateBackend, MayOpenHostFile, MayQuery
from vmm.errors import BackendInUse, InvalidState, NameTaken, OptionInvalid
from vmm.monitor.command import ForEach
from vmm.monitor.ports import Caller
from vmm.monitor.qapi import Size, Union
from vmm.phases.commands_backends import Id
from vmm.phases.foundation import Host
from vmm.phases.host_resources import NO_LOG
from vmm.phases.stores import MONITOR

if TYPE_CHECKING:
    from vmm.backends.rng import Rng
    from vmm.phases.monitors import Monitor
    from vmm.phases.qtest import QtestBackend
    from vmm.phases.stores import BootStores
    from vmm.phases.websocket import WebSocketBackend

HostSource = MayOpenHostFile | MayAdoptDescriptor

DEFAULT_SOURCE: Final = "/dev/urandom"


@attrs.frozen(kw_only=True)
class _Object:
    """What all objects have."""

    id: str


@final
@attrs.frozen(kw_only=True)
class MonitorQmp(_Object):
    """A monitor over a chardev of kind socket or stdio."""

    qom_type: Literal["monitor-qmp"]
    chardev: str | None = None
    fd: int | None = None
    """A connected socket that this process was started with; an extension, and not part of the recipe."""


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
class MonitorWebsocket(_Object):
    """A monitor over websockets; an extension."""

    qom_type: Literal["monitor-websocket"]
    addr: MonitorAddress
    token_file: str | None = None
    """A file with the token that clients must know."""
    grant: Literal["observe", "operate", "migrate", "admin"] | None = None
    """What clients may do; by default observe, and no more without a token."""


@final
@attrs.frozen(kw_only=True)
class RngBuiltin(_Object):
    """Random bytes of the host kernel's generator."""

    qom_type: Literal["rng-builtin"]


@final
@attrs.frozen(kw_only=True)
class RngRandom(_Object):
    """Random bytes of a character device of the host's."""

    qom_type: Literal["rng-random"]
    filename: str = DEFAULT_SOURCE


@final
@attrs.frozen(kw_only=True)
class Qtest(_Object):
    """A socket whose clients drive ports, memory, interrupt lines and clock; one in a machine."""

    qom_type: Literal["qtest"]
    chardev: str
    log: str = NO_LOG
    """A file for every line received and sent; `none` for no file."""


@final
@attrs.frozen(kw_only=True)
class MemoryBackendMemfd(_Object):
    """RAM of this process's own making, which a successor gets. Its size is sealed, so `seal` is on."""

    qom_type: Literal["memory-backend-memfd"]
    size: Size
    """Bytes."""
    hugetlb: bool = False
    """Whether it is of huge pages, which are reserved at once."""
    hugetlbsize: Size | None = None
    """Bytes of a huge page; by default 2 MiB."""
    prealloc: bool = False
    """Whether all of it is allocated at once."""
    seal: bool = True
    share: bool = True
    """On, always: so that a live update is possible."""


@final
@attrs.frozen(kw_only=True)
class MemoryBackendFile(_Object):
    """RAM in a file, where it can stay while no process has it. One machine has it at a time."""

    qom_type: Literal["memory-backend-file"]
    size: Size
    """Bytes."""
    mem_path: str
    """The file, which is made where there is none; in a directory, one without a name is made."""
    prealloc: bool = False
    share: bool = False
    """Must be on: RAM is shared, always, so that a live update is possible."""


@final
@attrs.frozen(kw_only=True)
class SnapshotDirectory(_Object):
    """Where snapshots are, a file each; an extension."""

    qom_type: Literal["snapshot-directory"]
    path: str
    """A directory that is there."""


@final
@attrs.frozen(kw_only=True)
class TlsCredsX509(_Object):
    """Certificates and a key for TLS. It is this process's: it goes neither into a recipe nor to a successor."""

    qom_type: Literal["tls-creds-x509"]
    dir: str
    """Directory with ca-cert.pem; server-cert.pem and server-key.pem, or client-cert.pem and client-key.pem, which a
    client need not have; and ca-crl.pem, which need not be there. Only their owner may have access to keys."""
    endpoint: Literal["client", "server"] = "client"
    """What this side is: the source of a migration is the client, its destination the server."""
    verify_peer: bool = True
    """Whether the peer must have a certificate of the CA."""
    sanity_check: bool = True
    """Whether the own certificate is tried at once."""


ObjectAdd: TypeAlias = Annotated[
    MemoryBackendFile
    | MemoryBackendMemfd
    | MonitorQmp
    | MonitorWebsocket
    | Qtest
    | RngBuiltin
    | RngRandom
    | SnapshotDirectory
    | TlsCredsX509,
    Union("qom-type"),
]
"""Arguments of `object-add`, for the types there are."""

BY_TYPE: Final = ForEach(
    "qom-type",
    {
        "memory-backend-file": "memory",
        "memory-backend-memfd": "memory",
        "monitor-qmp": "monitor",
        "monitor-websocket": "monitor",
        "qtest": "monitor",
        "rng-builtin": "rng",
        "rng-random": "rng",
        "snapshot-directory": "snapshots",
        "tls-creds-x509": "tls",
    },
)
"""Back ends of devices come after the accelerator. The others are there from the beginning."""


async def object_add(
    may: Annotated[MayCreateBackend, BY_TYPE], host: HostSource, query: MayQuery, args: ObjectAdd
) -> None:
    """Make an object: a monitor, a qtest, a back end for devices, one that RAM is made of, or credentials for TLS."""
    machine = query.view(Host)
    _require_free(machine.stores, args.id)
    match args:
        case MonitorQmp():
            await _add_monitor(may, host, machine, args)
        case MonitorWebsocket():
            await _add_websocket(may, host, machine, args)
        case Qtest():
            await _add_qtest(may, host, machine, args)
        case RngBuiltin() | RngRandom():
            await _add_rng(may, host, machine, args)
        case MemoryBackendMemfd() | MemoryBackendFile():
            await _add_memory(may, host, machine, args)
        case SnapshotDirectory():
            await _add_snapshots(may, host, machine, args)
        case TlsCredsX509():
            from vmm.phases.tls_objects import open_credentials  # OpenSSL, which few machines need.

            await may.adopt("tls", args.id, open_credentials(host, args))


def _require_free(stores: BootStores, name: str) -> None:
    if name in stores.monitors:
        raise NameTaken(what="Monitor", name=name)
    if name in stores.rngs or name in stores.memories or name in stores.snapshots or name in stores.tls:
        raise NameTaken(what="Object", name=name)


async def _add_monitor(may: MayCreateBackend, host: HostSource, machine: Host, args: MonitorQmp) -> None:
    if (args.chardev is None) == (args.fd is None):
        raise OptionInvalid(option="object-add", value=args.id, wanted="complete: a monitor-qmp needs chardev or fd")
    if args.fd is not None:
        fd = host_sockets.adopt_connection(args.fd)
        await _adopt(may, args.id, machine.monitors.over_connection(args.id, fd))
        return
    label = str(args.chardev)
    chardev = machine.stores.take_chardev(label, f"{MONITOR}{args.id}")
    try:
        await chardev.quiesce()
        monitor = machine.monitors.over_chardev(args.id, chardev, held=host.inherits)
        await _adopt(may, args.id, monitor)
    except BaseException:
        machine.stores.free_chardev(label)
        raise
    made = {"qom-type": "monitor-qmp", "id": args.id, "chardev": label}
    if monitor.moves:
        machine.recorder.record("object-add", made)
    elif monitor.moving is not None:
        machine.recorder.set_aside("chardev-add", "id", label)
        machine.recorder.record("object-add", made)
        machine.recorder.set_aside("object-add", "id", args.id)
    else:
        machine.recorder.forget("chardev-add", "id", label)


async def _adopt(may: MayCreateBackend, name: str, monitor: Monitor | WebSocketBackend | QtestBackend) -> None:
    try:
        await may.adopt("monitor", name, monitor)
    except BaseException:
        monitor.close()
        raise


async def _add_websocket(may: MayCreateBackend, host: HostSource, machine: Host, args: MonitorWebsocket) -> None:
    with hostio.importing("vmm.phases.websocket"):
        from vmm.phases.websocket import make_websocket  # The websocket library, which few machines need.

    backend, arguments = make_websocket(machine.monitors, host, args)
    await _adopt(may, args.id, backend)
    machine.recorder.record("object-add", arguments)


async def _add_qtest(may: MayCreateBackend, host: HostSource, machine: Host, args: Qtest) -> None:
    with hostio.importing("vmm.phases.qtest"):
        from vmm.phases.qtest import QtestBackend, TrafficLog  # For tests of devices; no guest needs it.

    stores = machine.stores
    present = next((name for name, (it, _) in stores.monitors.items() if isinstance(it, QtestBackend)), None)
    if present is not None:
        state, instead = f"while {present!r} is there", "a machine has one; object-del ends it"
        raise InvalidState(what=f"object-add of qtest {args.id!r}", state=state, instead=instead)
    chardev = stores.take_chardev(args.chardev, f"{MONITOR}{args.id}")
    with ExitStack() as undo:
        undo.callback(stores.free_chardev, args.chardev)
        await chardev.quiesce()
        log = TrafficLog(args.id, machine.complain)
        undo.callback(log.close)
        if args.log != NO_LOG:
            log.fd = host.obtain(f"monitor/{args.id}/log", lambda: hostio.open_output_file(args.log, append=False))
        qtest = QtestBackend(args.id, chardev, log, tree=machine.tree, complain=machine.complain, held=host.inherits)
        await _adopt(may, args.id, qtest)
        undo.pop_all()
    if qtest.moves:
        machine.recorder.record_options("object-add", args)
    else:
        machine.recorder.forget("chardev-add", "id", args.chardev)


async def _add_rng(may: MayCreateBackend, host: HostSource, machine: Host, args: RngBuiltin | RngRandom) -> None:
    from vmm.backends.rng import BuiltinRng, DeviceRng  # Which a monitor alone does not need.

    rng: Rng
    if isinstance(args, RngRandom):
        path, name = args.filename, f"object/{args.id}/file"
        fd = host.obtain(name, lambda: hostio.open_random_source(path))
        rng = DeviceRng(hostio.adopt_random_source(fd, name), path)
    else:
        rng = BuiltinRng()
    try:
        await may.adopt("rng", args.id, rng)
    except BaseException:
        rng.close()
        raise
    machine.recorder.record_options("object-add", args)


async def _add_memory(
    may: MayCreateBackend, host: HostSource, machine: Host, args: MemoryBackendMemfd | MemoryBackendFile
) -> None:
    from vmm.phases.memory_objects import open_memory  # Which a monitor alone does not need.

    memory = await open_memory(host, args)
    try:
        await may.adopt("memory", args.id, memory)
    except BaseException:
        memory.close()
        raise
    machine.recorder.record_options("object-add", args)


async def _add_snapshots(may: MayCreateBackend, host: HostSource, machine: Host, args: SnapshotDirectory) -> None:
    from vmm.backends import snapshots  # Likewise.

    name = f"object/{args.id}/directory"
    fd = host_dirs.adopt_directory(host.obtain(name, lambda: hostio.open_directory(args.path)), name)
    directory = snapshots.SnapshotDirectory(fd, args.path)
    try:
        directory.sweep()
        await may.adopt("snapshots", args.id, directory)
    except BaseException:
        directory.close()
        raise
    machine.recorder.record_options("object-add", args)


async def object_del(may: MayCreateBackend, caller: Caller, query: MayQuery, args: Id) -> None:
    """End an object that nothing uses. A session cannot end its own monitor."""
    machine = query.view(Host)
    if caller.name.startswith(f"{args.id}/"):
        raise BackendInUse(what="Monitor", name=args.id, user="this session; use another one")
    stores = machine.stores
    families: dict[str, dict[str, Any]] = {
        "rng": stores.rngs,
        "memory": stores.memories,
        "snapshots": stores.snapshots,
        "tls": stores.tls,
    }
    family = next((name for name, objects in families.items() if args.id in objects), "monitor")
    await may.dismiss(family, args.id)
    machine.recorder.forget("object-add", "id", args.id)
