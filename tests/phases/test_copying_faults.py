"""What goes wrong while a guest is copied: it goes on where it was, and whoever is left says why."""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

import vmm
from tests.phases.copy_kit import (
    commands,
    destination_peer,
    empty,
    goes_on,
    in_status,
    look,
    outcome,
    parts,
    ram,
    refusal,
    save,
    source_peer,
    started,
    status,
)
from tests.phases.machine import sockets_in
from tests.phases.streams import answered, head_of
from vmm.cpr.limits import CprLimits
from vmm.errors import MigrationPeerGone, MigrationRefused, StreamCorrupt, VmmError
from vmm.migration.stream import StreamWriter
from vmm.migration.stream_records import PROCESSOR, PROCESSOR_VERSION, recipe_digest
from vmm.phases.start import Start
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from tests.phases.copy_kit import Peer
    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]


def full(machine: EmbeddedMachine) -> None:
    """Put something into all of the guest's upper 8 MiB, so that no socket takes all of its RAM at once."""
    parts(machine).memory.write(8 << 20, os.urandom(8 << 20))


async def failed(source: EmbeddedMachine, reason: str) -> None:
    """Require that the migration has failed for this reason, and that the guest goes on here."""
    info = await outcome(source)
    assert (info["status"], info["error-desc"]) == ("failed", reason)
    await in_status(source, "running")
    await goes_on(source)


@asynccontextmanager
async def loaded(source: EmbeddedMachine, machine: EmbeddedMachine, folder: Path) -> AsyncGenerator[Peer, None]:
    """Send what `source` saves to `machine`, as a source does, until that has loaded it."""
    data = answered(await save(source, folder / "state"))
    await machine.execute("migrate-incoming", uri=f"unix:{folder / 'main'}")
    async with source_peer(folder / "main") as peer:
        await peer.send(data)
        assert (await peer.hear()).name == "ready"
        assert (await peer.hear()).name == "loaded"
        yield peer


GONE: Final = "The destination closed the connection; the guest goes on in the source"


# --- the destination --------------------------------------------------------------------------------------------


async def test_a_destination_that_hangs_up_at_once_keeps_nothing(tmp_path: Path) -> None:
    async with started() as source:
        async with destination_peer(source, tmp_path) as peer:
            peer.close()
        await failed(source, GONE)


async def test_a_destination_that_hangs_up_amid_ram_keeps_nothing(tmp_path: Path) -> None:
    async with started() as source:
        full(source)
        async with destination_peer(source, tmp_path) as peer:
            await peer.invite()
            await peer.read(3 << 20)
            peer.close()
        await failed(source, GONE)


async def test_a_destination_that_hangs_up_in_place_of_a_last_word_keeps_nothing(tmp_path: Path) -> None:
    async with started() as source:
        async with destination_peer(source, tmp_path) as peer:
            await peer.prepare()
            await outcome(source, "device")
            peer.close()
        await failed(source, GONE)


@pytest.mark.parametrize("after", [0, 3 << 20])
async def test_a_destination_that_refuses_is_quoted(after: int, tmp_path: Path) -> None:
    async with started() as source:
        full(source)
        async with destination_peer(source, tmp_path) as peer:
            if after:
                await peer.invite()
                await peer.read(after)
            await peer.say("refused", "there is no room")
            await peer.ended()
        await failed(source, "Refused by the destination: there is no room")


async def test_a_destination_refuses_before_the_guest_has_been_stopped(tmp_path: Path) -> None:
    async with started() as source:
        async with source.events() as events, destination_peer(source, tmp_path) as peer:
            await peer.say("refused", "no")
            await outcome(source)
            await source.execute("stop")
            seen = []
            async for event in events:
                seen.append(event["event"])
                if event["event"] == "STOP":
                    break
        assert seen.count("STOP") == 1
        assert "RESUME" not in seen


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            b"HTTP/1.1 400\n",
            "State stream: the destination says b'HTTP/1.1 400\\n', "
            "expected one of ready, acknowledged, prepared, loaded, refused, yours",
        ),
        (b'{"word": "yours"}\n', "State stream: the destination says 'yours', expected 'ready'"),
        (b'{"word": "loaded"}\n', "State stream: the destination says 'loaded', expected 'ready'"),
        (b"x" * 20000, "State stream: the destination says more than 16384 bytes where a word was expected"),
    ],
)
async def test_a_destination_that_talks_nonsense_keeps_nothing(said: bytes, reason: str, tmp_path: Path) -> None:
    async with started() as source:
        async with destination_peer(source, tmp_path) as peer:
            await peer.invited()
            await peer.send(said)
            await peer.ended()
        await failed(source, reason)


