"""`trio-vmm save` and `trio-vmm resume`: over an end of the process, with all that the machine had."""

from __future__ import annotations

import errno
import io
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from tests.phases.machine import Running, connected, monitor, parse
from tests.phases.streams import Pages, records_of, stream_of
from tests.phases.update_kit import GUEST
from tests.saved_machines import (
    HANGS,
    SIZE,
    again,
    begun,
    files,
    grown,
    original,
    saved,
    status,
    steps,
    ticked,
    ticks,
)
from tests.terminal import Screen
from vmm import host_sockets, hostio
from vmm.cli_progress import Bar, Figures
from vmm.cli_resume import Claim, Loading, SavedStateRefused, claimed, resume_machine, resumed
from vmm.cli_save import SaveFailed, SaveUnclear, save
from vmm.cli_watch import Interrupted, Interruption
from vmm.errors import HostFileRefused, OptionInvalid, VmmError
from vmm.kvm.faults import PagesFromFile
from vmm.migration.mapped_file import MappedFile
from vmm.migration.mapped_ram import MappedWriter
from vmm.migration.outflow import Outflow
from vmm.migration.ram_file_records import RamInPlace, RamMapped
from vmm.migration.stream_records import Home
from vmm.phases.copy_control import Canceller
from vmm.phases.foundation import Host
from vmm.phases.machine import Machine
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

BYSTANDER = 12 << 20
"""Address of RAM that the guest leaves alone."""


# --- there and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [True, False], ids=["in place", "copied"])
async def test_a_machine_goes_on_with_its_monitors_and_chardevs_at_their_paths(file: bool, tmp_path: Path) -> None:
    await saved(tmp_path, file=file, serial=True)
    assert files(tmp_path) == sorted(["saved", "ser", *(["ram"] if file else [])])
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o600
    records = records_of((tmp_path / "saved").read_bytes())
    assert any(isinstance(record, RamInPlace) for record in records) is file
    assert any(isinstance(record, RamMapped) for record in records) is not file
    said = (tmp_path / "ser").read_bytes()
    async with again(tmp_path) as running, connected(tmp_path / "qmp") as client:
        assert await status(client) == "running"
        await ticked(running, 10)
        assert [step.execute for step in running.host.recorder.recipe()].count("object-add") == 1 + file
        # What the serial port had written is still there.
        assert (tmp_path / "ser").read_bytes().startswith(said)


async def test_what_was_saved_says_where_its_ram_is(tmp_path: Path) -> None:
    async with original(tmp_path):
        assert await save(str(tmp_path / "qmp"), tmp_path / "saved", Interruption()) == "its RAM where it was"


async def test_with_s_it_stands_until_it_is_told_to_run(tmp_path: Path) -> None:
    await saved(tmp_path)
    async with again(tmp_path, "-S") as running, connected(tmp_path / "qmp") as client:
        assert await status(client) == "paused"
        before = ticks(running)
        await client.execute("cont")
        await ticked(running, before + 5)


async def test_what_the_options_say_besides_is_there_too_and_what_they_say_again_instead(tmp_path: Path) -> None:
    await saved(tmp_path, serial=True)
    more = ("-qmp", f"unix:{tmp_path}/more", "-chardev", f"file,id=s0,path={tmp_path}/other")
    async with again(tmp_path, *more) as running:
        for path in ("qmp", "more"):
            async with connected(tmp_path / path) as client:
                assert await status(client) == "running"
        await ticked(running, 10)
        with trio.fail_after(HANGS):
            while not (tmp_path / "other").read_bytes():  # noqa: ASYNC110 - a file does not tell
                await trio.sleep(0.005)


