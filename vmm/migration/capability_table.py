"""QEMU's migration capabilities: which of them are supported here, and which exclude or require each other.

Source: QEMU qapi/migration.json (MigrationCapability), migration/options.c (the rules).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, final, get_args

import attrs

from vmm.errors import MigrationRefused, OptionInvalid, Unsupported

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

MigrationCapability = Literal[
    "xbzrle",
    "rdma-pin-all",
    "auto-converge",
    "events",
    "postcopy-ram",
    "x-colo",
    "release-ram",
    "return-path",
    "pause-before-switchover",
    "multifd",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
    "zero-copy-send",
    "postcopy-preempt",
    "switchover-ack",
    "dirty-limit",
    "mapped-ram",
]
"""In the order of QEMU's enumeration, which is the order of `query-migrate-capabilities`."""

MIGRATION_CAPABILITIES: Final[tuple[str, ...]] = get_args(MigrationCapability)
SUPPORTED: Final = frozenset(
    {
        "auto-converge",
        "background-snapshot",
        "dirty-limit",
        "events",
        "mapped-ram",
        "multifd",
        "pause-before-switchover",
        "postcopy-blocktime",
        "postcopy-preempt",
        "postcopy-ram",
        "return-path",
        "switchover-ack",
        "validate-uuid",
        "x-ignore-shared",
        "zero-copy-send",
    }
)
"""What can be turned on. The others are known by name, are off, and can be set to off."""


@final
@attrs.frozen
class Rule:
    """Two migration capabilities that do not go together, or only together."""

    a: str
    relation: Literal["excludes", "requires"]
    b: str
    reason: str

    def broken_by(self, enabled: Collection[str]) -> bool:
        """Say whether having exactly `enabled` on breaks the rule."""
        return self.a in enabled and (self.b in enabled) == (self.relation == "excludes")


def _snapshot_excludes(*others: str) -> tuple[Rule, ...]:
    reason = "a background snapshot writes each page once, as it was at one instant"
    return tuple(Rule("background-snapshot", "excludes", other, reason) for other in others)


RULES: Final = (
    Rule("x-colo", "requires", "return-path", "the secondary answers every checkpoint"),
    Rule("postcopy-ram", "excludes", "x-ignore-shared", "a page fault can only be answered with a page that was sent"),
    Rule("postcopy-ram", "excludes", "multifd", "pages that the guest waits for come over the stream's own channel"),
    Rule("postcopy-preempt", "requires", "postcopy-ram", "it is a second channel for postcopy's page requests"),
    Rule("switchover-ack", "requires", "return-path", "the acknowledgement comes over it"),
    Rule("multifd", "excludes", "xbzrle", "its deltas need the order of one channel"),
    Rule("zero-copy-send", "requires", "multifd", "only the multifd channels send pages without a copy"),
    Rule("mapped-ram", "excludes", "xbzrle", "every page has a fixed place in the file, a delta has none"),
    Rule("mapped-ram", "excludes", "postcopy-ram", "a file cannot answer page requests"),
    Rule("dirty-limit", "excludes", "auto-converge", "both slow the guest down to let the migration end"),
    *_snapshot_excludes(
        "postcopy-ram",
        "dirty-bitmaps",
        "postcopy-blocktime",
        "late-block-activate",
        "return-path",
        "multifd",
        "pause-before-switchover",
        "auto-converge",
        "release-ram",
        "rdma-pin-all",
        "xbzrle",
        "x-colo",
        "validate-uuid",
        "zero-copy-send",
    ),
)


@final
@attrs.frozen(kw_only=True)
class MigrationCapabilityStatus:
    """One entry of `migrate-set-capabilities` and of `query-migrate-capabilities`."""

    capability: MigrationCapability
    state: bool


@final
@attrs.frozen(kw_only=True)
class SetMigrationCapabilities:
    """The arguments of `migrate-set-capabilities`."""

    capabilities: list[MigrationCapabilityStatus]

    def changes(self) -> dict[str, bool]:
        """Return what is to be set, by name; of two entries with one name the later holds."""
        return {entry.capability: entry.state for entry in self.capabilities}