async def test_one_that_has_loaded_too_early_keeps_nothing(tmp_path: Path) -> None:
    async with started() as source:
        full(source)
        async with destination_peer(source, tmp_path) as peer:
            await peer.invite()
            await peer.read(1 << 20)
            await peer.say("loaded")
            await peer.ended()
        await failed(source, "State stream: the destination says 'loaded', expected 'refused'")


async def test_a_guest_that_stood_stands_after_a_failure(tmp_path: Path) -> None:
    async with started() as source:
        await source.execute("stop")
        async with destination_peer(source, tmp_path) as peer:
            await peer.prepare()
            await outcome(source, "device")
            peer.close()
        assert (await outcome(source))["status"] == "failed"
        assert await status(source) == "paused"


# --- in between -------------------------------------------------------------------------------------------------


async def test_the_monitor_answers_while_ram_is_copied_and_tells_how_far_it_is(tmp_path: Path) -> None:
    async with started() as source:
        full(source)
        async with destination_peer(source, tmp_path) as peer:
            await peer.invite()
            remaining: list[int] = []
            for _ in range(6):
                await peer.read(1 << 20)
                info = await outcome(source, "active")
                remaining.append(info["ram"]["remaining"])
                assert await status(source) == "running"
            assert remaining == sorted(remaining, reverse=True)
            assert 0 < remaining[-1] < remaining[0]


async def test_a_migration_is_cancelled_while_ram_is_copied_and_the_guest_goes_on(tmp_path: Path) -> None:
    async with started() as source:
        full(source)
        async with destination_peer(source, tmp_path) as peer:
            await peer.invite()
            await peer.read(1 << 20)
            await source.execute("migrate_cancel")
            assert (await outcome(source))["status"] == "cancelled"
            await goes_on(source)


@pytest.mark.parametrize("word", [None, "ready"])
async def test_a_migration_is_cancelled_while_it_waits_for_the_destination(word: str | None, tmp_path: Path) -> None:
    async with started() as source:
        async with destination_peer(source, tmp_path) as peer:
            if word is not None:
                await peer.prepare()
                await outcome(source, "device")
            else:
                await outcome(source, "active")
            await source.execute("migrate_cancel")
            assert (await outcome(source))["status"] == "cancelled"
        await goes_on(source)


async def test_a_guest_runs_until_the_destination_has_made_ready(tmp_path: Path) -> None:
    async with started() as source:
        async with destination_peer(source, tmp_path) as peer:
            await peer.invite()
            await peer.read_pages()
            assert (await outcome(source, "active"))["ram"]["remaining"] <= 64 * 4096
            await goes_on(source)
            await source.execute("migrate_cancel")
            assert (await outcome(source))["status"] == "cancelled"
        await goes_on(source)


async def test_commands_are_answered_however_long_the_source_says_nothing(tmp_path: Path) -> None:
    policy = os.sched_getscheduler(0)
    async with started() as source, empty() as machine, loaded(source, machine, tmp_path) as peer:
        await machine.execute("cont")
        await machine.execute("migrate-set-parameters", **{"downtime-limit": 7})
        await machine.execute("stop")
        assert os.sched_getscheduler(0) == policy
        await peer.say("yours")
        await in_status(machine, "paused")
        await machine.execute("cont")
        await goes_on(machine)


@pytest.mark.parametrize("turns", [0, 2, 4, 6, 9, 12, 20])
async def test_a_stop_at_the_moment_of_the_guest_s_start_is_not_lost(turns: int, tmp_path: Path) -> None:
    async with started() as source, empty() as machine:
        async with loaded(source, machine, tmp_path) as peer:
            await peer.say("yours")
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            await machine.execute("stop")
        await in_status(machine, "paused")
        await machine.execute("cont")
        await goes_on(machine)


async def test_after_a_cancelled_migration_the_next_one_succeeds(tmp_path: Path) -> None:
    async with started() as source:
        async with destination_peer(source, tmp_path):
            await source.execute("migrate_cancel")
            assert (await outcome(source))["status"] == "cancelled"
        await save(source, tmp_path / "state")


async def test_a_machine_ends_amid_a_migration(tmp_path: Path) -> None:
    async with started() as source:
        full(source)
        async with destination_peer(source, tmp_path) as peer:
            await peer.invite()
            await peer.read(1 << 20)
            await source.execute("quit")
            await peer.ended()


async def test_what_would_change_the_machine_waits_until_the_migration_is_over(tmp_path: Path) -> None:
    async with started() as source, destination_peer(source, tmp_path) as peer:
        await peer.prepare()
        await outcome(source, "device")
        for command, arguments in (
            ("stop", {}),
            ("cont", {}),
            ("system_reset", {}),
            ("migrate", {"uri": "tcp:127.0.0.1:1"}),
        ):
            with pytest.raises(VmmError, match="withholds until it ends"):
                await source.execute(command, **arguments)