async def test_a_clock_tells_the_time_of_the_day_on_which_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await saved(tmp_path)
    now, days = time.time_ns, 3
    monkeypatch.setattr(time, "time_ns", lambda: now() + days * 86_400_000_000_000)
    async with again(tmp_path) as running:
        await ticked(running, 10)
        access = running.tree.view(Machine).access
        register = {"seconds": 0, "minutes": 2, "hours": 4, "day": 7, "month": 8, "year": 9}
        before, found = None, dict[str, int]()
        while before != (now_is := time.gmtime(time.time_ns() // 1_000_000_000)):  # a second may end in between
            before = now_is
            for name, number in register.items():
                access.write_port(0x70, 1, number)
                found[name] = access.read_port(0x71, 1)
        told = {name: (value >> 4) * 10 + (value & 0xF) for name, value in found.items()}
        assert told == {
            "seconds": before.tm_sec, "minutes": before.tm_min, "hours": before.tm_hour, "day": before.tm_mday,
            "month": before.tm_mon, "year": before.tm_year % 100,
        }  # fmt: skip


async def test_it_can_be_saved_again(tmp_path: Path) -> None:
    await saved(tmp_path)
    async with again(tmp_path) as running:
        await ticked(running, 10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(save, str(tmp_path / "qmp"), tmp_path / "saved", Interruption())
            with trio.fail_after(HANGS):
                await running.ended.wait()
    async with again(tmp_path) as running:
        await ticked(running, 15)


async def test_ram_that_is_copied_has_its_places_in_a_sparse_file_and_comes_as_it_is_used(tmp_path: Path) -> None:
    await saved(tmp_path, file=False)
    found = (tmp_path / "saved").stat()
    assert found.st_size > SIZE
    assert found.st_blocks * 512 < SIZE // 4
    on_demand = Step("loadvm", {"name": str(tmp_path / "saved"), "on-demand": True})
    for whole in (False, True):
        assert (on_demand in resumed(str(tmp_path / "saved"), parse(), whole=whole)) is not whole
    async with again(tmp_path, whole=True) as running:
        await ticked(running, 10)


async def test_ram_that_was_copied_in_a_row_is_loaded_too(tmp_path: Path) -> None:
    async with original(tmp_path, file=False), connected(tmp_path / "qmp") as client:
        await client.execute("migrate", uri=f"file:{tmp_path}/saved", parameters={"mode": "cpr-reboot"})
        with trio.fail_after(HANGS):
            while (info := await client.execute("query-migrate"))["status"] != "completed":
                assert info["status"] != "failed", info
                await trio.sleep(0.005)
    assert any(isinstance(record, Pages) for record in records_of((tmp_path / "saved").read_bytes()))
    async with again(tmp_path) as running:
        await ticked(running, 10)


# --- the file that is used up ------------------------------------------------------------------------------------


async def used_up(folder: Path, running: Running, claim: Claim) -> None:
    """Do what `trio-vmm resume` does beside the machine."""
    loading = Loading(Bar(None), claim)
    loading.begun()
    with trio.fail_after(HANGS):
        await loading.watch(running.host)


@pytest.mark.parametrize("file", [True, False], ids=["in place", "copied"])
async def test_the_file_goes_once_all_of_the_guest_is_here(file: bool, tmp_path: Path) -> None:
    await saved(tmp_path, file=file)
    with claimed(str(tmp_path / "saved")) as claim:
        async with again(tmp_path) as running:
            await used_up(tmp_path, running, claim)
            assert running.tree.view(Machine).memory.absent is None
            assert "saved" not in files(tmp_path)
            await ticked(running, 10)


def test_of_a_link_the_file_goes_that_it_leads_to(tmp_path: Path) -> None:
    path, link = tmp_path / "saved", tmp_path / "link"
    path.write_bytes(b"one")
    link.symlink_to("saved")
    with pytest.raises(SavedStateRefused, match=f"Cannot resume from {path}: "):
        resume_machine(str(link), parse(), whole=False)
    with claimed(str(link)) as claim:
        assert claim.path == str(path)
        assert claim.use_up() is None
    assert files(tmp_path) == ["link"]


async def test_a_guest_whose_page_is_lost_stands_and_the_file_stays(tmp_path: Path) -> None:
    async with original(tmp_path, file=False) as running, trio.open_nursery() as nursery:
        running.tree.view(Machine).memory.write(BYSTANDER, b"then")
        nursery.start_soon(save, str(tmp_path / "qmp"), tmp_path / "saved", Interruption())
        with trio.fail_after(HANGS):
            await running.ended.wait()
    place = next(it for it in records_of((tmp_path / "saved").read_bytes()) if isinstance(it, RamMapped)).area
    content = bytearray((tmp_path / "saved").read_bytes())
    content[place + BYSTANDER] ^= 0x40
    (tmp_path / "saved").write_bytes(content)
    with claimed(str(tmp_path / "saved")) as claim:
        async with again(tmp_path) as running:
            await used_up(tmp_path, running, claim)
            assert "saved" in files(tmp_path)
            async with connected(tmp_path / "qmp") as client:
                with trio.fail_after(HANGS):
                    while await status(client) != "internal-error":  # noqa: ASYNC110 - it has no event
                        await trio.sleep(0.005)


@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("seen", [True, False], ids=["loaded", "not seen to be"])
async def test_the_file_goes_too_if_the_machine_ends_before_all_of_a_guest_that_ran_is_here(
    ran: bool, seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_: PagesFromFile) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(PagesFromFile, "wait_over", never)
    await saved(tmp_path, file=False)
    with claimed(str(tmp_path / "saved")) as claim:
        loading = Loading(Bar(None), claim)
        async with again(tmp_path, *(() if ran else ("-S",))) as running, trio.open_nursery() as nursery:
            nursery.start_soon(loading.watch, running.host)
            if seen:
                loading.begun()
            async with connected(tmp_path / "qmp") as client:
                await client.execute("quit")
            with trio.fail_after(HANGS):
                await running.ended.wait()
            nursery.cancel_scope.cancel()
    assert ("saved" in files(tmp_path)) is not ran


async def test_what_is_told_stands_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(b"one")
    shown = io.StringIO()
    state = SimpleNamespace(absent=None)
    host = SimpleNamespace(
        tree=SimpleNamespace(view=lambda kind: state),
        status=SimpleNamespace(has_run=True),
        complain=lambda text: shown.write(f"{text}\n"),
    )
    bar = Bar(shown, terminal=True)
    with claimed(str(path)) as claim:
        path.rename(tmp_path / "moved")
        loading = Loading(bar, claim)
        loading.begun()
        bar.show(Figures(word="loading"))
        await loading._use_up(cast("Any", host))
    screen = Screen()
    screen.feed(shown.getvalue())
    assert screen.rows == [f"{path} was moved while a guest was resumed from it; remove it: its guest runs here"]


async def test_a_directory_that_does_not_go_to_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "saved"

    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    path.write_bytes(b"one")
    with claimed(str(path)) as claim:
        assert claim.use_up() == f"Cannot remove {path}: Input/output error"


async def test_another_file_of_that_name_stays_and_what_cannot_be_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "saved"
    path.write_bytes(b"one")
    with claimed(str(path)) as claim:
        path.rename(tmp_path / "kept")
        path.write_bytes(b"another")
        assert claim.use_up() == f"{path} was replaced while a guest was resumed from it; what is there now stays"
    with claimed(str(path)) as claim:
        path.rename(tmp_path / "moved")
        moved = f"{path} was moved while a guest was resumed from it; remove it: its guest runs here"
        assert claim.use_up() == moved
    path.write_bytes(b"one")
    with claimed(str(path)) as claim:
        path.unlink()
        assert claim.use_up() is None
    assert files(tmp_path) == ["kept", "moved"]

    def denied(_: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    await saved(tmp_path)
    said: list[str] = []
    with claimed(str(path)) as claim:
        async with again(tmp_path) as running:
            with monkeypatch.context() as patch:
                patch.setattr(Host, "complain", lambda _, text: said.append(text))
                patch.setattr(os, "unlink", denied)
                await used_up(tmp_path, running, claim)
            await ticked(running, 10)
    assert said == [f"Cannot remove {path}: Read-only file system"]


# --- what keeps it from being saved ------------------------------------------------------------------------------


async def fails(folder: Path, kind: type[VmmError], running: Running, interruption: Interruption | None = None) -> str:
    """Expect that a save does not come about, that the guest goes on, and that nothing is left of the save."""
    before = files(folder)
    with pytest.raises(kind) as caught:
        await save(str(folder / "qmp"), folder / "saved", interruption or Interruption())
    assert files(folder) == before
    assert not running.ended.is_set()
    async with connected(folder / "qmp") as client:
        assert await status(client) == "running"
        assert not any(entry["state"] for entry in await client.execute("query-migrate-capabilities"))
        assert (await client.execute("query-migrate-parameters"))["mode"] == "normal"
    await ticked(running, ticks(running) + 5)
    return str(caught.value)


@pytest.mark.parametrize("room", [16384, 8 << 20], ids=["at once", "half way"])
async def test_a_disk_that_is_full_leaves_the_guest_running_and_no_file(room: int, tmp_path: Path) -> None:
    async with original(tmp_path, file=False) as running:
        running.tree.view(Machine).memory.write(BYSTANDER, b"behind that")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            text = await fails(tmp_path, SaveFailed, running)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    place = re.escape(f"{tmp_path}/.saved.")
    assert re.fullmatch(
        f"The machine was not saved, and goes on: Cannot write {place}[0-9a-f]{{8}}: File too large", text
    )


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize(("file", "kind", "step"), [(True, Outflow, "leave"), (False, MappedWriter, "save")])
async def test_an_interrupt_calls_it_off(
    file: bool, kind: type, step: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interruption = Interruption()
    real = getattr(kind, step)

    async def interrupt_first(*arguments: Any) -> Any:
        interruption.comes()
        await trio.sleep(0.05)  # until it is called off; else it fails by what comes of it
        return await real(*arguments)

    if when == "before":
        interruption.comes()
    monkeypatch.setattr(kind, step, interrupt_first)
    async with original(tmp_path, file=file) as running:
        text = await fails(tmp_path, Interrupted, running, interruption)
    assert text == "The save was interrupted: the machine goes on"


async def test_an_interrupt_while_it_goes_to_its_disk_calls_it_off_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interruption, called_off = Interruption(), threading.Event()
    finish, cancel = MappedFile.finish, Canceller.cancel

    def interrupt_first(self: MappedFile, sections: Any) -> None:
        trio.from_thread.run_sync(interruption.comes)
        assert called_off.wait(HANGS)
        finish(self, sections)

    def note(self: Canceller, by: str) -> None:
        cancel(self, by)
        called_off.set()

    monkeypatch.setattr(MappedFile, "finish", interrupt_first)
    monkeypatch.setattr(Canceller, "cancel", note)
    async with original(tmp_path, file=False) as running:
        text = await fails(tmp_path, Interrupted, running, interruption)
    assert text == "The save was interrupted: the machine goes on"


async def test_what_was_set_for_a_migration_is_not_in_its_way(tmp_path: Path) -> None:
    on = ("multifd", "pause-before-switchover", "return-path", "switchover-ack", "zero-copy-send", "auto-converge")
    async with original(tmp_path, file=False) as running, connected(tmp_path / "qmp") as client:
        states = [{"capability": name, "state": True} for name in on]
        await client.execute("migrate-set-capabilities", capabilities=states)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(save, str(tmp_path / "qmp"), tmp_path / "saved", Interruption())
            with trio.fail_after(HANGS):
                await running.ended.wait()
    async with again(tmp_path) as running:
        await ticked(running, 10)


async def test_a_place_that_cannot_be_is_told_before_anything_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    async with original(tmp_path) as running:
        assert await fails(tmp_path, HostFileRefused, running) == (
            f"Cannot write {tmp_path}/saved: it is a directory, not a regular file"
        )
        with pytest.raises(SaveFailed) as caught:
            await save(str(tmp_path / "qmp"), tmp_path / "no" / "saved", Interruption())
        assert str(caught.value).startswith(
            f"The machine was not saved, and goes on: Cannot write {tmp_path}/no/.saved."
        )


async def test_each_save_writes_under_a_name_of_its_own_also_into_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[str] = []
    rename = os.rename

    def note(part: Path, target: Path) -> None:
        parts.append(str(part))
        rename(part, target)

    monkeypatch.setattr(os, "rename", note)
    target = tmp_path / "saved,offset=0x1000"  # and it is a name, whatever is in it
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        async with original(tmp_path / name) as running, trio.open_nursery() as nursery:
            nursery.start_soon(save, str(tmp_path / name / "qmp"), target, Interruption())
            with trio.fail_after(HANGS):
                await running.ended.wait()
    assert len(set(parts)) == 2
    assert files(tmp_path) == ["a", "b", target.name]


@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("call", ["rename", "fsync"])
async def test_a_file_that_cannot_be_put_in_its_place_is_not_left_there(
    call: str, ran: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, call)

    def broken(*arguments: Any) -> None:
        if call == "fsync" and not os.path.isdir(f"/proc/self/fd/{arguments[0]}"):
            real(*arguments)
            return
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with original(tmp_path) as _, connected(tmp_path / "qmp") as client:
        if not ran:
            await client.execute("stop")
        monkeypatch.setattr(os, call, broken)
        with pytest.raises(SaveFailed) as caught:
            await save(str(tmp_path / "qmp"), tmp_path / "saved", Interruption())
        monkeypatch.undo()
        assert str(caught.value) == (
            f"The machine was not saved, and goes on: Cannot write {tmp_path}/saved: Input/output error"
        )
        assert files(tmp_path) == ["qmp", "ram"]
        assert await status(client) == ("running" if ran else "paused")


async def test_a_machine_without_a_guest_cannot_be_saved(tmp_path: Path) -> None:
    async with begun(Recipe("of this test", monitor(tmp_path / "qmp")), tmp_path / "qmp"):
        with pytest.raises(SaveFailed) as caught:
            await save(str(tmp_path / "qmp"), tmp_path / "saved", Interruption())
    assert str(caught.value) == (
        f"The machine was not saved, and goes on: the machine at {tmp_path}/qmp has no guest yet; "
        "its phase is no-machine, and must be machine-ready"
    )


async def test_a_machine_that_ends_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with original(tmp_path) as running:

        async def end_first(self: Outflow, *arguments: Any) -> None:
            running.host.ending.end("host-signal")
            await trio.sleep_forever()

        monkeypatch.setattr(Outflow, "leave", end_first)
        with pytest.raises(SaveUnclear) as caught:
            await save(str(tmp_path / "qmp"), tmp_path / "saved", Interruption())
    assert str(caught.value) == "The save went wrong: the machine ended while it was being saved"
    assert files(tmp_path) == ["ram"]


# --- what keeps it from being resumed ------------------------------------------------------------------------------


def refused(folder: Path, *options: str, kind: type[VmmError] = SavedStateRefused) -> str:
    with pytest.raises(kind) as caught:
        resumed(str(folder / "saved"), parse(*options))
    return str(caught.value)


async def test_a_file_must_be_the_operator_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await saved(tmp_path)
    path = tmp_path / "saved"
    for mode in (0o602, 0o620, 0o666):
        path.chmod(mode)
        assert refused(tmp_path) == (
            f"Cannot resume from {path}: its mode is {mode:04o}, so others can write it; use chmod 600"
        )
    path.chmod(0o600)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert refused(tmp_path) == (
        f"Cannot resume from {path}: it belongs to uid {uid}, not to uid {uid + 1}, whose machine it would be"
    )


def test_of_two_that_resume_at_the_same_time_one_does(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(b"")
    with claimed(str(path)) as claim:
        with pytest.raises(SavedStateRefused) as caught:
            resume_machine(str(path), parse(), whole=False)
        assert str(caught.value) == (
            f"Cannot resume from {path}: another process is resuming from it; its guest is that process's"
        )
        claim.close()  # as it does once all of the guest is here
        with claimed(str(path)):
            pass


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "another one"])
def test_a_file_that_goes_before_it_is_locked_is_not_resumed_from(
    gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = tmp_path / "saved", hostio.lock_saved_state
    path.write_bytes(b"one")

    def goes(fd: int, name: str) -> bool:
        path.unlink()
        if not gone:
            path.write_bytes(b"another")
        return lock(fd, name)

    monkeypatch.setattr(hostio, "lock_saved_state", goes)
    with pytest.raises(SavedStateRefused) as caught:
        resume_machine(str(path), parse(), whole=False)
    assert str(caught.value) == (
        f"Cannot resume from {path}: it was removed or replaced meanwhile, perhaps because its guest runs by now"
    )


def test_a_file_that_cannot_be_looked_at_once_it_is_locked_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "saved"
    path.write_bytes(b"one")

    def refuses(one: object, other: object) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os.path, "samestat", refuses)
    with pytest.raises(HostFileRefused, match=f"Cannot read {path}: Input/output error"):
        resume_machine(str(path), parse(), whole=False)


async def test_what_is_no_saved_machine_is_told(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    assert refused(tmp_path, kind=HostFileRefused) == f"Cannot read {path}: No such file or directory"
    for content, reason in (
        (b"", "State stream: it ends after 0 bytes; expected the preamble of 12 bytes"),
        (b"x" * 100, "State stream: it begins with 7878787878787878, expected 8954564d4d0d0a1a"),
    ):
        path.write_bytes(content)
        path.chmod(0o600)
        assert refused(tmp_path) == f"Cannot resume from {path}: {reason}"


async def test_a_state_that_came_over_a_network_says_nothing_of_this_host(tmp_path: Path) -> None:
    await saved(tmp_path)
    found = records_of((tmp_path / "saved").read_bytes())
    (tmp_path / "saved").write_bytes(stream_of([record for record in found if not isinstance(record, Home)]))
    assert refused(tmp_path) == (
        f"Cannot resume from {tmp_path}/saved: it does not say what the machine had beside its guest; "
        "start it by restore"
    )


async def test_a_machine_is_not_made_otherwise_than_it_was(tmp_path: Path) -> None:
    await saved(tmp_path)
    for options in (("-m", "32"), ("-incoming", "defer"), ("-loadvm", "x"), ("-precreate",), ("--recipe", "x")):
        text = refused(tmp_path, *options, kind=OptionInvalid)
        assert text.startswith(f"{options[0]}: ")
        assert text.endswith(f"is not possible with resume: the machine is the one in {tmp_path}/saved; leave it out")


async def test_what_nobody_can_open_again_is_named_and_can_be_replaced(tmp_path: Path) -> None:
    ours, theirs = host_sockets.connected_pair()
    with ours:
        address = {"type": "fd", "data": {"str": str(theirs.detach())}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        chardev = Step("chardev-add", {"id": "s1", "backend": backend})
        recipe = Recipe("of this test", (chardev, *steps(tmp_path, file=True)))
        async with begun(recipe, tmp_path / "qmp") as running:
            await ticked(running, 5)
            await save(str(tmp_path / "qmp"), tmp_path / "saved", Interruption())
    assert refused(tmp_path) == (
        f"Cannot resume from {tmp_path}/saved: chardev 's1' was a socket that its process was started with, and cannot "
        "be opened again; give -chardev with id=s1 in its place"
    )
    async with again(tmp_path, "-chardev", "null,id=s1") as running:
        await ticked(running, 10)


async def test_a_path_that_is_taken_is_named_and_the_machine_can_be_resumed_later(tmp_path: Path) -> None:
    await saved(tmp_path)
    taken = host_sockets.listen_unix(str(tmp_path / "qmp"))
    with taken, pytest.RaisesGroup(VmmError, flatten_subgroups=True) as caught:
        async with again(tmp_path):
            raise AssertionError("it was resumed")
    (error,) = caught.value.exceptions
    assert f"Cannot listen on {tmp_path}/qmp: another process answers there" in str(error)
    os.unlink(tmp_path / "qmp")
    async with again(tmp_path) as running:
        await ticked(running, 10)


# --- as commands -------------------------------------------------------------------------------------------------


def test_the_commands_do_it_between_processes(tmp_path: Path) -> None:
    serial, state, qmp = tmp_path / "ser", tmp_path / "saved", tmp_path / "qmp"
    command = [sys.executable, "-m", "vmm"]
    backend = f"memory-backend-file,id=m0,size=16M,mem-path={tmp_path}/ram,share=on"
    first = subprocess.Popen(
        [*command, "run", *GUEST, "-object", backend, "-machine", "memory-backend=m0", "-serial", f"file:{serial}",
         "-qmp", f"unix:{qmp}"],
    )  # fmt: skip
    second = None
    try:
        grown(serial, 3)
        done = subprocess.run(
            [*command, "save", "--qmp", str(qmp), str(state)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"saved: {state}, its RAM where it was; the machine has ended\n"
        assert first.wait(HANGS) == 0
        assert sorted(os.listdir(tmp_path)) == ["ram", "saved", "ser"]
        second = subprocess.Popen([*command, "resume", str(state)])
        lines = grown(serial, len(serial.read_bytes().splitlines()) + 3)
        assert lines == [b"heartbeat: started", *(b"heartbeat %d ok" % n for n in range(1, len(lines)))]
        while state.exists():
            time.sleep(0.01)
        second.send_signal(signal.SIGTERM)
        assert second.wait(HANGS) == 0
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.wait()
    assert sorted(os.listdir(tmp_path)) == ["ram", "ser"]
