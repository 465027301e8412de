"""In what one machine's recipe differs from another's, and whether the guest could tell.

An item is a member of a decision (`machine-set.memory`), or what one command made (`chardev-add serial0`). What is not
known to be the host's business alone counts as visible to the guest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from vmm.recipe import Recipe, Step

Effect = Literal["identical", "host-only", "guest-visible"]

DECISIONS: Final = ("machine-set", "accel-set", "cpu-model-set")
"""Commands of which a machine has one each; their members are items of their own."""

_HOST_ONLY_MEMBERS: Final = frozenset(
    {"machine-set.name", "machine-set.reboot-action", "machine-set.rtc", "machine-set.serial"}
    | {"machine-set.memory-backend", "accel-set.dirty-ring-size"}
)
"""What becomes of a reset is the host's policy. Which chardevs are behind the serial ports is, too; how many is not.
How far the clock is ahead is state that travels; where it once began is forgotten."""

_HOST_ONLY_COMMANDS: Final = frozenset({"chardev-add", "object-add", "netdev_add"})

_HOST_ONLY_OF_DEVICES: Final = frozenset({"id", "rng", "max-bytes", "period"})
"""Arguments of `device_add` that name things of the host, or are its policy."""

FIXED: Final = frozenset({"machine-set.type", "machine-set.memory", "machine-set.smp", "accel-set.accel"})
"""What the state that travels has the shape of: a difference in these cannot be allowed."""


@final
@attrs.frozen(kw_only=True)
class Difference:
    """An item of two recipes: whether it is the same in both, and if not, whether the guest could tell."""

    name: str
    effect: Effect
    source: Any = None
    """How it is at the source; absent where it is not there, or the same in both."""
    here: Any = None
    """How it is at the destination, likewise."""

    def describe(self) -> str:
        """Return it in words, for an error text."""
        return f"{self.name} ({_shown(self.source)} there, {_shown(self.here)} here)"


def compare(source: Recipe, here: Recipe) -> tuple[Difference, ...]:
    """Return every item of either recipe, in the order of `source`, and then of what is only `here`.

    Both recipes must have all defaults written out, as a machine's own has.
    """
    theirs, ours = dict(_items(source)), dict(_items(here))
    return tuple(_difference(name, theirs.get(name), ours.get(name)) for name in {**theirs, **ours})


def visible(differences: Iterable[Difference], allowed: Iterable[str] = ()) -> tuple[Difference, ...]:
    """Return those that the guest could tell and nobody has allowed by name."""
    names = frozenset(allowed)
    return tuple(
        item
        for item in differences
        if item.effect == "guest-visible" and (_is_of_the_states_shape(item) or item.name not in names)
    )


def _is_of_the_states_shape(item: Difference) -> bool:
    a_device_more = item.name.startswith("device_add ") and (item.source is None or item.here is None)
    return item.name in FIXED or a_device_more


def _items(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    numa = 0
    for step in recipe:
        if step.execute in DECISIONS:
            for member, value in step.arguments.items():
                yield f"{step.execute}.{member}", value
        elif step.execute == "set-numa-node":
            yield f"set-numa-node {numa}", dict(step.arguments)
            numa += 1
        elif step.execute == "device_add":
            # By its place: the guest knows nothing of the name.
            yield f"device_add {step.arguments.get('bus') or step.arguments.get('id', '')}", dict(step.arguments)
        elif step.arguments:
            yield name_of(step), {member: value for member, value in step.arguments.items() if member != "id"}


def name_of(step: Step) -> str:
    """Return how the list calls what `step`, which is no decision, makes."""
    return f"{step.execute} {step.arguments.get('id', '')}".rstrip()


def _difference(name: str, source: Any, here: Any) -> Difference:
    if source == here:
        return Difference(name=name, effect="identical")
    effect: Effect = "host-only" if _host_only(name, source, here) else "guest-visible"
    return Difference(name=name, effect=effect, source=source, here=here)


def _host_only(name: str, source: Any, here: Any) -> bool:
    if name == "machine-set.serial":
        return isinstance(source, list) and isinstance(here, list) and len(source) == len(here)
    command = name.partition(" ")[0]
    if command == "device_add" and isinstance(source, dict) and isinstance(here, dict):
        return _guests(source) == _guests(here)
    return name in _HOST_ONLY_MEMBERS or command in _HOST_ONLY_COMMANDS


def _guests(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {member: value for member, value in arguments.items() if member not in _HOST_ONLY_OF_DEVICES}


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


_SHOWN: Final = 60
"""Characters of a value in an error text."""
