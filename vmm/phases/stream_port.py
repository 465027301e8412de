"""Where a guest that is copied is awaited: on a socket, or in a file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, final

from vmm.decisions import Turn
from vmm.errors import DifferencesVisible, MigrationRefused
from vmm.phases.differences import compare, visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vmm.errors import VmmError
    from vmm.migration.address import ChannelAddress, SocketAddress
    from vmm.migration.connect import Listener
    from vmm.migration.connection import Connection
    from vmm.nursery_tree import Phase
    from vmm.phases.cpus import CpuModel
    from vmm.phases.foundation import Host
    from vmm.phases.incoming_port import IncomingPort
    from vmm.phases.migration_state import MigrationState, Wishes
    from vmm.phases.stream_receive import StreamWait
    from vmm.phases.tls_objects import Tls
    from vmm.recipe import Recipe


def settled() -> Turn[None]:
    """Return a turn that leads nowhere: what was asked for is done."""
    turn = Turn[None](None)
    turn.succeed()
    return turn


class Admission:
    """What of the facet of `may-listen` is the same in every phase that grants it."""

    def __init__(self, port: IncomingPort) -> None:
        self._port: Final = port

    async def abandon(self) -> None:
        """As `IncomingPort.abandon`."""
        await self._port.abandon()

    def allow(self, names: Iterable[str]) -> None:
        """As `IncomingPort.allow`."""
        self._port.allow(names)

    def allow_resource(self, name: str, where: str) -> None:
        """As `IncomingPort.allow_resource`."""
        self._port.allow_resource(name, where)


@final
class StreamPort:
    """What of the incoming port is about state streams. One is awaited at a time."""

    def __init__(self, precreate: Phase, host: Host, migration: MigrationState, port: IncomingPort) -> None:
        self._precreate = precreate
        self._host = host
        self._migration = migration
        self._port = port
        self.tree: Final = precreate.tree
        self.wait: StreamWait | None = None
        """The stream that is awaited, or coming in; None where there is none."""

    async def listen(self, address: ChannelAddress, *, exit_on_error: bool) -> None:
        """Bind `address`, and await a stream there. Raises `HostFileRefused`, `SocketInUse`."""
        # Only now: most machines await nothing, and these bring what a monitor can start without.
        from vmm import hostio
        from vmm.migration.address import DescriptorAddress, ExecAddress, FileAddress
        from vmm.migration.command import start_command
        from vmm.migration.connect import listen, open_descriptor
        from vmm.migration.connection import Connection

        origin: Listener | Connection
        addresses: tuple[SocketAddress, ...] = ()
        self._require_tls(address)
        if isinstance(address, FileAddress):
            origin = Connection(hostio.open_saved_state(address.filename, address.offset))
        elif isinstance(address, ExecAddress):
            origin = start_command(address, "in", two_way=self._migration.capabilities["return-path"])
            origin.serve(self._precreate.residents)
        else:
            connected = open_descriptor(address) if isinstance(address, DescriptorAddress) else None
            if connected is None:
                listener = await listen(address)
                origin, addresses = listener, (listener.address,)
            else:
                origin, addresses = connected, (address,)
        self._await(origin, addresses, exit_on_error=exit_on_error)

    def _require_tls(self, address: ChannelAddress) -> None:
        if self._migration.parameters["tls-creds"]:
            from vmm.phases.tls_objects import of_destination, require_peer

            require_peer(address, "migrate-incoming")
            of_destination(self._host.stores, self._migration.parameters.values)

    def tls(self) -> Tls | None:
        """Return what a channel that comes in is made secure with, by what is set now; None where it is not.

        Raises:
            VmmError: what is set cannot be.
        """
        if not self._migration.parameters["tls-creds"]:
            return None
        from vmm.phases.tls_objects import of_destination

        return of_destination(self._host.stores, self._migration.parameters.values)

    def restore(self, file: int, wishes: Wishes, *, tell: Callable[[VmmError], None]) -> None:
        """Await the stream in `file`, which is taken over. A failure ends nothing here, and is told to `tell`.

        Raises:
            MigrationRefused: something is awaited already.
        """
        try:
            self._port.require_idle()
        except MigrationRefused:
            os.close(file)
            raise
        from vmm.migration.connection import Connection

        with self._migration.attempt("target", wishes):
            self._await(Connection(file), (), exit_on_error=False, tell=tell)

    def _await(
        self,
        origin: Listener | Connection,
        addresses: tuple[SocketAddress, ...],
        *,
        exit_on_error: bool,
        tell: Callable[[VmmError], None] | None = None,
    ) -> None:
        from vmm.phases.stream_receive import StreamWait, run_stream_receive

        wait = StreamWait(origin, exit_on_error=exit_on_error, tell=tell)
        progress = self._migration.begin("target")
        progress.addresses = addresses
        self._port.progress, self.wait = progress, wait
        self._precreate.residents.start_soon(
            "stream_receive", run_stream_receive, self._precreate, self._host, self._port, wait
        )

    def failed(self, wait: StreamWait, error: VmmError) -> None:
        """Note that nothing comes of `wait`: another may be awaited."""
        assert self._port.progress is not None
        self._migration.failed(self._port.progress, str(error))
        self.forget(wait)

    def forget(self, wait: StreamWait) -> None:
        """Note that `wait` is over, one way or the other."""
        if self.wait is wait:
            self.wait = None

    def give_up(self) -> None:
        """Await the stream no more: what should have led to phase incoming did not."""
        if self.wait is not None:
            self.wait.scope.cancel()
            self.forget(self.wait)
            self._port.progress = None
            self._migration.forget()

    def replays(self) -> bool:
        """Say whether the machine is being made from a stream's recipe."""
        return self.wait is not None and self.wait.replays

    def require_same(self, source: Recipe, cpu: object, model: CpuModel) -> None:
        """Raise `DifferencesVisible` unless the source's machine is, as far as its guest can tell, this one.

        Args:
            cpu: what the source says of its processor, hostile: `RecipeInvalid` if it is nothing of the kind.
        """
        from vmm.phases.copy_plan import travelling
        from vmm.phases.cpu_differences import compare_made

        recipes = compare(source, travelling(self._host.recorder.recipe()))
        self._port.differences = (*recipes, *compare_made(cpu, model))
        refused = visible(self._port.differences, self._port.allowed)
        if refused:
            raise DifferencesVisible(items=tuple(item.describe() for item in refused))
