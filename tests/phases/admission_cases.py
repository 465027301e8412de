"""What clients send: every command with arguments that are right, and some that are wrong, and what comes of it.

A case says nothing about admission, which is the model's. It says what an admitted command does to the machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import attrs

from tests.phases.admission_rig import MEMORY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@final
@attrs.define
class State:
    """What a client who has seen everything knows of the machine."""

    phase: str = "precreate"
    """`ended` once it has."""
    awaits: bool = False
    """Whether a live update is awaited; what would make a machine is noted meanwhile."""
    noted: bool = False
    """Whether something was."""
    streams: bool = False
    """Whether a guest is awaited that is copied: into the machine that is made here, or that comes with it."""
    goes_back: bool = False
    """Whether the guest was copied elsewhere, and may run here again."""
    reserved: bool = False
    """Whether an incoming recipe has the machine."""
    stage: str = ""
    """What a live update's destination has done last."""
    boots: bool = True
    """Whether the machine has a kernel."""
    mode: str = "normal"
    nodes: int = 0
    """How many NUMA nodes there are, each with `MEMORY` bytes."""
    qtest: bool = False
    """Whether the accelerator executes nothing."""
    rngs: set[str] = attrs.Factory(set)
    memories: set[str] = attrs.Factory(set)
    devices: set[str] = attrs.Factory(set)
    """`d1` uses `r0`."""
    chardevs: set[str] = attrs.Factory(set)
    fdsets: set[int] = attrs.Factory(set)
    names: dict[str, set[str]] = attrs.Factory(dict)
    """Named descriptors of each session."""
    unclaimed: set[str] = attrs.Factory(set)
    """The sessions that have sent a descriptor which no command has taken yet: the next one that wants one does."""

    @property
    def traits(self) -> set[str]:
        """Return what of the machine decides on some tokens."""
        copied = self.goes_back if self.phase == "postmigrate" else self.streams
        copying = self.stage == "copying"
        names = {"copied": copied, "copying": copying, "updated": bool(self.stage) and not copying}
        return {name for name, is_so in names.items() if is_so}

    @property
    def memory(self) -> int:
        """How much the machine has: as we define it, or by default."""
        return MEMORY if self.boots else 128 << 20

    def named(self, grant: str) -> set[str]:
        """Return the names of the descriptors that the session with `grant` has."""
        return self.names.setdefault(grant, set())


def _complete(state: State, grant: str) -> bool:
    return state.nodes * MEMORY in (0, state.memory)


def _always(state: State, grant: str) -> bool:
    return True


def _never(state: State, grant: str) -> bool:
    return False


def _nothing(state: State, grant: str) -> None:
    return None


@final
@attrs.frozen(eq=False)
class Case:
    """A command with arguments. `@main` and the like stand for paths; see `Machine.arguments`."""

    command: str
    arguments: Mapping[str, Any] = attrs.Factory(dict)
    works: Callable[[State, str], bool | None] = _always
    """Whether it succeeds, once admitted; None where that depends on the guest."""
    then: Callable[[State, str], None] = _nothing
    sends_fd: bool = False
    claims_fd: bool = False
    """Whether it takes a descriptor, also if it fails afterwards."""
    well_formed: bool | None = None
    """Whether the arguments have the right form, though they may be impossible; None if `works` says it."""

    @property
    def can_be_noted(self) -> bool:
        """Whether it is noted where it cannot be carried out yet."""
        return self.works is not _never if self.well_formed is None else self.well_formed

    def __repr__(self) -> str:
        return f"{self.command} {dict(self.arguments)}{' and a descriptor' if self.sends_fd else ''}"


def _to(phase: str, **changes: Any) -> Callable[[State, str], None]:
    def change(state: State, grant: str) -> None:
        state.phase = phase
        for name, value in changes.items():
            setattr(state, name, value)

    return change


