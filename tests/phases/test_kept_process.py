"""The process that a guest came from is kept, takes the guest back, is let go, and dies."""

from __future__ import annotations

from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, final

import attrs
import pytest

from tests.phases.machine import connected
from tests.phases.update_kit import Bench, Console, Process, Ram, answering_pid, open_bench, outcome
from tests.phases.update_pair import hand_over, pair
from vmm.cli_replace import UndoRefused, _forget, _undo
from vmm.cpr.channel import CprChannel
from vmm.errors import HostFileRefused
from vmm.qmp_client import CommandFailed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vmm.qmp_client import QmpClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

NOBODY = "no process is kept ready to take the guest back; a live update with x-keep-source keeps one"


@final
@attrs.frozen
class Kept:
    """A machine that was updated, and the process that it came from, which waits."""

    bench: Bench
    console: Console
    source: Process
    new: Process
    ram: Ram
    client: QmpClient
    """A client since before the update."""

    async def require_guest_in(self, process: Process) -> None:
        """Fail unless the guest goes on in `process`, and has lost nothing."""
        await self.console.new_beats(2)
        self.ram.require_intact()
        assert await answering_pid(self.bench.qmp) == process.pid

    async def update(self, *, keep: bool) -> Process:
        """Update the machine, and wait until the new process says that it is over."""
        new = self.bench.destination()
        await self.bench.listening(new)
        parameters = {"mode": "cpr-transfer", "migrate-sessions": True, "x-keep-source": keep}
        await self.client.execute("migrate", channels=self.bench.channels(new), parameters=parameters)
        assert (await outcome(self.client))["status"] == "completed"
        assert self.client.peer_pid == new.pid
        return new


@asynccontextmanager
async def kept(*options: str) -> AsyncGenerator[Kept, None]:
    """Update a machine, and keep the process that had it. `options` are that one's."""
    async with open_bench() as bench:
        console = bench.console()
        source = bench.machine(console, *options)
        await console.beats(1)
        async with bench.session(bench.qmp) as client:
            await client.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            with closing(Ram(source.pid)) as ram:
                made = Kept(bench, console, source, source, ram, client)
                yield attrs.evolve(made, new=await made.update(keep=True))


async def test_an_update_is_undone_and_every_client_stays() -> None:
    async with kept() as made:
        info = await made.client.execute("query-migrate")
        assert info["x-kept"]["pid"] == made.source.pid
        assert info["x-kept"]["program"].startswith("trio-vmm ")
        report = await _undo(made.bench.qmp)
        assert (report.old_pid, report.new_pid) == (made.new.pid, made.source.pid)
        assert report.pauses[0]["total"] > 0
        await made.require_guest_in(made.source)
        assert "x-kept" not in await made.client.execute("query-migrate")
        assert made.client.peer_pid == made.source.pid  # the connection is the one from before
        assert await made.new.ended() == 0
        with pytest.raises(UndoRefused) as caught:
            await _undo(made.bench.qmp)
        assert str(caught.value) == f"The machine goes on where it is: x-cpr-undo: {NOBODY}"


async def test_a_kept_process_that_is_forgotten_ends() -> None:
    async with kept() as made:
        await _forget(made.bench.qmp)
        assert await made.source.ended() == 0
        await made.require_guest_in(made.new)
        with pytest.raises(UndoRefused) as caught:
            await _forget(made.bench.qmp)
        assert str(caught.value) == f"The machine goes on where it is: x-cpr-forget: {NOBODY}"


async def test_a_kept_process_ends_with_the_one_that_has_the_guest() -> None:
    async with kept() as made:
        await made.client.execute("quit")
        assert await made.source.ended() == 0


async def test_a_kept_process_ends_with_the_next_update() -> None:
    async with kept() as made:
        newest = await made.update(keep=False)
        assert await made.source.ended() == 0
        assert await made.new.ended() == 0
        await made.require_guest_in(newest)


async def test_a_kept_process_that_has_died_is_nowhere_to_go_back_to() -> None:
    async with kept() as made:
        made.source.kill()
        await made.source.ended()
        assert "x-kept" not in await made.client.execute("query-migrate")
        with pytest.raises(UndoRefused, match="no process is kept ready"):
            await _undo(made.bench.qmp)
        await made.require_guest_in(made.new)


async def test_a_kept_process_that_dies_as_it_takes_the_guest_back_leaves_it_where_it_is() -> None:
    async with kept("--x-cpr-stop-at", "destination:loaded") as made:
        await made.client.execute("x-cpr-undo")
        await made.source.stopped()
        made.source.kill()
        info = await outcome(made.client)
        assert info["status"] == "failed"
        assert info["error-desc"].startswith("The destination closed the channel at step")
        await made.require_guest_in(made.new)


async def test_a_process_that_cannot_be_kept_keeps_its_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leash(_channel: CprChannel) -> int:
        raise HostFileRefused(action="duplicate", path="a descriptor", reason="Too many open files")

    async with pair(tmp_path) as made, made.destination(), connected(made.qmp) as client:
        host = made.machines[0].host
        host.start = attrs.evolve(host.start, own_process=True)
        monkeypatch.setattr(CprChannel, "leash", leash)
        with pytest.raises(CommandFailed, match="Too many open files"):
            await hand_over(made, client, 1, x_keep_source=True)
        assert (await client.execute("query-status"))["running"]


async def test_a_process_that_is_not_the_machines_alone_is_not_kept(tmp_path: Path) -> None:
    async with pair(tmp_path) as made, made.destination(), connected(made.qmp) as client:
        with pytest.raises(CommandFailed) as caught:
            await hand_over(made, client, 1, x_keep_source=True)
        assert caught.value.desc == (
            "migrate: the machine runs inside another program, whose process cannot stand by for it; "
            "turn x-keep-source off"
        )
        assert (await client.execute("query-status"))["running"]
