"""The chain of phases as data, read off their grants: for error texts, `query-commands` and the documentation."""

from __future__ import annotations

import types
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Union, final, get_args, get_origin, get_type_hints

import attrs

from vmm.capabilities import Token
from vmm.monitor.command import Need

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vmm.capabilities import AnyToken


@final
@attrs.frozen
class PhaseFacts:
    """What a phase's file declares."""

    name: str
    machine_phase: str
    grants: type[Any] | None
    withholds: tuple[type[AnyToken], ...] = ()
    scopes: Mapping[str, tuple[str, ...]] = attrs.Factory(dict)
    """Wire name of a kind -> what its token is narrowed to here."""
    lent: bool = True
    """Whether sessions may be lent its tokens."""
    left_by: str = ""
    reach: str = ""
    """How a machine gets here, for error texts."""

    def kinds(self) -> tuple[type[AnyToken], ...]:
        """Return the kinds that the phase grants, in the order of its grants class."""
        if self.grants is None:
            return ()
        return _granted(self.grants)  # type: ignore[arg-type]  # a class is hashable

    def grants_for(self, need: Need) -> bool:
        """Say whether the phase's window would satisfy `need`."""
        return any(
            kind in need.kinds and (need.scope is None or need.scope in self.scopes.get(kind.wire_name, (need.scope,)))
            for kind in self.kinds()
        )


@cache
def _granted(grants: type[Any]) -> tuple[type[AnyToken], ...]:
    """Evaluating annotations takes most of the time of a list of all commands, and nothing about them changes."""
    hints = get_type_hints(grants)
    return tuple(
        kind
        for field in attrs.fields(grants)
        for kind in _members(hints[field.name])
        if isinstance(kind, type) and issubclass(kind, Token)
    )


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def chain() -> tuple[PhaseFacts, ...]:
    """Return all phases, outermost first."""
    from vmm.phases.accel import AccelGrants
    from vmm.phases.backends import BackendsGrants
    from vmm.phases.boot import BootGrants
    from vmm.phases.devices import DevicesGrants
    from vmm.phases.fd_receive import FdReceiveGrants
    from vmm.phases.handover import HandoverGrants
    from vmm.phases.incoming import IncomingGrants
    from vmm.phases.migrating import WITHHELD, MigratingGrants
    from vmm.phases.postcopy import WITHHELD as POSTCOPY_WITHHELD
    from vmm.phases.postcopy import PostcopyGrants
    from vmm.phases.postmigrate import PostmigrateGrants
    from vmm.phases.preconfig import PreconfigGrants
    from vmm.phases.precreate import PrecreateGrants
    from vmm.phases.quiesced import WITHHELD as QUIESCED_WITHHELD
    from vmm.phases.quiesced import QuiescedGrants
    from vmm.phases.restoring import WITHHELD as RESTORING_WITHHELD
    from vmm.phases.restoring import RestoringGrants
    from vmm.phases.running import RunningGrants
    from vmm.phases.stream_receive import StreamReceiveGrants

    configure: Final = "may-configure-machine"
    append: Final = "may-append-recipe"
    return (
        PhaseFacts(
            "boot", "no-machine", BootGrants,
            scopes={"may-create-backend": ("chardev", "memory", "monitor", "snapshots", "tls")},
            left_by="the end of the process",
        ),
        PhaseFacts(
            "precreate", "no-machine", PrecreateGrants, scopes={configure: ("machine",), append: ("overrides",)},
            left_by="`machine-set`, `x-exit-precreate`, or the arrival of CPR state", reach="a start without a machine",
        ),
        PhaseFacts(
            "fd_receive", "no-machine", FdReceiveGrants, lent=False,
            left_by="the change of owner",
        ),
        PhaseFacts(
            "stream_receive", "no-machine", StreamReceiveGrants, lent=False,
            left_by="the stream's end",
        ),
        PhaseFacts("accel", "machine-created", AccelGrants, left_by="`accel-set`", reach="machine-set"),
        PhaseFacts("backends", "accel-created", BackendsGrants, left_by="itself, at once", reach="accel-set"),
        PhaseFacts(
            "preconfig", "accel-created", PreconfigGrants, scopes={configure: ("cpu",), append: ("devices",)},
            left_by="`cpu-model-set`, `x-exit-preconfig`, `cont`, `migrate-incoming`, `loadvm`", reach="accel-set",
        ),
        PhaseFacts(
            "devices", "machine-initialized", DevicesGrants, scopes={configure: ("board",)},
            left_by="`finish-machine-init`, `cont`, `migrate-incoming`, `loadvm`",
            reach="cpu-model-set or x-exit-preconfig",
        ),
        PhaseFacts(
            "incoming", "machine-ready", IncomingGrants,
            left_by="itself, once the state is loaded", reach="an incoming migration",
        ),
        PhaseFacts(
            "running", "machine-ready", RunningGrants,
            left_by="a migration that completed", reach="finish-machine-init or cont",
        ),
        PhaseFacts(
            "migrating", "machine-ready", MigratingGrants, withholds=WITHHELD,
            left_by="the end of the migration", reach="migrate",
        ),
        PhaseFacts(
            "quiesced", "machine-ready", QuiescedGrants, withholds=QUIESCED_WITHHELD,
            left_by="the end of the guest's pause", reach="migrate",
        ),
        PhaseFacts("handover", "machine-ready", HandoverGrants, left_by="the change of owner", reach="migrate"),
        PhaseFacts(
            "restoring", "machine-ready", RestoringGrants, withholds=RESTORING_WITHHELD,
            left_by="itself, once the state is in force", reach="loadvm",
        ),
        PhaseFacts(
            "postcopy", "machine-ready", PostcopyGrants, withholds=POSTCOPY_WITHHELD,
            left_by="itself, once all of RAM is there", reach="migrate-start-postcopy",
        ),
        PhaseFacts(
            "postmigrate", "machine-ready", PostmigrateGrants,
            left_by="`quit`, or `cont` after a migration that copied", reach="a migration that completed",
        ),
    )  # fmt: skip


