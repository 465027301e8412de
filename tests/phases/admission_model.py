"""Who may what, when: a model of admission, written from the design's table of phases and not from the code's.

`DESIGN` is that table. `DEVIATIONS` are the places where the code is otherwise on purpose, each with the reason; what
is neither in the one nor in the other is a bug.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping


@final
@attrs.frozen
class Row:
    """A phase: where it is, what its window grants (`token` or `token:scope,scope`), and what it withholds."""

    path: str
    machine_phase: str
    grants: frozenset[str]
    withholds: frozenset[str] = frozenset()
    lent: bool = True
    around: tuple[str, ...] = ("boot",)
    """The phases whose windows are open around it, innermost first."""


def _row(
    path: str, machine_phase: str, grants: str, withholds: str = "", *, lent: bool = True, around: str = "boot"
) -> Row:
    return Row(
        path,
        machine_phase,
        frozenset(f"may-{name}" for name in grants.split()),
        frozenset(f"may-{name}" for name in withholds.split()),
        lent,
        tuple(around.split()),
    )


_ACCEL: Final = "boot/precreate/accel"
_PRECONFIG: Final = f"{_ACCEL}/backends/preconfig"
_DEVICES: Final = f"{_PRECONFIG}/devices"
_RUNNING: Final = f"{_DEVICES}/running"
_MIGRATING: Final = f"{_RUNNING}/migrating"

DESIGN: Final[Mapping[str, Row]] = {
    "boot": _row(
        "boot", "no-machine", "query quit add-descriptor create-backend:chardev,monitor open-host-file", around=""
    ),
    "precreate": _row(
        "boot/precreate", "no-machine", "configure-machine:machine set-migration-cap set-migration-param listen"
    ),
    "fd_receive": _row("boot/precreate/fd_receive", "no-machine", "adopt-descriptor", lent=False),
    "stream_receive": _row("boot/precreate/stream_receive", "no-machine", "adopt-descriptor", lent=False),
    "accel": _row(_ACCEL, "machine-created", "open-kvm configure-machine"),
    "backends": _row(f"{_ACCEL}/backends", "accel-created", "create-backend open-host-file"),
    "preconfig": _row(
        _PRECONFIG, "accel-created",
        "create-backend open-host-file set-numa append-recipe:devices configure-machine:cpu set-migration-cap "
        "set-migration-param listen",
    ),
    "devices": _row(
        _DEVICES, "machine-initialized",
        "plug-device map-guest-memory declare-state create-backend write-guest-memory configure-machine:board",
    ),
    "incoming": _row(
        f"{_DEVICES}/incoming", "machine-ready",
        "load-state cancel-migration set-migration-cap set-migration-param run-vcpus",
    ),
    "running": _row(
        _RUNNING, "machine-ready",
        "run-vcpus plug-device create-backend open-host-file listen start-migration set-migration-cap "
        "set-migration-param inject",
    ),
    "migrating": _row(
        _MIGRATING, "machine-ready", "read-dirty-log cancel-migration send-descriptors",
        "plug-device create-backend open-host-file set-migration-cap start-migration", around="running boot",
    ),
    "quiesced": _row(
        f"{_MIGRATING}/quiesced", "machine-ready", "save-state", "run-vcpus inject", around="migrating running boot"
    ),
    "handover": _row(
        f"{_MIGRATING}/quiesced/handover", "machine-ready", "release-guest", around="quiesced migrating running boot"
    ),
    "restoring": _row(
        f"{_RUNNING}/restoring", "machine-ready", "load-state write-guest-memory",
        "plug-device create-backend open-host-file set-migration-cap start-migration run-vcpus inject restore-guest",
        around="running boot",
    ),
    "postcopy": _row(
        f"{_RUNNING}/postcopy", "machine-ready", "steer-postcopy",
        "plug-device create-backend open-host-file set-migration-cap start-migration restore-guest",
        around="running boot",
    ),
    "postmigrate": _row(f"{_RUNNING}/postmigrate", "machine-ready", "resume-here"),
}  # fmt: skip


@final
@attrs.frozen
class Deviation:
    """A phase that grants (or withholds) something else than the table says."""

    phase: str
    more: frozenset[str]
    less: frozenset[str]
    why: str


def _but(phase: str, why: str, *, more: str = "", less: str = "") -> Deviation:
    return Deviation(
        phase, frozenset(f"may-{name}" for name in more.split()), frozenset(f"may-{name}" for name in less.split()), why
    )


DEVIATIONS: Final = (
    _but(
        "boot", "what RAM is made of is there before the machine, so that it can be checked when that is defined; "
        "credentials for TLS, since a machine may come over it; and where snapshots are is no part of it",
        more="create-backend:chardev,monitor,memory,snapshots,tls", less="create-backend:chardev,monitor",
    ),
    _but("boot", "a job that has concluded is dismissed in whatever phase", more="dismiss-job"),
    _but(
        "boot",
        "what comes in passes through many phases, and QEMU's clients cancel to be sure that nothing is under way",
        more="cancel-migration",
    ),
    _but("precreate", "what a machine that is awaited shall have otherwise is noted", more="append-recipe:overrides"),
    _but("accel", "there is nothing but the accelerator to decide there", less="configure-machine"),
    _but("accel", "the RAM is made in its turn, so that it can fail and be repeated", more="open-host-file"),
    _but("preconfig", "cont leads on from here, and stop is no error before anything runs", more="run-vcpus"),
    _but("preconfig", "loadvm leads on from here", more="restore-guest"),
    _but(
        "devices",
        "cont, migrate-incoming and loadvm lead on from here; back ends may be opened for devices; nodes are checked "
        "when the machine is complete; a qtest client reaches what is there",
        more="run-vcpus open-host-file set-numa listen restore-guest inject",
    ),
    _but(
        "incoming", "a guest that is copied comes into RAM of this process; after a failure another may be awaited",
        more="write-guest-memory listen restore-guest",
    ),
    _but("migrating", "a guest that is copied may wait before it goes", more="switch-over"),
    _but("migrating", "a guest that is copied may go before all of its RAM has", more="steer-postcopy"),
    _but("migrating", "what devices have goes ahead of a copied guest's pause", more="preview-state"),
    _but("incoming", "it is called off by what boot grants, as before", less="cancel-migration"),
    _but("running", "a machine with a guest awaits none", less="listen"),
    _but("running", "loadvm puts a saved state in place of the guest's own", more="restore-guest"),
)  # fmt: skip

ONLY: Final[Mapping[tuple[str, str], str]] = {
    # A live update brings its run state along, and ends with its source.
    **dict.fromkeys(
        (
            ("incoming", f"may-{name}")
            for name in ("run-vcpus", "write-guest-memory", "listen", "restore-guest")
        ),
        "copied",
    ),
    ("migrating", "may-send-descriptors"): "updated",
    ("migrating", "may-read-dirty-log"): "copying",
    ("migrating", "may-preview-state"): "copying",
    ("migrating", "may-switch-over"): "copying",
    ("migrating", "may-steer-postcopy"): "copying",
    # After a live update the guest comes back by a hand-over only.
    ("postmigrate", "may-resume-here"): "copied",
}  # fmt: skip
"""Tokens that a phase grants only where it has a use for them: where a guest is copied, or where it is updated live."""


def _granted(phase: str) -> dict[str, frozenset[str] | None]:
    """Return what the window of `phase` grants: wire name -> scope, None for all."""
    names = set(DESIGN[phase].grants)
    for deviation in DEVIATIONS:
        if deviation.phase == phase:
            assert deviation.less <= names, deviation
            assert not deviation.more & names, deviation
            names = names - deviation.less | deviation.more
    found = {}
    for name in names:
        kind, _, scope = name.partition(":")
        found[kind] = frozenset(scope.split(",")) if scope else None
    return found


GRANTED: Final[Mapping[str, Mapping[str, frozenset[str] | None]]] = {phase: _granted(phase) for phase in DESIGN}
WITHHELD: Final[Mapping[str, frozenset[str]]] = {phase: row.withholds for phase, row in DESIGN.items()}

_HOST: Final = "may-open-host-file|may-adopt-descriptor"

NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        (
            "query-version", "query-commands", "query-qmp-schema", "query-name", "query-uuid", "query-machine-phase",
            "query-nursery-tree", "query-fdsets", "query-chardev", "query-monitors", "query-status", "query-cpus-fast",
            "query-migrate-capabilities", "query-migrate-parameters", "query-migrate", "query-differences",
            "query-cpu-definitions", "query-cpu-model-expansion", "query-kvm", "query-machines",
            "query-current-machine", "query-target", "query-hotpluggable-cpus", "query-memory-size-summary",
            "query-accelerators", "query-jobs", "device-list-properties", "query-dirty-rate",
            "query-vcpu-dirty-limit", "x-query-snapshots",
        ),
        ("may-query",),
    ),
    **dict.fromkeys(("getfd", "closefd", "add-fd", "remove-fd"), ("may-add-descriptor",)),
    "quit": ("may-quit",),
    "chardev-add": ("may-create-backend:chardev", _HOST, "may-query"),
    "chardev-remove": ("may-create-backend:chardev", "may-query"),
    "object-add": ("may-create-backend", _HOST, "may-query"),
    "object-del": ("may-create-backend", "may-query"),
    "netdev_add": ("may-create-backend:netdev", _HOST, "may-query"),
    "netdev_del": ("may-create-backend:netdev", "may-query"),
    "machine-set": ("may-configure-machine:machine", _HOST),
    "x-exit-precreate": ("may-configure-machine:machine", _HOST),
    "accel-set": ("may-open-kvm",),
    "cpu-model-set": ("may-configure-machine:cpu",),
    "x-exit-preconfig": ("may-configure-machine:cpu",),
    "set-numa-node": ("may-set-numa",),
    **dict.fromkeys(("device_add", "device_del"), ("may-plug-device|may-append-recipe:devices", "may-query")),
    "finish-machine-init": ("may-configure-machine:board",),
    **dict.fromkeys(("stop", "system_reset"), ("may-run-vcpus",)),
    "cont": ("may-run-vcpus|may-resume-here",),
    "migrate-set-capabilities": ("may-set-migration-cap",),
    "migrate-set-parameters": ("may-set-migration-param",),
    "migrate": ("may-start-migration", "may-query"),
    "migrate-incoming": ("may-listen", "may-query"),
    "migrate_cancel": ("may-cancel-migration",),
    "migrate-continue": ("may-switch-over",),
    "migrate-start-postcopy": ("may-steer-postcopy",),
    "migrate-pause": ("may-steer-postcopy",),
    "migrate-recover": ("may-steer-postcopy",),
    "job-cancel": ("may-cancel-migration", "may-query"),
    "job-dismiss": ("may-dismiss-job",),
    "loadvm": ("may-restore-guest", "may-open-host-file"),
    **dict.fromkeys(("x-cpr-check", "x-cpr-undo", "x-cpr-forget", "calc-dirty-rate"), ("may-start-migration",)),
    **dict.fromkeys(("set-vcpu-dirty-limit", "cancel-vcpu-dirty-limit"), ("may-start-migration",)),
    **dict.fromkeys(("snapshot-save", "snapshot-delete"), ("may-start-migration", "may-query")),
    "snapshot-load": ("may-restore-guest", "may-start-migration", "may-query"),
    "x-cpr-abandon": ("may-listen",),
    "x-allow-difference": ("may-listen",),
    "x-allow-resource": ("may-open-host-file", "may-listen"),
}  # fmt: skip
"""What each command takes; alternatives are joined by `|`, a scope follows a colon."""

OBJECTS: Final[Mapping[str, str]] = {
    "monitor-qmp": "monitor", "monitor-websocket": "monitor", "rng-builtin": "rng", "rng-random": "rng",
    "memory-backend-file": "memory", "memory-backend-memfd": "memory", "snapshot-directory": "snapshots",
    "tls-creds-x509": "tls",
}  # fmt: skip
"""Type of an object -> what `object-add` must be allowed to create."""

NOTED: Final = frozenset(
    {
        *("chardev-add", "object-add", "netdev_add", "machine-set", "accel-set", "set-numa-node", "cpu-model-set"),
        "device_add",
    }
)
"""Commands that are noted only, while a machine is awaited from another process."""


def needs_of(command: str, arguments: Mapping[str, object] = MappingProxyType({})) -> tuple[str, ...]:
    """Return what `command` takes with these arguments, be they right or wrong."""
    family = OBJECTS.get(str(arguments.get("qom-type")))
    if command == "object-add" and family is not None:
        return (f"may-create-backend:{family}", *NEEDS[command][1:])
    return NEEDS[command]


EVERY_TRAIT: Final = ("copied", "copying", "updated")

_OBSERVE: Final = frozenset({"may-query"})
_OPERATE: Final = _OBSERVE | {"may-quit", "may-run-vcpus", "may-resume-here", "may-plug-device"}
_MIGRATE: Final = _OPERATE | {
    "may-set-migration-cap", "may-set-migration-param", "may-listen", "may-start-migration", "may-cancel-migration",
    "may-dismiss-job", "may-switch-over", "may-steer-postcopy",
}  # fmt: skip
_ALL: Final = frozenset(kind for kinds in GRANTED.values() for kind in kinds) - {"may-adopt-descriptor"}
LENDABLE: Final[Mapping[str, frozenset[str]]] = {
    "observe": _OBSERVE, "operate": _OPERATE, "migrate": _MIGRATE, "admin": _ALL,
}  # fmt: skip
"""What a session of each grant may be lent."""


@final
@attrs.frozen
class Refusal:
    """Why a command is not admitted: which token, and who stands in its way."""

    token: str
    by: str
    """`session`, `phase`, `withheld`, `reserved`."""
    at: str
    """The grant's name, the path of the phase, or for whom the machine is reserved."""
    phases: tuple[str, ...] = ()
    """With `phase`: those that grant the token."""


