"""Commands on the monitor itself: what there is, who may what, and descriptors that clients send."""

from __future__ import annotations

import os
from typing import final

import attrs
import trio

from vmm import hostio
from vmm.capabilities import AnyToken, MayAddDescriptor, MayQuery, MayQuit
from vmm.errors import DescriptorError, TokenError
from vmm.monitor.command import CommandTable
from vmm.monitor.events import EventHub
from vmm.monitor.ports import Caller
from vmm.monitor.session import Version
from vmm.nursery_tree import Phase, Tree
from vmm.phases.fdsets import FdSets
from vmm.phases.start import Identity

# --- what there is ------------------------------------------------------------------------------------------


@final
@attrs.frozen(kw_only=True)
class VersionTriple:
    """A QEMU release number."""

    major: int
    minor: int
    micro: int


@final
@attrs.frozen(kw_only=True)
class VersionInfo:
    """The QEMU release whose protocol is spoken, and what this program is."""

    qemu: VersionTriple
    package: str


def query_version(may: MayQuery) -> VersionInfo:
    """Return the QEMU release whose protocol is spoken here, and this program's own version as package."""
    version = may.view(Version)
    triple = VersionTriple(major=version.major, minor=version.minor, micro=version.micro)
    return VersionInfo(qemu=triple, package=version.package)


@final
@attrs.frozen(kw_only=True)
class CommandInfo:
    """A command, and what it takes to run it. All but `name` are extensions, returned with `extended`."""

    name: str
    tokens: list[str] | None = None
    """Wire names; alternatives are joined by `|`, and a scope follows a colon. Which it is may go by an argument."""
    phases: list[str] | None = None
    """The phases whose windows grant them, with some arguments at least."""
    admitted: bool | None = None
    """Whether this session could run it now, with some arguments at least."""
    noted: bool | None = None
    """Whether it is only noted now, to be laid over a machine that comes from another process."""


@final
@attrs.frozen(kw_only=True)
class QueryCommands:
    """Arguments of `query-commands`."""

    extended: bool = False


def query_commands(may: MayQuery, caller: Caller, args: QueryCommands) -> list[CommandInfo]:
    """List the commands; with `extended`, each with its tokens, the phases that grant them, and whether it runs now."""
    table = may.view(CommandTable)
    names = sorted([*(command.name for command in table), "qmp_capabilities"])
    if not args.extended:
        return [CommandInfo(name=name) for name in names]
    return [_extended(table, name, caller) for name in names if table.knows(name)]


def _extended(table: CommandTable, name: str, caller: Caller) -> CommandInfo:
    from vmm.phases.chain import phases_granting  # Reads every phase's declaration; few ask.

    command = table[name]
    try:
        table.require_admitted(command, caller)
        admitted = True
    except TokenError:
        admitted = False
    needs = command.signature.needs
    return CommandInfo(
        name=name,
        tokens=[need.describe() for need in needs],
        phases=phases_granting(needs),
        admitted=admitted,
        noted=table.is_noted(command, caller),
    )


def query_qmp_schema(may: MayQuery) -> list[dict[str, object]]:
    """Return the schema of all commands and events, as QAPI introspection has it."""
    with hostio.importing("vmm.monitor.schema"):
        from vmm.monitor.schema import schema  # Large, and most sessions never ask.
        from vmm.monitor.session import Negotiation

    return schema([*may.view(CommandTable), Negotiation()], list(may.view(EventHub)))


@final
@attrs.frozen(kw_only=True)
class NameInfo:
    """The machine's name."""

    name: str | None = None


def query_name(may: MayQuery) -> NameInfo:
    """Return the machine's name, if it has one."""
    return NameInfo(name=may.view(Identity).name)


@final
@attrs.frozen(kw_only=True)
class UuidInfo:
    """The machine's UUID."""

    UUID: str = attrs.field(metadata={"wire": "UUID"})


def query_uuid(may: MayQuery) -> UuidInfo:
    """Return the machine's UUID; all zero if it has none."""
    return UuidInfo(UUID=may.view(Identity).uuid or "00000000-0000-0000-0000-000000000000")


# --- phases and tokens --------------------------------------------------------------------------------------


@final
@attrs.frozen(kw_only=True)
class MachinePhaseInfo:
    """Where the machine is."""

    phase: str
    """no-machine, machine-created, accel-created, machine-initialized or machine-ready."""
    path: str
    """The innermost open phase, below the phases that enclose it."""


def query_machine_phase(may: MayQuery) -> MachinePhaseInfo:
    """Say how far the machine is."""
    tree = may.view(Tree)
    return MachinePhaseInfo(phase=tree.machine_phase, path=tree.path)


@final
@attrs.frozen(kw_only=True)
class LendingInfo:
    """A token in use."""

    command: str
    holder: str
    seconds: float


@final
@attrs.frozen(kw_only=True)
class TokenInfo:
    """A token that a window grants."""

    token: str
    scope: list[str] | None = None
    lent: list[LendingInfo]


@final
@attrs.frozen(kw_only=True)
class PhaseInfo:
    """An open phase."""

    path: str
    phase: str
    machine_phase: str
    seconds: float
    """How long it has been open."""
    tasks: list[str]
    window: bool
    """Whether its window is open."""
    tokens: list[TokenInfo]
    withholds: list[str]
    children: list[dict[str, object]]