# --- the source -------------------------------------------------------------------------------------------------


async def talk(path: Path) -> None:
    """Be a stranger that says what is no stream."""
    async with source_peer(path) as peer:
        await peer.send(b"GET / HTTP/1.1\r\n\r\n")
        word = await peer.hear()
        assert word.name == "refused"
        assert word.reason.startswith("State stream: it begins with 474554202f204854")


async def hang_up(path: Path) -> None:
    """Be one that says nothing, and goes."""
    async with source_peer(path):
        pass


async def be_silent(path: Path) -> None:
    """Be one that says nothing, and stays."""
    async with source_peer(path) as peer:
        assert (await peer.hear()).name == "refused"


STRANGERS: Final = (
    (talk, "it begins with 474554202f204854, expected 8954564d4d0d0a1a"),
    (hang_up, "it ends after 0 bytes; expected the preamble of 12 bytes"),
    (be_silent, "the source did not say what machine it is of within 2 s"),
)


@pytest.mark.parametrize("defined", [False, True])
async def test_a_stranger_keeps_no_source_out(*, defined: bool, tmp_path: Path) -> None:
    complaints: list[str] = []
    recipe = Recipe.from_json("of this test", commands(upto="accel-set") if defined else [])
    start = Start(recipe, limits=CprLimits(describing=2), complain=complaints.append)
    async with started() as source, vmm.machine(start=start) as machine:
        uri = f"unix:{tmp_path / 'main'}"
        await machine.execute("migrate-incoming", uri=uri)
        for stranger, _ in STRANGERS:
            await stranger(tmp_path / "main")
        await source.execute("migrate", uri=uri)
        await in_status(machine, "running")
        await goes_on(machine)
    assert complaints == [f"State stream: {text}" for _, text in STRANGERS]


async def test_a_stranger_at_the_other_end_of_a_descriptor_ends_a_destination_with_the_reason() -> None:
    """Nobody else can come there."""
    ours, theirs = socket.socketpair()
    with ours, refusal(StreamCorrupt, "it begins with 474554202f204854, expected 8954564d4d0d0a1a"):
        async with empty() as machine:
            machine._program.descriptors["main"] = theirs.detach()
            await machine.execute("migrate-incoming", uri="fd:main")
            ours.sendall(b"GET / HTTP/1.1\r\n\r\n")
            ours.shutdown(socket.SHUT_WR)
            await trio.sleep_forever()


async def test_a_source_that_hangs_up_in_place_of_its_last_word_keeps_its_guest(tmp_path: Path) -> None:
    async with started() as source:
        data = answered(await save(source, tmp_path / "state"))
        with refusal(MigrationPeerGone, "The source closed the connection; the guest stays there"):
            async with empty() as machine:
                await machine.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}")
                async with source_peer(tmp_path / "main") as peer:
                    await peer.send(data[: head_of(data)])
                    assert (await peer.hear()).name == "ready"
                    await peer.send(data[head_of(data) :])
                    assert (await peer.hear()).name == "loaded"
                    assert await status(machine) == "inmigrate"
                await trio.sleep_forever()


async def test_a_destination_runs_its_guest_only_after_the_source_has_let_go(tmp_path: Path) -> None:
    async with started() as source, empty() as machine:
        async with loaded(source, machine, tmp_path) as peer:
            before = look(machine).ticks
            assert await status(machine) == "inmigrate"
            assert look(machine).ticks == before
            await peer.say("yours")
        await in_status(machine, "running")
        await goes_on(machine)


# --- and once more ----------------------------------------------------------------------------------------------


async def test_without_exit_on_error_an_empty_destination_may_await_the_next(tmp_path: Path) -> None:
    writer = StreamWriter("a test", recipe_digest([]))
    writer.recipe([])
    writer.section(PROCESSOR, PROCESSOR_VERSION, {})
    of_nothing = b"".join(writer.finish())
    async with started() as source, empty() as machine:
        for number in range(3):
            path = tmp_path / f"main{number}"
            await machine.execute("migrate-incoming", uri=f"unix:{path}", exit_on_error=False)
            async with source_peer(path) as peer:
                await peer.send(of_nothing)
                word = await peer.hear()
                assert "the recipe of a whole machine has it once" in word.reason
            info = await outcome(machine)
            assert info["status"] == "failed"
            assert machine.path.endswith("precreate")
        await machine.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}")
        await source.execute("migrate", uri=f"unix:{tmp_path / 'main'}")
        await in_status(machine, "running")


