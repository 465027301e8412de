"""A guest runs at its destination before all of its RAM is there."""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import trio.testing

import vmm
from tests.migration.pki import NAME, Pki
from tests.phases.copy_kit import (
    HANGS,
    commands,
    empty,
    given,
    goes_on,
    in_status,
    look,
    outcome,
    parts,
    port_of,
    started,
    status,
    ticked,
)
from vmm.errors import (
    HostFileRefused,
    InvalidState,
    MigrationPeerGone,
    MigrationRefused,
    PageFaultsUnavailable,
    StateRejected,
    TokenNotGranted,
    TokenWithheld,
)
from vmm.guests.dirtier import DirtierReader
from vmm.kvm import faults
from vmm.kvm._faults import lib as pages_lib
from vmm.kvm.faults import PagesFromLink
from vmm.migration.outflow import Outflow
from vmm.migration.page_frames import Frame, FrameKind
from vmm.migration.page_server import LinkBroken, PageServer
from vmm.migration.registry import StateRegistry
from vmm.phases import copying
from vmm.phases.copy_control import Canceller, Claim
from vmm.phases.machine import Machine
from vmm.phases.postcopy import hang_up

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine
    from vmm.migration.connection import Connection

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

BYSTANDER: Final = 12 << 20
"""Address of RAM that the guest leaves alone."""
POSTCOPY: Final = [{"capability": "postcopy-ram", "state": True}]
BLOCKTIME: Final = [{"capability": "postcopy-blocktime", "state": True}]
SLOW: Final = {"max-bandwidth": 1 << 20, "max-postcopy-bandwidth": 1, "downtime-limit": 0}
"""So that neither the passes nor what nobody waits for come to an end by themselves."""
PAGES: Final = 600
"""Pages of a bystander's, more than a source sends at once that is to be slow."""


def fill(machine: EmbeddedMachine) -> None:
    """Write something of the test's own to the guest's RAM."""
    for page in range(PAGES):
        parts(machine).memory.write(BYSTANDER + page * 4096, page.to_bytes(2, "little") * 2048)


def filled(machine: EmbeddedMachine) -> bool:
    """Whether it is there."""
    return all(
        parts(machine).memory.read(BYSTANDER + page * 4096, 4096) == page.to_bytes(2, "little") * 2048
        for page in range(PAGES)
    )


async def begin(source: EmbeddedMachine, destination: EmbeddedMachine, path: Path, **parameters: Any) -> None:
    """Have the guest run at the destination; some of its RAM is at the source."""
    uri = f"unix:{path}"
    await destination.execute("migrate-incoming", uri=uri)
    await source.execute("migrate", uri=uri, capabilities=POSTCOPY, parameters={**SLOW, **parameters})
    await outcome(source, "active")
    await source.execute("migrate-start-postcopy")


async def completed(*machines: EmbeddedMachine) -> None:
    for machine in machines:
        info = await outcome(machine, "completed", "failed", "postcopy-paused")
        assert info["status"] == "completed", info


@asynccontextmanager
async def half_gone(
    path: Path, *, credentials: Path | None = None
) -> AsyncGenerator[tuple[EmbeddedMachine, EmbeddedMachine], None]:
    """Have a guest run at a destination, and the rest of it wait at the source; with TLS by the credentials there."""
    async with started() as source, empty() as destination:
        if credentials is not None:
            await given(source, credentials, "client", tls_hostname=NAME)
            await given(destination, credentials, "server")
        fill(source)
        await begin(source, destination, path)
        await in_status(destination, "running")
        await outcome(destination, "postcopy-active")
        await outcome(source, "postcopy-active")
        yield source, destination


async def let_all_come(source: EmbeddedMachine) -> None:
    """Take the limit away."""
    await source.execute("migrate-set-parameters", max_postcopy_bandwidth=0)


async def all_comes(source: EmbeddedMachine, destination: EmbeddedMachine) -> None:
    """Take the limit away; check that all of the guest comes, and goes on there."""
    await let_all_come(source)
    await completed(source, destination)
    assert filled(destination)
    await goes_on(destination)