def query_nursery_tree(may: MayQuery) -> PhaseInfo:
    """Return the open phases, with their tasks, their tokens, and to whom these are lent."""
    root = may.view(Tree).root
    assert root is not None, "a command runs inside the tree"
    return _phase_info(root)


def _phase_info(phase: Phase) -> PhaseInfo:
    from vmm.monitor.arguments import unstructure

    now = trio.current_time()
    window = phase.open_window
    lendings = window.lendings if window else []

    def lent(token: AnyToken) -> list[LendingInfo]:
        return [
            LendingInfo(command=lending.command, holder=lending.holder, seconds=round(now - lending.since, 6))
            for lending in lendings
            if type(token) in lending.kinds
        ]

    tokens = [
        TokenInfo(token=token.wire_name, scope=None if token.scope is None else sorted(token.scope), lent=lent(token))
        for token in (window.tokens if window else ())
    ]
    children = [unstructure(_phase_info(child)) for child in phase.children]
    return PhaseInfo(
        path=phase.path,
        phase=phase.name,
        machine_phase=phase.machine_phase,
        seconds=round(now - phase.since, 6),
        tasks=phase.residents.names,
        window=window is not None,
        tokens=tokens,
        withholds=sorted(kind.wire_name for kind in window.withholds) if window else [],
        children=[child for child in children if isinstance(child, dict)],
    )


# --- descriptors --------------------------------------------------------------------------------------------


@final
@attrs.frozen(kw_only=True)
class FdName:
    """Arguments of `getfd` and `closefd`."""

    fdname: str


def _take(caller: Caller, command: str) -> int:
    descriptors = caller.take_descriptors()
    if not descriptors:
        reason = f"{command}: no descriptor came with the request; send one by SCM_RIGHTS, before it or with it"
        raise DescriptorError(reason=reason)
    *extra, fd = descriptors
    for other in extra:
        os.close(other)
    return fd


async def getfd(may: MayAddDescriptor, caller: Caller, args: FdName) -> None:
    """Keep the descriptor that came with the request, under a name of this session; an older one is closed."""
    await trio.lowlevel.checkpoint()
    if not args.fdname or args.fdname[0].isdigit():
        raise DescriptorError(reason=f"getfd: fdname {args.fdname!r} must not be empty or begin with a digit")
    fd = _take(caller, "getfd")
    old = caller.descriptors.pop(args.fdname, None)
    if old is not None:
        os.close(old)
    caller.descriptors[args.fdname] = fd


async def closefd(may: MayAddDescriptor, caller: Caller, args: FdName) -> None:
    """Close a descriptor that `getfd` named."""
    await trio.lowlevel.checkpoint()
    if args.fdname not in caller.descriptors:
        known = ", ".join(sorted(caller.descriptors)) or "none"
        raise DescriptorError(reason=f"closefd: this session has no descriptor {args.fdname!r} (it has: {known})")
    os.close(caller.descriptors.pop(args.fdname))


@final
@attrs.frozen(kw_only=True)
class AddFd:
    """Arguments of `add-fd`."""

    fdset_id: int | None = None
    opaque: str | None = None


@final
@attrs.frozen(kw_only=True)
class AddFdInfo:
    """Where a descriptor was put."""

    fdset_id: int
    fd: int
    """The number by which it is known from here on, also in a successor; at first, usually, this process's own."""


async def add_fd(may: MayAddDescriptor, caller: Caller, args: AddFd) -> AddFdInfo:
    """Put the descriptor that came with the request into a set of the machine's."""
    await trio.lowlevel.checkpoint()
    fd = _take(caller, "add-fd")
    fdset_id, number = may.add(fd, args.fdset_id, args.opaque)
    return AddFdInfo(fdset_id=fdset_id, fd=number)


@final
@attrs.frozen(kw_only=True)
class RemoveFd:
    """Arguments of `remove-fd`."""

    fdset_id: int
    fd: int | None = None


async def remove_fd(may: MayAddDescriptor, args: RemoveFd) -> None:
    """Close one descriptor of a set, or the whole set."""
    await trio.lowlevel.checkpoint()
    may.remove(args.fdset_id, args.fd)


@final
@attrs.frozen(kw_only=True)
class FdsetFdInfo:
    """A descriptor of a set."""

    fd: int
    opaque: str | None = None


@final
@attrs.frozen(kw_only=True)
class FdsetInfo:
    """A descriptor set."""

    fdset_id: int
    fds: list[FdsetFdInfo]


def query_fdsets(may: MayQuery) -> list[FdsetInfo]:
    """List the descriptor sets."""
    sets = may.view(FdSets).sets
    return [
        FdsetInfo(fdset_id=number, fds=[FdsetFdInfo(fd=entry.number, opaque=entry.opaque) for entry in held])
        for number, held in sorted(sets.items())
    ]


def quit_machine(may: MayQuit) -> None:
    """End this process: the phases close from the innermost outwards, and SHUTDOWN is the last event."""
    may.end("host-qmp-quit")
