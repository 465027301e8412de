"""cpr-reboot: RAM that stays in its file while the rest of the guest is saved, and who may go on with it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

import vmm
from tests.phases.copy_kit import (
    SIZE,
    at_path,
    commands,
    empty,
    goes_on,
    in_status,
    look,
    outcome,
    parts,
    started,
    status,
    ticked,
)
from tests.phases.memory_kit import in_file, memfd, recipe, with_ram
from tests.phases.streams import Pages, records_of, stream_of
from vmm import hostmem
from vmm.errors import HostFileRefused, VmmError
from vmm.migration.outflow import Outflow
from vmm.migration.ram_file_records import RamInPlace
from vmm.migration.ram_records import RamExtents
from vmm.migration.stream_records import Home

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

REBOOT = {
    "parameters": {"mode": "cpr-reboot"},
    "capabilities": [{"capability": "x-ignore-shared", "state": True}],
}


async def leave(source: EmbeddedMachine, path: Path) -> dict[str, Any]:
    """Save the guest in `path`, its RAM left in place; return what `query-migrate` says then."""
    await source.execute("migrate", uri=f"file:{path}", **REBOOT)
    return await outcome(source)


def waiting(ram: Path) -> list[dict[str, Any]]:
    """Return the recipe of a machine that its guest is loaded into, with its RAM in file `ram`."""
    return recipe(in_file(ram), upto="cpu-model-set")


async def saved(folder: Path) -> int:
    """Save a guest in `state` with its RAM in `ram`, and end its machine; return how often it had ticked."""
    async with with_ram(in_file(folder / "ram")) as source:
        assert (await leave(source, folder / "state"))["status"] == "completed"
        return look(source).ticks


def records(path: Path) -> list[Any]:
    return records_of(path.read_bytes())


async def failure(machine: EmbeddedMachine, command: str, /, **arguments: Any) -> str:
    with pytest.raises(VmmError) as caught:
        await machine.execute(command, **arguments)
    return str(caught.value)


# --- and back ------------------------------------------------------------------------------------------------


async def test_a_guest_goes_on_with_its_ram_where_it_was_left(tmp_path: Path) -> None:
    async with with_ram(in_file(tmp_path / "ram")) as source, source.events() as events:
        info = await leave(source, tmp_path / "state")
        assert info["status"] == "completed"
        assert (info["ram"]["total"], info["ram"]["remaining"], info["ram"]["normal"]) == (SIZE, 0, 0)
        assert await status(source) == "postmigrate"
        ticks = look(source).ticks
        await source.execute("quit")
        names = [event["event"] async for event in events]
        assert names.count("STOP") == 1
    found = records(tmp_path / "state")
    assert not any(isinstance(record, (Pages, RamExtents)) for record in found)
    (place,) = (record for record in found if isinstance(record, RamInPlace))
    assert (place.name, place.size) == ("m0", SIZE)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600
    async with vmm.machine(waiting(tmp_path / "ram")) as machine:
        await machine.execute("loadvm", name=str(tmp_path / "state"))
        await goes_on(machine)
        assert look(machine).ticks > ticks
        assert look(machine).intact
        assert (tmp_path / "ram").stat().st_size == SIZE


async def test_an_empty_process_goes_on_with_it_where_the_file_is_allowed(tmp_path: Path) -> None:
    ticks = await saved(tmp_path)
    async with empty(allowed={"object/m0": str(tmp_path / "ram")}) as machine:
        await machine.execute("migrate-incoming", uri=f"file:{tmp_path}/state")
        await in_status(machine, "running")
        await goes_on(machine)
        assert look(machine).ticks > ticks


async def test_a_guest_that_stood_stands_again_in_its_ram(tmp_path: Path) -> None:
    async with with_ram(in_file(tmp_path / "ram")) as source:
        await source.execute("stop")
        assert (await leave(source, tmp_path / "state"))["status"] == "completed"
    async with vmm.machine(waiting(tmp_path / "ram")) as machine:
        await machine.execute("loadvm", name=str(tmp_path / "state"))
        assert await status(machine) == "paused"
        await machine.execute("cont")
        await goes_on(machine)


@pytest.mark.parametrize("kind", ["own", "memfd", "nameless", "off"])
async def test_ram_that_nobody_could_find_again_is_copied(kind: str, tmp_path: Path) -> None:
    backend = {"memfd": memfd(), "nameless": in_file(tmp_path), "off": in_file(tmp_path / "ram")}.get(kind)
    async with vmm.machine(recipe(backend) if backend else commands()) as source:
        await ticked(source, 5)
        more = {"parameters": {"mode": "cpr-reboot"}} if kind == "off" else REBOOT
        await source.execute("migrate", uri=f"file:{tmp_path}/state", **more)
        assert (await outcome(source))["status"] == "completed"
    found = records(tmp_path / "state")
    assert any(isinstance(record, Pages) for record in found)
    assert not any(isinstance(record, RamInPlace) for record in found)
    async with vmm.machine(commands(upto="cpu-model-set")) as machine:
        await machine.execute("loadvm", name=str(tmp_path / "state"))
        await goes_on(machine)


async def test_over_a_socket_it_is_refused_before_anything_is_stopped(tmp_path: Path) -> None:
    async with with_ram(in_file(tmp_path / "ram")) as source:
        assert await failure(source, "migrate", uri=f"unix:{tmp_path}/main", **REBOOT) == (
            "migrate: with x-ignore-shared the guest's RAM stays in its file, which this process has locked as long as "
            "it is there: save the guest in a file:, hand it over by cpr-transfer, or turn x-ignore-shared off"
        )
        assert await status(source) == "running"
        await goes_on(source)


async def test_what_of_the_machine_is_not_the_guest_s_is_in_the_file_for_whoever_wants_it(tmp_path: Path) -> None:
    address = {"type": "unix", "data": {"path": str(tmp_path / "qmp")}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    async with started() as source:
        await source.execute("chardev-add", id="c", backend=backend)
        await source.execute("object-add", qom_type="monitor-qmp", id="q", chardev="c")
        await source.execute("migrate", uri=f"file:{tmp_path}/state")
        assert (await outcome(source))["status"] == "completed"
    (home,) = (record for record in records(tmp_path / "state") if isinstance(record, Home))
    assert [command["arguments"]["id"] for command in home.commands] == ["c", "q"]
    async with empty() as machine:
        await machine.execute("migrate-incoming", uri=f"file:{tmp_path}/state")
        await goes_on_there(machine)
        assert not (tmp_path / "qmp").exists()


async def goes_on_there(machine: EmbeddedMachine) -> None:
    await in_status(machine, "running")
    await goes_on(machine)


# --- and never twice -----------------------------------------------------------------------------------------


def not_again(folder: Path, why: str) -> str:
    return (
        f"The guest's RAM was left in the file of back end 'm0', {SIZE} bytes. What this machine has for RAM, "
        f"{folder}/ram, {SIZE} bytes, {why}; a state can go on only once, with the file as the save left it"
    )


USED = "is in use, was used since, or is not the file"


async def test_a_state_goes_on_once(tmp_path: Path) -> None:
    await saved(tmp_path)
    async with vmm.machine(waiting(tmp_path / "ram")) as machine:
        await machine.execute("loadvm", name=str(tmp_path / "state"))
        await goes_on(machine)
        assert await failure(machine, "loadvm", name=str(tmp_path / "state")) == not_again(tmp_path, USED)
        await goes_on(machine)
    async with vmm.machine(waiting(tmp_path / "ram")) as machine:
        assert await failure(machine, "loadvm", name=str(tmp_path / "state")) == not_again(tmp_path, USED)


async def test_a_guest_that_goes_on_where_it_was_saved_leaves_a_state_of_the_past(tmp_path: Path) -> None:
    async with with_ram(in_file(tmp_path / "ram")) as source:
        assert (await leave(source, tmp_path / "state"))["status"] == "completed"
        await source.execute("cont")
        await goes_on(source)
    async with vmm.machine(waiting(tmp_path / "ram")) as machine:
        assert await failure(machine, "loadvm", name=str(tmp_path / "state")) == not_again(tmp_path, USED)


async def test_of_two_saves_the_last_is_the_guest(tmp_path: Path) -> None:
    async with with_ram(in_file(tmp_path / "ram")) as source:
        assert (await leave(source, tmp_path / "first"))["status"] == "completed"
        await source.execute("cont")
        await at_path(source, "running")
        await goes_on(source)
        assert (await leave(source, tmp_path / "second"))["status"] == "completed"
        ticks = look(source).ticks
    async with vmm.machine(waiting(tmp_path / "ram")) as machine:
        text = await failure(machine, "loadvm", name=str(tmp_path / "first"))
        assert text == not_again(tmp_path, "was left for another state")
        await machine.execute("loadvm", name=str(tmp_path / "second"))
        await goes_on(machine)
        assert look(machine).ticks > ticks
        assert look(machine).intact


async def test_a_machine_that_boots_in_the_file_makes_it_its_own(tmp_path: Path) -> None:
    await saved(tmp_path)
    async with with_ram(in_file(tmp_path / "ram")):
        pass
    async with vmm.machine(waiting(tmp_path / "ram")) as machine:
        assert await failure(machine, "loadvm", name=str(tmp_path / "state")) == not_again(tmp_path, USED)


async def test_another_guest_that_is_loaded_into_the_file_makes_it_its_own(tmp_path: Path) -> None:
    await saved(tmp_path)
    async with started() as other:
        await other.execute("migrate", uri=f"file:{tmp_path}/other")
        assert (await outcome(other))["status"] == "completed"
    async with vmm.machine(waiting(tmp_path / "ram")) as machine:
        await machine.execute("loadvm", name=str(tmp_path / "other"))
        await goes_on(machine)
    async with vmm.machine(waiting(tmp_path / "ram")) as machine:
        assert await failure(machine, "loadvm", name=str(tmp_path / "state")) == not_again(tmp_path, USED)


async def test_a_copy_of_the_file_of_another_size_is_not_the_guest_s(tmp_path: Path) -> None:
    await saved(tmp_path)
    async with vmm.machine(recipe(memfd(), upto="cpu-model-set")) as machine:
        text = await failure(machine, "loadvm", name=str(tmp_path / "state"))
        assert "What this machine has for RAM, /memfd:object/m0/memory (deleted)" in text
        assert USED in text


# --- what fails ------------------------------------------------------------------------------------------------


async def test_a_state_that_is_refused_leaves_the_ram_as_it_was(tmp_path: Path) -> None:
    ticks = await saved(tmp_path)
    before = (tmp_path / "ram").read_bytes()
    whole = (tmp_path / "state").read_bytes()
    for number, damaged in enumerate((whole[:-1], whole[:-40] + bytes(40), whole[:2000])):
        (tmp_path / "damaged").write_bytes(damaged)
        async with vmm.machine(waiting(tmp_path / "ram")) as machine:
            assert "State stream: " in await failure(machine, "loadvm", name=str(tmp_path / "damaged")), number
            # Another one may be loaded in the same phase.
            if number == 2:
                await machine.execute("loadvm", name=str(tmp_path / "state"))
                await goes_on(machine)
                assert look(machine).ticks > ticks
                return
        assert (tmp_path / "ram").read_bytes() == before


@pytest.mark.parametrize("more", ["twice", "content after", "content before"])
async def test_a_state_that_has_its_ram_in_two_places_is_refused_and_writes_to_neither(
    more: str, tmp_path: Path
) -> None:
    await saved(tmp_path)
    before = (tmp_path / "ram").read_bytes()
    found = records(tmp_path / "state")
    at = next(number for number, record in enumerate(found) if isinstance(record, RamInPlace))
    place, content = found[at], [RamExtents(((0, SIZE),), in_stream=True), Pages.of((0, b"x" * 4096))]
    both = {"twice": [place, place], "content after": [place, *content], "content before": [*content, place]}
    (tmp_path / "bad").write_bytes(stream_of([*found[:at], *both[more], *found[at + 1 :]]))
    async with vmm.machine(waiting(tmp_path / "ram")) as machine:
        assert await failure(machine, "loadvm", name=str(tmp_path / "bad")) == (
            "State stream: it says twice where the guest's RAM is: once in it, once in a file, or in two files"
        )
    if more != "content before":
        # What comes first and is right so far has made the file that machine's.
        assert (tmp_path / "ram").read_bytes() == before


@pytest.mark.parametrize("when", ["data", "mark", "state"])
async def test_a_disk_that_is_full_leaves_the_guest_running_and_no_state(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise HostFileRefused(action="write", path="it", reason=os.strerror(errno.ENOSPC))

    async with with_ram(in_file(tmp_path / "ram")) as source:
        if when == "data":
            monkeypatch.setattr(hostmem, "mark", full)
        elif when == "mark":
            monkeypatch.setattr(os, "pwrite", lambda *_: 0)
        else:
            monkeypatch.setattr("vmm.migration.outflow._sync", full)
        info = await leave(source, tmp_path / "state")
        monkeypatch.undo()
        assert info["status"] == "failed"
        assert info["error-desc"].endswith("No space left on device")
        assert parts(source).memory.stays_for() is None
        await goes_on(source)
    async with vmm.machine(waiting(tmp_path / "ram")) as machine:
        await failure(machine, "loadvm", name=str(tmp_path / "state"))


async def test_a_save_that_is_called_off_leaves_the_guest_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_ram(in_file(tmp_path / "ram")) as source:
        leave_ram = Outflow.leave

        async def cancel_first(self: Outflow, *arguments: Any) -> int:
            await source.execute("migrate_cancel")
            return await leave_ram(self, *arguments)

        monkeypatch.setattr(Outflow, "leave", cancel_first)
        assert (await leave(source, tmp_path / "state"))["status"] == "cancelled"
        assert parts(source).memory.stays_for() is None
        await goes_on(source)


async def test_a_file_that_cannot_be_taken_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with with_ram(in_file(tmp_path / "ram")) as source:
        assert (await leave(source, tmp_path / "state"))["status"] == "completed"
        monkeypatch.setattr(os, "ftruncate", broken)
        assert await failure(source, "cont") == f"Cannot write {tmp_path}/ram: Input/output error"
        monkeypatch.undo()
        assert await status(source) == "postmigrate"
        await source.execute("cont")
        await goes_on(source)
