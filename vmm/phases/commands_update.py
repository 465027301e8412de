"""Commands on what would become of a machine in a live update, before it is one."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import final

import attrs
import trio

from vmm.capabilities import MayListen, MayOpenHostFile, MayQuery, MayStartMigration
from vmm.errors import CprRefused, InvalidArguments, MigrationRefused, OptionInvalid
from vmm.migration.channel import Channels, MigrationChannel, outgoing_channels
from vmm.monitor.arguments import structure
from vmm.monitor.ports import Caller
from vmm.phases.commands_migration import require_sockets, resolved
from vmm.phases.differences import Difference


@final
@attrs.frozen(kw_only=True)
class CprCheck:
    """Arguments of `x-cpr-check`: those that `migrate` would get."""

    channels: list[MigrationChannel]


@final
@attrs.frozen(kw_only=True)
class CprCheckInfo:
    """What a destination would do with the machine."""

    admitted: bool
    """Whether it would build it."""
    reason: str | None = None
    """Why not."""
    differences: list[Difference]
    """Every item of the machine, with what would be otherwise there."""


@final
@attrs.frozen(kw_only=True)
class _Verdict:
    """The body of message `checked`."""

    reason: str
    differences: list[Difference]


async def x_cpr_check(may: MayStartMigration, caller: Caller, args: CprCheck) -> CprCheckInfo:
    """Ask the destination behind `channels` what it would make of this machine; neither of the two changes.

    The dry run of a live update: connect, compare, report. The destination awaits the next source afterwards.
    """
    channels = outgoing_channels(None, args.channels)
    if channels.cpr is None:
        raise MigrationRefused(reason="x-cpr-check: a destination is asked over its channel of type 'cpr'; give it")
    require_sockets(channels, "x-cpr-check")
    from vmm.phases.migrating import TransferPlan  # Brings KVM and the streams; the guest that is to go has them.

    main, cpr = resolved((channels.main, channels.cpr), caller)
    body = await may.check(TransferPlan(Channels(main, cpr)))
    try:
        verdict = structure(_Verdict, body, "x-cpr-check")
    except InvalidArguments as error:
        raise CprRefused(side="source", step="checking", reason=f"the answer is none: {error}") from error
    assert isinstance(verdict, _Verdict)
    reason = verdict.reason or None
    return CprCheckInfo(admitted=reason is None, reason=reason, differences=verdict.differences)


async def x_cpr_abandon(may: MayListen) -> None:
    """Give up the CPR channel on which a machine is awaited; one can be made here then, or be awaited anew.

    What was noted to be laid over that machine is forgotten.
    """
    await may.abandon()


@final
@attrs.frozen(kw_only=True)
class AllowDifference:
    """Arguments of `x-allow-difference`."""

    names: list[str]
    """As `query-differences` and `x-cpr-check` have them."""


async def x_allow_difference(may: MayListen, args: AllowDifference) -> None:
    """Let the machine that arrives here differ from the source's in `names`, though its guest could tell."""
    await trio.lowlevel.checkpoint()
    may.allow(args.names)


@final
@attrs.frozen(kw_only=True)
class AllowResource:
    """Arguments of `x-allow-resource`."""

    name: str
    """What the resource is called: kernel, initrd, acpi-table.N, chardev/ID, object/ID, monitor/ID or netdev/ID."""
    path: str | None = None
    """Where it is on this host; by default, where the recipe that comes says."""
    fd: int | None = None
    """A descriptor that this process was started with, instead."""


async def x_allow_resource(host: MayOpenHostFile, may: MayListen, args: AllowResource) -> None:
    """Let a machine that comes in have a resource of this host, for which no descriptor comes with it."""
    await trio.lowlevel.checkpoint()
    if args.path is not None and args.fd is not None:
        raise OptionInvalid(option="x-allow-resource", value=args.name, wanted="clear: give path, fd or neither")
    if args.fd is not None and not 0 <= args.fd < 1 << 31:
        raise OptionInvalid(option="x-allow-resource, fd", value=args.fd, wanted="the number of a descriptor")
    may.allow_resource(args.name, f"fd:{args.fd}" if args.fd is not None else args.path or "")


def x_cpr_undo(may: MayStartMigration) -> Awaitable[None]:
    """Give the guest back to the process that it came from, which a live update with `x-keep-source` left waiting.

    Replies once that has begun, as `migrate` does; it is a live update in the other direction, sessions included.
    """
    return may.undo()


async def x_cpr_forget(may: MayStartMigration) -> None:
    """Let the process that the guest came from end; the guest stays here."""
    await trio.lowlevel.checkpoint()
    may.forget()


def query_differences(may: MayQuery) -> list[Difference]:
    """List in what the machine here differs from the source's that asked last, or whose machine this is now."""
    from vmm.phases.incoming_port import IncomingPort

    return list(may.view(IncomingPort).differences)
