from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.phases.machine import (
    DEFINITION,
    PATHS,
    WAY,
    advance,
    appearance,
    bare,
    connected,
    failure,
    machine,
    monitor,
    sockets_in,
    start_of,
)
from tests.trees import out_of_order
from vmm.errors import RecipeInvalid, leaves
from vmm.phases.chain import chain
from vmm.phases.config import GoOn
from vmm.phases.start import Start
from vmm.qmp_client import CommandFailed, MonitorGone, QmpClient, qmp_session
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from pathlib import Path

    from tests.phases.machine import Running

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

phases = pytest.mark.parametrize("phase", list(PATHS))


def told(events: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Events of phases and tokens, in the words of `out_of_order`."""
    words = {"TOKEN_GRANTED": "granted", "TOKEN_REVOKED": "revoked"}
    return [
        f"{words[name]} {data['token']} of {data['path']}"
        if name in words
        else f"{'open' if data['opened'] else 'leave'} {data['path']}"
        for name, data in events
        if name in words or name == "PHASE_CHANGED"
    ]


def out_of_reverse(running: Running) -> list[str]:
    return out_of_order(told(running.events()), ("open", "granted"), ("leave", "revoked"))


async def where(client: QmpClient) -> tuple[str, str]:
    info = await client.execute("query-machine-phase")
    return info["phase"], info["path"]


async def quit_and_read_on(client: QmpClient) -> list[str]:
    """Quit; return the names of the events that follow, to the end of the stream."""
    await client.execute("quit")
    client.events.clear()
    return await read_on(client)


async def read_on(client: QmpClient) -> list[str]:
    """Return the names of the events to the end of the stream."""
    names: list[str] = []
    try:
        while True:
            names.append((await client.read())["event"])
    except MonitorGone:
        return names


# --- built over the monitor -------------------------------------------------------------------------------


async def test_with_only_a_monitor_a_client_does_all_of_it(tmp_path: Path) -> None:
    async with bare(tmp_path) as (running, client):
        for phase, command, arguments in WAY:
            assert await where(client) == PATHS[phase]
            assert (await client.execute("query-status"))["status"] == "prelaunch"
            assert await client.execute(command, **arguments) == {}
        assert await client.execute("query-status") == {"running": True, "status": "running"}
        await client.execute("stop")
        assert await client.execute("query-status") == {"running": False, "status": "paused"}
        await client.execute("system_reset")
        assert await where(client) == PATHS["running"]
        await client.execute("cont")
        names = await quit_and_read_on(client)
        await running.ended.wait()
        assert running.status == 0
    assert names[-1] == "SHUTDOWN"
    assert running.events()[-2:] == [
        ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}),
        ("PHASE_CHANGED", {"path": "boot", "phase": "boot", "machine-phase": "no-machine", "opened": False}),
    ]
    assert [name for name, _ in running.events() if name in ("STOP", "RESUME", "RESET")] == [
        *("RESUME", "STOP", "RESET", "RESUME"),
    ]
    assert sockets_in(tmp_path) == []


async def test_every_phase_grants_what_it_declares(tmp_path: Path) -> None:
    """The table that the documentation is made of, against what really opens and closes."""
    async with bare(tmp_path) as (running, client):
        await advance(client, "running")
        await client.execute("quit")
        await running.ended.wait()
    declared = {facts.name: facts for facts in chain()}
    events = running.events()
    opened = [data for name, data in events if name == "PHASE_CHANGED" and data["opened"]]
    assert [data["phase"] for data in opened] == [
        *("boot", "precreate", "accel", "backends", "preconfig", "devices", "running"),
    ]
    for data in opened:
        facts = declared[data["phase"]]
        assert data["machine-phase"] == facts.machine_phase
        expected = [
            {
                "token": kind.wire_name,
                "path": data["path"],
                "phase": facts.name,
                **({"scope": list(facts.scopes[kind.wire_name])} if kind.wire_name in facts.scopes else {}),
            }
            for kind in facts.kinds()
        ]
        assert [d for name, d in events if name == "TOKEN_GRANTED" and d["phase"] == facts.name] == expected
        assert [d for name, d in events if name == "TOKEN_REVOKED" and d["phase"] == facts.name] == expected[::-1]
    assert out_of_reverse(running) == []


async def test_the_tree_shows_phases_tasks_and_tokens(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await advance(client, "running")
        node = await client.execute("query-nursery-tree")
        seen: dict[str, Any] = {}
        while True:
            seen[node["phase"]] = node
            if not node["children"]:
                break
            (node,) = node["children"]
        assert list(seen) == ["boot", "precreate", "accel", "backends", "preconfig", "devices", "running"]
        assert seen["boot"]["tasks"] == ["events", "chardev mon0", "monitor qmp_mon0"]
        assert seen["running"]["tasks"] == ["vcpus", "guest requests"]
        assert {name for name, info in seen.items() if info["window"]} == {"boot", "running"}
        assert seen["accel"]["tokens"] == []
        facts = {facts.name: facts for facts in chain()}
        for name in ("boot", "running"):
            granted = [token["token"] for token in seen[name]["tokens"]]
            assert granted == [kind.wire_name for kind in facts[name].kinds()]


async def test_extended_query_commands_says_what_would_be_admitted(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        for phase, command, arguments in WAY:
            infos = {info["name"]: info for info in await client.execute("query-commands", extended=True)}
            assert infos[command]["admitted"], command
            for name, info in infos.items():
                assert info["admitted"] == (phase in info["phases"]), f"{name} in {phase}"
            await client.execute(command, **arguments)


async def test_each_decision_needs_only_defaults(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        for command in ("x-exit-precreate", "accel-set", "x-exit-preconfig", "finish-machine-init"):
            assert await client.execute(command) == {}
        assert await where(client) == PATHS["running"]


async def test_cont_leads_from_preconfig_to_a_running_guest(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await advance(client, "preconfig")
        await client.execute("cont")
        assert await where(client) == PATHS["running"]
        assert (await client.execute("query-status"))["running"]


async def test_cont_leads_from_devices_to_a_running_guest(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await advance(client, "devices")
        await client.execute("cont")
        assert await where(client) == PATHS["running"]
        assert (await client.execute("query-status"))["running"]


async def test_stop_and_reset_before_there_is_a_guest(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await advance(client, "devices")
        await client.execute("stop")
        assert await failure(client, "system_reset") == (
            "system_reset is not possible before the machine is ready; finish-machine-init or cont makes it ready"
        )
        assert await where(client) == PATHS["devices"]


# --- a failure leaves the phase as it was -----------------------------------------------------------------


async def test_a_machine_set_that_fails_leaves_precreate_as_it_was(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    absent = tmp_path / "absent"
    refused: list[tuple[dict[str, Any], str]] = [
        ({"type": "q35"}, "Machine type 'q35' is not supported here; the one there is is microvm"),
        ({"memory": {"size": 4097}}, "memory.size: 4097 is not a multiple of 4 KiB between 1 MiB and 1 TiB"),
        ({"memory": {"size": 1 << 41}}, f"memory.size: {1 << 41} is not a multiple of 4 KiB between 1 MiB and 1 TiB"),
        ({"smp": {"cpus": 9}}, "smp.cpus: 9 is not a number of vCPUs from 1 to 8"),
        ({"smp": {"cpus": 0}}, "smp.cpus: 0 is not a number of vCPUs from 1 to 8"),
        (
            {"smp": {"cpus": 2, "sockets": 2}},
            "smp.sockets: 2 is not 1, the only value with 2 vCPUs (one socket, a core each, no hot plug)",
        ),
        ({"kernel": str(absent)}, f"Cannot read {absent}: No such file or directory"),
        ({"kernel": str(tmp_path)}, f"Cannot read {tmp_path}: it is a directory, not a regular file"),
        ({"initrd": str(empty)}, f"initrd: '{empty}' is not possible without a kernel"),
        ({"kernel": "builtin:heartbeat", "initrd": str(absent)}, f"Cannot read {absent}: No such file or directory"),
        ({"uuid": "x"}, "uuid: 'x' is not a UUID such as 6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
        ({"serial": ["nope"]}, "Chardev 'nope' does not exist; there are: com, mon0"),
        ({"serial": ["mon0"]}, "Chardev 'mon0' is in use by monitor qmp_mon0"),
        ({"serial": ["com", "com"]}, "Chardev 'com' is in use by COM1"),
        ({"serial": ["com"] * 3}, "serial: ['com', 'com', 'com'] is not at most two chardevs (COM1 and COM2)"),
    ]
    null = Step("chardev-add", {"id": "com", "backend": {"type": "null", "data": {}}})
    async with bare(tmp_path, null) as (running, client):
        await settled_in(client, "precreate")
        held = len(os.listdir("/proc/self/fd"))
        before = running.events()
        for arguments, text in refused:
            assert await failure(client, "machine-set", **arguments) == text
            assert await where(client) == PATHS["precreate"]
        assert (await failure(client, "machine-set", kernel=str(empty))).startswith(f"Cannot boot {empty}: ")
        assert running.events() == before, "nothing opened, nothing closed"
        assert len(os.listdir("/proc/self/fd")) == held, "no file stays open"
        assert await client.execute("query-name") == {}
        await client.execute("machine-set", **DEFINITION, serial=["com"], name="guest1")
        assert await client.execute("query-name") == {"name": "guest1"}
        assert await failure(client, "chardev-remove", id="com") == "Chardev 'com' is in use by COM1"
        await client.execute("accel-set")
        await client.execute("cont")
        assert (await client.execute("query-status"))["running"]


async def test_a_machine_set_with_wrong_arguments_names_them_all(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        text = await failure(client, "machine-set", memory={"size": "16M"}, colour="red")
        assert text == (
            "Command 'machine-set': 'colour' is unexpected; there are 'type', 'name', 'uuid', 'memory', "
            "'memory-backend', 'smp', 'kernel', 'initrd', 'append', 'serial', 'reboot-action', 'boot', and 5 more; "
            "'memory.size' must be an integer, not \"16M\""
        )


async def test_other_decisions_that_fail_may_be_given_again(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await advance(client, "accel")
        assert await failure(client, "accel-set", accel="tcg") == (
            "Accelerator 'tcg' is not supported here; there are kvm, and qtest for tests"
        )
        assert await where(client) == PATHS["accel"]
        await client.execute("accel-set", accel="kvm")
        assert await failure(client, "cpu-model-set", model="pentium") == (
            "CPU model 'pentium' is not supported here; use host, which is all that this host's KVM offers, "
            "or base with the features that props names"
        )
        assert await where(client) == PATHS["preconfig"]
        await client.execute("cpu-model-set", model="max")


async def test_a_kernel_that_has_changed_meanwhile_is_told_and_the_machine_waits(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"\x90" * 65536)
    async with bare(tmp_path) as (_, client):
        await client.execute("machine-set", kernel=f"flat:{kernel}", memory={"size": 16 << 20})
        await client.execute("accel-set")
        await client.execute("cpu-model-set")
        os.truncate(kernel, 100)
        text = await failure(client, "cont")
        assert text.startswith("Cannot boot ") or str(kernel) in text, text
        assert await where(client) == PATHS["devices"]
        kernel.write_bytes(b"\x90" * 65536)
        await client.execute("finish-machine-init")
        assert await where(client) == PATHS["running"]


# --- the wrong phase --------------------------------------------------------------------------------------

WRONG = [
    (
        "precreate",
        "accel-set",
        "Command 'accel-set' needs may-open-kvm, which phase boot/precreate does not grant; "
        "phases that grant it: accel (reached by machine-set)",
    ),
    (
        "precreate",
        "cont",
        "Command 'cont' needs may-run-vcpus, which phase boot/precreate does not grant; phases that grant it: "
        "preconfig (reached by accel-set), devices (reached by cpu-model-set or x-exit-preconfig), "
        "incoming (reached by an incoming migration), running (reached by finish-machine-init or cont), "
        "postmigrate (reached by a migration that completed)",
    ),
    (
        "precreate",
        "x-exit-preconfig",
        "Command 'x-exit-preconfig' needs may-configure-machine:cpu, which phase boot/precreate does not grant; "
        "phases that grant it: preconfig (reached by accel-set)",
    ),
    (
        "accel",
        "finish-machine-init",
        "Command 'finish-machine-init' needs may-configure-machine:board, which phase boot/precreate/accel does not "
        "grant; phases that grant it: devices (reached by cpu-model-set or x-exit-preconfig)",
    ),
    (
        "accel",
        "machine-set",
        "Command 'machine-set' needs may-configure-machine:machine, which phase boot/precreate/accel does not grant; "
        "phases that grant it: precreate (reached by a start without a machine)",
    ),
    (
        "preconfig",
        "accel-set",
        "Command 'accel-set' needs may-open-kvm, which phase boot/precreate/accel/backends/preconfig does not grant; "
        "phases that grant it: accel (reached by machine-set)",
    ),
    (
        "devices",
        "cpu-model-set",
        "Command 'cpu-model-set' needs may-configure-machine:cpu, which phase "
        "boot/precreate/accel/backends/preconfig/devices does not grant; "
        "phases that grant it: preconfig (reached by accel-set)",
    ),
    (
        "running",
        "x-exit-precreate",
        "Command 'x-exit-precreate' needs may-configure-machine:machine, which phase "
        "boot/precreate/accel/backends/preconfig/devices/running does not grant; "
        "phases that grant it: precreate (reached by a start without a machine)",
    ),
]


@pytest.mark.parametrize(("phase", "command", "text"), WRONG, ids=[f"{row[1]} in {row[0]}" for row in WRONG])
async def test_a_command_in_the_wrong_phase_is_told_the_token_the_phases_and_the_way(
    tmp_path: Path, phase: str, command: str, text: str
) -> None:
    async with bare(tmp_path) as (_, client):
        await advance(client, phase)
        assert await failure(client, command) == text
        assert await where(client) == PATHS[phase]


async def test_what_is_not_there_yet_is_named_with_its_phase(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        with pytest.raises(CommandFailed) as caught:
            await client.execute("query-cpus-fast")
        assert (caught.value.error_class, caught.value.desc) == (
            "DeviceNotActive",
            "The machine is not there before phase devices",
        )
        await advance(client, "devices")
        assert len(await client.execute("query-cpus-fast")) == 1


# --- options that linger ----------------------------------------------------------------------------------


async def test_preconfig_waits_and_then_runs_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    start = start_of(*f"-qmp unix:{path} -preconfig -kernel builtin:heartbeat -m 16 -serial none".split())
    async with machine(start, path) as running, connected(path) as client:
        assert await settled_in(client, "preconfig")
        await client.execute("x-exit-preconfig")
        # At once: the reply comes when the machine has got there, and RESUME came before it.
        assert "RESUME" in [event["event"] for event in client.events]
        assert await client.execute("query-status") == {"running": True, "status": "running"}
        assert (await failure(client, "x-exit-preconfig")).startswith(
            "Command 'x-exit-preconfig' needs may-configure-machine:cpu, which phase "
            "boot/precreate/accel/backends/preconfig/devices/running does not grant"
        )
        await client.execute("stop")
        await client.execute("quit")
        await running.ended.wait()
        assert running.status == 0


async def settled_in(client: QmpClient, phase: str) -> bool:
    """Wait until the start recipe is through: a command that changes the machine waits for that."""
    await client.execute("migrate-set-parameters")
    return await where(client) == PATHS[phase]


async def test_preconfig_with_s_ends_in_a_machine_that_stands(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    start = start_of(*f"-qmp unix:{path} --preconfig -S -kernel builtin:heartbeat -m 16 -serial none".split())
    async with machine(start, path), connected(path) as client:
        await client.execute("cpu-model-set")
        assert await where(client) == PATHS["running"]
        assert (await client.execute("query-status"))["status"] == "prelaunch"
        await client.execute("cont")
        assert (await client.execute("query-status"))["running"]


async def test_precreate_waits_for_machine_set(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    async with machine(start_of("-qmp", f"unix:{path}", "--precreate"), path), connected(path) as client:
        assert await where(client) == PATHS["precreate"]
        await client.execute("machine-set", **DEFINITION)
        assert await where(client) == PATHS["accel"]


async def test_s_leaves_the_machine_standing(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    start = start_of(*f"-qmp unix:{path} -S -kernel builtin:heartbeat -m 16 -serial none -name g1".split())
    async with machine(start, path), connected(path) as client:
        assert await settled_in(client, "running")
        assert (await client.execute("query-status"))["status"] == "prelaunch"
        assert await client.execute("query-name") == {"name": "g1"}


async def test_a_machine_of_the_command_line_passes_through_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    start = start_of(*f"-qmp unix:{path} -kernel builtin:heartbeat -m 16 -serial null -smp 2".split())
    async with machine(start, path), connected(path) as client:
        assert await settled_in(client, "running")
        assert (await client.execute("query-status"))["running"]
        cpus = await client.execute("query-cpus-fast")
        assert [cpu["cpu-index"] for cpu in cpus] == [0, 1]


# --- who comes at the same time ---------------------------------------------------------------------------


async def test_a_client_may_send_the_whole_recipe_without_waiting(tmp_path: Path) -> None:
    """Each reply comes only when the next command is admitted; and who comes during the start is not turned away."""
    requests = [("qmp_capabilities", {}), *((command, arguments) for _, command, arguments in WAY)]
    requests += [("stop", {}), ("system_reset", {}), ("cont", {}), ("query-machine-phase", {}), ("quit", {})]
    for run in range(50):
        status, messages = await converse(tmp_path / f"qmp{run}", requests)
        replies = [message for message in messages if "event" not in message]
        assert status == 0
        assert [next(iter(reply)) for reply in replies] == ["QMP", *["return"] * len(requests)], replies
        assert replies[-2]["return"]["phase"] == "machine-ready"
        assert messages[-1]["event"] == "SHUTDOWN"
    assert sockets_in(tmp_path) == []


async def converse(path: Path, requests: list[tuple[str, Any]]) -> tuple[int | None, list[Any]]:
    """Run a machine with a monitor; send all `requests` at once, and return its status and all that it sent."""
    sent = b"".join(json.dumps({"execute": name, "arguments": dict(args)}).encode() for name, args in requests)
    async with machine(Start(Recipe("of this test", monitor(path))), path) as running:
        await appearance(path)
        async with await trio.open_unix_socket(str(path)) as stream:
            await stream.send_all(sent)
            received = b"".join([data async for data in stream])
        await running.ended.wait()
        return running.status, [json.loads(line) for line in received.splitlines()]


async def test_two_clients_that_decide_at_once_do_not_stop_the_machine(tmp_path: Path) -> None:
    async with bare(tmp_path) as (running, first), qmp_session(str(running.path)) as second:
        for _, command, arguments in WAY[:4]:
            outcomes: list[str] = []

            async def decide(
                client: QmpClient, command: str = command, arguments: Any = arguments, outcomes: list[str] = outcomes
            ) -> None:
                try:
                    await client.execute(command, **arguments)
                    outcomes.append("done")
                except CommandFailed as error:
                    outcomes.append(error.desc)

            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(decide, first)
                    nursery.start_soon(decide, second)
            assert outcomes.count("done") == 1
            (other,) = (outcome for outcome in outcomes if outcome != "done")
            assert "does not grant" in other or "has been left" in other
        assert await where(first) == PATHS["running"]


async def test_settings_that_come_while_the_machine_moves_wait_for_it(tmp_path: Path) -> None:
    """Such a command used to wait inside the window that the machine was leaving, and both waited for ever."""
    for run in range(20):
        directory = tmp_path / str(run)
        directory.mkdir()
        async with bare(directory) as (running, first), qmp_session(str(running.path)) as second:
            await advance(first, "preconfig")
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(second.execute, "migrate-set-parameters")
                    nursery.start_soon(first.execute, "cont")
            assert await where(first) == PATHS["running"]


async def test_a_session_may_query_and_quit_while_the_recipe_is_replayed(tmp_path: Path) -> None:
    """The recipe ends in `cont` of a machine; the client quits as soon as it can. Either the one or the other."""
    path = tmp_path / "qmp"
    steps = [Step(command, arguments) for _, command, arguments in WAY]
    async with machine(Start(Recipe("of this test", (*monitor(path), *steps))), path) as running:
        async with connected(path) as client:
            await client.execute("query-status")
            await client.execute("quit")
        with trio.fail_after(20):
            await running.ended.wait()
        assert running.status == 0
    assert out_of_reverse(running) == []


async def test_a_recipe_may_end_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    start = Start(Recipe("of this test", (*monitor(path), Step("machine-set"), Step("quit"), Step("accel-set"))))
    async with machine(start, path) as running:
        await running.ended.wait()
        assert running.status == 0
    assert "boot/precreate/accel/backends" not in [data.get("path") for _, data in running.events()]


# --- the end ----------------------------------------------------------------------------------------------


@phases
async def test_quit_ends_the_machine_from_every_phase(tmp_path: Path, phase: str) -> None:
    async with bare(tmp_path) as (running, client):
        await advance(client, phase)
        assert (await quit_and_read_on(client))[-1] == "SHUTDOWN"
        await running.ended.wait()
        assert running.status == 0
    assert out_of_reverse(running) == []
    assert sockets_in(tmp_path) == []


@pytest.mark.parametrize("place", [*PATHS, "running, the guest runs", "running, stopped"])
async def test_a_cancel_from_outside_leaves_nothing_behind(tmp_path: Path, place: str) -> None:
    phase, _, how = place.partition(", ")
    async with bare(tmp_path) as (running, client):
        await advance(client, phase)
        if how:
            await client.execute("cont")
        if how == "stopped":
            await client.execute("stop")
        running.scope.cancel()
        await running.ended.wait()
        assert running.status is None
        names = await read_on(client)
    assert running.scope.cancelled_caught
    assert names[-1] == "SHUTDOWN"
    assert running.events()[-2] == ("SHUTDOWN", {"guest": False, "reason": "host-signal"})
    assert out_of_reverse(running) == []
    assert sockets_in(tmp_path) == []


async def test_a_cancel_while_a_command_is_under_way_leaves_nothing_behind(tmp_path: Path) -> None:
    """`object-del` waits for a client who has not read his replies."""
    other = tmp_path / "other"
    async with bare(tmp_path, *monitor(other, "mon1")) as (running, client):
        await advance(client, "running")
        idle = await trio.open_unix_socket(str(other))
        async with idle:
            await idle.send_all(b'{"execute": "qmp_capabilities"}' + b'{"execute": "query-qmp-schema"}' * 8)
            async with trio.open_nursery() as nursery:

                async def delete() -> None:
                    with pytest.raises((CommandFailed, MonitorGone)):
                        await client.execute("object-del", id="qmp_mon1")

                nursery.start_soon(delete)
                with trio.fail_after(20):
                    while "object-del" not in running.lent():
                        await trio.lowlevel.checkpoint()
                running.scope.cancel()
            await running.ended.wait()
    assert running.status is None
    assert out_of_reverse(running) == []
    assert sockets_in(tmp_path) == []


async def test_a_cancel_at_any_moment_of_the_start_closes_everything_in_reverse(tmp_path: Path) -> None:
    steps = [Step(command, arguments) for _, command, arguments in WAY]
    null = Step("chardev-add", {"id": "com", "backend": {"type": "null", "data": {}}})
    path = tmp_path / "qmp"
    reached: set[str] = set()
    held = os.listdir("/proc/self/fd")
    for turns in random.Random(2).choices(range(1, 150), k=100):
        async with machine(Start(Recipe("of this test", (*monitor(path), null, *steps))), path) as running:
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            reached.add(running.tree.path.rsplit("/", 1)[-1])
            running.scope.cancel()
            await running.ended.wait()
        assert out_of_reverse(running) == []
        assert sockets_in(tmp_path) == []
        assert os.listdir("/proc/self/fd") == held
    assert reached >= {"precreate", "accel", "preconfig", "devices", "running"}, "it was cancelled in all of them"


# --- a start that fails -----------------------------------------------------------------------------------


async def test_a_start_recipe_whose_third_command_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    steps = (*monitor(path), Step("machine-set", {"kernel": str(tmp_path / "absent")}), Step("accel-set"))

    async def run() -> None:
        async with machine(Start(Recipe("of this test", steps)), path) as running:
            await running.ended.wait()

    with pytest.raises(BaseExceptionGroup) as caught:
        await run()
    (error,) = leaves(caught.value)
    assert isinstance(error, RecipeInvalid)
    assert str(error) == (
        f"Recipe of this test, command 3 (machine-set): Cannot read {tmp_path}/absent: No such file or directory"
    )
    assert sockets_in(tmp_path) == []


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Step("no-such"), "There is no command 'no-such'; query-commands lists those there are"),
        (
            Step("accel-set"),
            "Command 'accel-set' needs may-open-kvm, which phase boot/precreate does not grant; "
            "phases that grant it: accel (reached by machine-set)",
        ),
        (
            Step("machine-set", {"colour": "red"}),
            "Command 'machine-set': 'colour' is unexpected; there are 'type', 'name', 'uuid', 'memory', "
            "'memory-backend', 'smp', 'kernel', 'initrd', 'append', 'serial', 'reboot-action', 'boot', and 5 more",
        ),
    ],
    ids=["unknown", "too early", "wrong argument"],
)
async def test_a_start_recipe_that_cannot_be_names_the_command_and_why(tmp_path: Path, step: Step, text: str) -> None:
    async def run() -> None:
        async with machine(Start(Recipe("of this test", (step,))), tmp_path / "qmp") as running:
            await running.ended.wait()

    with pytest.raises(BaseExceptionGroup) as caught:
        await run()
    assert [str(error) for error in leaves(caught.value)] == [
        f"Recipe of this test, command 1 ({step.execute}): {text}"
    ]


async def test_clients_are_told_of_the_end_when_the_start_fails(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        monitor_on = Step("object-add", {"qom-type": "monitor-qmp", "id": "fd", "fd": theirs.detach()})

        async def run() -> None:
            steps = (monitor_on, *monitor(tmp_path / "qmp"), Step("machine-set", {"type": "q35"}))
            async with machine(Start(Recipe("of this test", steps)), tmp_path / "qmp") as running:
                await running.ended.wait()

        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
            await stream.send_all(b'{"execute": "qmp_capabilities"}{"execute": "cont"}')
            with pytest.raises(BaseExceptionGroup):
                await run()
            received = b"".join([data async for data in stream])
    messages = [json.loads(line) for line in received.splitlines()]
    assert messages[1] == {"return": {}}
    (error,) = (message["error"] for message in messages if "error" in message)
    assert error == {"class": "GenericError", "desc": "Command 'cont' was cut short because its phase ended"}
    last = [message for message in messages if "event" in message][-1]
    assert (last["event"], last["data"]) == ("SHUTDOWN", {"guest": False, "reason": "host-error"})


def test_a_process_whose_start_fails_says_why_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    command = [sys.executable, "-m", "vmm", "run", "-qmp", f"unix:{path}", "-kernel", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "trio-vmm: Recipe of the command line, command 4 (machine-set): "
        f"Cannot read {tmp_path}/absent: No such file or directory\n"
    )
    assert sockets_in(tmp_path) == []


async def test_two_machines_live_in_one_process(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    async with bare(one) as (_, first), bare(two) as (_, second):
        await advance(first, "running")
        await first.execute("cont")
        assert await where(second) == PATHS["precreate"]
        await advance(second, "devices")
        await first.execute("quit")
        await second.execute("cont")
        assert (await second.execute("query-status"))["running"]
    assert sockets_in(one) == sockets_in(two) == []


def test_go_on_is_what_s_decides() -> None:
    assert start_of("-preconfig").after_preconfig == GoOn(start=True)
    assert start_of("-preconfig", "-S").after_preconfig == GoOn(start=False)
    assert start_of("-S").after_preconfig is None
