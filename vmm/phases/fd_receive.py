"""Phase ``fd_receive``: beside precreate, a predecessor's recipe and descriptors are awaited and read.

A peer that is refused (another user, another version, garbage) ends its own attempt and nothing else: the next may
come. From an accepted recipe on there is no way back: if it can't be carried out, the source is told why, and this
process ends with that reason.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from vmm import host_fds
from vmm.capabilities import MayAdoptDescriptor
from vmm.cpr.cell import OwnershipCell
from vmm.cpr.channel import CprChannel
from vmm.cpr.limits import CprLimits
from vmm.cpr.steps import Steps
from vmm.errors import CprError, CprPeerGone, CprRefused, MigrationCancelled, RecipeInvalid, VmmError
from vmm.migration.status import MigrationStatus
from vmm.monitor.arguments import unstructure
from vmm.phases.host import Inheritance
from vmm.phases.host_resources import socket_paths
from vmm.phases.migrating import STDERR
from vmm.phases.migration_state import MigrationState
from vmm.phases.predecessor import Predecessor
from vmm.phases.replay import SUCCESSOR, replay_incoming
from vmm.phases.run_state import run_state_named
from vmm.phases.section_kinds import read_here
from vmm.recipe import Recipe
from vmm.service import ServiceManager

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.capabilities import Mint
    from vmm.cpr.channel import Message
    from vmm.migration.connect import Listener
    from vmm.nursery_tree import Phase
    from vmm.phases.foundation import Host
    from vmm.phases.incoming_port import IncomingPort
    from vmm.phases.start import Start


_FAREWELL: Final = 1.0
"""Seconds for a source that has given its guest away to say how long that took."""

_STAGES: Final = 64
_LONG: Final = 1e9
"""More stages of a pause, or longer ones (in milliseconds), are not told."""


@final
@attrs.frozen
class FdReceiveGrants:
    """Tokens of this phase; lent to the incoming recipe alone."""

    adopt_descriptor: MayAdoptDescriptor


@final
@attrs.define(eq=False)
class Arrival:
    """What came over a CPR channel, whose other end waits."""

    channel: CprChannel
    steps: Steps
    cell: OwnershipCell
    source: Recipe
    """The recipe that came."""
    recipe: Recipe
    """What is carried out: that, with what this side has otherwise."""
    inheritance: Inheritance
    fdsets: object
    """What the source told of its descriptor sets, unchecked; None for nothing."""
    over: trio.Event = attrs.Factory(trio.Event)
    """Set once the guest is here: the cell has done its duty."""
    settled: trio.Event = attrs.Factory(trio.Event)
    """Set once the source has said its last word, or nobody waits for it any longer."""
    _stderr: int = -1
    _refused: bool = False

    async def refuse(self, error: VmmError) -> None:
        """Tell the source why it keeps its guest. Only the first reason is told, and none once the guest is here."""
        if not self._refused and not self.over.is_set():
            self._refused = True
            await self.channel.refuse(str(error))

    async def farewell(self) -> Mapping[str, Any]:
        """Wait, for `_FAREWELL` seconds at most, for what the source says last; empty if it says nothing."""
        with trio.move_on_after(_FAREWELL):
            try:
                with closing(await self.channel.receive("finished")) as message:
                    return message.body
            except CprError:
                pass  # It has ended, or was never going to say anything.
        return {}

    def adopt_standard_error(self, start: Start) -> None:
        """Put the source's standard error, if it sent one, in place of this process's, if it is the machine's alone."""
        if self._stderr >= 0 and start.stderr is not None:
            os.dup2(self._stderr, start.stderr)

    def close(self) -> None:
        """Close the cell. Idempotent."""
        self.cell.close()
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1


