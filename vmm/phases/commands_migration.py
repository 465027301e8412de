"""Commands of migration and live update."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, final

import attrs
import trio

from vmm.capabilities import (
    MayCancelMigration,
    MayListen,
    MayQuery,
    MaySetMigrationCap,
    MaySetMigrationParam,
    MayStartMigration,
)
from vmm.errors import DescriptorError, MigrationRefused, Unsupported
from vmm.migration.address import DescriptorAddress
from vmm.migration.capability_table import MigrationCapabilityStatus, SetMigrationCapabilities
from vmm.migration.channel import Channel, Channels, MigrationChannel, outgoing_channels
from vmm.migration.parameter_arguments import ParameterValues, SetMigrationParameters
from vmm.migration.status import MigrationInfo
from vmm.monitor.ports import Caller
from vmm.phases.migration_state import MigrationState


async def migrate_set_capabilities(may: MaySetMigrationCap, args: SetMigrationCapabilities) -> None:
    """Turn migration capabilities on and off, all that are named or none."""
    await trio.lowlevel.checkpoint()
    may.update(args.changes())


def query_migrate_capabilities(may: MayQuery) -> list[MigrationCapabilityStatus]:
    """List all migration capabilities that QEMU has, in its order."""
    return may.view(MigrationState).capabilities.query()


async def migrate_set_parameters(may: MaySetMigrationParam, args: SetMigrationParameters) -> None:
    """Set migration parameters, all that are named or none."""
    await trio.lowlevel.checkpoint()
    may.update(args.changes())


def query_migrate_parameters(may: MayQuery) -> ParameterValues:
    """Return all migration parameters."""
    return may.view(MigrationState).parameters.query()


def query_migrate(may: MayQuery) -> MigrationInfo:
    """Say how far the last or present migration is; for a live update, with the stages of its pause."""
    progress = may.view(MigrationState).progress
    return progress.info() if progress is not None else MigrationInfo()


@final
@attrs.frozen(kw_only=True)
class Migrate:
    """Arguments of `migrate`."""

    uri: str | None = None
    channels: list[MigrationChannel] | None = None
    resume: bool = False


def migrate(may: MayStartMigration, query: MayQuery, caller: Caller, args: Migrate) -> Awaitable[None]:
    """Hand the guest over to the process behind `channels`. Replies once the migration has begun.

    Parameter `mode` must be cpr-transfer, and a channel of type cpr be given beside the main one.
    """
    if args.resume:
        raise MigrationRefused(reason="migrate: there is no paused postcopy to resume; leave 'resume' out")
    channels = outgoing_channels(args.uri, args.channels)
    mode = query.view(MigrationState).parameters.mode
    if mode != "cpr-transfer":
        instead = "set parameter 'mode' to 'cpr-transfer' for a live update on this host"
        raise Unsupported(what="Migration mode", name=mode, instead=instead)
    if channels.cpr is None:
        raise MigrationRefused(reason="migrate: mode cpr-transfer needs a channel of type 'cpr' beside the main one")
    from vmm.phases.migrating import TransferPlan  # Brings KVM and the streams; the guest that is to go has them.

    main, cpr = resolved((channels.main, channels.cpr), caller)
    return may.start(TransferPlan(Channels(main, cpr)))


def resolved(addresses: Sequence[Any], caller: Caller) -> list[Any]:
    """Replace names of descriptors by their numbers, all or none; the descriptors then belong to the migration."""
    named = [address.name for address in addresses if isinstance(address, DescriptorAddress) and address.number is None]
    for name in named:
        if name not in caller.descriptors:
            known = ", ".join(sorted(caller.descriptors)) or "none"
            raise DescriptorError(reason=f"This session has no descriptor {name!r} (it has: {known}); send it by getfd")
        if named.count(name) > 1:
            raise DescriptorError(reason=f"Descriptor {name!r} is given for two channels; each needs its own")
    return [
        DescriptorAddress(str(caller.descriptors.pop(address.name)))
        if isinstance(address, DescriptorAddress) and address.number is None
        else address
        for address in addresses
    ]


@final
@attrs.frozen(kw_only=True)
class MigrateIncoming:
    """Arguments of `migrate-incoming`."""

    uri: str | None = None
    channels: list[MigrationChannel] | None = None
    exit_on_error: bool = True


async def migrate_incoming(may: MayListen, caller: Caller, args: MigrateIncoming) -> None:
    """Bind the channels on which a live update comes in. Possible before there is a machine; `query-migrate` shows
    the addresses, with the real port where port 0 was given."""
    if args.channels is None:
        given = "only a URI" if args.uri is not None else "nothing"
        raise MigrationRefused(
            reason="migrate-incoming: a live update needs 'channels', one of type main and one of type cpr; "
            f"{given} was given"
        )
    if not args.exit_on_error:
        instead = "leave it true: a destination whose source was refused has nothing to go on with"
        raise Unsupported(what="migrate-incoming with exit-on-error", name="false", instead=instead)
    channels = [
        Channel.from_json(value, f"migrate-incoming: channels[{index}]") for index, value in enumerate(args.channels)
    ]
    addresses = resolved([channel.address for channel in channels], caller)
    await may.listen(
        [Channel(channel.channel_type, address) for channel, address in zip(channels, addresses, strict=True)]
    )


async def migrate_cancel(may: MayCancelMigration, caller: Caller) -> None:
    """Call a live update off; the guest stays here. Without effect once it has been offered to the other side."""
    await trio.lowlevel.checkpoint()
    may.cancel(f"by {caller.name}")
