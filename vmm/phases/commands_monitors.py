"""Commands on the monitors as such."""

from __future__ import annotations

from typing import final

import attrs

from vmm.capabilities import MayQuery
from vmm.phases.stores import BootStores


@final
@attrs.frozen(kw_only=True)
class MonitorInfo:
    """A monitor."""

    id: str
    grant: str
    """What its clients may be lent at most."""
    clients: int
    """How many are connected."""
    chardev: str | None = None
    """Label of the chardev whose socket it serves."""
    url: str | None = None
    """Where a websocket monitor is, with the real port."""


def query_monitors(may: MayQuery) -> list[MonitorInfo]:
    """List the monitors; an extension."""
    return [
        MonitorInfo(id=name, grant=it.grant, clients=it.clients, chardev=it.chardev, url=it.url)
        for name, (it, _) in may.view(BootStores).monitors.items()
    ]
