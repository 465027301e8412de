"""Phase ``stream_receive``: beside the chain, a state stream is awaited, and its recipe read.

Where no machine has been defined yet the recipe is replayed: an empty process becomes the machine. Where there is one
it is left alone, and phase incoming compares the two. What follows the recipe is read by phase incoming, which both
ways lead to.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.capabilities import MayAdoptDescriptor
from vmm.cpr.limits import CprLimits
from vmm.errors import MigrationRefused, StreamCorrupt, VmmError, leaves
from vmm.migration.connect import Listener
from vmm.migration.connection import Connection
from vmm.migration.further import Gathering
from vmm.migration.inflow import Inflow
from vmm.phases.arriving import checked
from vmm.phases.host import Inheritance
from vmm.phases.replay import SUCCESSOR, replay_incoming
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.capabilities import Mint
    from vmm.migration.further import ChannelKind
    from vmm.migration.stream_records import Recipe as RecipeRecord
    from vmm.migration.stream_records import Section
    from vmm.nursery_tree import Phase
    from vmm.phases.foundation import Host
    from vmm.phases.incoming_port import IncomingPort
    from vmm.phases.tls_objects import Tls
    from vmm.residents import Residents


_GATHERING: Final = 60.0
"""Seconds for all further channels of one kind to be there."""


@final
@attrs.frozen
class StreamReceiveGrants:
    """Tokens of this phase; lent to the incoming recipe alone."""

    adopt_descriptor: MayAdoptDescriptor


@final
@attrs.frozen(eq=False)
class StreamArrival:
    """A state stream whose head is here, and whose source waits."""

    flow: Inflow
    recipe: Recipe
    cpu: object
    """What the source says of its processor, unchecked."""


@final
@attrs.frozen(eq=False)
class _Admission:
    """What it takes to admit a connection."""

    host: Host
    port: IncomingPort
    residents: Residents
    within: float
    """Seconds that it has to say what it is."""


@final
class StreamWait:
    """One incoming state stream, from the moment that it is awaited. Owns its listener, or its connection."""

    def __init__(
        self,
        origin: Listener | Connection,
        *,
        exit_on_error: bool,
        tell: Callable[[VmmError], None] | None = None,
    ) -> None:
        """Await it on a listener, or on what is connected or open already."""
        self._origin: Listener | Connection | None = origin
        self.exit_on_error = exit_on_error
        """Whether this process ends if the stream is refused."""
        self.inheritance = Inheritance()
        self.arrival: StreamArrival | None = None
        self.replays = False
        """Whether the machine is made from the stream's recipe."""
        self.arrived = trio.Event()
        """Set once `arrival` is there, or `failure` is known."""
        self.failure: VmmError | None = None
        """Why none came, or why it was refused."""
        self.over = trio.Event()
        """Set by whoever has loaded the stream, or refused it."""
        self.scope = trio.CancelScope()
        """Of the task that awaits it."""
        self._tell = tell
        self._further: Listener | None = None
        """Where further channels of the migration that has come are awaited."""
        self.gathering: Gathering | None = None
        """Who knows them."""

    @property
    def others_may_come(self) -> bool:
        """Whether there is a listener, and it still listens."""
        return isinstance(self._origin, Listener)

    async def accept(self) -> Connection:
        """Wait for whoever connects."""
        await trio.lowlevel.checkpoint()
        if isinstance(self._origin, Listener):
            return Connection(await self._origin.accept())
        taken, self._origin = self._origin, None
        assert taken is not None, "it is taken once"
        return taken

    async def secured(self, connection: Connection, tls: Tls | None, within: float) -> Connection:
        """Shake hands over what has come, if TLS is set. Raises `TlsFailed`; it is closed then."""
        # A file that is loaded by its name was never meant.
        if tls is None or connection.is_file:
            return connection
        return await tls.secure(connection, "source", within=within)

    async def read_head(self, flow: Inflow, within: float) -> tuple[RecipeRecord, Section]:
        """Read the head of what has come. Nobody else is admitted once it is one.

        Args:
            within: seconds that one who has connected has for it. A file has no limit, nor has a connection that this
                process was given: its source may begin much later.

        Raises:
            VmmError: it is none.
        """
        if not isinstance(self._origin, Listener):
            return await flow.read_head()
        with trio.move_on_after(within):
            head = await flow.read_head()
            if flow.terms.multifd or flow.terms.preempt:
                self._further, self._origin = self._origin, None
            else:
                self.close()
            return head
        raise StreamCorrupt(reason=f"the source did not say what machine it is of within {within:g} s")

    def expect_further(self, flow: Inflow, admission: _Admission) -> None:
        """Note how further channels are admitted, of the migration whose head has come."""
        listener = self._further
        if listener is None:
            return

        async def accept() -> Connection:
            return Connection(await listener.accept())

        self.gathering = Gathering(
            accept,
            partial(self._admitted, admission),
            admission.host.complain,
            identity=flow.terms.id,
            each=admission.within,
            gone=flow.hung_up,
        )

    async def _admitted(self, admission: _Admission, connection: Connection) -> Connection:
        secured = await self.secured(connection, admission.port.streams.tls(), admission.within)
        return secured if secured is connection else secured.serve(admission.residents)

    def require_listener(self) -> None:
        """Raise `MigrationRefused` if no further channel can come."""
        if self.gathering is None:
            raise MigrationRefused(
                reason="The source opens further channels, and nobody listens for them here: await it on tcp:, unix: "
                "or vsock:, or turn off what needs them (multifd, postcopy-preempt)"
            )

    async def more_channels(self, kind: ChannelKind, count: int) -> list[Connection]:
        """Wait for further channels of the migration that has come; they are the caller's. As `Gathering.gather`."""
        assert self.gathering is not None, "see require_listener"
        assert self.arrival is not None, "they follow the first one"
        found = await self.gathering.gather(kind, count, within=_GATHERING)
        if kind == "preempt" or not self.arrival.flow.terms.preempt:
            self.close()
        return found

    def come(self, arrival: StreamArrival) -> None:
        """Note that its head is here."""
        self.arrival = arrival
        self.arrived.set()

    def fail(self, error: VmmError) -> None:
        """Note why nothing came of it."""
        self.failure = error
        self.arrived.set()
        self.over.set()
        if self._tell is not None:
            self._tell(error)

    @property
    def is_asked_for(self) -> bool:
        """Whether somebody waits to be told the outcome."""
        return self._tell is not None

    def close(self) -> None:
        """Close what is still open. Idempotent."""
        for open_still in (self._origin, self._further):
            if open_still is not None:
                open_still.close()
        self._origin = self._further = None