def _parse(need: str) -> tuple[tuple[str, ...], str | None]:
    kinds, _, scope = need.partition(":")
    return tuple(kinds.split("|")), scope or None


def _grants(phase: str, kind: str, scope: str | None) -> bool:
    if kind not in GRANTED[phase]:
        return False
    names = GRANTED[phase][kind]
    return scope is None or names is None or scope in names


def _open_in(phase: str) -> tuple[str, ...]:
    """The open windows, innermost first."""
    return (phase, *DESIGN[phase].around)


def has(phase: str, kind: str, traits: Collection[str]) -> bool:
    """Say whether the window of `phase`, of a machine with these traits, grants `kind`."""
    return kind in GRANTED[phase] and ONLY.get((phase, kind)) in (None, *traits)


def _refusal(need: str, phase: str, grant: str, reserved: bool, traits: Collection[str]) -> Refusal | None:
    kinds, scope = _parse(need)
    suffix = f":{scope}" if scope else ""
    allowed = [kind for kind in kinds if kind in LENDABLE[grant]]
    if not allowed:
        return Refusal(f"{kinds[0]}{suffix}", "session", grant)
    if reserved and not {"may-query", "may-quit", "may-cancel-migration"}.issuperset(allowed):
        return Refusal(f"{allowed[0]}{suffix}", "reserved", "the incoming recipe")
    held_by: dict[str, str] = {}
    for window in _open_in(phase):
        for kind in allowed:
            if kind not in held_by and _grants(window, kind, scope) and has(window, kind, traits):
                return None
            if kind in WITHHELD[window]:
                held_by.setdefault(kind, window)
    if held_by:
        kind, window = next(iter(held_by.items()))
        return Refusal(f"{kind}{suffix}", "withheld", DESIGN[window].path)
    where = tuple(granting(f"{'|'.join(allowed)}{suffix}"))
    return Refusal(f"{allowed[0]}{suffix}", "phase", DESIGN[phase].path, where)


