"""A live update between two machines of the test's own process, with a real KVM: quick, and all of it in one loop."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import trio

from tests.phases.machine import Running, appearance, connected, machine, monitor, start_of
from tests.phases.update_kit import APPEND, OVER, channels, due
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vmm.phases.migration_state import MigrationState
    from vmm.qmp_client import QmpClient

GUEST: Final = ("-kernel", "builtin:heartbeat", "-append", APPEND, "-m", "16", "-serial", "null")


@final
@attrs.define(eq=False)
class Pair:
    """Machines of one guest, oldest first: each took it from the one before."""

    folder: Path
    machines: list[Running] = attrs.Factory(list)

    @property
    def qmp(self) -> Path:
        """The machine's own monitor, which moves with it."""
        return self.folder / "machine"

    def own(self, number: int) -> Path:
        """Return the monitor that process `number` (from 1) was started with."""
        return self.folder / f"qmp{number}"

    def where(self, number: int) -> list[dict[str, Any]]:
        """Return the channels of process `number`, as `migrate` takes them."""
        return channels(f"{self.folder}/main{number}", f"{self.folder}/cpr{number}")

    @asynccontextmanager
    async def destination(self, *options: str) -> AsyncGenerator[Running, None]:
        """Run a machine that awaits the guest."""
        number = len(self.machines)
        cpr = f"channel-type=cpr,addr.transport=socket,addr.type=unix,addr.path={self.folder}/cpr{number}"
        incoming = ("-incoming", f"unix:{self.folder}/main{number}", "-incoming", cpr)
        start = start_of(*incoming, *options)
        # By a name of its own: those that make room for another are told apart by their process alone.
        recipe = Recipe("of this test", (*monitor(self.own(number), f"own{number}"), *start.recipe))
        start = attrs.evolve(start, recipe=recipe)
        async with machine(start, self.own(number)) as running:
            self.machines.append(running)
            await appearance(self.folder / f"cpr{number}")
            yield running


@asynccontextmanager
async def pair(folder: Path, *options: str) -> AsyncGenerator[Pair, None]:
    """Run a machine with the heartbeat guest."""
    made = Pair(folder)
    async with machine(start_of("-qmp", f"unix:{made.qmp},wait=off", *GUEST, *options), made.qmp) as running:
        made.machines.append(running)
        async with connected(made.qmp) as client, due("the guest"):
            while not (await client.execute("query-status"))["running"]:
                await client.wait_event(lambda event: True)
        yield made


def migration(running: Running) -> MigrationState:
    """Return a machine's migration, as `query-migrate` sees it."""
    from vmm.phases.migration_state import MigrationState

    return running.tree.view(MigrationState)


async def concluded(running: Running) -> dict[str, Any]:
    """Wait until a machine's migration is over; return what `query-migrate` says there."""
    with trio.fail_after(20):
        while (progress := migration(running).progress) is None or progress.status not in OVER:  # noqa: ASYNC110 - the machine is in the same loop
            await trio.sleep(0.001)
    return progress.info().to_json()


async def hand_over(made: Pair, client: QmpClient, number: int, **more: Any) -> None:
    """Have `client` hand the guest over to process `number`, with `more` parameters for that."""
    parameters = {name.replace("_", "-"): value for name, value in more.items()}
    await client.execute("migrate", channels=made.where(number), parameters={"mode": "cpr-transfer", **parameters})


async def add_fd(client: QmpClient, fd: int, **arguments: Any) -> dict[str, int]:
    """Put `fd` into a set."""
    sock = client._sock
    await trio.lowlevel.wait_writable(sock)
    with socket.fromfd(sock.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as copy:
        socket.send_fds(copy, [b"\n"], [fd])
    found: dict[str, int] = await client.execute("add-fd", **arguments)
    return found
