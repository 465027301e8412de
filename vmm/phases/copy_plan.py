"""Where a guest is copied to, and what of its machine goes there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm.migration.address import ExecAddress, FileAddress
from vmm.migration.connect import close_descriptors, connect_channel
from vmm.migration.connection import Connection
from vmm.phases.migration_state import NO_WISHES, Wishes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vmm.migration.address import ChannelAddress
    from vmm.phases.tls_objects import Tls
    from vmm.recipe import Recipe
    from vmm.residents import Residents

_CONNECTING: Final = 10.0
"""Seconds for the channel to be connected."""


@final
@attrs.define(eq=False)
class CopyPlan:
    """Where a guest is copied to. Owns the descriptor among its address."""

    address: ChannelAddress
    open_file: Callable[[], int] | None = None
    """Of a `FileAddress`: opens the file, which changes it. A migration that is refused before has not touched it."""
    start_command: Callable[[bool], Connection] | None = None
    """Of an `ExecAddress`: starts the command, which can answer if the argument says so."""
    wishes: Wishes = NO_WISHES
    finish: Callable[[], None] | None = None
    """Of a snapshot, after which the guest goes on here: gives the file its name, once all is in it. For a thread."""
    resume: bool = False
    """Whether it is to go on with a postcopy whose connection broke."""
    _closed: bool = False

    async def open(self, residents: Residents, *, two_way: bool = False, tls: Tls | None) -> Connection:
        """Connect. Again and again, if somebody listens there.

        Args:
            residents: of whom whoever serves the connection is one.
            two_way: whether a command can answer.
            tls: what the channel is made secure with.

        Raises:
            HostFileRefused: nobody listens there, the file cannot be written, or the command cannot be started.
            TlsFailed: there is no TLS with who listens there.
        """
        connection = await self._connect(two_way=two_way, tls=tls)
        return connection.serve(residents)

    async def _connect(self, *, two_way: bool, tls: Tls | None) -> Connection:
        if isinstance(self.address, FileAddress):
            assert self.open_file is not None, "given by the command"
            return Connection(self.open_file())
        if isinstance(self.address, ExecAddress):
            assert self.start_command is not None, "likewise"
            return self.start_command(two_way)
        connection = await connect_channel(self.address, within=_CONNECTING)
        if tls is None:
            return connection
        return await tls.secure(connection, "destination", within=_CONNECTING)

    def close(self) -> None:
        """Close the descriptor; what was connected stays. Idempotent."""
        if not self._closed:
            self._closed = True
            close_descriptors([self.address])


def travelling(recipe: Recipe) -> Recipe:
    """Return what of a machine's recipe is the machine's: no monitors, qtest, or their chardevs, nor its snapshots."""
    monitors = [step for step in recipe if step.execute == "object-add" and _stays(step.arguments)]
    chardevs = {step.arguments.get("chardev") for step in monitors} - {None}
    return attrs.evolve(
        recipe,
        steps=tuple(
            step
            for step in recipe
            if step not in monitors and not (step.execute == "chardev-add" and step.arguments.get("id") in chardevs)
        ),
    )


def staying(recipe: Recipe) -> Recipe:
    """Return the rest."""
    goes = travelling(recipe).steps
    return attrs.evolve(recipe, steps=tuple(step for step in recipe if step not in goes))


def _stays(arguments: Mapping[str, Any]) -> bool:
    kind = str(arguments.get("qom-type"))
    return kind.startswith("monitor-") or kind in ("qtest", "snapshot-directory")