def phases_granting(needs: Iterable[Need]) -> list[str]:
    """Return the names of the phases in which all of `needs` can be met: one grants it, and no inner one withholds it.

    Boot's tokens, and those of the phases that a window stays open in, count for the phases inside. Of a need whose
    scope goes by an argument, one alternative is enough.
    """
    facts = chain()
    names: list[str] = []
    for at, phase in enumerate(facts):
        if not phase.lent:
            continue
        open_windows = [phase, *_open_around(facts, at)]
        if all(any(_met(one, open_windows) for one in need.alternatives()) for need in needs):
            names.append(phase.name)
    return names


def _open_around(facts: tuple[PhaseFacts, ...], at: int) -> list[PhaseFacts]:
    """Return the phases whose windows are open around phase number `at`, innermost first."""
    by_name = {phase.name: phase for phase in facts}
    around = {
        "boot": (),
        "migrating": ("running", "boot"),
        "restoring": ("running", "boot"),
        "postcopy": ("running", "boot"),
        "quiesced": ("migrating", "running", "boot"),
        "handover": ("quiesced", "migrating", "running", "boot"),
    }.get(facts[at].name, ("boot",))
    return [by_name[name] for name in around]


def _met(need: Need, windows: list[PhaseFacts]) -> bool:
    for phase in windows:
        if phase.grants_for(need):
            return True
        need = Need(need.parameter, tuple(kind for kind in need.kinds if kind not in phase.withholds), need.scope)
    return False


def hint(kinds: Sequence[type[AnyToken]], scope: str | None) -> str:
    """Return what an error text adds about `kinds` for `scope`: the phases that grant one, and how to get there."""
    need = Need("", tuple(kinds), scope)
    granting = [phase for phase in chain() if phase.lent and phase.grants_for(need)]
    if not granting:
        return ""
    named = (f"{phase.name} (reached by {phase.reach})" if phase.reach else phase.name for phase in granting)
    return f"; phases that grant it: {', '.join(named)}"
