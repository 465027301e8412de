"""What a user of QEMU 11 cannot do, by the letters under which the thread of October 2024 left it open.

a. A monitor on a cpr-transfer destination before `migrate` on the source.
b. A dynamic port with cpr-transfer, and `file:` beside it.
c. The CPR channel given over QMP.
d. Capabilities and parameters on the destination before CPR state has come.
e. A preconfig that begins before devices exist and admits what it has to.
f. machine-set, accel-set, cpu-model-set, finish-machine-init, query-machine-phase.
g. Chardevs that a live update preserves.
h. `migrate` and `migrate-incoming` with capabilities and parameters, and jobs.
i. A start with nothing but a QMP socket.

All of it is done to real processes, as a management program would.
"""

from __future__ import annotations

import array
import json
import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.phases.update_kit import (
    GUEST,
    answering_pid,
    begin_update,
    channels,
    due,
    open_bench,
    outcome,
)
from tests.qmp.kit import machine
from vmm import host_sockets
from vmm.qmp_client import CommandFailed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from tests.phases.update_kit import Bench, Process
    from tests.qmp.kit import Raw
    from vmm.qmp_client import QmpClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

PRECONFIG: Final = (*GUEST, "-serial", "none", "--preconfig")
EVENTS: Final = [{"capability": "events", "state": True}]


async def refused(client: QmpClient, command: str, **arguments: Any) -> str:
    """Execute a command that must fail; return what it says."""
    with pytest.raises(CommandFailed) as caught:
        await client.execute(command, **arguments)
    return caught.value.desc


async def with_descriptor(raw: Raw, request: dict[str, Any]) -> Any:
    """Send a request together with a descriptor; return the reply."""
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        await raw.sock.sendmsg([json.dumps(request).encode()], rights)
    finally:
        os.close(fd)
    return await raw.reply()


async def arrives(source: QmpClient, where: list[dict[str, Any]], status: str = "completed") -> None:
    """Hand the guest of `source` over; it must be all over, one way or the other, with `status`."""
    await begin_update(source, where)
    info = await outcome(source)
    assert info["status"] == status, info