def _channels(main: str, cpr: str) -> dict[str, Any]:
    return {
        "channels": [
            {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": path}}
            for kind, path in (("main", main), ("cpr", cpr))
        ]
    }


def _mode(state: State, grant: str) -> None:
    state.mode = "cpr-transfer"


def _cancel(state: State, grant: str) -> None:
    if state.phase == "migrating" or state.stage == "loading":
        _to("running", stage="")(state, grant)


def _await(state: State, grant: str) -> None:
    state.awaits = True


def _abandon(state: State, grant: str) -> None:
    state.awaits = state.noted = False


def _qtest(state: State, grant: str) -> None:
    state.phase, state.qtest = "preconfig", True


def _node(state: State, grant: str) -> None:
    state.nodes += 1


def _can_run(state: State, grant: str) -> bool | None:
    if state.phase in ("preconfig", "devices"):
        return _complete(state, grant)
    return True if state.boots else None


def _finish(state: State, grant: str) -> None:
    state.phase = "incoming" if state.streams else "running"


def _cont(state: State, grant: str) -> None:
    if state.phase in ("preconfig", "devices"):
        _finish(state, grant)
    elif state.phase == "postmigrate":
        state.phase, state.goes_back = "running", False


def _stream(state: State, grant: str) -> None:
    state.streams = True
    if state.phase in ("preconfig", "devices"):
        state.phase = "incoming"


def _can_stream(state: State, grant: str) -> bool:
    return not state.awaits and not state.streams and (state.phase == "precreate" or _complete(state, grant))


def _can_copy(state: State, grant: str) -> bool:
    return state.mode == "normal"


def _save(state: State, grant: str) -> None:
    state.phase, state.goes_back = "postmigrate", True


DEFINITION: Final = {"memory": {"size": MEMORY}, "kernel": "builtin:heartbeat", "append": "region=64K pages=1"}
_NULL: Final = {"type": "null", "data": {}}

_QUERIES: Final = (
    "query-version", "query-commands", "query-qmp-schema", "query-name", "query-uuid", "query-machine-phase",
    "query-nursery-tree", "query-fdsets", "query-chardev", "query-monitors", "query-status",
    "query-migrate-capabilities", "query-migrate-parameters", "query-migrate", "query-differences", "query-kvm",
    "query-machines", "query-target", "query-jobs", "query-dirty-rate", "query-vcpu-dirty-limit",
    "x-query-snapshots",
)  # fmt: skip
_PLAIN: Final = (
    *_QUERIES, "query-cpus-fast", "query-cpu-definitions", "x-cpr-abandon",
    "x-exit-precreate", "x-exit-preconfig", "finish-machine-init", "cont", "stop",
    "system_reset", "migrate_cancel", "quit",
)  # fmt: skip
"""Commands without arguments."""


def _has_fd(state: State, grant: str) -> bool:
    return grant in state.unclaimed


def _can_plug(name: str) -> Callable[[State, str], bool]:
    return lambda state, grant: name not in state.devices and (name != "d1" or "r0" in state.rngs)


def _plugged(name: str) -> Callable[[State, str], bool]:
    return lambda state, grant: name in state.devices


def _plug(name: str) -> Callable[[State, str], None]:
    return lambda state, grant: state.devices.add(name)


def _unplug(name: str) -> Callable[[State, str], None]:
    return lambda state, grant: state.devices.discard(name)


def _is_new(name: str) -> Callable[[State, str], bool]:
    return lambda state, grant: name not in state.chardevs


def _added(name: str) -> Callable[[State, str], None]:
    return lambda state, grant: state.chardevs.add(name)


def _has_kvm(state: State, grant: str) -> bool | None:
    if state.qtest:
        return None
    return state.phase == "preconfig" or _built(state, grant)


def _built(state: State, grant: str) -> bool:
    return state.phase in ("devices", "incoming", "running", "migrating", "quiesced", "handover", "postmigrate")


CASES: Final = (
    *(Case(name) for name in _QUERIES),
    Case("query-cpus-fast", works=_built),
    *(
        Case(name, works=lambda state, grant: state.phase != "precreate")
        for name in ("query-current-machine", "query-hotpluggable-cpus", "query-memory-size-summary")
    ),
    Case("query-accelerators", works=lambda state, grant: state.phase not in ("precreate", "accel")),
    Case("query-cpu-definitions"),
    Case("query-cpu-model-expansion", {"type": "full", "model": {"name": "host"}}, _has_kvm),
    Case("query-cpu-model-expansion", {"type": "full"}, _never),
    *(Case(name, {"colour": "red"}, _never) for name in _PLAIN),
    # Descriptors.
    *(
        Case(
            "getfd", {"fdname": "a"}, _has_fd, lambda state, grant: state.named(grant).add("a"), sends_fd=sends,
            claims_fd=True,
        )
        for sends in (True, False)
    ),
    Case("getfd", {"fdname": "1"}, _never, sends_fd=True),
    Case("getfd", {}, _never),
    Case(
        "closefd", {"fdname": "a"}, lambda state, grant: "a" in state.named(grant),
        lambda state, grant: state.named(grant).discard("a"),
    ),
    *(
        Case(
            "add-fd", {"fdset-id": 1}, _has_fd, lambda state, grant: state.fdsets.add(1), sends_fd=sends, claims_fd=True
        )
        for sends in (True, False)
    ),
    Case("add-fd", {"fdset-id": -1}, _never, sends_fd=True, claims_fd=True),
    Case(
        "remove-fd", {"fdset-id": 1}, lambda state, grant: 1 in state.fdsets,
        lambda state, grant: state.fdsets.discard(1),
    ),
    Case("remove-fd", {}, _never),
    # Back ends.
    *(
        Case(
            "chardev-add", {"id": name, "backend": _NULL}, _is_new(name), _added(name),
        )
        for name in ("c0", "c1")
    ),
    Case("chardev-add", {"id": "c2", "backend": {"type": "tape", "data": {}}}, _never),
    Case("chardev-add", {"id": "c2"}, _never),
    Case(
        "chardev-remove", {"id": "c0"}, lambda state, grant: "c0" in state.chardevs,
        lambda state, grant: state.chardevs.discard("c0"),
    ),
    Case("chardev-remove", {"id": "c9"}, _never),
    Case("object-add", {"qom-type": "monitor-hmp", "id": "m"}, _never),
    Case("object-add", {"id": "m"}, _never),
    Case("object-add", {"qom-type": "monitor-qmp", "id": "m"}, _never, well_formed=True),
    Case("object-add", {"qom-type": "monitor-qmp", "id": "m", "chardev": "c9"}, _never, well_formed=True),
    Case(
        "object-add", {"qom-type": "rng-builtin", "id": "r0"}, lambda state, grant: "r0" not in state.rngs,
        lambda state, grant: state.rngs.add("r0"),
    ),
    Case("object-add", {"qom-type": "rng-random", "id": "r1", "filename": "/nowhere"}, _never, well_formed=True),
    Case(
        "object-add", {"qom-type": "memory-backend-memfd", "id": "r9", "size": 1 << 20},
        lambda state, grant: "r9" not in state.memories, lambda state, grant: state.memories.add("r9"),
    ),
    Case("object-add", {"qom-type": "snapshot-directory", "id": "s", "path": "/nowhere"}, _never, well_formed=True),
    Case("object-add", {"qom-type": "memory-backend-file", "id": "m", "size": 1 << 20}, _never),
    Case(
        "object-add", {"qom-type": "memory-backend-file", "id": "m", "size": 1 << 20, "mem-path": "/", "share": False},
        _never, well_formed=True,
    ),
    Case("object-add", {"qom-type": "tls-creds-x509", "id": "t", "dir": "/nowhere"}, _never, well_formed=True),
    Case(
        "object-del", {"id": "r9"}, lambda state, grant: "r9" in state.memories,
        lambda state, grant: state.memories.discard("r9"),
    ),
    Case(
        # Where only boot's token is open, that does for monitors alone.
        "object-del", {"id": "r0"},
        lambda state, grant: (
            "r0" in state.rngs and "d1" not in state.devices and state.phase in ("preconfig", "devices", "running")
        ),
        lambda state, grant: state.rngs.discard("r0"),
    ),
    Case("object-del", {"id": "m"}, _never),
    Case("object-del", {}, _never),
    # Taps need a descriptor that tests of their own have.
    Case("netdev_add", {"type": "tap", "id": "n0", "fd": "none"}, _never, well_formed=True),
    Case("netdev_add", {"type": "tap", "id": "n0", "ifname": "n0", "script": "/x"}, _never, well_formed=True),
    Case("netdev_add", {"type": "user", "id": "n0"}, _never),
    Case("netdev_del", {"id": "n0"}, _never),
    Case("netdev_del", {}, _never),
    # Devices.
    *(
        Case(
            "device_add", {"driver": "virtio-rng-device", "id": name, **more}, _can_plug(name), _plug(name),
        )
        for name, more in (("d0", {}), ("d1", {"rng": "r0"}))
    ),
    Case("device_add", {"driver": "e1000", "id": "d2"}, _never, well_formed=True),
    Case("device_add", {"id": "d2"}, _never),
    *(
        Case(
            "device_del", {"id": name}, _plugged(name), _unplug(name),
        )
        for name in ("d0", "d1")
    ),
    Case("device_del", {}, _never),
    Case("device-list-properties", {"typename": "virtio-rng-device"}),
    Case("device-list-properties", {"typename": "e1000"}, _never),
    # Building the machine.
    Case("machine-set", DEFINITION, lambda state, grant: not state.awaits, _to("accel", boots=True)),
    Case("machine-set", {"type": "q35"}, _never, well_formed=True),
    Case("machine-set", {"memory": {"size": 5}}, _never, well_formed=True),
    Case("machine-set", {"kernel": "/nowhere/kernel"}, _never, well_formed=True),
    Case("machine-set", {"memory": "much"}, _never),
    Case("x-exit-precreate", {}, lambda state, grant: not state.awaits, _to("accel", boots=False)),
    Case("accel-set", {}, then=_to("preconfig")),
    Case("accel-set", {"accel": "qtest"}, then=_qtest),
    Case("accel-set", {"accel": "tcg"}, _never, well_formed=True),
    Case("cpu-model-set", {}, then=_to("devices")),
    Case("cpu-model-set", {"model": "pentium"}, _never, well_formed=True),
    Case("x-exit-preconfig", {}, then=_to("devices")),
    Case(
        "set-numa-node", {"type": "node", "mem": MEMORY}, lambda state, grant: state.nodes * MEMORY < state.memory,
        _node, well_formed=True,
    ),
    Case("set-numa-node", {"type": "node", "nodeid": 200}, _never, well_formed=True),
    Case("set-numa-node", {"type": "knot"}, _never),
    Case("finish-machine-init", {}, _complete, _finish),
    # Running it.
    Case("cont", {}, _can_run, _cont),
    Case("stop"),
    Case("system_reset", {}, lambda state, grant: state.phase not in ("preconfig", "devices", "incoming")),
    Case("quit", {}, then=_to("ended", stage="")),
    # Migration.
    Case("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}),
    Case("migrate-set-capabilities", {"capabilities": [{"capability": "teleport", "state": True}]}, _never),
    Case("migrate-set-parameters", {"mode": "cpr-transfer"}, then=_mode),
    Case("migrate-set-parameters", {"mode": "carrier-pigeon"}, _never),
    Case(
        "migrate", _channels("@to-main", "@to-cpr"),
        lambda state, grant: state.mode == "cpr-transfer",
        _to("migrating", stage="hello"),
    ),
    Case("migrate", _channels("@nowhere", "@nowhere"), _never),
    Case("migrate", {"uri": "unix:@to-main"}, _can_copy, _to("migrating", stage="copying")),
    Case("migrate", {"uri": "file:@state"}, lambda state, grant: _can_copy(state, grant) and grant == "admin", _save),
    Case("migrate", {"uri": "nonsense"}, _never),
    Case("migrate", {}, _never),
    Case(
        "migrate-incoming", _channels("@from-main", "@from-cpr"),
        lambda state, grant: state.phase == "precreate" and not state.awaits and not state.streams, _await,
    ),
    Case("migrate-incoming", {"uri": "unix:@from-main"}, _can_stream, _stream),
    Case("migrate-incoming", {"uri": "file:@nowhere"}, _never),
    Case("loadvm", {"name": "@nowhere"}, _never),
    Case("loadvm", {}, _never),
    *(
        Case(f"snapshot-{what}", {"job-id": "j", "tag": "t", "vmstate": "none", "devices": []}, _never)
        for what in ("save", "load")
    ),
    Case("snapshot-delete", {"job-id": "j", "tag": "t", "devices": ["none"]}, _never),
    Case("migrate-incoming", {}, _never),
    Case("migrate_cancel", {}, then=_cancel),
    Case("migrate-continue", {"state": "pre-switchover"}, _never),
    Case("migrate-start-postcopy", {}, _never),
    Case("migrate-pause", {}, _never),
    Case("migrate-recover", {"uri": "unix:@main"}, _never),
    # One that is under way is in the way of the next.
    Case("calc-dirty-rate", {"calc-time": 50, "calc-time-unit": "millisecond"}, lambda state, grant: None),
    Case("calc-dirty-rate", {"calc-time": 0}, _never),
    Case("set-vcpu-dirty-limit", {"dirty-rate": 100}),
    Case("set-vcpu-dirty-limit", {"dirty-rate": 100, "cpu-index": 77}, _never),
    Case("cancel-vcpu-dirty-limit", {}),
    Case("cancel-vcpu-dirty-limit", {"cpu-index": 77}, _never),
    Case("job-cancel", {"id": "none"}, _never),
    Case("job-dismiss", {"id": "none"}, _never),
    # Live update.
    Case("x-cpr-check", _channels("@nowhere", "@nowhere"), _never),
    Case("x-cpr-check", {}, _never),
    Case("x-cpr-undo", {}, _never),
    Case("x-cpr-forget", {}, _never),
    Case("x-cpr-abandon", {}, lambda state, grant: state.awaits, _abandon),
    Case("x-allow-difference", {"names": ["serial"]}),
    Case("x-allow-difference", {"names": 1}, _never),
    Case("x-allow-resource", {"name": "kernel"}),
    Case("x-allow-resource", {"name": 1}, _never),
)  # fmt: skip

WAY_ON: Final[Mapping[str, str]] = {
    "precreate": "machine-set", "accel": "accel-set", "preconfig": "cpu-model-set", "devices": "finish-machine-init",
    "running": "migrate",
}  # fmt: skip
"""In each phase, the command that leads to the next."""


def proper(command: str) -> Case:
    """Return the case in which `command` is sent as it should be."""
    return next(case for case in CASES if case.command == command and case.works is not _never)