def granting(need: str) -> Iterable[str]:
    """Yield the phases, outermost first, whose own windows grant `need` to a session."""
    kinds, scope = _parse(need)
    return (phase for phase, row in DESIGN.items() if row.lent and any(_grants(phase, kind, scope) for kind in kinds))


def refusals(
    command: str,
    phase: str,
    grant: str,
    arguments: Mapping[str, object] = MappingProxyType({}),
    *,
    reserved: bool = False,
    noting: bool = False,
    traits: Collection[str] = EVERY_TRAIT,
) -> list[Refusal]:
    """Return every reason not to admit `command`; empty where it is admitted. An error names one of them.

    Args:
        reserved: whether an incoming recipe has the machine.
        noting: whether a machine is awaited, and what would make one is noted.
        traits: see `ONLY`.
    """
    needs = needs_of(command, arguments)
    found = [_refusal(need, phase, grant, reserved, traits) for need in needs]
    if noting and command in NOTED:
        # A session must be allowed the command itself, although it is not carried out now.
        found = [refusal for refusal in found if refusal is not None and refusal.by == "session"]
        found.append(_refusal("may-append-recipe:overrides", phase, grant, reserved, traits))
    return [refusal for refusal in found if refusal is not None]


def phases_of(command: str) -> list[str]:
    """Return the phases in which a session that may all could run `command`."""
    return [phase for phase, row in DESIGN.items() if row.lent and not refusals(command, phase, "admin")]