def tcp_main(port: str, cpr: str) -> list[dict[str, Any]]:
    main, other = channels("", cpr)
    return [main | {"addr": {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": port}}, other]


@asynccontextmanager
async def beating() -> AsyncGenerator[tuple[Bench, Process, QmpClient], None]:
    """A machine whose guest counts; it must count on, without a gap, in whatever process it is in the end."""
    async with open_bench() as bench:
        console = bench.console()
        process = bench.machine(console)
        async with bench.session(bench.qmp) as client:
            await console.beats(2)
            yield bench, process, client
            await console.new_beats(2)


# --- a ------------------------------------------------------------------------------------------------------


async def test_gap_a_a_destination_answers_before_the_source_migrates_and_until_it_has_the_guest() -> None:
    async with beating() as (bench, _, source):
        destination = bench.destination()
        async with bench.session(destination.qmp) as client:
            assert await client.execute("query-machine-phase") == {"phase": "no-machine", "path": "boot/precreate"}
            assert (await client.execute("query-status"))["status"] == "prelaunch"
            await bench.listening(destination)
            assert (await client.execute("query-migrate"))["status"] == "setup"
            await arrives(source, bench.channels(destination))
            assert (await client.execute("query-status"))["running"]
        assert await answering_pid(bench.qmp) == destination.pid


async def test_gap_a_a_destination_can_be_told_to_quit_while_it_waits() -> None:
    async with open_bench() as bench:
        destination = bench.destination()
        await bench.listening(destination)
        async with bench.session(destination.qmp) as client:
            await client.execute("quit")
        assert await destination.ended() == 0
        assert not any(name.startswith(("main", "cpr", "qmp")) for name in os.listdir(bench.folder))


# --- b ------------------------------------------------------------------------------------------------------


async def test_gap_b_a_destination_tells_the_port_that_it_was_given() -> None:
    async with beating() as (bench, _, source):
        cpr = f"{bench.folder}/cpr"
        destination = bench.start(
            *("-incoming", "tcp:127.0.0.1:0"),
            *("-incoming", f"channel-type=cpr,addr.transport=socket,addr.type=unix,addr.path={cpr}"),
        )
        await bench.listening(destination)
        async with bench.session(destination.qmp) as client:
            addresses = (await client.execute("query-migrate"))["socket-address"]
            (port,) = [it["port"] for it in addresses if it["type"] == "inet"]
            assert 0 < int(port) < 65536
            await arrives(source, tcp_main(port, cpr))
            assert (await client.execute("query-status"))["running"]


async def test_gap_b_a_live_update_through_a_file_is_refused_with_the_reason() -> None:
    """Both processes live at once and tell each other how far they are: there is nothing that a file could do."""
    async with beating() as (bench, _, source):
        destination = bench.destination()
        await bench.listening(destination)
        main, cpr = bench.channels(destination)
        to_file = [main | {"addr": {"transport": "file", "filename": f"{bench.folder}/state", "offset": 0}}, cpr]
        await source.execute("migrate-set-parameters", mode="cpr-transfer")
        text = "migrate: the main channel of a live update must be a socket, not a file"
        assert await refused(source, "migrate", channels=to_file) == text
        other = bench.start("-incoming", "defer")
        async with bench.session(other.qmp) as client:
            assert await refused(client, "migrate-incoming", channels=to_file) == f"migrate-incoming{text[7:]}"
        assert not bench.is_there(f"{bench.folder}/state")
        assert (await source.execute("query-status"))["running"]


# --- c ------------------------------------------------------------------------------------------------------


async def test_gap_c_the_cpr_channel_is_given_over_qmp() -> None:
    async with beating() as (bench, _, source):
        destination = bench.start()
        where = channels(f"{bench.folder}/main", f"{bench.folder}/cpr")
        async with bench.session(destination.qmp) as client:
            await client.execute("migrate-incoming", channels=where)
            addresses = (await client.execute("query-migrate"))["socket-address"]
            assert [it["path"] for it in addresses] == [it["addr"]["path"] for it in where]
            await arrives(source, where)
            assert (await client.execute("query-status"))["running"]


async def test_gap_c_and_can_be_given_up_and_given_again() -> None:
    async with beating() as (bench, _, source):
        destination = bench.start()
        async with bench.session(destination.qmp) as client:
            for attempt in range(2):
                where = channels(f"{bench.folder}/main{attempt}", f"{bench.folder}/cpr{attempt}")
                await client.execute("migrate-incoming", channels=where)
                if attempt == 0:
                    await client.execute("x-cpr-abandon")
                    assert not bench.is_there(f"{bench.folder}/cpr0")
            await arrives(source, where)


# --- d ------------------------------------------------------------------------------------------------------


async def test_gap_d_a_destination_is_set_up_before_anything_has_come() -> None:
    async with beating() as (bench, _, source):
        destination = bench.destination()
        async with bench.session(destination.qmp) as client:
            await client.execute("migrate-set-capabilities", capabilities=EVENTS)
            await client.execute("migrate-set-parameters", **{"downtime-limit": 77})
            await bench.listening(destination)
            client.events.clear()
            await arrives(source, bench.channels(destination))
            async with due("the destination's own events"):
                await client.wait_event(lambda event: event.get("data", {}).get("status") == "completed")
            assert (await client.execute("query-migrate-parameters"))["downtime-limit"] == 77
            capabilities = await client.execute("query-migrate-capabilities")
            assert [it["capability"] for it in capabilities if it["state"]] == ["events"]


# --- e ------------------------------------------------------------------------------------------------------


async def test_gap_e_preconfig_admits_what_a_machine_is_set_up_with(tmp_path: Path) -> None:
    async with machine(tmp_path, *PRECONFIG) as m:
        await m.until_phase("preconfig")
        assert (await m.qmp.execute("query-machine-phase"))["phase"] == "accel-created"
        await m.qmp.execute("migrate-set-capabilities", capabilities=EVENTS)
        await m.qmp.execute("migrate-set-parameters", mode="normal")
        assert await m.qmp.execute("query-migrate") == {}
        await m.qmp.execute("migrate_cancel")
        assert [it["name"] for it in await m.qmp.execute("query-machines")] == ["microvm"]
        assert len(await m.qmp.execute("query-hotpluggable-cpus")) == 1
        assert "host" in [it["name"] for it in await m.qmp.execute("query-cpu-definitions")]
        expanded = await m.qmp.execute("query-cpu-model-expansion", type="full", model={"name": "host"})
        assert expanded["model"]["props"]
        await m.qmp.execute("chardev-add", id="late", backend={"type": "null", "data": {}})
        async with await m.raw() as raw:
            await raw.negotiate()
            for command, arguments in (("getfd", {"fdname": "a"}), ("add-fd", {"fdset-id": 1})):
                assert "return" in await with_descriptor(raw, {"execute": command, "arguments": arguments})
        await m.qmp.execute("device_add", driver="virtio-rng-device", id="rng0")
        await m.qmp.execute("x-exit-preconfig")
        await m.until_running()
        await m.qmp.execute("device_del", id="rng0")  # so it was there


async def test_gap_e_preconfig_begins_before_anything_exists_that_uses_a_back_end(tmp_path: Path) -> None:
    async with machine(tmp_path, *GUEST, "-chardev", "null,id=com", "-serial", "chardev:com", "--preconfig") as m:
        await m.until_phase("preconfig")
        with pytest.raises(CommandFailed) as caught:
            await m.qmp.execute("query-cpus-fast")
        assert caught.value.error_class == "DeviceNotActive"
        await m.qmp.execute("cont")
        await m.until_running()
        assert len(await m.qmp.execute("query-cpus-fast")) == 1


async def saved(tmp_path: Path) -> str:
    """Run a guest of `PRECONFIG`'s options, save it to a file, and return the file's path."""
    path, folder = tmp_path / "state", tmp_path / "saver"
    folder.mkdir()
    async with machine(folder, *PRECONFIG) as m:
        await m.until_phase("preconfig")
        await m.qmp.execute("cont")
        await m.qmp.execute("migrate-set-capabilities", capabilities=EVENTS)
        await m.qmp.execute("migrate", uri=f"file:{path}")
        assert (await outcome(m.qmp))["status"] == "completed"
    return str(path)


async def test_gap_e_preconfig_is_left_by_loadvm(tmp_path: Path) -> None:
    path = await saved(tmp_path)
    async with machine(tmp_path, *PRECONFIG) as m:
        await m.until_phase("preconfig")
        await m.qmp.execute("loadvm", name=path)
        await m.until_running()


async def test_gap_e_preconfig_is_left_by_an_incoming_migration_that_was_not_deferred(tmp_path: Path) -> None:
    path, folder, main = await saved(tmp_path), tmp_path / "new", tmp_path / "main"
    folder.mkdir()
    async with machine(tmp_path, *PRECONFIG) as m:
        await m.until_phase("preconfig")
        await m.qmp.execute("loadvm", name=path)
        await m.until_running()
        async with machine(folder, *PRECONFIG, "-incoming", f"unix:{main}") as other:
            await other.until_phase("preconfig")
            await other.qmp.execute("x-exit-preconfig")
            await other.until_phase("incoming")
            await m.qmp.execute("migrate-set-capabilities", capabilities=EVENTS)
            await m.qmp.execute("migrate", uri=f"unix:{main}")
            assert (await outcome(m.qmp))["status"] == "completed"
            await other.until_running()


async def test_gap_e_preconfig_is_left_by_migrate_incoming(tmp_path: Path) -> None:
    path = await saved(tmp_path)
    async with machine(tmp_path, *PRECONFIG) as m:
        await m.until_phase("preconfig")
        await m.qmp.execute("migrate-incoming", uri=f"file:{path}")
        await m.until_running()


# --- f ------------------------------------------------------------------------------------------------------


async def test_gap_f_each_decision_is_a_command_and_each_phase_has_a_name(tmp_path: Path) -> None:
    async with machine(tmp_path) as m:
        for phase, command, arguments in (
            ("no-machine", "machine-set", {"memory": {"size": 16 << 20}, "kernel": "builtin:heartbeat"}),
            ("machine-created", "accel-set", {"accel": "kvm"}),
            ("accel-created", "cpu-model-set", {"model": "host"}),
            ("machine-initialized", "finish-machine-init", {}),
        ):
            assert (await m.qmp.execute("query-machine-phase"))["phase"] == phase
            assert await m.qmp.execute(command, **arguments) == {}
        assert (await m.qmp.execute("query-machine-phase"))["phase"] == "machine-ready"


# --- g ------------------------------------------------------------------------------------------------------


async def test_gap_g_chardevs_of_every_kind_go_on_in_the_next_process() -> None:
    """The serial port's client stays connected; a pty, a file and the monitor's own socket stay what they are."""
    async with beating() as (bench, process, source):
        log = f"{bench.folder}/log"
        await source.execute("chardev-add", id="log", backend={"type": "file", "data": {"out": log}})
        made = await source.execute("chardev-add", id="term", backend={"type": "pty", "data": {}})
        before = {it["label"]: it["filename"] for it in await source.execute("query-chardev")}
        destination = bench.destination()
        await bench.listening(destination)
        await arrives(source, bench.channels(destination))
        assert await answering_pid(bench.qmp) == destination.pid != process.pid
        async with bench.session(bench.qmp) as client:
            after = {it["label"]: it["filename"] for it in await client.execute("query-chardev")}
            assert after["term"] == before["term"]
            assert made["pty"] in after["term"]
            assert after["log"] == before["log"]
            assert after["serial0"] == before["serial0"]
            # The old process has let go: its end ends no chardev of the machine's.
            await source.execute("quit")
            assert await process.ended() == 0
            assert os.path.exists(made["pty"])  # noqa: ASYNC240


# --- h ------------------------------------------------------------------------------------------------------


async def concluded(client: QmpClient, name: str) -> dict[str, Any]:
    """Return what `query-jobs` says of job `name` once it has concluded."""
    async with due(f"the end of job {name}"):
        while True:
            (job,) = await client.execute("query-jobs")
            if job["status"] == "concluded":
                return dict(job)
            await client.wait_event(lambda event: event["event"] == "JOB_STATUS_CHANGE")


async def test_gap_h_one_command_on_each_side_says_all_of_a_migration_which_is_a_job() -> None:
    async with beating() as (bench, _, source):
        destination = bench.start()
        where = channels(f"{bench.folder}/main", f"{bench.folder}/cpr")
        async with bench.session(destination.qmp) as client:
            await client.execute(
                "migrate-incoming", channels=where, capabilities=EVENTS, parameters={"downtime-limit": 77}, job_id="in"
            )
            await source.execute("migrate", channels=where, parameters={"mode": "cpr-transfer"}, job_id="out")
            for side, name in ((source, "out"), (client, "in")):
                job = await concluded(side, name)
                assert (job["id"], job["type"], "error" in job) == (name, "migrate", False)
                await side.execute("job-dismiss", id=name)
                assert await side.execute("query-jobs") == []
            # What was said for one migration held for that one.
            assert (await source.execute("query-migrate-parameters"))["mode"] == "normal"
            assert (await client.execute("query-status"))["running"]


async def test_gap_h_a_job_is_cancelled_and_the_guest_stays() -> None:
    async with beating() as (bench, _, source):
        main, cpr = f"{bench.folder}/main", f"{bench.folder}/cpr"
        with host_sockets.listen_unix(main), host_sockets.listen_unix(cpr):
            # A destination that never answers.
            settings = {"mode": "cpr-transfer"}
            await source.execute("migrate", channels=channels(main, cpr), parameters=settings, job_id="out")
            await source.execute("job-cancel", id="out")
            job = await concluded(source, "out")
        assert "cancelled" in job["error"]
        assert (await source.execute("query-migrate"))["status"] == "cancelled"
        assert (await source.execute("query-status"))["running"]


# --- i ------------------------------------------------------------------------------------------------------


async def test_gap_i_a_machine_comes_from_nothing_but_a_qmp_socket() -> None:
    async with open_bench() as bench:
        process = bench.start()
        console = bench.console()
        serial = {"addr": {"type": "unix", "data": {"path": console.path}}, "server": False}
        async with bench.session(process.qmp) as client:
            assert await client.execute("query-machine-phase") == {"phase": "no-machine", "path": "boot/precreate"}
            assert [it["label"] for it in await client.execute("query-chardev")] == ["compat_monitor0"]
            await client.execute("chardev-add", id="com", backend={"type": "socket", "data": serial})
            await client.execute(
                "machine-set",
                memory={"size": 16 << 20},
                kernel="builtin:heartbeat",
                append="region=64K pages=1",
                serial=["com"],
            )
            await client.execute("accel-set")
            await client.execute("cont")
            await console.beats(3)
            await client.execute("quit")
        assert await process.ended() == 0
        assert process.said() == []
