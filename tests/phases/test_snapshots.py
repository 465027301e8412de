"""`snapshot-save`, `snapshot-load` and `snapshot-delete`: jobs on a guest that goes on."""

from __future__ import annotations

import os
import resource
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio

import vmm
from tests.phases.copy_kit import (
    HANGS,
    at_path,
    commands,
    empty,
    goes_on,
    in_status,
    look,
    move,
    outcome,
    ram,
    save,
    status,
    ticked,
)
from tests.phases.memory_kit import in_file, update
from tests.phases.snapshot_kit import begin, concluded, directory, done, failed, tags, with_snapshots
from vmm.backends.snapshots import SnapshotDirectory
from vmm.errors import PageFaultsUnavailable, VmmError
from vmm.phases import saving

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine
    from vmm.migration.mapped_file import MappedFile
    from vmm.phases.running import Run

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

TAG = "before.1"


@pytest.fixture(params=["while it runs", "while it stands"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Save a guest that runs on, and one on a host that has nothing for that."""
    if request.param == "while it stands":
        monkeypatch.setattr(saving, "KeptPages", unavailable)
    return str(request.param)


def unavailable(*arguments: Any) -> None:
    raise PageFaultsUnavailable(action="keep", reason="it is a test")


async def refusal(machine: EmbeddedMachine, command: str, /, **arguments: Any) -> str:
    with pytest.raises(VmmError) as caught:
        await machine.execute(command, **arguments)
    return str(caught.value)


# --- there and back ---------------------------------------------------------------------------------------------


async def test_a_guest_goes_back_to_its_snapshot_as_often_as_it_is_told_to(way: str, tmp_path: Path) -> None:
    async with with_snapshots(tmp_path) as machine:
        before = look(machine).ticks
        await done(machine, "save", TAG)
        assert await status(machine) == "running"
        await goes_on(machine)
        for _ in range(2):
            await ticked(machine, before + 60)
            await done(machine, "load", TAG)
            assert before <= look(machine).ticks < before + 60
            assert await status(machine) == "running"
            await goes_on(machine)
        await done(machine, "delete", TAG)
        assert os.listdir(tmp_path) == []
        await goes_on(machine)


async def test_a_guest_that_stood_stands_again_and_its_ram_is_what_it_was(way: str, tmp_path: Path) -> None:
    async with with_snapshots(tmp_path) as machine:
        await machine.execute("stop")
        there = ram(machine)
        await done(machine, "save", TAG)
        assert await status(machine) == "paused"
        assert ram(machine) == there
        await machine.execute("cont")
        await goes_on(machine)
        await machine.execute("stop")
        assert ram(machine) != there
        await done(machine, "load", TAG)
        assert await status(machine) == "paused"
        assert ram(machine) == there


async def test_what_there_is_is_told(tmp_path: Path) -> None:
    async with with_snapshots(tmp_path) as machine:
        assert await machine.execute("x-query-snapshots") == []
        begun = int(time.time())
        await done(machine, "save", "b", devices=["s0"])
        await done(machine, "save", "a")
        (tmp_path / "broken.tvmm").write_bytes(b"no snapshot at all")
        (tmp_path / "cut.tvmm").write_bytes(b"")
        (tmp_path / "link.tvmm").symlink_to("/etc/passwd")
        (tmp_path / "notes").touch()
        found = await machine.execute("x-query-snapshots")
        assert [entry["tag"] for entry in found] == ["a", "b", "broken", "cut", "link"]
        assert {entry["vmstate"] for entry in found} == {"s0"}
        for entry in found[:2]:
            assert entry["machine"] == "trio-vmm"
            assert begun <= entry["date-sec"] <= time.time()
            assert 64 << 10 < entry["size"] < 16 << 20
            assert "fault" not in entry
        assert [entry["fault"] for entry in found[2:]] == [
            "State stream: it begins with 6e6f20736e617073, expected 8954564d4d0d0a1a",
            "State stream: it ends after 0 bytes; expected the preamble of 12 bytes",
            f"Cannot read {tmp_path}/link.tvmm: Too many levels of symbolic links",
        ]


async def test_jobs_tell_their_statuses_and_query_migrate_how_it_went(tmp_path: Path) -> None:
    async with with_snapshots(tmp_path) as machine:
        for what in ("save", "load", "delete"):
            await begin(machine, what, TAG, job=what)
            info = await concluded(machine, what)
            assert info["current-progress"] <= info["total-progress"]
            told = [
                event.body["data"]["status"]  # type: ignore[index]
                for event in machine._host.events.since(0) or ()
                if event.body["event"] == "JOB_STATUS_CHANGE" and event.body["data"]["id"] == what  # type: ignore[index]
            ]
            assert told == ["created", "running", "waiting", "pending", "concluded", "null"]
            assert (await machine.execute("query-migrate"))["status"] == "completed"
        # What was lent to it is given back.
        assert not any(entry["state"] for entry in await machine.execute("query-migrate-capabilities"))


# --- what cannot be ---------------------------------------------------------------------------------------------


async def test_arguments_that_cannot_be_are_refused_by_name_and_begin_no_job(tmp_path: Path) -> None:
    async with with_snapshots(tmp_path) as machine:
        await done(machine, "save", "a")
        right = {"job_id": "j0", "tag": "b", "vmstate": "s0", "devices": []}
        for command in ("snapshot-save", "snapshot-load"):
            assert await refusal(machine, command, **right | {"vmstate": "x"}) == (
                "Snapshot directory 'x' does not exist; there are: s0"
            )
            assert await refusal(machine, command, **right | {"devices": ["disk0"]}) == (
                f"{command}: devices: ['disk0'] is not empty, or 's0' alone: there are no block devices to be saved"
            )
            assert (await refusal(machine, command, **right | {"tag": "../b"})).startswith("tag: '../b' is not a tag: ")
        del right["vmstate"]
        assert (await refusal(machine, "snapshot-load", **right)).startswith(
            "Command 'snapshot-load': 'vmstate' is missing"
        )
        right["vmstate"] = "s0"
        assert await refusal(machine, "snapshot-save", **right | {"tag": "a"}) == (
            "Snapshot 'a' exists already; choose another name"
        )
        assert await refusal(machine, "snapshot-load", **right) == "Snapshot 'b' does not exist; there are: a"
        remove = {"job_id": "j0", "tag": "a", "devices": ["s0"]}
        for devices in ([], ["s0", "s0"]):
            assert await refusal(machine, "snapshot-delete", **remove | {"devices": devices}) == (
                f"snapshot-delete: devices: {devices} is not the name of the one object of type snapshot-directory "
                "that it is in"
            )
        assert await refusal(machine, "snapshot-delete", **remove | {"tag": "b"}) == (
            "Snapshot 'b' does not exist; there are: a"
        )
        await machine.execute("migrate", uri=f"file:{tmp_path}/state", job_id="j0")
        await outcome(machine)
        await machine.execute("cont")
        for command, arguments in (("snapshot-save", right), ("snapshot-load", right | {"tag": "a"}),
                                   ("snapshot-delete", remove)):  # fmt: skip
            assert await refusal(machine, command, **arguments) == "Job 'j0' exists already; choose another name"
        assert len(await machine.execute("query-jobs")) == 1
        assert await tags(machine) == ["a"]


async def test_a_snapshot_of_another_machine_is_refused_by_what_differs(tmp_path: Path) -> None:
    async with with_snapshots(tmp_path, size=32 << 20) as other:
        await done(other, "save", TAG)
    async with with_snapshots(tmp_path) as machine:
        assert "machine-set.memory ({'size': 33554432} there, {'size': 16777216} here)" in await failed(
            machine, "load", TAG
        )
        await goes_on(machine)
        assert (await machine.execute("query-migrate"))["status"] == "failed"


async def test_a_damaged_snapshot_costs_the_guest_nothing(tmp_path: Path) -> None:
    async with with_snapshots(tmp_path) as machine:
        await done(machine, "save", TAG)
        path = tmp_path / f"{TAG}.tvmm"
        content = path.read_bytes()
        for damaged in (content[:-1], content[:100], content[:2000] + b"\0\0\0\0" + content[2004:]):
            path.write_bytes(damaged)
            assert (await failed(machine, "load", TAG)).startswith("State stream: ")
            await goes_on(machine)


async def test_a_disk_that_is_full_leaves_no_snapshot_and_the_guest_running(way: str, tmp_path: Path) -> None:
    async with with_snapshots(tmp_path) as machine:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
        try:
            text = await failed(machine, "save", TAG)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert text.endswith("File too large")
        assert os.listdir(tmp_path) == []
        await goes_on(machine)
        await done(machine, "save", TAG)


async def test_a_tag_that_is_taken_meanwhile_fails_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_file = saving._begin

    async def meanwhile(run: Run, file: MappedFile) -> None:
        await begin_file(run, file)
        (tmp_path / f"{TAG}.tvmm").write_bytes(b"of another process")

    monkeypatch.setattr(saving, "_begin", meanwhile)
    async with with_snapshots(tmp_path) as machine:
        assert await failed(machine, "save", TAG) == f"Snapshot '{TAG}' exists already; choose another name"
        assert (tmp_path / f"{TAG}.tvmm").read_bytes() == b"of another process"
        assert os.listdir(tmp_path) == [f"{TAG}.tvmm"]
        await goes_on(machine)


async def test_a_save_is_cancelled_and_a_load_or_a_removal_is_not(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forever(run: Run, file: MappedFile) -> None:
        await trio.sleep_forever()

    async with with_snapshots(tmp_path) as machine:
        await done(machine, "save", "a")
        monkeypatch.setattr(saving, "_begin", forever)
        await begin(machine, "save", TAG)
        assert await tags(machine) == ["a"]
        assert await status(machine) == "running"
        await machine.execute("job-cancel", id="j0")
        assert (await concluded(machine))["error"] == "The snapshot was cancelled"
        assert os.listdir(tmp_path) == ["a.tvmm"]
        await goes_on(machine)
        # Held up where it is read.
        entered = trio.Event()

        async def wait(*arguments: Any) -> Any:
            entered.set()
            await trio.sleep_forever()

        monkeypatch.setattr("vmm.phases.restoring.read_state", wait)
        await begin(machine, "load", "a", job="j1")
        with trio.fail_after(HANGS):
            await entered.wait()
        assert "while a snapshot is put in the guest's place" in await refusal(machine, "job-cancel", id="j1")


async def test_a_removal_that_fails_is_the_job_s_failure_and_cannot_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_snapshots(tmp_path) as machine:
        await done(machine, "save", TAG)
        started, go = trio.Event(), trio.Event()
        remove = SnapshotDirectory.remove

        def gone(self: SnapshotDirectory, tag: str) -> None:
            trio.from_thread.run_sync(started.set)
            trio.from_thread.run(go.wait)
            os.unlink(tmp_path / f"{tag}.tvmm")
            remove(self, tag)

        monkeypatch.setattr(SnapshotDirectory, "remove", gone)
        await begin(machine, "delete", TAG)
        with trio.fail_after(HANGS):
            await started.wait()
        assert "job-cancel of 'j0' is not possible of a removal" in await refusal(machine, "job-cancel", id="j0")
        go.set()
        assert (await concluded(machine))["error"] == f"Snapshot '{TAG}' does not exist; there are: none"


# --- the directory ----------------------------------------------------------------------------------------------


async def test_a_directory_comes_and_goes_in_every_phase(tmp_path: Path) -> None:
    made = directory(tmp_path)["arguments"]
    async with vmm.machine() as machine:
        for step in (None, *commands()):
            if step is not None:
                await machine.execute(step["execute"], **step.get("arguments", {}))
            await machine.execute("object-add", **made)
            assert await refusal(machine, "object-add", **made) == "Object 's0' exists already; choose another name"
            await machine.execute("object-del", id="s0")
            assert await refusal(machine, "object-del", id="s0") == "Object 's0' does not exist; there are: none"
        assert not [step for step in machine.recipe if step.execute == "object-add"]
        text = await refusal(machine, "object-add", **{**made, "path": f"{tmp_path}/no"})
        assert text == f"Cannot read {tmp_path}/no: No such file or directory"
        (tmp_path / "f").touch()
        text = await refusal(machine, "object-add", **{**made, "path": f"{tmp_path}/f"})
        assert text == f"Cannot read {tmp_path}/f: Not a directory"


async def test_it_goes_over_in_a_live_update_whatever_its_path_is_by_then(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    async with with_snapshots(tmp_path / "snapshots") as source, empty() as destination:
        await done(source, "save", TAG)
        os.rename(tmp_path / "snapshots", tmp_path / "elsewhere")
        assert (await update(source, destination, tmp_path))["status"] == "completed"
        await in_status(destination, "running")
        await done(destination, "load", TAG)
        await done(destination, "save", "after")
        await goes_on(destination)
        assert await tags(destination) == ["after", TAG]
        assert sorted(os.listdir(tmp_path / "elsewhere")) == ["after.tvmm", f"{TAG}.tvmm"]


async def test_it_stays_where_it_is_when_the_guest_is_copied(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    async with with_snapshots(tmp_path / "snapshots") as source, empty() as destination:
        assert (await move(source, destination, tmp_path))["status"] == "completed"
        await goes_on(destination)
        assert await destination.execute("x-query-snapshots") == []


async def test_a_snapshot_is_a_file_like_any_other_that_a_guest_is_saved_in(tmp_path: Path) -> None:
    async with with_snapshots(tmp_path) as machine:
        await done(machine, "save", TAG)
        before = look(machine).ticks
    async with empty() as again:
        await again.execute("migrate-incoming", uri=f"file:{tmp_path}/{TAG}.tvmm")
        await at_path(again, "running")
        await ticked(again, before + 5)
    async with with_snapshots(tmp_path) as machine:
        await save(machine, tmp_path / "other.tvmm")
        await machine.execute("cont")
        await done(machine, "load", "other")
        await goes_on(machine)


async def test_ram_in_a_file_is_in_the_snapshot_too_whatever_is_set(tmp_path: Path) -> None:
    recipe = [
        directory(tmp_path),
        {"execute": "object-add", "arguments": in_file(tmp_path / "ram")},
        *commands(**{"memory-backend": "m0"}),
    ]
    async with vmm.machine(recipe) as machine:
        await ticked(machine, 5)
        ignore = [{"capability": "x-ignore-shared", "state": True}]
        await machine.execute("migrate-set-capabilities", capabilities=ignore)
        await done(machine, "save", TAG)
        before = look(machine).ticks
        await ticked(machine, before + 60)
        await done(machine, "load", TAG)
        assert look(machine).ticks < before + 60
        await goes_on(machine)