_NEEDS: Final = re.compile(r"Command '(?P<command>[^']+)' needs (?P<token>[a-z|:-]+), (?:which )?(?P<rest>.*)")
_RESTS: Final = (
    ("session", re.compile(r"this session \(grant (?P<at>\w+)\) may not be lent")),
    ("withheld", re.compile(r"phase (?P<at>\S+) withholds until it ends")),
    ("phase", re.compile(r"phase (?P<at>[^;\s]+) does not grant(?:; phases that grant it: (?P<phases>.*))?")),
    ("reserved", re.compile(r"reserved for (?P<at>.*) until it is done; query, quit and migrate_cancel are not")),
)


def told(command: str, error: Mapping[str, str]) -> Refusal | None:
    """Return what `error`, an error of a reply, says about admission; None if it is about something else."""
    needs = _NEEDS.fullmatch(error["desc"])
    if needs is None:
        return None
    assert needs["command"] == command
    assert error["class"] == "GenericError"
    for by, pattern in _RESTS:
        if (rest := pattern.fullmatch(needs["rest"])) is not None:
            listed = rest.groupdict().get("phases") or ""
            names = tuple(re.findall(r"(\w+)(?: \([^)]*\))?(?:, |$)", listed))
            return Refusal(needs["token"], by, rest["at"], names)
    raise AssertionError(f"an admission error in words that nobody knows: {error['desc']}")
