"""A guest is copied from one machine to another, and into a file and back, on the real KVM."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

import vmm
from tests.phases.copy_kit import (
    at_path,
    commands,
    empty,
    goes_on,
    in_status,
    look,
    move,
    outcome,
    parts,
    port_of,
    ram,
    refusal,
    save,
    started,
    status,
    ticked,
)
from tests.qtest.client import QtestClient
from vmm.errors import (
    DifferencesVisible,
    HostFileRefused,
    InvalidState,
    MigrationRefused,
    ResourcesMissing,
    TokenNotGranted,
    Unsupported,
    VmmError,
)
from vmm.hw.codec import StateCodec

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

GIB: Final = 1 << 30


# --- from here to there ---------------------------------------------------------------------------------------


async def test_an_empty_process_becomes_the_machine_and_goes_on_with_its_guest(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        info = await move(source, destination, tmp_path)
        assert info["status"] == "completed"
        assert await status(source) == "postmigrate"
        await in_status(destination, "running")
        await goes_on(destination)
        assert destination.recipe.to_json() == source.recipe.to_json()
        assert (await outcome(destination))["status"] == "completed"
    assert os.listdir(tmp_path) == []


async def test_nothing_is_compiled_while_the_guest_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_codec = StateCodec.of
    compiled: list[tuple[str, str]] = []

    def of(cls: type[StateCodec[Any]], kind: type, *rest: Any) -> StateCodec[Any]:
        compiled.append((kind.__name__, source.path.rpartition("/")[2]))
        return compile_codec(kind, *rest)

    monkeypatch.setattr(StateCodec, "of", classmethod(of))
    async with started() as source, empty() as destination:
        assert (await move(source, destination, tmp_path))["status"] == "completed"
        await in_status(destination, "running")
    assert len(compiled) > 10
    assert [kind for kind, phase in compiled if phase in ("quiesced", "postmigrate")] == []


async def test_monitors_and_qtest_stay_with_their_chardevs(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        machine = source.recipe.to_json()
        for kind in ("monitor-qmp", "qtest"):
            address = {"type": "unix", "data": {"path": str(tmp_path / kind)}}
            backend = {"type": "socket", "data": {"addr": address, "wait": False}}
            await source.execute("chardev-add", id=kind, backend=backend)
            await source.execute("object-add", qom_type=kind, id=f"over-{kind}", chardev=kind)
        assert (await move(source, destination, tmp_path))["status"] == "completed"
        await in_status(destination, "running")
        assert destination.recipe.to_json() == machine


@pytest.mark.parametrize("way", ["stream", "file"])
async def test_nothing_is_left_of_what_was_written_before_the_guest_came(way: str, tmp_path: Path) -> None:
    path = tmp_path / "qt"
    address = {"type": "unix", "data": {"path": str(path)}}
    backend = {"type": "socket", "data": {"addr": address, "wait": False}}
    async with started() as source, empty(autostart=False) as destination:
        for step in commands(upto="cpu-model-set"):
            await destination.execute(step["execute"], **step.get("arguments", {}))
        await destination.execute("chardev-add", id="qt", backend=backend)
        await destination.execute("object-add", qom_type="qtest", id="qtest0", chardev="qt")
        async with await QtestClient.connect(path) as client:
            await client.do("writeq 0x800000 0x5a5a5a5a5a5a5a5a")
            assert await client.value("readq 0x800000") == 0x5A5A5A5A5A5A5A5A
        if way == "stream":
            assert (await move(source, destination, tmp_path))["status"] == "completed"
        else:
            await save(source, tmp_path / "saved")
            await destination.execute("loadvm", name=str(tmp_path / "saved"))
        await in_status(destination, "paused")
        assert ram(destination) == ram(source)


async def test_a_reset_that_was_asked_for_before_the_guest_came_is_not_the_guest_s(tmp_path: Path) -> None:
    path = tmp_path / "qt"
    address = {"type": "unix", "data": {"path": str(path)}}
    backend = {"type": "socket", "data": {"addr": address, "wait": False}}
    async with started() as source, empty() as destination, destination.events() as events:
        for step in commands(upto="cpu-model-set"):
            await destination.execute(step["execute"], **step.get("arguments", {}))
        await destination.execute("chardev-add", id="qt", backend=backend)
        await destination.execute("object-add", qom_type="qtest", id="qtest0", chardev="qt")
        async with await QtestClient.connect(path) as client:
            await client.do("outb 0x64 0xfe")
        assert (await move(source, destination, tmp_path))["status"] == "completed"
        await in_status(destination, "running")
        await goes_on(destination)
        await destination.execute("quit")
        assert "RESET" not in [event["event"] async for event in events]


@pytest.mark.parametrize("size", [16 << 20, 64 << 20, 3 * GIB, 3 * GIB + 4096, 5 * GIB])
async def test_all_of_ram_is_there_byte_for_byte(size: int, tmp_path: Path) -> None:
    async with started(size=size) as source, empty(autostart=False) as destination:
        memory = parts(source).memory
        for region in memory.regions:
            memory.write(region.address + region.size - 4096, b"\xa5" * 4096)
        info = await move(source, destination, tmp_path)
        assert info["status"] == "completed"
        await in_status(destination, "paused")
        assert parts(destination).memory.regions == memory.regions
        assert ram(destination) == ram(source)
        await destination.execute("cont")
        await goes_on(destination)


async def test_statistics_tell_what_was_sent_and_what_was_zero(tmp_path: Path) -> None:
    async with started(region="4M") as source, empty() as destination:
        info = await move(source, destination, tmp_path)
        found = info["ram"]
        assert found["total"] == 16 << 20
        assert found["remaining"] == 0
        assert found["page-size"] == 4096
        # Each page has gone, and some twice: what the guest wrote meanwhile.
        assert found["normal"] + found["duplicate"] >= (16 << 20) // 4096
        assert found["normal-bytes"] == 4096 * found["normal"]
        assert 0 < found["normal-bytes"] < found["transferred"] < found["normal-bytes"] + (1 << 16)
        assert found["dirty-sync-count"] >= 2
        assert found["precopy-bytes"] + found["downtime-bytes"] == found["transferred"]
        assert info["total-time"] >= info["downtime"]


async def test_port_0_is_a_free_one_that_query_migrate_shows(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        await destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        await source.execute("migrate", uri=f"tcp:127.0.0.1:{await port_of(destination)}")
        assert (await outcome(source))["status"] == "completed"
        await in_status(destination, "running")


async def test_a_pair_of_connected_descriptors_will_do() -> None:
    async with started() as source, empty() as destination:
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
        source._program.descriptors["main"] = ours.detach()
        destination._program.descriptors["main"] = theirs.detach()
        await destination.execute("migrate-incoming", uri="fd:main")
        await source.execute("migrate", uri="fd:main")
        assert (await outcome(source))["status"] == "completed"
        await in_status(destination, "running")
        await goes_on(destination)


async def test_a_guest_goes_back_and_forth_and_misses_nothing(tmp_path: Path) -> None:
    async with started() as first, empty() as second, empty() as third:
        for here, there in ((first, second), (second, third)):
            await move(here, there, tmp_path)
            await in_status(there, "running")
            await goes_on(there)


async def test_a_guest_that_stood_stands_there_too_until_it_is_continued(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        await source.execute("stop")
        before = look(source).ticks
        assert (await move(source, destination, tmp_path))["status"] == "completed"
        await in_status(destination, "paused")
        assert look(destination).ticks == before
        await destination.execute("cont")
        await goes_on(destination)


async def test_stop_while_it_comes_in_keeps_the_guest_standing(tmp_path: Path) -> None:
    async with started() as source, vmm.machine(commands(upto="accel-set")) as destination:
        await destination.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}")
        assert await status(destination) == "inmigrate"
        await destination.execute("stop")
        await source.execute("migrate", uri=f"unix:{tmp_path / 'main'}")
        await in_status(destination, "paused")
        assert look(destination).ticks == look(source).ticks


async def test_cont_while_it_comes_in_undoes_stop(tmp_path: Path) -> None:
    async with started() as source, empty(autostart=False) as destination:
        for command in commands(upto="accel-set"):
            await destination.execute(command["execute"], **command.get("arguments", {}))
        await destination.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}")
        await destination.execute("cont")
        assert await status(destination) == "inmigrate"
        await source.execute("migrate", uri=f"unix:{tmp_path / 'main'}")
        await in_status(destination, "running")


async def test_a_reset_is_not_possible_while_the_guest_comes_in(tmp_path: Path) -> None:
    async with vmm.machine(commands(upto="accel-set")) as destination:
        await destination.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}")
        with pytest.raises(InvalidState, match="while the guest's state is awaited"):
            await destination.execute("system_reset")


async def test_a_guest_that_was_copied_can_be_reset_where_it_is_now(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        await move(source, destination, tmp_path)
        await in_status(destination, "running")
        await destination.execute("system_reset")
        await in_status(destination, "running")
        await goes_on(destination)


# --- afterwards, here -------------------------------------------------------------------------------------------


async def test_cont_runs_a_copied_guest_here_again(tmp_path: Path) -> None:
    async with started() as source, empty(autostart=False) as destination:
        await move(source, destination, tmp_path)
        assert source.path.endswith("/running/postmigrate")
        await source.execute("cont")
        assert await status(source) == "running"
        await goes_on(source)
        await at_path(source, "running")


async def test_after_a_cont_here_it_can_be_copied_again(tmp_path: Path) -> None:
    async with started() as source:
        first = await save(source, tmp_path / "first")
        await source.execute("cont")
        await goes_on(source)
        assert await save(source, tmp_path / "second") != first


async def test_what_has_gone_can_neither_be_stopped_nor_reset_nor_sent_again(tmp_path: Path) -> None:
    async with started() as source:
        await save(source, tmp_path / "state")
        for command, arguments in (("stop", {}), ("system_reset", {}), ("migrate", {"uri": "tcp:127.0.0.1:1"})):
            with pytest.raises(TokenNotGranted):
                await source.execute(command, **arguments)


# --- a machine that was made here -------------------------------------------------------------------------------


@pytest.mark.parametrize(("upto", "phase"), [("accel-set", "preconfig"), ("cpu-model-set", "devices")])
async def test_migrate_incoming_leaves_the_phase_on_its_own(upto: str, phase: str, tmp_path: Path) -> None:
    async with started() as source, vmm.machine(commands(upto=upto)) as destination:
        assert destination.path.endswith(phase)
        await destination.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}")
        assert destination.path.endswith("/devices/incoming")
        await source.execute("migrate", uri=f"unix:{tmp_path / 'main'}")
        assert (await outcome(source))["status"] == "completed"
        await in_status(destination, "running")
        await goes_on(destination)


@pytest.mark.parametrize(("upto", "phase"), [("accel-set", "preconfig"), ("cpu-model-set", "devices")])
async def test_loadvm_leaves_the_phase_on_its_own(upto: str, phase: str, tmp_path: Path) -> None:
    async with started() as source, vmm.machine(commands(upto=upto)) as destination:
        await save(source, tmp_path / "state")
        assert destination.path.endswith(phase)
        await destination.execute("loadvm", name=str(tmp_path / "state"))
        assert destination.path.endswith("/incoming/running")
        assert await status(destination) == "running"
        await goes_on(destination)


async def test_a_machine_that_awaits_a_guest_is_complete_by_the_usual_commands(tmp_path: Path) -> None:
    """What `-incoming` with a whole machine on the command line stands for."""
    async with started() as source, empty() as destination:
        await destination.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}")
        for command in commands(upto="cont"):
            await destination.execute(command["execute"], **command.get("arguments", {}))
        assert await status(destination) == "inmigrate"
        await source.execute("migrate", uri=f"unix:{tmp_path / 'main'}")
        await in_status(destination, "running")
        assert look(destination).ticks >= look(source).ticks


async def test_cont_in_preconfig_leads_to_where_the_guest_is_awaited(tmp_path: Path) -> None:
    async with empty(autostart=False) as destination:
        await destination.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}")
        for command in commands(upto="accel-set"):
            await destination.execute(command["execute"], **command.get("arguments", {}))
        await destination.execute("cont")
        assert await status(destination) == "inmigrate"


async def test_another_machine_than_the_source_s_is_refused_with_a_list(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path / 'main'}"
    async with started() as source:
        with refusal(DifferencesVisible):
            async with vmm.machine(commands(upto="accel-set", size=32 << 20, region="128K")) as destination:
                await destination.execute("migrate-incoming", uri=uri)
                await source.execute("migrate", uri=uri)
                await trio.sleep_forever()
        info = await outcome(source)
        assert info["status"] == "failed"
        assert "machine-set.memory ({'size': 16777216} there, {'size': 33554432} here)" in info["error-desc"]
        assert "machine-set.append ('region=64K pages=1' there, 'region=128K' here)" in info["error-desc"]
        assert await status(source) == "running"
        await goes_on(source)


# --- files ------------------------------------------------------------------------------------------------------


async def test_what_was_allowed_for_a_copied_guest_is_not_allowed_for_the_next(tmp_path: Path) -> None:
    async with started() as source, vmm.machine(commands(upto="accel-set", region="128K")) as destination:
        await save(source, tmp_path / "state")
        await destination.execute("x-allow-difference", names=["machine-set.append"])
        await destination.execute("loadvm", name=str(tmp_path / "state"))
        assert await status(destination) == "running"
        with pytest.raises(DifferencesVisible, match=r"machine-set\.append"):
            await destination.execute("loadvm", name=str(tmp_path / "state"))
        assert await status(destination) == "running"


async def test_a_guest_is_saved_and_an_empty_process_goes_on_with_it(tmp_path: Path) -> None:
    async with started() as source, empty(autostart=False) as destination:
        data = await save(source, tmp_path / "state")
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600
        assert len(data) < 1 << 20
        await destination.execute("migrate-incoming", uri=f"file:{tmp_path / 'state'}")
        await in_status(destination, "paused")
        assert ram(destination) == ram(source)
        await destination.execute("cont")
        await goes_on(destination)


async def test_a_stream_may_begin_at_an_offset_of_its_file_and_leaves_what_is_before_it(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"x" * (3 << 20))
    async with started() as source, empty() as destination:
        await source.execute("migrate", uri=f"file:{path},offset=1M")
        assert (await outcome(source))["status"] == "completed"
        data = path.read_bytes()
        assert data[: 1 << 20] == b"x" * (1 << 20)
        assert data.count(b"x" * 4096) == 256
        await destination.execute("migrate-incoming", uri=f"file:{path},offset=0x100000")
        await in_status(destination, "running")


async def test_a_saved_guest_that_stood_stands_after_loadvm(tmp_path: Path) -> None:
    async with started() as source, vmm.machine(commands(upto="accel-set")) as destination:
        await source.execute("stop")
        await save(source, tmp_path / "state")
        await destination.execute("loadvm", name=str(tmp_path / "state"))
        assert await status(destination) == "paused"


@pytest.mark.parametrize("bad", ["missing", "folder"])
async def test_a_file_that_cannot_be_is_refused_and_nothing_changes(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "state" if bad == "missing" else tmp_path
    async with started() as source, vmm.machine(commands(upto="accel-set")) as destination:
        with pytest.raises(HostFileRefused, match="Cannot write"):
            await source.execute("migrate", uri=f"file:{path}")
        await goes_on(source)
        with pytest.raises(HostFileRefused, match="Cannot read"):
            await destination.execute("loadvm", name=str(path))
        assert destination.path.endswith("preconfig")


@pytest.mark.parametrize("there", [True, False])
async def test_a_migration_that_is_refused_before_it_begins_has_not_touched_its_file(
    there: bool, tmp_path: Path
) -> None:
    path = tmp_path / "state"
    if there:
        path.write_bytes(b"yesterday's guest")
    steps: list[dict[str, Any]] = [
        {"execute": "machine-set", "arguments": {"memory": {"size": 1 << 20}}},
        {"execute": "accel-set", "arguments": {"accel": "qtest"}},
        {"execute": "cpu-model-set"},
        {"execute": "finish-machine-init"},
    ]
    async with vmm.machine(steps) as source:
        wanted = [{"capability": "xbzrle", "state": True}]
        with pytest.raises(Unsupported, match="'xbzrle' is not supported here"):
            await source.execute("migrate", uri=f"file:{path}", capabilities=wanted)
    assert os.listdir(tmp_path) == (["state"] if there else [])
    assert not there or path.read_bytes() == b"yesterday's guest"


async def test_loadvm_is_for_a_machine_that_is_there(tmp_path: Path) -> None:
    async with empty() as machine:
        with pytest.raises(TokenNotGranted, match="may-restore-guest"):
            await machine.execute("loadvm", name=str(tmp_path / "state"))


# --- channels ---------------------------------------------------------------------------------------------------

SOCKET: Final = {"transport": "socket", "type": "unix", "path": "/nowhere"}
FILE: Final = {"transport": "file", "filename": "/nowhere", "offset": 0}


@pytest.mark.parametrize(
    ("mode", "channels", "reason"),
    [
        (
            "normal",
            {"main": SOCKET, "cpr": SOCKET},
            "migrate: a channel of type 'cpr' is for mode cpr-transfer; set parameter 'mode', or leave it out",
        ),
        (
            "cpr-transfer",
            {"main": FILE, "cpr": SOCKET},
            "migrate: the main channel of a live update must be a socket, not a file",
        ),
        (
            "cpr-transfer",
            {"main": SOCKET, "cpr": FILE},
            "migrate: the cpr channel of a live update must be a socket, not a file",
        ),
    ],
)
async def test_channels_that_do_not_go_with_the_mode_are_refused(
    mode: str, channels: dict[str, Any], reason: str
) -> None:
    async with vmm.machine(commands()) as machine:
        await machine.execute("migrate-set-parameters", mode=mode)
        given = [{"channel-type": kind, "addr": address} for kind, address in channels.items()]
        with pytest.raises(MigrationRefused) as caught:
            await machine.execute("migrate", channels=given)
        assert str(caught.value) == reason


async def test_a_live_update_cannot_do_without_its_end() -> None:
    async with empty() as machine:
        given = [{"channel-type": kind, "addr": {**SOCKET, "path": f"/{kind}"}} for kind in ("main", "cpr")]
        with pytest.raises(VmmError, match="exit-on-error of a live update 'false' is not supported here"):
            await machine.execute("migrate-incoming", channels=given, exit_on_error=False)


async def test_nobody_at_the_address_is_told_at_once_and_the_guest_goes_on(tmp_path: Path) -> None:
    async with started() as source:
        with pytest.raises(HostFileRefused, match="Cannot connect to"):
            await source.execute("migrate", uri=f"unix:{tmp_path / 'nobody'}")
        assert (await source.execute("query-migrate")) == {}
        await goes_on(source)


async def test_two_guests_are_not_awaited_at_once(tmp_path: Path) -> None:
    async with empty() as machine:
        await machine.execute("migrate-incoming", uri=f"unix:{tmp_path / 'one'}")
        with pytest.raises(MigrationRefused, match="channels are bound already"):
            await machine.execute("migrate-incoming", uri=f"unix:{tmp_path / 'two'}")


# --- host resources ---------------------------------------------------------------------------------------------


def serial(path: Path) -> list[dict[str, Any]]:
    """A machine with a serial port that goes into a file."""
    backend = {"type": "file", "data": {"out": str(path)}}
    return [
        {"execute": "chardev-add", "arguments": {"id": "serial0", "backend": backend}},
        *commands(serial=["serial0"]),
    ]


async def test_a_chardev_of_the_recipe_needs_the_operator_s_permission(tmp_path: Path) -> None:
    there = tmp_path / "there"
    async with (
        vmm.machine(serial(tmp_path / "here")) as source,
        empty(allowed={"chardev/serial0": str(there)}) as destination,
    ):
        await move(source, destination, tmp_path)
        await in_status(destination, "running")
        await ticked(destination, 200)
        text = (tmp_path / "here").read_bytes() + there.read_bytes()
    # Not a byte is missing or there twice; the last line may be under way.
    whole = [line.decode() for line in text.split(b"\r\n")[:-1]]
    assert whole[0] == "heartbeat: started"
    assert whole[1:] == [f"heartbeat {n} ok" for n in range(1, len(whole))]


async def test_without_that_permission_the_source_keeps_its_guest(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path / 'main'}"
    async with vmm.machine(serial(tmp_path / "here")) as source:
        with refusal(ResourcesMissing):
            async with empty() as destination:
                await destination.execute("migrate-incoming", uri=uri)
                await source.execute("migrate", uri=uri)
                await trio.sleep_forever()
        info = await outcome(source)
        assert info["status"] == "failed"
        assert "chardev/serial0" in info["error-desc"]
        assert await status(source) == "running"


async def test_a_machine_of_its_own_has_chardevs_of_its_own(tmp_path: Path) -> None:
    own = [*serial(tmp_path / "there")[:3]]
    own[0]["arguments"]["id"] = own[1]["arguments"]["serial"][0] = "mine"
    async with vmm.machine(serial(tmp_path / "here")) as source, vmm.machine(own) as destination:
        await destination.execute("migrate-incoming", uri=f"unix:{tmp_path / 'main'}")
        await source.execute("migrate", uri=f"unix:{tmp_path / 'main'}")
        assert (await outcome(source))["status"] == "completed"
        await in_status(destination, "running")
        await ticked(destination, 200)
    text = (tmp_path / "here").read_text() + (tmp_path / "there").read_text()
    assert text.startswith("heartbeat: started\n") or text.startswith("heartbeat: started\r\n")


# --- what a machine may have ------------------------------------------------------------------------------------


async def test_a_machine_with_two_vcpus_is_copied(tmp_path: Path) -> None:
    async with started(smp={"cpus": 2}) as source, empty() as destination:
        assert (await move(source, destination, tmp_path))["status"] == "completed"
        await in_status(destination, "running")
        await goes_on(destination)
        assert len(await destination.execute("query-cpus-fast")) == 2


async def test_a_machine_with_a_plugged_device_is_copied(tmp_path: Path) -> None:
    async with started() as source, empty(autostart=False) as destination:
        await source.execute("device_add", driver="virtio-rng-device", id="rng0")
        assert (await move(source, destination, tmp_path))["status"] == "completed"
        await in_status(destination, "paused")
        await destination.execute("device_del", id="rng0")


async def test_a_guest_that_was_never_started_starts_there(tmp_path: Path) -> None:
    async with vmm.machine(commands(upto="finish-machine-init")) as source, empty() as destination:
        assert await status(source) == "prelaunch"
        assert (await move(source, destination, tmp_path))["status"] == "completed"
        await in_status(destination, "prelaunch")
        await destination.execute("cont")
        await ticked(destination, 5)
