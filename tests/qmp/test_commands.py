"""Every command against the real process: what it does when all is right, and what it says when it is not.

A scenario is a list of steps in the order in which a client could send them. The last test walks the catalog: a command
that no scenario answers with success and with an error is a failure.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any, final

import attrs
import pytest

from tests.qmp.kit import HALT, Machine, flat_guest, machine
from vmm.migration.capability_table import SUPPORTED
from vmm.phases.catalog import COMMANDS
from vmm.qmp_client import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GENERIC = "GenericError"
ANY: Callable[[Any], bool] = lambda value: True  # noqa: E731
EMPTY: Callable[[Any], bool] = lambda value: bool(value == {})  # noqa: E731
NONE_TAKEN = "'x' is unexpected; there are none"
PHASE = "/".join(("boot", "precreate", "accel", "backends", "preconfig", "devices", "running"))


@final
@attrs.frozen
class Step:
    """One command, and either what its reply must fulfil, or the error's class and words."""

    name: str
    arguments: dict[str, Any] = attrs.Factory(dict)
    ok: Callable[[Any], bool] | None = None
    error: tuple[str, str] | None = None


def good(name: str, ok: Callable[[Any], bool] = EMPTY, /, **arguments: Any) -> Step:
    """Make a step that succeeds."""
    return Step(name, _wire(arguments), ok=ok)


def bad(name: str, desc: str, kind: str = GENERIC, /, **arguments: Any) -> Step:
    """Make a step that fails."""
    return Step(name, _wire(arguments), error=(kind, desc))


def wrong(name: str, faults: str, /, **arguments: Any) -> Step:
    """Make a step whose arguments don't fit."""
    return bad(name, f"Command {name!r}: {faults}", **arguments)


def _wire(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in arguments.items()}


def lacks(name: str, token: str, phase: str, ways: str, **arguments: Any) -> Step:
    """Make a step that is refused for want of a token."""
    text = f"Command {name!r} needs {token}, which phase {phase} does not grant; phases that grant it: {ways}"
    return bad(name, text, **arguments)


NULL = {"type": "null", "data": {}}


def unix(path: Path) -> dict[str, Any]:
    return {
        "type": "socket",
        "data": {"addr": {"type": "unix", "data": {"path": str(path)}}, "server": True, "wait": False},
    }


