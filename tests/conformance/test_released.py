"""What every release wrote is read by the program as it is: its recipes, its guests, and its side of a live update."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import trio

import vmm
from tests.conformance.fingerprints import recorded, released
from tests.conformance.release import descriptor, kvm_of_this_host, on_this_host, releases
from tests.phases.copy_kit import empty, in_status, look, outcome, reader, ticked
from tests.phases.test_overrides import channels, guest
from vmm import __version__, host_sockets
from vmm.cpr.cell import OwnershipCell
from vmm.cpr.channel import CprChannel
from vmm.migration.stream import StreamReader
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conformance.release import Release, Said
    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

every_release = pytest.mark.parametrize("release", releases(), ids=str)
HANGS = 30.0


async def goes_on(machine: EmbeddedMachine) -> None:
    """Wait until the guest has ticked on from where it stood; its RAM is as it was then."""
    found, before = reader(machine), look(machine)
    assert before.ticks >= 20
    with trio.fail_after(HANGS):
        while (report := found.look()) is None or report.ticks < before.ticks + 20:  # noqa: ASYNC110
            await trio.sleep(0.005)
    # Not whether its TSC went back: it is another host's here.
    assert (report.sequence_gaps, report.repeats, report.torn, report.region_faults) == (0, 0, 0, 0), str(report)


@every_release
async def test_its_recipe_makes_a_machine(release: Release, tmp_path: Path) -> None:
    made = Recipe.parse(f"of release {release}", release.recipe(tmp_path))
    async with vmm.machine(made) as machine:
        await machine.execute("cont")
        await ticked(machine, 5)
        assert machine.recipe.to_json() == made.to_json()


@every_release
async def test_its_saved_guest_goes_on(release: Release, tmp_path: Path) -> None:
    stream = on_this_host(release.bytes_of("saved"), await kvm_of_this_host(tmp_path))
    (tmp_path / "saved").write_bytes(stream)
    async with empty(allowed={"chardev/serial0": str(tmp_path / "serial")}) as machine:
        await machine.execute("migrate-incoming", uri=f"file:{tmp_path / 'saved'}")
        info = await outcome(machine)
        assert info["status"] == "completed", info
        await in_status(machine, "running")
        await goes_on(machine)


async def said_by(channel: CprChannel, said: Said, fds: dict[str, int], folder: Path) -> None:
    await channel.send(said.kind, said.placed(folder), {name: fds[name] for name in said.descriptors})


@every_release
async def test_it_hands_its_guest_over_to_the_present_program(release: Release, tmp_path: Path) -> None:
    ram, here = release.bytes_of("ram"), await kvm_of_this_host(tmp_path)
    fds = {"pidfd": os.pidfd_open(os.getpid())}
    async with vmm.machine() as machine:
        await machine.execute("migrate-incoming", channels=channels(tmp_path))
        sock = trio.socket.from_stdlib_socket(host_sockets.connect_unix(str(tmp_path / "cpr")))
        with (
            closing(CprChannel(sock, side="source", peer="destination")) as channel,
            closing(OwnershipCell.create()) as cell,
            host_sockets.connect_unix(str(tmp_path / "main")) as main,
            trio.fail_after(HANGS),
        ):
            fds["owner"] = os.dup(cell.fd)
            for said in release.conversation():
                if said.side == "destination":
                    (await channel.receive(said.kind)).close()
                    continue
                fds |= {name: descriptor(name, tmp_path, ram) for name in said.descriptors if name not in fds}
                if said.kind == "offered":
                    cell.offer()
                await said_by(channel, said, fds, tmp_path)
                if said.kind == "paused":
                    main.sendall(on_this_host(release.bytes_of("state"), here))
        for fd in fds.values():
            os.close(fd)
        await in_status(machine, "running")
        await goes_on(machine)


def lacking(recorded: Any, sent: Any, path: str = "") -> list[str]:
    """Name what a recorded message has and one that was sent has not, or of another type. New members are no matter."""
    if isinstance(recorded, dict) and isinstance(sent, dict):
        return [
            fault
            for name, value in recorded.items()
            for fault in (lacking(value, sent[name], f"{path}.{name}") if name in sent else [f"{path}.{name} is gone"])
        ]
    return [] if type(recorded) is type(sent) else [f"{path} is {sent!r}, and was {recorded!r}"]


@every_release
async def test_it_takes_a_guest_over_from_the_present_program(release: Release, tmp_path: Path) -> None:
    """As far as messages go: a section that a later program writes otherwise is refused before the pause."""
    with (
        host_sockets.listen_unix(str(tmp_path / "cpr")) as awaiting,
        host_sockets.listen_unix(str(tmp_path / "main")) as main,
    ):
        async with vmm.machine(guest(tmp_path)) as source:
            await source.execute("migrate-set-parameters", mode="cpr-transfer")
            # The settings go over: the same ones as in the recorded update.
            await source.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            await source.execute("migrate", channels=channels(tmp_path))
            with trio.fail_after(HANGS):
                accepted, _ = await trio.socket.from_stdlib_socket(awaiting).accept()
                with closing(CprChannel(accepted, side="destination", peer="source")) as channel:
                    await taken(channel, main, release.conversation(), tmp_path)
                info = await outcome(source)
            assert info["status"] == "completed", info
    for name in ("cpr", "main"):
        (tmp_path / name).unlink(missing_ok=True)


async def taken(channel: CprChannel, main: Any, conversation: list[Said], folder: Path) -> None:
    """Be the destination of a recorded conversation."""
    cell = None
    pidfd = os.pidfd_open(os.getpid())
    for said in conversation:
        if said.side == "destination":
            if said.kind == "running":
                assert cell is not None
                assert cell.take()
                assert cell.run()
            await said_by(channel, said, {"pidfd": pidfd}, folder)
            continue
        with closing(await channel.receive(said.kind)) as message:
            assert lacking(said.body, message.body) == []
            if said.kind == "machine":
                cell = OwnershipCell.adopt(message.claim("owner"))
        if said.kind == "paused":
            stream, _ = await trio.socket.from_stdlib_socket(main).accept()
            with stream:
                state = StreamReader()
                while not state.ended:
                    state.feed(await stream.recv(1 << 16))
    os.close(pidfd)
    assert cell is not None
    cell.close()


def test_the_present_version_is_frozen_as_it_is() -> None:
    """Until it is published, that is: `scripts/freeze_release.py --again`."""
    frozen = released().get(__version__)
    if frozen is not None:
        assert frozen == {kind: max(map(int, versions)) for kind, versions in recorded().items()}
