"""What further channels a source opens, and for what: as its capabilities and parameters have it when it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import attrs

from vmm.errors import MigrationRefused
from vmm.migration.address import InetAddress, UnixAddress, VsockAddress
from vmm.migration.further import new_id, open_channels
from vmm.migration.packing import packing
from vmm.migration.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from vmm.migration.address import ChannelAddress
    from vmm.migration.connection import Connection
    from vmm.migration.outflow import Outflow
    from vmm.migration.packing import Packing
    from vmm.migration.ram import RamSender
    from vmm.migration.status import MigrationRamStats
    from vmm.phases.migration_state import MigrationState
    from vmm.phases.tls_objects import Tls


@final
@attrs.frozen(eq=False)
class FurtherChannels:
    """The channels that carry pages (migration capability multifd)."""

    identity: str
    compression: Any
    packings: Sequence[Packing | None]
    """One for each channel."""
    zero_copy: bool

    def terms(self) -> Terms:
        """Return what the destination is told."""
        return Terms(id=self.identity, multifd=len(self.packings), compression=self.compression)

    async def open(
        self, dial: Callable[[], Awaitable[Connection]], flow: Outflow, ram: RamSender
    ) -> Callable[[], MigrationRamStats]:
        """Open them, and have all pages go there; return what tells how far it is.

        Raises:
            VmmError: they cannot be opened, or cannot do what is wanted of them.
        """
        connections = await open_channels(dial, "multifd", len(self.packings), self.identity)
        try:
            sink = flow.send_pages_over(connections, ram.memory, self.packings, zero_copy=self.zero_copy)
        except BaseException:
            for connection in connections:
                connection.close()
            raise

        def statistics() -> MigrationRamStats:
            return attrs.evolve(
                ram.statistics(),
                multifd_bytes=sink.further_bytes,
                dirty_sync_missed_zero_copy=sink.copied_all_the_same,
            )

        return statistics


def plan_channels(migration: MigrationState, address: ChannelAddress, tls: Tls | None) -> FurtherChannels | None:
    """Return what further channels a migration to `address` has; None for none.

    Raises:
        MigrationRefused: it cannot have those that are wanted.
        Unsupported: this host cannot pack as it should.
    """
    capabilities, values = migration.capabilities, migration.parameters.values
    if not capabilities["multifd"]:
        return None
    if not isinstance(address, InetAddress | UnixAddress | VsockAddress):
        raise MigrationRefused(
            reason="migrate: multifd needs an address that can be connected to several times: tcp:, unix: or vsock:; "
            "turn it off for any other"
        )
    zero_copy = capabilities["zero-copy-send"]
    if zero_copy:
        _require_bare(values, address, tls)
    compression = values["multifd-compression"]
    packings = [packing(compression, values) for _ in range(values["multifd-channels"])]
    return FurtherChannels(new_id(), compression, packings, zero_copy)


def _require_bare(values: Mapping[str, Any], address: ChannelAddress, tls: Tls | None) -> None:
    """Raise `MigrationRefused` if pages cannot go from where they lie."""
    if not isinstance(address, InetAddress):
        why, instead = "the network reads pages where they lie, which it does for tcp: alone", "turn it off"
    elif tls is not None:
        why, instead = "what is encrypted is a copy", "turn it off, or unset tls-creds"
    elif values["multifd-compression"] != "none":
        why, instead = "what is packed is a copy", "turn it off, or set multifd-compression to none"
    else:
        return
    raise MigrationRefused(reason=f"migrate: zero-copy-send is not possible: {why}; {instead}")