def channel(kind: str, path: Path) -> dict[str, Any]:
    return {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": str(path)}}


PRE = "boot/precreate"

QUERIES = [
    good("query-version", lambda v: set(v) == {"qemu", "package"} and v["package"].startswith("trio-vmm ")),
    wrong("query-version", NONE_TAKEN, x=1),
    good("query-commands", lambda v: {"name": "quit"} in v),
    good("query-commands", lambda v: {"name", "tokens", "phases", "admitted", "noted"} == set(v[0]), extended=True),
    wrong("query-commands", "'extended' must be a boolean, not 1", extended=1),
    good("query-qmp-schema", lambda v: len(v) > 50),
    wrong("query-qmp-schema", NONE_TAKEN, x=1),
    wrong("query-name", NONE_TAKEN, x=1),
    wrong("query-uuid", NONE_TAKEN, x=1),
    wrong("query-status", NONE_TAKEN, x=1),
    wrong("query-machine-phase", NONE_TAKEN, x=1),
    good("query-nursery-tree", lambda v: v["path"] == "boot" and v["children"][0]["path"] == PRE),
    wrong("query-nursery-tree", NONE_TAKEN, x=1),
    wrong("query-fdsets", NONE_TAKEN, x=1),
    wrong("query-chardev", NONE_TAKEN, x=1),
    wrong("query-monitors", NONE_TAKEN, x=1),
    good("query-monitors", lambda v: len(v) >= 2),
    wrong("query-cpus-fast", NONE_TAKEN, x=1),
    good("query-cpu-definitions", lambda v: {model["name"] for model in v} == {"host", "max", "base"}),
    wrong("query-cpu-definitions", NONE_TAKEN, x=1),
    good("query-target", lambda v: v == {"arch": "x86_64"}),
    good("query-kvm", lambda v: v["present"] is True),
    good("query-machines", lambda v: v[0]["name"] == "microvm" and "compat-props" not in v[0]),
    good("query-machines", lambda v: v[0]["compat-props"] == [], compat_props=True),
    wrong("query-machines", "'compat-props' must be a boolean, not 1", compat_props=1),
    *(
        wrong(name, NONE_TAKEN, x=1)
        for name in (
            "query-target",
            "query-kvm",
            "query-accelerators",
            "query-current-machine",
            "query-memory-size-summary",
            "query-hotpluggable-cpus",
        )
    ),
    wrong("query-cpu-model-expansion", "'type' is missing; 'model' is missing"),
    wrong("query-migrate", NONE_TAKEN, x=1),
    wrong("query-migrate-capabilities", NONE_TAKEN, x=1),
    wrong("query-migrate-parameters", NONE_TAKEN, x=1),
    good("migrate_cancel"),
    wrong("migrate_cancel", NONE_TAKEN, x=1),
    good(
        "device-list-properties", lambda v: {"name": "rng", "type": "str"} in v, typename="virtio-rng-device",
    ),
    wrong("device-list-properties", "'typename' is missing"),
    bad(
        "device-list-properties", "Device type 'x' does not exist; there are: virtio-rng-device", "DeviceNotFound",
        typename="x",
    ),
    good("query-vcpu-dirty-limit", lambda v: v == []),
    wrong("query-vcpu-dirty-limit", NONE_TAKEN, x=1),
    good("query-dirty-rate", lambda v: v["status"] == "unstarted" and v["mode"] == "page-sampling"),
    wrong("query-dirty-rate", "'calc-time-unit' does not accept \"hour\"; it accepts 'second', 'millisecond'",
          calc_time_unit="hour"),
    good("query-jobs", lambda v: v == []),
    wrong("query-jobs", NONE_TAKEN, x=1),
    bad("job-cancel", "Job 'j' does not exist; there are: none", id="j"),
    wrong("job-cancel", "'id' is missing"),
    bad("job-dismiss", "Job 'j' does not exist; there are: none", id="j"),
    wrong("job-dismiss", "'id' must be a string, not 1", id=1),
]  # fmt: skip


def precreate(directory: Path) -> list[Step]:
    """What can be done before there is a machine."""
    return [
        *QUERIES,
        good("query-name", EMPTY),
        good("query-uuid", lambda v: v == {"UUID": "00000000-0000-0000-0000-000000000000"}),
        good("query-status", lambda v: v == {"running": False, "status": "prelaunch"}),
        good("query-machine-phase", lambda v: v == {"phase": "no-machine", "path": PRE}),
        bad("query-cpus-fast", "The machine is not there before phase devices", "DeviceNotActive"),
        bad("query-accelerators", "The accelerator is not there before phase backends", "DeviceNotActive"),
        *(
            bad(name, "The machine's definition is not there before phase accel", "DeviceNotActive")
            for name in ("query-current-machine", "query-memory-size-summary", "query-hotpluggable-cpus")
        ),
        good("query-kvm", lambda v: v["enabled"] is False),
        good("query-fdsets", lambda v: v == []),
        # Chardevs and monitors.
        good("chardev-add", EMPTY, id="a", backend=NULL),
        good("chardev-add", lambda v: v["pty"].startswith("/dev/pts/"), id="b", backend={"type": "pty", "data": {}}),
        bad("chardev-add", "Chardev 'a' exists already; choose another name", id="a", backend=NULL),
        wrong("chardev-add", "'id' is missing; 'backend' is missing"),
        wrong(
            "chardev-add", "'backend.type' does not accept \"vc\"; "
            "it accepts 'file', 'null', 'pipe', 'pty', 'socket', 'stdio'", id="c", backend={"type": "vc"},
        ),
        bad(
            "chardev-add", f"Cannot write {directory}/none/f: No such file or directory",
            id="c", backend={"type": "file", "data": {"out": f"{directory}/none/f"}},
        ),
        good(
            "query-chardev",
            lambda v: {"label": "a", "filename": "null", "frontend-open": False} in v
            and {"label": "compat_monitor0", "filename": f"disconnected:unix:{directory}/qmp,server=on",
                 "frontend-open": True} in v,
        ),
        good("chardev-remove", EMPTY, id="b"),
        bad(
            "chardev-remove", "Chardev 'b' does not exist; there are: a, compat_monitor0", id="b",
        ),
        bad(
            "chardev-remove", "Chardev 'compat_monitor0' is in use by monitor qmp_compat_monitor0",
            id="compat_monitor0",
        ),
        wrong("chardev-remove", "'id' is missing"),
        good("chardev-add", EMPTY, id="m", backend=unix(directory / "m")),
        good("object-add", EMPTY, qom_type="monitor-qmp", id="q", chardev="m"),
        bad(
            "object-add", "Monitor 'q' exists already; choose another name",
            qom_type="monitor-qmp", id="q", chardev="m",
        ),
        bad("object-add", "Chardev 'm' is in use by monitor q", qom_type="monitor-qmp", id="r", chardev="m"),
        bad(
            "object-add", "Monitor over a chardev of kind 'null' is not supported here; "
            "a monitor needs a chardev of kind socket or stdio", qom_type="monitor-qmp", id="r", chardev="a",
        ),
        wrong(
            "object-add", "'qom-type' does not accept \"rng\"; "
            "it accepts 'memory-backend-file', 'memory-backend-memfd', 'monitor-qmp', 'monitor-websocket', 'qtest', "
            "'rng-builtin', 'rng-random', 'snapshot-directory', 'tls-creds-x509'",
            qom_type="rng", id="r",
        ),
        bad(
            "object-add", "object-add: 'r' is not complete: a monitor-qmp needs chardev or fd",
            qom_type="monitor-qmp", id="r",
        ),
        bad(
            "object-add", "Cannot read /nowhere/ca-cert.pem: No such file or directory",
            qom_type="tls-creds-x509", id="t", dir="/nowhere",
        ),
        wrong("object-add", "'qom-type' is missing; 'id' is missing"),
        good("object-del", EMPTY, id="q"),
        good("chardev-remove", EMPTY, id="m"),
        bad(
            "object-del", "Object 'q' does not exist; there are: compat_monitor1, qmp_compat_monitor0",
            id="q",
        ),
        bad("object-del", "Monitor 'compat_monitor1' is in use by this session; use another one", id="compat_monitor1"),
        wrong("object-del", "'id' is missing"),
        # Descriptors: the good cases are in test_protocol, which can send some.
        wrong("getfd", "'fdname' is missing"),
        bad("getfd", "getfd: fdname '1' must not be empty or begin with a digit", fdname="1"),
        wrong("closefd", "'fdname' is missing"),
        wrong("add-fd", "'fdset-id' must be an integer, not \"x\"", fdset_id="x"),
        wrong("remove-fd", "'fdset-id' is missing"),
        bad("remove-fd", "Descriptor set 1 has no descriptors; query-fdsets lists what there is", fdset_id=1),
        # Migration.
        good("query-migrate", EMPTY),
        good("query-migrate-capabilities", lambda v: len(v) == 21 and all(not entry["state"] for entry in v)),
        good("migrate-set-capabilities", EMPTY, capabilities=[{"capability": "events", "state": True}]),
        good("query-migrate-capabilities", lambda v: {"capability": "events", "state": True} in v),
        wrong("migrate-set-capabilities", "'capabilities' is missing"),
        bad(
            "migrate-set-capabilities",
            "Migration capability 'xbzrle' is not supported here; "
            f"leave it off (those that can be on: {', '.join(sorted(SUPPORTED))})",
            capabilities=[{"capability": "events", "state": False}, {"capability": "xbzrle", "state": True}],
        ),
        good("query-migrate-capabilities", lambda v: {"capability": "events", "state": True} in v),
        good("query-migrate-parameters", lambda v: v["mode"] == "normal" and v["downtime-limit"] == 300),
        good("migrate-set-parameters", EMPTY, downtime_limit=20),
        good("query-migrate-parameters", lambda v: v["downtime-limit"] == 20),
        wrong("migrate-set-parameters", "'downtime-limit' must be an integer, not \"x\"", downtime_limit="x"),
        bad(
            "migrate-set-parameters",
            "Migration parameter downtime-limit: 2000001 is not an integer from 0 to 2000000 ms",
            downtime_limit=2000001,
        ),
        wrong("migrate-incoming", "'channels' must be an array, not \"x\"", channels="x"),
        bad(
            "migrate-incoming",
            "migrate-incoming needs either 'uri' or 'channels'; neither was given",
        ),
        good("query-differences", lambda v: v == []),
        wrong("query-differences", NONE_TAKEN, x=1),
        good("x-allow-difference", EMPTY, names=["machine-set.append"]),
        bad(
            "x-allow-difference",
            "x-allow-difference: 'machine-set.smp' is not a difference that can be: the guest's state has its shape",
            names=["machine-set.smp"],
        ),
        good("x-allow-resource", EMPTY, name="kernel", path="/boot/vmlinuz"),
        wrong("x-allow-resource", "'name' is missing"),
        bad(
            "x-cpr-abandon",
            "x-cpr-abandon is not possible when no CPR channel is awaited; query-migrate says what is under way",
        ),
        lacks("x-cpr-check", "may-start-migration", PRE, "running (reached by finish-machine-init or cont)"),
        lacks("x-cpr-undo", "may-start-migration", PRE, "running (reached by finish-machine-init or cont)"),
        lacks("x-cpr-forget", "may-start-migration", PRE, "running (reached by finish-machine-init or cont)"),
        lacks("migrate", "may-start-migration", PRE, "running (reached by finish-machine-init or cont)"),
        # Running something that is not there.
        lacks(
            "stop", "may-run-vcpus", PRE, "preconfig (reached by accel-set), devices (reached by cpu-model-set or "
            "x-exit-preconfig), incoming (reached by an incoming migration), "
            "running (reached by finish-machine-init or cont)",
        ),
        lacks("accel-set", "may-open-kvm", PRE, "accel (reached by machine-set)"),
        # A machine that cannot be leaves all as it was.
        bad("machine-set", "smp.cpus: 9 is not a number of vCPUs from 1 to 8", smp={"cpus": 9}),
        wrong("machine-set", "'memory.size' must be an integer, not \"x\"", memory={"size": "x"}),
        wrong("x-exit-precreate", NONE_TAKEN, x=1),
        good("query-machine-phase", lambda v: v == {"phase": "no-machine", "path": PRE}),
        wrong("quit", NONE_TAKEN, x=1),
    ]  # fmt: skip


def built(kernel: str) -> list[Step]:
    """A machine made over the monitor, one decision at a time."""
    stands = "system_reset is not possible before the machine is ready; finish-machine-init or cont makes it ready"
    return [
        good("chardev-add", EMPTY, id="s", backend=NULL),
        good(
            "machine-set", EMPTY, kernel=kernel, memory={"size": 2 << 20}, smp={"cpus": 2}, serial=["s"], name="n",
            uuid="6ba7b810-9dad-11d1-80b4-00c04fd430c8",
        ),
        good("query-name", lambda v: v == {"name": "n"}),
        good("query-uuid", lambda v: v == {"UUID": "6ba7b810-9dad-11d1-80b4-00c04fd430c8"}),
        good("query-machine-phase", lambda v: v["phase"] == "machine-created"),
        good("query-memory-size-summary", lambda v: v == {"base-memory": 2 << 20, "plugged-memory": 0}),
        good("query-current-machine", lambda v: v == {"wakeup-suspend-support": False}),
        good(
            "query-hotpluggable-cpus",
            lambda v: v[1]
            == {"type": "host-x86_64-cpu", "vcpus-count": 1, "qom-path": "/machine/unattached/device[0]",
                "props": {"socket-id": 0, "core-id": 0, "thread-id": 0}},
        ),
        wrong("accel-set", "'accel' must be a string, not 1", accel=1),
        bad(
            "accel-set", "dirty-ring-size: 5 is not a power of two from 1024 to 65536, or 0", dirty_ring_size=5,
        ),
        bad("accel-set", "Accelerator 'tcg' is not supported here; there are kvm, and qtest for tests", accel="tcg"),
        good("accel-set", EMPTY, accel="kvm"),
        good("query-accelerators", lambda v: v == {"enabled": "kvm", "present": ["kvm", "qtest"]}),
        good("query-kvm", lambda v: v == {"enabled": True, "present": True}),
        good("query-machine-phase", lambda v: v["phase"] == "accel-created" and v["path"].endswith("/preconfig")),
        good("stop"),
        bad("system_reset", stands),
        wrong("x-exit-preconfig", NONE_TAKEN, x=1),
        wrong("cpu-model-set", "'model' must be a string, not 1", model=1),
        bad(
            "cpu-model-set", "CPU model 'qemu64' is not supported here; use host, which is all that this host's KVM "
            "offers, or base with the features that props names", model="qemu64",
        ),
        good("query-cpu-model-expansion", lambda v: v["model"]["props"]["x2apic"], type="full", model={"name": "max"}),
        good("set-numa-node", EMPTY, type="node", mem=2 << 20),
        wrong("set-numa-node", "'src' is missing; 'dst' is missing; 'val' is missing", type="dist"),
        good("cpu-model-set", EMPTY, model="host"),
        good("query-machine-phase", lambda v: v["phase"] == "machine-initialized" and v["path"].endswith("/devices")),
        good("query-cpus-fast", lambda v: [cpu["thread-id"] for cpu in v] == [0, 0]),
        bad("system_reset", stands),
        wrong("finish-machine-init", NONE_TAKEN, x=1),
        good("finish-machine-init"),
        good("query-machine-phase", lambda v: v == {"phase": "machine-ready", "path": PHASE}),
        good("query-status", lambda v: v == {"running": False, "status": "prelaunch"}),
        *running(),
        good("quit"),
    ]  # fmt: skip


def running() -> list[Step]:
    """What can be done with a guest."""
    return [
        wrong("cont", NONE_TAKEN, x=1),
        good("cont"),
        good("cont"),
        good("query-status", lambda v: v == {"running": True, "status": "running"}),
        good(
            "query-cpus-fast",
            lambda v: [cpu["cpu-index"] for cpu in v] == [0, 1]
            and v[1]["props"].items() >= {"socket-id": 0, "core-id": 1, "thread-id": 0}.items()
            and v[0]["target"] == "x86_64",
        ),
        wrong("stop", NONE_TAKEN, x=1),
        good("stop"),
        good("stop"),
        good("query-status", lambda v: v == {"running": False, "status": "paused"}),
        wrong("system_reset", NONE_TAKEN, x=1),
        good("system_reset"),
        good("cont"),
        good("system_reset"),
        good("query-status", lambda v: v == {"running": True, "status": "running"}),
        bad("chardev-remove", "Chardev 's' is in use by COM1", id="s"),
        good("chardev-add", EMPTY, id="late", backend=NULL),
        good("chardev-remove", EMPTY, id="late"),
        wrong("netdev_add", "'type' does not accept \"user\"; it accepts 'tap'", type="user", id="n"),
        bad(
            "netdev_add", "Member of netdev_add 'vhost=true' is not supported here; "
            "leave it out, or say false: set the interface up beforehand", type="tap", id="n", ifname="n", vhost=True,
        ),
        bad("netdev_add", "netdev_add: 'n' is not complete: a tap needs ifname or fd", type="tap", id="n"),
        bad(
            "netdev_add", "ifname: '0123456789abcdef' is not the name of an interface: "
            "1 to 15 bytes without '/', ':', '%' and spaces", type="tap", id="n", ifname="0123456789abcdef",
        ),
        bad("netdev_del", "Netdev 'n' does not exist; there are: none", "DeviceNotFound", id="n"),
        wrong("netdev_del", "'id' is missing"),
        good("device_add", EMPTY, driver="virtio-rng-device", id="d"),
        good("device_del", EMPTY, id="d"),
        wrong("device_add", "'driver' is missing"),
        wrong("device_del", "'id' is missing"),
        bad("device_del", "Device 'd' does not exist; there are: none", "DeviceNotFound", id="d"),
        good("set-vcpu-dirty-limit", EMPTY, dirty_rate=100),
        good("query-vcpu-dirty-limit", lambda v: [cpu["limit-rate"] for cpu in v] == [100, 100]),
        wrong("set-vcpu-dirty-limit", "'dirty-rate' is missing"),
        bad(
            "set-vcpu-dirty-limit", "vCPU '7' does not exist; there are: 0, 1", "DeviceNotFound", dirty_rate=1,
            cpu_index=7,
        ),
        good("cancel-vcpu-dirty-limit", EMPTY),
        wrong("cancel-vcpu-dirty-limit", "'cpu-index' must be an integer, not \"x\"", cpu_index="x"),
        good("calc-dirty-rate", EMPTY, calc_time=50, calc_time_unit="millisecond"),
        bad("calc-dirty-rate", "calc-time: '0 ms' is not from 50 ms to 60 s", calc_time=0),
        wrong("calc-dirty-rate", "'calc-time' is missing"),
        good("migrate_cancel"),
        lacks(
            "migrate-continue", "may-switch-over", PHASE,
            "migrating (reached by migrate)",
        ),
        *(
            lacks(
                command, "may-steer-postcopy", PHASE,
                "migrating (reached by migrate), postcopy (reached by migrate-start-postcopy)", **arguments,
            )
            for command, arguments in (
                ("migrate-start-postcopy", {}), ("migrate-pause", {}), ("migrate-recover", {"uri": "tcp:127.0.0.1:0"}),
            )
        ),
        wrong("migrate", "'resume' must be a boolean, not 1", resume=1),
        bad(
            "migrate", "Cannot connect to /x: No such file or directory", uri="unix:/x",
        ),
        bad("loadvm", "Cannot read /x: No such file or directory", name="/x"),
        *(
            bad(
                f"snapshot-{what}", "Snapshot directory 'v' does not exist; there are: none", job_id="j", tag="t",
                vmstate="v", devices=[],
            )
            for what in ("save", "load")
        ),
        bad(
            "snapshot-delete", "Snapshot directory 'v' does not exist; there are: none", job_id="j", tag="t",
            devices=["v"],
        ),
        wrong("snapshot-delete", "'devices' is missing", job_id="j", tag="t"),
        good("x-query-snapshots", lambda v: v == []),
        wrong("x-query-snapshots", NONE_TAKEN, x=1),
        lacks(
            "machine-set", "may-configure-machine:machine", PHASE, "precreate (reached by a start without a machine)",
        ),
        lacks(
            "migrate-incoming", "may-listen", PHASE,
            "precreate (reached by a start without a machine), preconfig (reached by accel-set), "
            "devices (reached by cpu-model-set or x-exit-preconfig), incoming (reached by an incoming migration)",
        ),
    ]  # fmt: skip


def by_default() -> list[Step]:
    """The shortest way to a machine: with all defaults."""
    return [
        good("x-exit-precreate"),
        good("query-machine-phase", lambda v: v["path"].endswith("/accel")),
        good("accel-set"),
        good("x-exit-preconfig"),
        good("query-machine-phase", lambda v: v["path"].endswith("/devices")),
    ]


async def carry_out(m: Machine, steps: list[Step]) -> None:
    """Send the steps one after another, and check each reply."""
    for step in steps:
        answer: tuple[str, str] | None = None
        result = None
        try:
            result = await m.qmp.execute(step.name, **step.arguments)
        except CommandFailed as error:
            answer = (error.error_class, error.desc)
        assert step.error == answer, (step, answer or result)
        assert step.ok is None or step.ok(result), (step, result)


async def test_before_there_is_a_machine(tmp_path: Path) -> None:
    async with machine(tmp_path) as m:
        await carry_out(m, precreate(tmp_path))


@pytest.mark.kvm
async def test_a_machine_is_built_over_the_monitor_and_run(tmp_path: Path) -> None:
    kernel = flat_guest(tmp_path, HALT)
    async with machine(tmp_path) as m:
        await carry_out(m, built(kernel))
        assert (await m.ended()).status == 0


@pytest.mark.kvm
async def test_a_machine_of_defaults(tmp_path: Path) -> None:
    async with machine(tmp_path) as m:
        await carry_out(m, by_default())


@pytest.mark.kvm
async def test_a_guest_is_handed_over_by_migrate_and_migrate_incoming(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    channels = [channel("main", tmp_path / "main"), channel("cpr", tmp_path / "cpr")]
    kernel = ("-kernel", flat_guest(tmp_path, HALT), "-m", "2", "-serial", "null")
    async with machine(old, *kernel) as source:
        await source.until_running()
        # The source's own socket is old/qmp, and goes over with its listener.
        async with machine(new, chardev="own") as heir:
            events = [{"capability": "events", "state": True}]
            await heir.qmp.execute("migrate-set-capabilities", capabilities=events)
            await heir.qmp.execute("migrate-incoming", channels=channels)
            addresses = (await heir.qmp.execute("query-migrate"))["socket-address"]
            assert [address["path"] for address in addresses] == [str(tmp_path / "main"), str(tmp_path / "cpr")]
            await source.qmp.execute("migrate-set-parameters", mode="cpr-transfer")
            await source.qmp.execute("migrate", channels=channels)
            await heir.event("RESUME")
            assert (await heir.qmp.execute("query-status"))["running"]
            # The guest comes first.
            await heir.event("MIGRATION", lambda data: data["status"] == "completed")
            assert (await heir.qmp.execute("query-migrate"))["status"] == "completed"
            await source.until_phase("postmigrate")
            assert (await source.quit()).status == 0
            async with heir.session() as session:
                assert (await session.execute("query-status"))["running"]
            heir.process.send_signal(signal.SIGTERM)
            assert (await heir.ended()).status == 0
    assert not {"main", "cpr"} & set(os.listdir(tmp_path))


def test_every_command_has_a_good_and_a_bad_step(tmp_path: Path) -> None:
    steps = [*precreate(tmp_path), *built("k"), *by_default()]
    answered = {step.name for step in steps if step.ok is not None}
    refused = {step.name for step in steps if step.error is not None}
    # The first four need descriptors (test_protocol), the others a migration (above, and test_migration_jobs).
    elsewhere = {"getfd", "closefd", "add-fd", "remove-fd", "migrate", "migrate-incoming", "job-cancel", "job-dismiss"}
    # These succeed where there is a second process, or a file from one (tests/phases/test_overrides, test_copying,
    # test_switchover, test_postcopy, test_kept_process).
    elsewhere |= {"x-cpr-check", "x-cpr-abandon", "x-cpr-undo", "x-cpr-forget", "loadvm"}
    elsewhere |= {"migrate-continue", "migrate-start-postcopy", "migrate-pause", "migrate-recover"}
    # And these with a tap (tests/phases/test_netdev).
    elsewhere |= {"netdev_add", "netdev_del"}
    # And these in a machine that runs (tests/phases/test_snapshots).
    elsewhere |= {"snapshot-save", "snapshot-load", "snapshot-delete"}
    names = {command.name for command in COMMANDS}
    assert names - answered - elsewhere == set()
    assert names - refused == set()
    assert answered | refused == names