async def run_stream_receive(
    precreate: Phase,
    host: Host,
    port: IncomingPort,
    wait: StreamWait,
) -> None:
    """Await the stream of `wait`, and replay its recipe if there is no machine. Ends with it, loaded or refused.

    Raises:
        VmmError: why it was refused, where that ends the process.
    """
    async with precreate.child("stream_receive", aside=True) as phase:
        with closing(wait.inheritance), closing(wait):

            def grants(mint: Mint) -> StreamReceiveGrants:
                return StreamReceiveGrants(adopt_descriptor=mint(MayAdoptDescriptor, wait.inheritance))

            async with phase.window(grants):
                with wait.scope:
                    while not wait.over.is_set():
                        with ExitStack() as stack:
                            connection = stack.enter_context(closing(await wait.accept()))
                            await _serve(phase, host, port, wait, connection, stack, precreate.residents)


async def _serve(
    phase: Phase,
    host: Host,
    port: IncomingPort,
    wait: StreamWait,
    connection: Connection,
    stack: ExitStack,
    residents: Residents,
) -> None:
    """See what has come through to its end, which is that of `wait` unless it was no source at all.

    Raises:
        VmmError: why it was refused, where that ends the process.
    """
    failure: VmmError | None = None
    flow: Inflow | None = None
    within = (host.start.limits or CprLimits()).describing
    try:
        secured = await wait.secured(connection, port.streams.tls(), within)
        if secured is not connection:
            secured.serve(residents)
        flow = stack.enter_context(closing(Inflow(secured)))
        record, processor = await wait.read_head(flow, within)
        wait.expect_further(flow, _Admission(host, port, residents, within))
    except VmmError as error:
        failure = error
    else:
        failure = await _receive(phase, host, port, wait, flow, record, processor)
    if failure is None:
        return
    if wait.others_may_come:
        # A stranger, not a source: whoever is awaited may still come.
        host.complain(str(failure))
        await _tell(flow, failure)
        return
    port.streams.failed(wait, failure)
    await _tell(flow, failure)
    wait.fail(failure)
    if wait.exit_on_error:
        raise failure


async def _tell(flow: Inflow | None, failure: VmmError) -> None:
    if flow is not None:  # else TLS has told it, as far as it speaks that
        await flow.refuse(failure)


async def _receive(
    phase: Phase,
    host: Host,
    port: IncomingPort,
    wait: StreamWait,
    flow: Inflow,
    record: RecipeRecord,
    processor: Section,
) -> VmmError | None:
    """See one stream through; return why it was refused before phase incoming had it."""
    failure: VmmError | None = None
    try:
        source, cpu = Recipe.from_json("of the source", [dict(command) for command in record.commands]), processor.state
        if phase.tree.machine_phase == "no-machine":
            # The recipe that is being replayed may define one. Where it has, it may be that which waits for this.
            await phase.tree.wait_begun("migrate-incoming", SUCCESSOR.name)
        if phase.tree.machine_phase != "no-machine":
            source = checked(source, host.table)
            wait.come(StreamArrival(flow, source, cpu))
        else:
            arriving = port.consider(source, ())
            wait.inheritance.add_copies(arriving.given)
            wait.inheritance.open_here(arriving.here | arriving.private, {})
            wait.replays = True
            wait.come(StreamArrival(flow, arriving.recipe, cpu))
            await replay_incoming(host, phase.tree, arriving.recipe)
            phase.tree.reserved_for = None
    except* VmmError as group:
        failure = next(error for error in leaves(group) if isinstance(error, VmmError))
    if failure is None:
        await wait.over.wait()
    return failure