async def run_fd_receive(
    precreate: Phase,
    host: Host,
    port: IncomingPort,
    listener: Listener,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Await a source on `listener`, then replay its recipe with its descriptors."""
    async with precreate.child("fd_receive", aside=True) as phase:
        with closing(Inheritance()) as inheritance:

            def grants(mint: Mint) -> FdReceiveGrants:
                return FdReceiveGrants(adopt_descriptor=mint(MayAdoptDescriptor, inheritance))

            async with phase.window(grants):
                task_status.started()
                # What the start recipe says besides is laid over whatever comes.
                await phase.tree.wait_begun("migrate-incoming", SUCCESSOR.name)
                while True:
                    sock = await listener.accept()
                    with closing(
                        CprChannel(sock, side="destination", peer="source", uids=host.start.cpr_uids)
                    ) as channel:
                        arrival = await _attempt(channel, host, port, inheritance)
                        if arrival is None:
                            continue
                        # No second source: it is told so when it connects, and not left waiting.
                        listener.close()
                        with closing(arrival):
                            await _build(phase, host, port, arrival)
                            await arrival.over.wait()
                            await _conclude(arrival, host, port)
                            inheritance.retire_replaced(host.complain)
                            await port.unbind()
                            return


async def _attempt(channel: CprChannel, host: Host, port: IncomingPort, inheritance: Inheritance) -> Arrival | None:
    """Return what a source brings. None where it only asked, or was refused: the next one is awaited."""
    host.calling_off.begin()
    arrival: Arrival | None = None
    try:
        try:
            with host.calling_off.block():
                arrival = await _receive(channel, host, port, inheritance)
        except MigrationCancelled as error:
            raise await channel.refuse(str(error)) from error
        except (OSError, MemoryError) as error:
            raise channel.blame(error) from error
    except CprError as error:
        await _tell(channel, error)
        host.complain(str(error))
    finally:
        if arrival is None:
            host.calling_off.end()
    return arrival


async def _tell(channel: CprChannel, error: CprError) -> None:
    """Tell a source that is still there why this side will not go on, unless it has been told, or said so itself."""
    if channel.has_refused or isinstance(error, CprPeerGone):
        return
    if isinstance(error, CprRefused):
        if error.side == channel.side:
            await channel.refuse(error.reason)
    else:
        await channel.refuse(str(error))


async def _receive(channel: CprChannel, host: Host, port: IncomingPort, inheritance: Inheritance) -> Arrival | None:
    """Return what a source brings; None where it only asked what would become of it. Raises `CprError`."""
    steps = Steps("destination", host.start.stop_at)
    assert port.progress is not None
    steps.follow(port.progress.note_step)
    steps.reach("accepted")
    limits = host.start.limits or CprLimits()
    with trio.move_on_after(limits.describing):
        await channel.admit()
        await channel.hello(host.start.version.package, read_here())
        steps.reach("greeted")
        channel.step = "describing"
        message = await channel.receive("machine", "check")
        steps.reach("received")
        with closing(message):
            # The channel may have been given up since this came, and with it what was to be laid over it.
            await trio.lowlevel.checkpoint_if_cancelled()
            port.differences = ()
            if message.kind == "check":
                await channel.send("checked", _verdict(message, port))
                return None
            try:
                arrival = _arrival_of(message, channel, steps, port, inheritance)
                if message.body.get("service"):
                    host.service = ServiceManager.named(message.body["service"])
            except VmmError as error:
                raise await channel.refuse(str(error)) from error
        steps.reach("described")
        return arrival
    raise await channel.refuse(f"the source did not describe its machine within {limits.describing:g} s")


def _verdict(message: Message, port: IncomingPort) -> dict[str, Any]:
    """Return what a source is told that asks what would become of its machine. Nothing is changed."""
    sent = message.body.get("descriptors")
    names = [name for name in sent if isinstance(name, str)] if isinstance(sent, list) else []
    try:
        recipe = Recipe.from_json("of the source", message.body.get("recipe"))
        port.consider(recipe, names, message.body.get("cpu"), message.body.get("sections"), live=True)
        reason = ""
    except VmmError as error:
        reason = str(error)
    return {"reason": reason, "differences": unstructure(port.differences)}


def _arrival_of(
    message: Message, channel: CprChannel, steps: Steps, port: IncomingPort, inheritance: Inheritance
) -> Arrival:
    """Take out of `message` what it brings. Raises `VmmError`; then nothing has been taken over."""
    source = Recipe.from_json("of the source", message.body.get("recipe"))
    run_state = message.body.get("run-state")
    if run_state_named(run_state) is None:
        raise RecipeInvalid(source=source.source, where="as a whole", reason=f"run state {run_state!r} is none")
    arriving = port.consider(
        source, message.descriptors.keys(), message.body.get("cpu"), message.body.get("sections"), live=True
    )
    if STDERR in message.descriptors:
        host_fds.require_writable(message.descriptors[STDERR], STDERR)
    inheritance.add_copies(arriving.given)
    cell = OwnershipCell.adopt(message.claim("owner"))
    with ExitStack() as undo:
        undo.callback(cell.close)
        stderr = message.descriptors.pop(STDERR, -1)
        inheritance.add(message.descriptors)
        message.descriptors = {}
        inheritance.open_here(arriving.here, socket_paths(source))
        undo.pop_all()
    return Arrival(
        channel, steps, cell, source, arriving.recipe, inheritance, message.body.get("fdsets"), stderr=stderr
    )


async def _conclude(arrival: Arrival, host: Host, port: IncomingPort) -> None:
    progress = port.progress
    assert progress is not None
    told = await arrival.farewell()
    progress.pause_stages = _stages(told.get("pause"))
    progress.pause_before = _stages(told.get("before"))
    host.predecessor = Predecessor.of(told.get("kept"), arrival.channel)
    progress.advance(MigrationStatus.COMPLETED)
    if host.start.failure:
        # Of the way out, of which this was the way back: that is what whoever asked for it waits for.
        migration = host.tree.view(MigrationState)
        migration.failed(migration.begin("source"), host.start.failure)
    arrival.settled.set()


def _stages(pause: object) -> Mapping[str, float] | None:
    """Return the stages that a source told, if that is what they are: nothing depends on them."""
    if not isinstance(pause, dict) or not 0 < len(pause) <= _STAGES:
        return None
    if not all(type(value) in (int, float) and 0 <= value < _LONG and len(name) <= 64 for name, value in pause.items()):
        return None
    return pause


async def _build(phase: Phase, host: Host, port: IncomingPort, arrival: Arrival) -> None:
    port.arrived(arrival)
    arrival.channel.step = "building"
    try:
        with host.calling_off.block():
            await replay_incoming(host, phase.tree, arrival.recipe)
    except (VmmError, OSError, MemoryError) as error:
        failure = arrival.channel.blame(error)
        await arrival.refuse(failure)
        raise failure from error