@final
class MigrationCapabilities:
    """Which migration capabilities are on. All are off at first."""

    def __init__(self, *, supported: Collection[str] = SUPPORTED) -> None:
        self._supported: Final = frozenset(supported)
        self._enabled: frozenset[str] = frozenset()
        self._former: Mapping[str, bool] = {}
        self._chosen: dict[str, bool] = {}

    @property
    def chosen(self) -> Mapping[str, bool]:
        """What was set, for a successor: neither what was never touched nor what is lent."""
        return dict(self._chosen)

    def inherit(self, changes: Mapping[str, bool]) -> None:
        """Set what a predecessor had set, but for what was set here itself; what is lent here stays until it is given
        back. Raises as `update` does; then nothing has changed."""
        fresh = {name: state for name, state in changes.items() if name not in self._chosen}
        self.check(fresh)
        self._former = {**self._former, **{name: state for name, state in fresh.items() if name in self._former}}
        self._enabled = _with(self._enabled, {name: fresh[name] for name in fresh if name not in self._former})
        self._chosen.update(fresh)

    def update(self, changes: Mapping[str, bool]) -> None:
        """Check `changes` against the result as a whole, then apply all of them; on an error nothing has changed.

        Raises:
            OptionInvalid: a name is no migration capability of QEMU's.
            Unsupported: one that is not supported here is to be on.
            MigrationRefused: the result breaks a rule of `RULES`, now or when what was lent is given back.
        """
        enabled = self.check(changes)
        former = {name: state for name, state in self._former.items() if name not in changes}
        _obey_rules(_with(enabled, former))
        self._enabled, self._former = enabled, former
        self._chosen.update(changes)

    def check(self, changes: Mapping[str, bool]) -> frozenset[str]:
        """Return what would be on with `changes`. Raises as `update` does."""
        for name, state in changes.items():
            _known(name)
            if state and name not in self._supported:
                raise Unsupported(what="Migration capability", name=name, instead=self._instead())
        enabled = _with(self._enabled, changes)
        _obey_rules(enabled)
        return enabled

    def lend(self, changes: Mapping[str, bool]) -> None:
        """Apply `changes` until `give_back`. What `update` sets meanwhile stays. Raises as `update` does."""
        assert not self._former, "one migration is under way at a time"
        enabled = self.check(changes)
        self._former = {name: name in self._enabled for name in changes}
        self._enabled = enabled

    def give_back(self) -> None:
        """Undo `lend`."""
        self._enabled, self._former = _with(self._enabled, self._former), {}

    def query(self) -> list[MigrationCapabilityStatus]:
        """Return every migration capability, in QEMU's order."""
        return [MigrationCapabilityStatus(capability=name, state=name in self._enabled) for name in _typed_names()]

    def __getitem__(self, name: str) -> bool:
        _known(name)
        return name in self._enabled

    def _instead(self) -> str:
        return f"leave it off (those that can be on: {', '.join(sorted(self._supported)) or 'none'})"


def _with(enabled: frozenset[str], changes: Mapping[str, bool]) -> frozenset[str]:
    return (enabled - changes.keys()) | {name for name, state in changes.items() if state}


def _obey_rules(enabled: frozenset[str]) -> None:
    for rule in RULES:
        if rule.broken_by(enabled):
            raise MigrationRefused(reason=_conflict(rule))


def _known(name: str) -> None:
    if name not in MIGRATION_CAPABILITIES:
        raise OptionInvalid(
            option="Migration capability", value=name, wanted="one that query-migrate-capabilities lists"
        )


def _conflict(rule: Rule) -> str:
    if rule.relation == "excludes":
        return (
            f"Migration capabilities {rule.a!r} and {rule.b!r} exclude each other: {rule.reason}; turn one of them off"
        )
    return f"Migration capability {rule.a!r} requires {rule.b!r}: {rule.reason}; turn {rule.b!r} on too"


def _typed_names() -> Iterator[MigrationCapability]:
    yield from get_args(MigrationCapability)