def port(path: Path) -> dict[str, Any]:
    """Return the arguments of a `chardev-add` of a socket."""
    data = {"addr": {"type": "unix", "data": {"path": str(path)}}, "server": True, "wait": False}
    return {"id": "serial0", "backend": {"type": "socket", "data": data}}


async def test_a_replay_that_failed_leaves_nothing_and_the_next_source_may_come(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\xf4" * 512)
    allowed = {"kernel": f"flat:{tmp_path / 'missing'}", "chardev/serial0": str(tmp_path / "here")}
    definition = commands(serial=["serial0"])
    definition[0]["arguments"] |= {"kernel": f"flat:{tmp_path / 'image'}", "append": ""}
    there = {"execute": "chardev-add", "arguments": port(tmp_path / "there")}
    uri = f"unix:{tmp_path / 'main'}"
    async with vmm.machine([there, *definition]) as source, empty(allowed=allowed) as machine:
        await machine.execute("chardev-add", **port(tmp_path / "own"))
        before = machine.recipe, await machine.execute("query-chardev")
        for _ in range(2):
            await machine.execute("migrate-incoming", uri=uri, exit_on_error=False)
            await source.execute("migrate", uri=uri)
            info = await outcome(machine)
            assert info["status"] == "failed"
            assert info["error-desc"].endswith("missing: No such file or directory")
            assert (await outcome(source))["status"] == "failed"
            assert (machine.recipe, await machine.execute("query-chardev")) == before
            assert sockets_in(tmp_path) == ["image", "own", "there"]
        (tmp_path / "missing").write_bytes(b"\xf4" * 512)
        await machine.execute("migrate-incoming", uri=uri, exit_on_error=False)
        await source.execute("migrate", uri=uri)
        await in_status(machine, "running")
        labels = {chardev["label"] for chardev in await machine.execute("query-chardev")}
        assert labels == {"serial0", f"serial0@{os.getpid()}"}


async def test_without_exit_on_error_a_machine_may_await_the_next(tmp_path: Path) -> None:
    async with started() as source, destination(defined=True) as machine:
        full(source)
        uri = f"unix:{tmp_path / 'main'}"
        await machine.execute("migrate-incoming", uri=uri, exit_on_error=False)
        data = answered(await save(source, tmp_path / "state"))
        async with source_peer(tmp_path / "main") as peer:
            await peer.send(data[: len(data) // 2])
            assert (await peer.hear()).name == "ready"
        info = await outcome(machine)
        assert info["status"] == "failed"
        assert info["error-desc"].startswith(f"State stream: it ends after {len(data) // 2} bytes; expected ")
        assert machine.path.endswith("incoming")
        assert ram(machine) == []
        await machine.execute("migrate-incoming", uri=uri, exit_on_error=False)
        await source.execute("cont")
        await source.execute("migrate", uri=uri)
        assert (await outcome(source))["status"] == "completed"
        await in_status(machine, "running")
        await goes_on(machine)


async def test_a_failed_loadvm_is_told_and_the_next_one_succeeds(tmp_path: Path) -> None:
    async with started() as source, destination(defined=True) as machine:
        data = await save(source, tmp_path / "state")
        (tmp_path / "bad").write_bytes(data[:-1])
        for _ in range(2):
            with pytest.raises(StreamCorrupt, match=f"it ends after {len(data) - 1} bytes; expected record"):
                await machine.execute("loadvm", name=str(tmp_path / "bad"))
            assert await status(machine) == "inmigrate"
        await machine.execute("loadvm", name=str(tmp_path / "state"))
        assert await status(machine) == "running"
        await goes_on(machine)


async def test_a_live_update_does_not_come_into_a_machine_that_is_there(tmp_path: Path) -> None:
    async with destination(defined=True) as machine:
        with pytest.raises(StreamCorrupt):
            await bad_loadvm(machine, tmp_path)
        address = {"transport": "socket", "type": "unix", "path": str(tmp_path / "x")}
        with pytest.raises(MigrationRefused) as caught:
            await machine.execute("migrate-incoming", channels=[{"channel-type": "cpr", "addr": address}])
        assert str(caught.value) == "migrate-incoming: this machine is complete; a live update brings its own"


async def bad_loadvm(machine: EmbeddedMachine, folder: Path) -> None:
    await trio.Path(folder / "nothing").write_bytes(b"")
    await machine.execute("loadvm", name=str(folder / "nothing"))


def destination(*, defined: bool):  # type: ignore[no-untyped-def]  # noqa: ANN201
    """Make a machine that stands in precreate, or one that is defined and stands in preconfig."""
    return vmm.machine(commands(upto="accel-set")) if defined else empty()
