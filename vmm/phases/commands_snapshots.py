"""Commands on snapshots: the guest's state and RAM, whole, in a file of a snapshot directory.

QEMU's arguments. While there are no block devices, `vmstate` names an object of type snapshot-directory, and `devices`
nothing, or that object again.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable
from contextlib import closing
from typing import TYPE_CHECKING, Final, final

import attrs

from vmm import hostio
from vmm.capabilities import MayQuery, MayRestoreGuest, MayStartMigration
from vmm.errors import BackendNotFound, HostFileRefused, MigrationRefused, OptionInvalid, StreamCorrupt
from vmm.phases.foundation import Host
from vmm.phases.migration_state import MigrationState, Wishes

if TYPE_CHECKING:
    from vmm.backends.snapshots import SnapshotDirectory

_HEAD: Final = 4096
"""Bytes at the beginning of a file that its header is within."""


@final
@attrs.frozen(kw_only=True)
class SnapshotSave:
    """Arguments of `snapshot-save`."""

    job_id: str
    """Name of the job that it is."""
    tag: str
    """Name of the snapshot."""
    vmstate: str | None = None
    """Name of the snapshot directory; default: the only one. QEMU has no default."""
    devices: list[str]
    """Empty, or that directory again."""


@final
@attrs.frozen(kw_only=True)
class SnapshotJob:
    """Arguments of `snapshot-load`."""

    job_id: str
    """Name of the job that it is."""
    tag: str
    """Name of the snapshot."""
    vmstate: str
    """Name of the snapshot directory."""
    devices: list[str]
    """Empty, or that directory again."""


@final
@attrs.frozen(kw_only=True)
class SnapshotDelete:
    """Arguments of `snapshot-delete`."""

    job_id: str
    tag: str
    devices: list[str]
    """The snapshot directory."""


@final
@attrs.frozen(kw_only=True)
class SnapshotInfo:
    """A file in a snapshot directory."""

    tag: str
    vmstate: str
    """Name of the directory's object."""
    size: int
    """Bytes that it takes up on the disk."""
    date_sec: int
    """When it was saved: seconds since the epoch."""
    machine: str | None = None
    """Name of the machine that it is of."""
    fault: str | None = None
    """Why it is no snapshot, where its beginning tells."""


def snapshot_save(may: MayStartMigration, query: MayQuery, args: SnapshotSave) -> Awaitable[None]:
    """Save the guest under a new tag, as a job; the guest runs on meanwhile, and afterwards."""
    from vmm.phases.snapshots import SavePlan  # Brings KVM and the streams; a guest that is to be saved has them.

    directory = _directory(query, "snapshot-save", args.vmstate, args.devices)
    directory.require_new(args.tag)
    wishes = Wishes(job=args.job_id, kind="snapshot-save")
    query.view(MigrationState).check(wishes)
    return may.start(SavePlan(directory, args.tag, wishes))


def snapshot_load(
    may: MayRestoreGuest, running: MayStartMigration, query: MayQuery, args: SnapshotJob
) -> Awaitable[None]:
    """Put the guest that is saved under a tag in place of the present one, as a job; it runs if that ran.

    A snapshot of another machine is refused, and so is one that is damaged: the present guest goes on then.
    """
    from vmm.phases.building import SavedState

    directory = _directory(query, "snapshot-load", args.vmstate, args.devices)
    wishes = Wishes(job=args.job_id, kind="snapshot-load")
    query.view(MigrationState).check(wishes)
    with closing(SavedState(directory.open(args.tag), wishes)) as saved:
        return may.decide(saved)


def snapshot_delete(may: MayStartMigration, query: MayQuery, args: SnapshotDelete) -> Awaitable[None]:
    """Remove a snapshot, as a job."""
    from vmm.phases.snapshots import DeletePlan

    if len(args.devices) != 1:
        wanted = "the name of the one object of type snapshot-directory that it is in"
        raise OptionInvalid(option="snapshot-delete: devices", value=args.devices, wanted=wanted)
    directory = _directory(query, "snapshot-delete", args.devices[0], [])
    directory.require(args.tag)
    query.view(MigrationState).check(Wishes(job=args.job_id))
    return may.start(DeletePlan(directory, args.tag, args.job_id))


def x_query_snapshots(may: MayQuery) -> list[SnapshotInfo]:
    """List the snapshots in all snapshot directories, by directory and tag."""
    stores = may.view(Host).stores
    return [
        _info(name, directory, tag)
        for name, (directory, _) in sorted(stores.snapshots.items())
        for tag in directory.tags()
    ]


def _directory(query: MayQuery, command: str, name: str | None, devices: list[str]) -> SnapshotDirectory:
    """Return the directory that `vmstate` names, or the only one.

    Raises:
        BackendNotFound, OptionInvalid, MigrationRefused: there is no such directory, or not just one.
    """
    there = query.view(Host).stores.snapshots
    if name is None:
        if len(there) != 1:
            known = ", ".join(sorted(there)) or "none"
            reason = f"{command}: vmstate must name the object of type snapshot-directory; there are: {known}"
            raise MigrationRefused(reason=reason)
        (name,) = there
    if name not in there:
        known = f"; there are: {', '.join(sorted(there)) or 'none'}"
        raise BackendNotFound(what="Snapshot directory", name=name, known=known)
    if devices not in ([], [name]):
        wanted = f"empty, or {name!r} alone: there are no block devices to be saved"
        raise OptionInvalid(option=f"{command}: devices", value=devices, wanted=wanted)
    return there[name][0]


def _info(name: str, directory: SnapshotDirectory, tag: str) -> SnapshotInfo:
    machine: str | None = None
    fault: str | None = None
    size = date = 0
    try:
        fd = directory.open(tag)
        try:
            found = os.fstat(fd)
            size, date = found.st_blocks * 512, int(found.st_mtime)
            machine = _machine_of(os.read(fd, _HEAD))
        finally:
            os.close(fd)
    except (HostFileRefused, StreamCorrupt) as error:
        fault = str(error)
    except OSError as error:
        fault = str(hostio.refused("read", directory.path_of(tag), error))
    return SnapshotInfo(tag=tag, vmstate=name, size=size, date_sec=date, machine=machine, fault=fault)


def _machine_of(head: bytes) -> str:
    """Return the name of the machine whose stream begins with `head`. Raises `StreamCorrupt`."""
    from vmm.migration.stream import StreamReader
    from vmm.migration.stream_records import Header

    reader = StreamReader(seekable=True)
    records = reader.feed(head)
    if not records:
        reader.close()
    assert isinstance(records[0], Header), "the reader lets no stream begin otherwise"
    return records[0].machine