async def all_paused(*machines: EmbeddedMachine) -> None:
    """Wait until each side has seen the break."""
    for machine in machines:
        await outcome(machine, "postcopy-paused")


async def reconnected(source: EmbeddedMachine, destination: EmbeddedMachine, path: Path) -> None:
    """Have the two go on over another connection."""
    await destination.execute("migrate-recover", uri=f"unix:{path}")
    await source.execute("migrate", uri=f"unix:{path}", resume=True)


async def test_a_guest_runs_there_and_the_rest_follows(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        fill(source)
        ticks = look(source).ticks
        await destination.execute("migrate-set-capabilities", capabilities=BLOCKTIME)
        await begin(source, destination, tmp_path / "main", **{"max-postcopy-bandwidth": 0})
        await completed(source, destination)
        await ticked(destination, ticks + 10)
        assert filled(destination)
        assert parts(destination).memory.absent is None
        assert await status(source) == "postmigrate"
        ram = (await source.execute("query-migrate"))["ram"]
        assert ram["postcopy-bytes"] > 0
        assert ram["remaining"] == 0
        info = await destination.execute("query-migrate")
        assert info["ram"]["postcopy-bytes"] > 0
        assert info["ram"]["remaining"] == 0
        assert info["postcopy-blocktime"] >= 0
        assert len(info["postcopy-vcpu-blocktime"]) == 1
        # It is nowhere else, and can be had again from there alone.
        with pytest.raises(TokenNotGranted):
            await source.execute("cont")
        await goes_on(destination)


async def test_what_is_asked_for_comes_before_what_is_not(tmp_path: Path) -> None:
    async with half_gone(tmp_path / "main") as (source, destination):
        last = BYSTANDER + (PAGES - 1) * 4096
        read = await trio.to_thread.run_sync(parts(destination).memory.read, last, 4)
        assert read == (PAGES - 1).to_bytes(2, "little") * 2
        info = await source.execute("query-migrate")
        assert info["ram"]["postcopy-requests"] > 0
        assert info["ram"]["remaining"] > 0
        await let_all_come(source)
        await completed(source, destination)
        assert filled(destination)


async def test_what_cannot_be_done_meanwhile_says_so(tmp_path: Path) -> None:
    async with half_gone(tmp_path / "main") as (source, destination):
        uri = f"unix:{tmp_path / 'more'}"
        refusals: list[tuple[EmbeddedMachine, str, dict[str, Any], str]] = [
            (source, "migrate_cancel", {}, "the guest runs at the destination already, and would be lost"),
            (source, "migrate-start-postcopy", {}, "the guest runs at the destination already"),
            (source, "migrate-recover", {"uri": uri}, "migrate-recover is for the destination of a postcopy; here"),
            (source, "migrate", {"uri": uri}, "'resume' goes on with that after a break"),
            (source, "migrate", {"uri": uri, "resume": True}, "the postcopy is postcopy-active, not paused"),
            (destination, "migrate-start-postcopy", {}, "the guest runs here already; it is for the source"),
            (destination, "migrate-recover", {"uri": uri}, "the postcopy is postcopy-active, not paused; it needs no"),
            (destination, "migrate-recover", {"uri": f"file:{tmp_path}/f"}, "a postcopy goes on over a socket"),
        ]
        for machine, command, arguments, text in refusals:
            with pytest.raises(MigrationRefused, match=text):
                await machine.execute(command, **arguments)
        with pytest.raises(TokenWithheld):
            await destination.execute("migrate", uri=uri)
        with pytest.raises(TokenWithheld):
            await source.execute("cont")
        await destination.execute("stop")
        assert await status(destination) == "paused"
        await destination.execute("cont")
        await let_all_come(source)
        await completed(source, destination)
        assert filled(destination)


async def test_before_it_has_begun_there_is_nothing_to_mend(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        uri = f"unix:{tmp_path / 'main'}"
        await destination.execute("migrate-incoming", uri=uri, exit_on_error=False)
        await source.execute("migrate", uri=uri, parameters=SLOW)
        await outcome(source, "active")
        refusals: list[tuple[str, dict[str, Any], str]] = [
            ("migrate-start-postcopy", {}, "the migration has begun without postcopy-ram, which comes before"),
            ("migrate-pause", {}, "no postcopy is under way; migrate_cancel ends the migration"),
            ("migrate-recover", {"uri": uri}, "no postcopy is under way, and it is for the destination of one"),
        ]
        for command, arguments, text in refusals:
            with pytest.raises(MigrationRefused, match=text):
                await source.execute(command, **arguments)
        await source.execute("migrate_cancel")
        assert (await outcome(source))["status"] == "cancelled"
        await goes_on(source)
        with pytest.raises(MigrationRefused, match="there is no paused postcopy to resume; leave 'resume' out"):
            await source.execute("migrate", uri=uri, resume=True)


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_connection_that_breaks_is_replaced(side: str, tmp_path: Path) -> None:
    async with half_gone(tmp_path / "main") as (source, destination):
        await {"source": source, "destination": destination}[side].execute("migrate-pause")
        paused = await outcome(source, "postcopy-paused")
        assert paused["error-desc"]
        await outcome(destination, "postcopy-paused")
        with pytest.raises(MigrationRefused, match="migrate-pause: the postcopy is postcopy-paused, not active"):
            await source.execute("migrate-pause")
        with pytest.raises(MigrationRefused, match="migrate-pause: the postcopy is postcopy-paused, not active"):
            await destination.execute("migrate-pause")
        await destination.execute("migrate-recover", uri="tcp:127.0.0.1:0")
        await source.execute("migrate", uri=f"tcp:127.0.0.1:{await port_of(destination)}", resume=True)
        info = await outcome(source, "postcopy-active", "completed")
        assert "error-desc" not in info
        await all_comes(source, destination)


async def test_a_connection_with_tls_is_replaced_by_one_with_tls(tmp_path: Path) -> None:
    credentials = Pki.make(tmp_path).folder()
    async with half_gone(tmp_path / "main", credentials=credentials) as (source, destination):
        await source.execute("migrate-pause")
        await all_paused(source, destination)
        uri = f"unix:{tmp_path / 'again'}"
        await destination.execute("migrate-recover", uri=uri)
        async with await trio.open_unix_socket(str(tmp_path / "again")) as plain:
            await plain.send_all(Frame(FrameKind.RESUME, 0, 1).encode() + bytes(4096))
            said = bytearray()
            with trio.fail_after(HANGS), suppress(trio.BrokenResourceError):  # it hangs up with something unread
                async for data in plain:
                    said += data
            assert Frame(FrameKind.HAVE, 0, 1).encode()[:4] not in said  # no more than an alert of TLS
        await source.execute("migrate", uri=uri, resume=True)
        await all_comes(source, destination)


async def test_whoever_else_connects_is_no_source(tmp_path: Path) -> None:
    async with half_gone(tmp_path / "main") as (source, destination), half_gone(tmp_path / "other") as (other, there):
        for machine in (source, other):
            await machine.execute("migrate-pause")
        await all_paused(source, destination, other, there)
        uri = f"unix:{tmp_path / 'again'}"
        with pytest.raises(Exception, match="Cannot connect to"):
            await source.execute("migrate", uri=uri, resume=True)
        assert (await source.execute("query-migrate"))["status"] == "postcopy-paused"
        await destination.execute("migrate-recover", uri=uri)
        with pytest.raises(MigrationRefused, match="Refused by the destination: it awaits the source of another migr"):
            await other.execute("migrate", uri=uri, resume=True)
        async with await trio.open_unix_socket(str(tmp_path / "again")) as stranger:
            await stranger.send_all(b"x" * 32)
            assert await stranger.receive_some() == b""
        await source.execute("migrate", uri=uri, resume=True)
        await all_comes(source, destination)


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_either_side_can_end_while_pages_are_to_come(side: str, tmp_path: Path) -> None:
    async with half_gone(tmp_path / "main") as (source, destination):
        await source.execute("migrate-pause")
        await outcome(destination, "postcopy-paused")
        await {"source": source, "destination": destination}[side].execute("quit")


async def test_a_destination_that_cannot_answer_faults_says_so_before_the_guest_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(action: str, names: object) -> None:
        raise PageFaultsUnavailable(action=action, reason="this host is too old")

    monkeypatch.setattr(faults, "require_features", lacks)
    async with started() as source, empty() as destination:
        uri = f"unix:{tmp_path / 'main'}"
        await destination.execute("migrate-incoming", uri=uri, exit_on_error=False)
        async with source.events() as events:
            await source.execute("migrate", uri=uri, capabilities=POSTCOPY)
            info = await outcome(source)
            assert info["error-desc"] == (
                "Refused by the destination: Cannot run the guest before all of its RAM is there: this host is too old"
            )
            await source.execute("stop")
            seen: list[str] = []
            async for event in events:
                seen.append(event["event"])
                if seen[-1] == "STOP":
                    break
        assert seen.count("RESUME") == 0
        await source.execute("cont")
        await goes_on(source)


async def test_a_state_that_is_not_taken_stays_at_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise StateRejected(section="cpu0", faults=("it is not to the test's taste",))

    async with started() as source, empty() as destination:
        uri = f"unix:{tmp_path / 'main'}"
        await destination.execute("migrate-incoming", uri=uri, exit_on_error=False)
        await source.execute("migrate", uri=uri, capabilities=POSTCOPY, parameters=SLOW)
        await outcome(source, "active")
        monkeypatch.setattr(StateRegistry, "check", refuses)
        await source.execute("migrate-start-postcopy")
        info = await outcome(source)
        assert info["error-desc"] == "Refused by the destination: Section cpu0: it is not to the test's taste"
        assert parts(source).memory.absent is None
        await goes_on(source)
        await outcome(destination, "failed")


async def test_whoever_calls_it_off_just_before_the_source_lets_go_keeps_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve, made = Outflow.serve_until_loaded, []

    class Noted(Canceller):  # type: ignore[misc]  # to have the one of this migration
        def __init__(self, claim: Claim) -> None:
            super().__init__(claim)
            made.append(self)

    async def cancelled_in_this_moment(
        self: Outflow, server: PageServer, urgent: Connection | None, let_go: Callable[[], object]
    ) -> None:
        def cancel_first() -> None:
            made[0].cancel("by this test")
            let_go()

        await serve(self, server, urgent, cancel_first)

    monkeypatch.setattr(copying, "Canceller", Noted)
    monkeypatch.setattr(Outflow, "serve_until_loaded", cancelled_in_this_moment)
    async with started() as source, empty() as destination:
        uri = f"unix:{tmp_path / 'main'}"
        await destination.execute("migrate-incoming", uri=uri, exit_on_error=False)
        await source.execute("migrate", uri=uri, capabilities=POSTCOPY, parameters=SLOW)
        await outcome(source, "active")
        await source.execute("migrate-start-postcopy")
        assert (await outcome(source))["status"] == "cancelled"
        assert await status(source) == "running"
        await goes_on(source)
        assert await status(destination) != "running"


async def test_a_connection_that_breaks_before_the_state_is_in_force_leaves_the_guest_at_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = PagesFromLink.say_loaded

    def cut(pages: PagesFromLink) -> None:
        hang_up(pages._links[0])
        while pages._state().state == pages_lib.TF_RUNS:
            os.sched_yield()
        says(pages)

    monkeypatch.setattr(PagesFromLink, "say_loaded", cut)
    async with started() as source, empty() as destination:
        fill(source)
        await destination.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}", exit_on_error=False)
        await source.execute("migrate", uri=f"unix:{tmp_path / 'main'}", capabilities=POSTCOPY, parameters=SLOW)
        await outcome(source, "active")
        await source.execute("migrate-start-postcopy")
        assert (await outcome(source))["status"] == "failed"
        info = await outcome(destination, "failed", "postcopy-active", "postcopy-paused")
        assert (info["status"], info.get("error-desc")) == (
            "failed", "The source closed the connection; the guest stays there",
        )  # fmt: skip
        await goes_on(source)
        # And another one can come.
        await destination.execute("migrate-incoming", uri=f"unix:{tmp_path / 'again'}", exit_on_error=False)


async def test_what_cannot_be_gone_on_with_there_is_resumed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relink = PagesFromLink.relink

    def fails(*_: object) -> None:
        monkeypatch.setattr(PagesFromLink, "relink", relink)
        raise HostFileRefused(action="duplicate", path="descriptor 5", reason="no descriptor is left")

    async with half_gone(tmp_path / "main") as (source, destination):
        monkeypatch.setattr(PagesFromLink, "relink", fails)
        for turn in range(2):
            if not turn:
                await source.execute("migrate-pause")
            await all_paused(source, destination)
            await reconnected(source, destination, tmp_path / str(turn))
        await all_comes(source, destination)


async def test_where_nobody_can_answer_it_is_not_gone_on_with(tmp_path: Path) -> None:
    async with half_gone(tmp_path / "main") as (source, destination):
        await source.execute("migrate-pause")
        await all_paused(source, destination)
        read, write = os.pipe()
        with pytest.raises(MigrationRefused, match="migrate: a postcopy goes on over a socket, which can answer"):
            await source.execute("migrate", uri=f"fd:{write}", resume=True)
        os.close(read)
        await reconnected(source, destination, tmp_path / "again")
        await let_all_come(source)
        await completed(source, destination)
        await goes_on(destination)


async def test_where_the_source_is_awaited_in_vain_can_be_changed(tmp_path: Path) -> None:
    async with half_gone(tmp_path / "main") as (source, destination):
        await source.execute("migrate-pause")
        await all_paused(source, destination)
        await destination.execute("migrate-recover", uri=f"unix:{tmp_path / 'wrong'}")
        async with await trio.open_unix_socket(str(tmp_path / "wrong")) as stranger:
            await trio.testing.wait_all_tasks_blocked()
            await destination.execute("migrate-pause")
            await outcome(destination, "postcopy-paused")
            assert await stranger.receive_some() == b""
        await reconnected(source, destination, tmp_path / "right")
        await all_comes(source, destination)


async def test_a_reset_that_takes_what_does_not_come_is_told_and_can_be_had_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Machine.power_on_again

    def with_more(machine: Machine) -> None:
        machine.memory.write(BYSTANDER + (PAGES - 1) * 4096, b"firmware")
        again(machine)

    async with half_gone(tmp_path / "main") as (source, destination):
        # All that the guest uses: while a vCPU waits for a page, it cannot be stopped, nor reset.
        await trio.to_thread.run_sync(parts(destination).memory.read, 0, BYSTANDER)
        await source.execute("migrate-pause")
        await all_paused(source, destination)
        monkeypatch.setattr(Machine, "power_on_again", with_more)
        parts(destination).bells.request_reset()
        await in_status(destination, "internal-error")
        with pytest.raises(MigrationPeerGone, match="the guest waits for its pages; see migrate-recover"):
            await destination.execute("system_reset")
        await reconnected(source, destination, tmp_path / "again")
        await let_all_come(source)
        await completed(source, destination)
        await destination.execute("system_reset")
        await destination.execute("cont")
        await goes_on(destination)


async def test_a_guest_that_stands_goes_and_stands(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        await source.execute("stop")
        ticks = look(source).ticks
        await begin(source, destination, tmp_path / "main", **{"max-postcopy-bandwidth": 0})
        await completed(source, destination)
        await in_status(destination, "paused")
        assert look(destination).ticks == ticks
        await destination.execute("cont")
        await goes_on(destination)


PREEMPT: Final = [*POSTCOPY, {"capability": "postcopy-preempt", "state": True}]


async def test_what_is_asked_for_may_come_on_a_channel_of_its_own(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        fill(source)
        uri = f"unix:{tmp_path / 'main'}"
        await destination.execute("migrate-incoming", uri=uri)
        await source.execute("migrate", uri=uri, capabilities=PREEMPT, parameters=SLOW)
        await outcome(source, "active")
        await source.execute("migrate-start-postcopy")
        await outcome(destination, "postcopy-active")
        last = BYSTANDER + (PAGES - 1) * 4096
        assert await trio.to_thread.run_sync(parts(destination).memory.read, last, 2) == (PAGES - 1).to_bytes(
            2, "little"
        )
        # A break ends both; what follows it is one channel for all.
        await source.execute("migrate-pause")
        await all_paused(source, destination)
        await reconnected(source, destination, tmp_path / "again")
        await all_comes(source, destination)


async def test_where_nobody_can_ask_or_no_second_channel_comes_it_is_refused(tmp_path: Path) -> None:
    async with started() as source:
        with pytest.raises(MigrationRefused, match="postcopy-ram needs a destination that can ask for pages: give"):
            await source.execute("migrate", uri=f"file:{tmp_path / 'state'}", capabilities=POSTCOPY)
        with pytest.raises(MigrationRefused, match="postcopy-preempt needs an address that can be connected to twice"):
            await source.execute("migrate", uri="exec:cat >/dev/null", capabilities=PREEMPT)
        with pytest.raises(MigrationRefused, match="or a command with return-path on; or turn it off"):
            await source.execute("migrate", uri="exec:cat >/dev/null", capabilities=POSTCOPY)
        assert not (tmp_path / "state").exists()
        await goes_on(source)


DIRTIER: Final = {"kernel": "builtin:dirtier", "append": "region=4M pages=64 hz=100"}
"""A guest that writes all the time, and whose every page can be verified."""


async def test_what_a_guest_writes_all_the_time_is_whole_there(tmp_path: Path) -> None:
    async with vmm.machine(commands(**DIRTIER)) as source, empty() as destination:
        reader = DirtierReader(parts(source).memory.read)
        with trio.fail_after(HANGS):
            while (reader.written() or 0) < 500:  # noqa: ASYNC110 - a guest does not tell
                await trio.sleep(0.005)
        await begin(source, destination, tmp_path / "main", **{"max-postcopy-bandwidth": 0})
        await completed(source, destination)
        before = reader.written() or 0
        reader.follow(parts(destination).memory.read)
        with trio.fail_after(HANGS):
            while (reader.written() or 0) < before + 500:  # noqa: ASYNC110
                await trio.sleep(0.005)
        report = reader.look()
        assert report is not None
        assert report.intact, str(report)


async def test_a_break_before_the_state_is_in_force_leaves_the_guest_at_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_off(link: PagesFromLink) -> None:
        hang_up(link._links[0])

    monkeypatch.setattr(PagesFromLink, "say_loaded", breaks_off)
    async with started() as source, empty() as destination:
        fill(source)
        await begin(source, destination, tmp_path / "main")
        info = await outcome(source)
        assert info["status"] == "failed"
        assert info["error-desc"].endswith("the guest goes on in the source")
        await goes_on(source)
        # It is not known there whose the guest is, and so it does not run.
        await outcome(destination, "postcopy-paused")
        assert await status(destination) == "paused"


async def test_a_break_in_the_moment_in_which_the_guest_is_let_go_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_heard = PageServer._has_heard

    def is_cut_off(server: PageServer, frame: Frame, main: socket.socket, bell: int) -> bool:
        if frame.kind is FrameKind.LOADED:
            assert server._loaded is not None
            server._loaded()
            main.shutdown(socket.SHUT_RDWR)
            raise LinkBroken("the test has cut it")
        return has_heard(server, frame, main, bell)

    monkeypatch.setattr(PageServer, "_has_heard", is_cut_off)
    async with started() as source, empty() as destination:
        fill(source)
        await begin(source, destination, tmp_path / "main")
        await all_paused(source, destination)
        assert await status(source) == "postmigrate"
        for command in ("cont", "stop", "system_reset"):
            with pytest.raises(InvalidState, match="nobody knows whose the guest is: the connection broke"):
                await destination.execute(command)
        assert await status(destination) == "paused"
        monkeypatch.undo()
        await reconnected(source, destination, tmp_path / "again")
        await in_status(destination, "running")
        await all_comes(source, destination)
