"""Commands of migration and live update."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import attrs
import trio

from vmm import host_sockets, hostio
from vmm.capabilities import (
    MayCancelMigration,
    MayListen,
    MayOpenHostFile,
    MayQuery,
    MayRestoreGuest,
    MaySetMigrationCap,
    MaySetMigrationParam,
    MayStartMigration,
    MaySteerPostcopy,
    MaySwitchOver,
)
from vmm.errors import DescriptorError, MigrationRefused, OptionInvalid
from vmm.migration.address import ChannelAddress, DescriptorAddress, ExecAddress, FileAddress, HostAddress
from vmm.migration.capability_table import MigrationCapabilityStatus, SetMigrationCapabilities
from vmm.migration.channel import Channel, Channels, MigrationChannel, incoming_channels, outgoing_channels
from vmm.migration.parameter_arguments import ParameterValues, SetMigrationParameters
from vmm.migration.status import KeptProcess, MigrationInfo, StatusName
from vmm.monitor.ports import Caller
from vmm.phases.foundation import Host
from vmm.phases.migration_state import NO_WISHES, MigrationState, Wishes

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.migration.connection import Connection
    from vmm.phases.copy_plan import CopyPlan
    from vmm.phases.executing import ExecPlan


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
    """Say how far the last or present migration is; for a live update, with the stages of its pause.

    `blocked-reasons` has what of the machine cannot go over in the present `mode`, before anything starts.
    """
    from vmm.phases.blockers import blocked_reasons  # Which looks at what only a machine under way has.

    state, host = may.view(MigrationState), may.view(Host)
    # What has left is not here to be blocked.
    reasons = [] if host.status.name == "postmigrate" else blocked_reasons(host, state.parameters.values)
    progress = state.progress
    info = progress.info(reasons) if progress is not None else MigrationInfo(blocked_reasons=reasons or None)
    kept = host.predecessor
    if kept is None or not kept.waits:
        return info
    return attrs.evolve(info, x_kept=KeptProcess(pid=kept.pid, program=kept.program))


@attrs.frozen(kw_only=True)
class _Inline:
    """What a migration can be given besides where it goes. QEMU has none of it."""

    capabilities: list[MigrationCapabilityStatus] | None = None
    """Migration capabilities for this migration alone: afterwards they are as before, but for those that were set
    meanwhile. Takes may-set-migration-cap besides."""
    parameters: ParameterValues | None = None
    """Migration parameters, likewise. Takes may-set-migration-param besides."""
    job_id: str | None = None
    """Makes the migration a job of that name, type `migrate`."""

    def wishes(self, command: str, cap: MaySetMigrationCap | None, param: MaySetMigrationParam | None) -> Wishes:
        """Return them, unchecked. Raises `MigrationRefused` if a session may not have what it wants."""
        for member, value, token in (
            ("capabilities", self.capabilities, cap),
            ("parameters", self.parameters, param),
        ):
            if value is not None and token is None:
                kind = MaySetMigrationCap if member == "capabilities" else MaySetMigrationParam
                reason = f"{command}: {member!r} takes {kind.wire_name}, which this session is not lent; leave it out"
                raise MigrationRefused(reason=reason)
        return Wishes(
            SetMigrationCapabilities(capabilities=self.capabilities or []).changes(),
            self.parameters.changes() if self.parameters is not None else {},
            self.job_id,
        )


@final
@attrs.frozen(kw_only=True)
class Migrate(_Inline):
    """Arguments of `migrate`."""

    uri: str | None = None
    channels: list[MigrationChannel] | None = None
    resume: bool = False


def migrate(
    may: MayStartMigration,
    query: MayQuery,
    host: MayOpenHostFile | None,
    cap: MaySetMigrationCap | None,
    param: MaySetMigrationParam | None,
    caller: Caller,
    args: Migrate,
) -> Awaitable[None]:
    """Move the guest to the process behind `uri` or `channels`, or save it in a file. Replies once that has begun.

    Parameter `mode` says how: `normal` and `cpr-reboot` copy it, which stands meanwhile, and leave RAM where it is with
    x-ignore-shared, a file of RAM and a `file:` to save in; `cpr-transfer` hands it over on this host, and needs a
    channel of type cpr beside the main one; `cpr-exec` executes `cpr-exec-command` in this process, which has the guest
    again then, and uses no channel. A `file:` takes may-open-host-file besides, and so does an `exec:`.
    """
    state, wishes = query.view(MigrationState), args.wishes("migrate", cap, param)
    state.check(wishes)
    mode = wishes.parameters.get("mode", state.parameters.mode)
    if mode == "cpr-exec":
        return may.start(_exec_plan(args, state, wishes, host))
    channels = outgoing_channels(args.uri, args.channels)
    if args.resume and mode != "normal":
        raise MigrationRefused(reason="migrate: there is no paused postcopy to resume; leave 'resume' out")
    if mode in ("normal", "cpr-reboot"):
        if channels.cpr is not None:
            reason = "migrate: a channel of type 'cpr' is for mode cpr-transfer; set parameter 'mode', or leave it out"
            raise MigrationRefused(reason=reason)
        plan = _copy_plan(channels.main, wishes, host, caller)
        plan.resume = args.resume
        return may.start(plan)
    if channels.cpr is None:
        raise MigrationRefused(reason="migrate: mode cpr-transfer needs a channel of type 'cpr' beside the main one")
    require_sockets(channels, "migrate")
    from vmm.phases.migrating import TransferPlan  # Brings KVM and the streams; the guest that is to go has them.

    main, cpr = resolved((channels.main, channels.cpr), caller)
    sessions = bool(wishes.parameters.get("migrate-sessions", state.parameters["migrate-sessions"]))
    return may.start(TransferPlan(Channels(main, cpr), sessions, wishes))


def _exec_plan(args: Migrate, state: MigrationState, wishes: Wishes, host: MayOpenHostFile | None) -> ExecPlan:
    from vmm.phases.executing import ExecPlan  # Likewise.

    if args.uri is not None or args.channels is not None:
        outgoing_channels(args.uri, args.channels)  # QEMU's clients name a file; none is needed
    if host is None:
        reason = "migrate: mode cpr-exec takes may-open-host-file, which this session is not lent; use cpr-transfer"
        raise MigrationRefused(reason=reason)
    plan = ExecPlan(wishes.parameters.get("cpr-exec-command", state.parameters["cpr-exec-command"]), wishes)
    plan.check()
    return plan


def require_sockets(channels: Channels, command: str) -> None:
    """Raise `MigrationRefused` if a channel of a live update is a file or a command."""
    for kind, address in (("main", channels.main), ("cpr", channels.cpr)):
        if address is not None:
            require_socket(kind, address, command)


def require_socket(kind: str, address: ChannelAddress, command: str) -> None:
    """Raise `MigrationRefused` if the channel of that kind of a live update is a file or a command."""
    if isinstance(address, ExecAddress | FileAddress):
        reason = f"{command}: the {kind} channel of a live update must be a socket, not {address.what}"
        raise MigrationRefused(reason=reason)


def _copy_plan(address: ChannelAddress, wishes: Wishes, host: MayOpenHostFile | None, caller: Caller) -> CopyPlan:
    from vmm.phases.copy_plan import CopyPlan  # Likewise.

    if isinstance(address, FileAddress):
        may = _required(host, address, "migrate")

        def open_file() -> int:
            return may.obtain("state", lambda: hostio.open_state_file(address.filename, address.offset))

        return CopyPlan(address, open_file, wishes=wishes)
    if isinstance(address, ExecAddress):
        return CopyPlan(address, start_command=_starter(_required(host, address, "migrate"), address), wishes=wishes)
    return CopyPlan(resolved((address,), caller, "out")[0], wishes=wishes)


def _starter(may: MayOpenHostFile, address: ExecAddress) -> Callable[[bool], Connection]:
    from vmm.migration.command import start_command

    def start(two_way: bool) -> Connection:
        started: list[Connection] = []

        def obtain() -> int:
            started.append(start_command(address, "out", two_way=two_way))
            return started[0].fd

        may.obtain("state", obtain)
        return started[0]

    return start


def _required(host: MayOpenHostFile | None, address: HostAddress, command: str) -> MayOpenHostFile:
    if host is None:
        reason = f"{command}: {address.what} takes may-open-host-file, which this session is not lent; use a socket"
        raise MigrationRefused(reason=reason)
    return host


def resolved(addresses: Sequence[Any], caller: Caller, stream: Literal["out", "in"] | None = None) -> list[Any]:
    """Replace names of descriptors by their numbers, all or none; the descriptors then belong to the migration.

    Args:
        stream: where a state stream alone goes through it; it need not be a socket then.

    Raises:
        DescriptorError: there is none of that name, it is given twice, or a session gives a number.
        DescriptorWrongKind: it is no stream socket. It stays whose it was.
    """
    from vmm.migration.connect import require_stream  # Most machines await nothing.

    names = [address.name for address in addresses if isinstance(address, DescriptorAddress)]
    for name in names:
        if names.count(name) > 1:
            raise DescriptorError(reason=f"Descriptor {name!r} is given for two channels; each needs its own")
        if stream is None:
            host_sockets.require_stream_socket(_number(name, caller), name)
        else:
            require_stream(_number(name, caller), name, stream)
    return [
        DescriptorAddress(str(caller.descriptors.pop(address.name, address.number)))
        if isinstance(address, DescriptorAddress)
        else address
        for address in addresses
    ]


def _number(name: str, caller: Caller) -> int:
    number = DescriptorAddress(name).number
    if number is not None:
        if not caller.by_number:
            reason = f"Descriptor {name!r} is a number, and of those no session can know; send it by getfd, and name it"
            raise DescriptorError(reason=reason)
        return number
    if name not in caller.descriptors:
        known = ", ".join(sorted(caller.descriptors)) or "none"
        raise DescriptorError(reason=f"This session has no descriptor {name!r} (it has: {known}); send it by getfd")
    return caller.descriptors[name]


@final
@attrs.frozen(kw_only=True)
class MigrateIncoming(_Inline):
    """Arguments of `migrate-incoming`."""

    uri: str | None = None
    channels: list[MigrationChannel] | None = None
    exit_on_error: bool = True


async def migrate_incoming(
    may: MayListen,
    query: MayQuery,
    host: MayOpenHostFile | None,
    cap: MaySetMigrationCap | None,
    param: MaySetMigrationParam | None,
    caller: Caller,
    args: MigrateIncoming,
) -> Awaitable[None]:
    """Bind what a guest comes in on: a main channel for one that is copied, and one of type cpr for a live update.

    Possible before there is a machine: then its recipe comes with it. In preconfig and devices the machine goes on to
    phase incoming, and the reply is sent there. `query-migrate` shows the addresses, with the real port where port 0
    was given. With `exit-on-error` false this process stays, and may await another guest, after one that was refused;
    a live update cannot have that. A `file:` takes may-open-host-file besides, and so does an `exec:`.
    """
    from vmm.migration.connect import close_descriptors  # Most machines await nothing.

    channels, wishes = incoming_channels(args.uri, args.channels), args.wishes("migrate-incoming", cap, param)
    query.view(MigrationState).check(wishes)
    for channel in channels:
        if isinstance(channel.address, ExecAddress | FileAddress):
            _required(host, channel.address, "migrate-incoming")
    copied = [channel.channel_type for channel in channels] == ["main"]
    addresses = resolved([channel.address for channel in channels], caller, "in" if copied else None)
    bound = [Channel(channel.channel_type, address) for channel, address in zip(channels, addresses, strict=True)]
    try:
        return await may.listen(bound, exit_on_error=args.exit_on_error, wishes=wishes)
    finally:
        close_descriptors(addresses)


@final
@attrs.frozen(kw_only=True)
class LoadVm:
    """Arguments of `loadvm`."""

    name: str
    """Path of a file that `migrate` has written to a `file:`."""
    on_demand: bool | None = None
    """Whether RAM at fixed places of the file comes as it is used: `x-restore-on-demand` for this load alone."""


def loadvm(may: MayRestoreGuest, host: MayOpenHostFile, args: LoadVm) -> Awaitable[None]:
    """Load the guest that is saved in a file into this machine, which must be the same. Replies once it is in force.

    In preconfig and devices the machine goes on by itself, and its guest runs if it ran when it was saved (`stop`,
    while it is loaded, and `-S` keep it standing). After a failure the machine is in phase incoming, where another file
    can be loaded. In running it takes the place of the present guest, once all of the file has been checked, and runs
    if that ran. In an empty process `migrate-incoming` with `file:` makes the machine as well.
    """
    from vmm.phases.building import SavedState

    wishes = NO_WISHES if args.on_demand is None else Wishes(parameters={"x-restore-on-demand": args.on_demand})
    saved = SavedState(host.obtain("state", lambda: hostio.open_saved_state(args.name, 0)), wishes)
    try:
        return may.decide(saved)
    finally:
        saved.close()


@final
@attrs.frozen(kw_only=True)
class MigrateContinue:
    """The arguments of `migrate-continue`."""

    state: StatusName
    """The state that the migration is in: `pre-switchover` is the only one in which it waits."""


async def migrate_continue(may: MaySwitchOver, args: MigrateContinue) -> None:
    """Let a migration go on that waits with its guest stopped (migration capability `pause-before-switchover`)."""
    await trio.lowlevel.checkpoint()
    if args.state != "pre-switchover":
        wanted = "pre-switchover, the only state in which a migration waits"
        raise OptionInvalid(option="migrate-continue: state", value=args.state, wanted=wanted)
    may.go_on()


async def migrate_cancel(may: MayCancelMigration, caller: Caller) -> None:
    """Call a migration off; the guest stays here. Without effect once the other side has it, or has been offered it."""
    await trio.lowlevel.checkpoint()
    may.cancel(f"by {caller.name}")


async def migrate_start_postcopy(may: MaySteerPostcopy) -> None:
    """Have the guest run at the destination as soon as its devices' state is there; the rest of its RAM follows.

    Takes migration capability postcopy-ram, on before `migrate`. From then on the guest cannot run here again.
    """
    await trio.lowlevel.checkpoint()
    may.start()


async def migrate_pause(may: MaySteerPostcopy) -> None:
    """Break the connection of a postcopy, on either side. The guest waits where it lacks pages.

    `migrate-recover` at the destination, and then `migrate` with `resume` at the source, go on.
    """
    await trio.lowlevel.checkpoint()
    may.pause()


@final
@attrs.frozen(kw_only=True)
class MigrateRecover:
    """Arguments of `migrate-recover`."""

    uri: str


async def migrate_recover(may: MaySteerPostcopy, caller: Caller, args: MigrateRecover) -> None:
    """Listen for the source of a postcopy whose connection broke. Replies once bound; `query-migrate` shows where."""
    from vmm.migration.connect import close_descriptors  # Likewise.

    (channel,) = incoming_channels(args.uri, None)
    if isinstance(channel.address, ExecAddress | FileAddress):
        raise MigrationRefused(reason="migrate-recover: a postcopy goes on over a socket, which can answer")
    (address,) = resolved([channel.address], caller)
    try:
        await may.recover(address)
    finally:
        close_descriptors([address])
