"""A recipe that came from another process: data, to be checked whole before anything of it is carried out.

It may hold commands that make a machine and no others, each with arguments of the right form, in the order of the
phases. What this side was told beforehand goes over it, command by command and, in a decision, member by member.
Of this host it may have what its sender gave descriptors for, and what the operator allowed by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm.errors import (
    DifferencesVisible,
    InvalidArguments,
    MigrationRefused,
    OptionInvalid,
    RecipeInvalid,
    ResourcesMissing,
    Unsupported,
)
from vmm.monitor.arguments import structure, unstructure
from vmm.phases.catalog import rank
from vmm.phases.differences import DECISIONS, compare, name_of, visible
from vmm.phases.host_resources import missing, private, redirected, resources_of
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from vmm.monitor.command import CommandTable
    from vmm.phases.differences import Difference

NEEDED: Final = (*DECISIONS, "finish-machine-init")
"""Commands that every whole machine's recipe has, once each."""

ADMITTED: Final = (*NEEDED, "chardev-add", "object-add", "netdev_add", "set-numa-node", "device_add")
"""Commands that a recipe from elsewhere may have."""


_WITHOUT_NUMBERS: Final[Mapping[str, str]] = {
    "object-add": "a recipe's monitor has a chardev",
    "netdev_add": "a recipe's tap has an ifname",
}
"""Commands whose `fd` means something only in the process that was given it, and what they have instead."""


@final
@attrs.frozen
class Arriving:
    """A checked recipe, with what this side has otherwise."""

    recipe: Recipe
    differences: tuple[Difference, ...]
    here: frozenset[str]
    """Names of the host resources that this host opens itself. Descriptors of theirs that were sent are not used."""
    private: frozenset[str]
    """Names of the resources that are made where the recipe is carried out, unless their descriptors came."""
    given: Mapping[str, int]
    """Descriptors that the operator gave this process for what the source sent none for, by name. They stay open."""

    def with_more(self, differences: Iterable[Difference]) -> Arriving:
        """Return this with `differences` besides those of the recipes."""
        return attrs.evolve(self, differences=(*self.differences, *differences))

    def require_same_guest(self, allowed: Iterable[str]) -> None:
        """Raise `DifferencesVisible` for what the guest could tell and nobody has `allowed` by name."""
        refused = visible(self.differences, allowed)
        if refused:
            raise DifferencesVisible(items=tuple(item.describe() for item in refused))

    def require_resources(self, sent: Collection[str]) -> None:
        """Raise `ResourcesMissing` for host resources of which no descriptor was `sent` and that nobody allowed."""
        lacking = missing(self.recipe, (*sent, *self.given), self.here)
        if lacking:
            raise ResourcesMissing(names=tuple(lacking))


def checked(recipe: Recipe, table: CommandTable) -> Recipe:
    """Return `recipe`, which may be hostile, with all defaults written out.

    Raises:
        RecipeInvalid: it is not that of a whole machine; nothing of it was carried out.
    """
    steps = tuple(
        _checked(recipe.source, f"command {n} ({step.execute})", step, table) for n, step in enumerate(recipe, 1)
    )
    _check_whole(recipe.source, steps)
    return Recipe(recipe.source, steps)


def arrive(
    recipe: Recipe, table: CommandTable, overrides: Recipe, allowed: Mapping[str, str], *, live: bool = False
) -> Arriving:
    """Check `recipe`, lay `overrides` over it, and say in what the machine here will differ from the source's.

    Args:
        overrides: commands that were checked for their form when they were given.
        allowed: name of a host resource -> the path that it has here, `fd:N` for a descriptor of this process, or
            nothing for the path that the recipe says.
        live: whether the guest's RAM comes as it is, in a live update.

    Raises:
        RecipeInvalid: `recipe`, alone or with the overrides, is not that of a whole machine.
        MigrationRefused: the overrides would have the guest find other RAM than its own.
    """
    source = checked(recipe, table)
    _require_no_numbers(source)
    if live:
        overrides = _without_same_ram(source, overrides, table)
    made = checked(_overridden(source, overrides), table)
    numbers = {name: int(where[3:]) for name, where in allowed.items() if where.startswith("fd:")}
    given = {
        resource.descriptor: numbers[resource.name]
        for step in made
        for resource in resources_of(step)
        if resource.name in numbers and resource.descriptor
    }
    paths = {name: path for name, path in allowed.items() if name not in numbers}
    here = frozenset(paths) | frozenset(_opened(overrides)) - frozenset(numbers)
    return Arriving(redirected(made, paths), compare(source, made), here, private(made), given)


def _without_same_ram(source: Recipe, overrides: Recipe, table: CommandTable) -> Recipe:
    """Return `overrides` without what they say of the guest's RAM, which must be what `source` says."""
    name = _definition(source).get("memory-backend")
    other = _definition(overrides).get("memory-backend", name)
    if other != name:
        raise _other_ram(f"machine-set has memory-backend {other!r} here, and {name!r} at the source")
    kept: list[Step] = []
    for step in overrides:
        if step.execute != "object-add" or name is None or step.arguments.get("id") != name:
            kept.append(step)
        elif not any(_complete(step, table) == _complete(theirs, table) for theirs in source):
            raise _other_ram(f"object-add {name} is not the same here as at the source")
    return Recipe(overrides.source, tuple(kept))


def _definition(recipe: Recipe) -> Mapping[str, Any]:
    return next((step.arguments for step in recipe if step.execute == "machine-set"), {})


def _complete(step: Step, table: CommandTable) -> tuple[str, object]:
    kind = table[step.execute].arguments
    return step.execute, unstructure(structure(kind, step.arguments, step.execute)) if kind is not None else None


def _other_ram(what: str) -> MigrationRefused:
    return MigrationRefused(reason=f"{what}; in a live update the guest's RAM is the source's, so leave it out here")


def _checked(source: str, where: str, step: Step, table: CommandTable) -> Step:
    if step.execute not in ADMITTED or not table.knows(step.execute):
        reason = f"a recipe from elsewhere has only commands that make a machine: {', '.join(sorted(ADMITTED))}"
        raise RecipeInvalid(source=source, where=where, reason=reason)
    name = step.arguments.get("id")
    if isinstance(name, str) and "/" in name:
        # What is opened here goes by names: `object/x/y` would be of object x, or be object x/y.
        reason = f"id: {name!r} has a '/', which parts the names of host resources; use other characters"
        raise RecipeInvalid(source=source, where=where, reason=reason)
    kind = table[step.execute].arguments
    try:
        if kind is None:
            return step
        arguments: Any = structure(kind, step.arguments, step.execute)
        if hasattr(arguments, "check"):
            arguments.check()
    except (InvalidArguments, OptionInvalid, Unsupported) as error:
        raise RecipeInvalid(source=source, where=where, reason=str(error)) from error
    if step.execute not in DECISIONS:
        return step
    complete = unstructure(arguments)
    assert isinstance(complete, dict)
    return Step(step.execute, complete)


def _require_no_numbers(recipe: Recipe) -> None:
    """Raise `RecipeInvalid` for a number of a descriptor: here it could be any, also of its own channel."""
    for number, step in enumerate(recipe, 1):
        if step.execute in _WITHOUT_NUMBERS and step.arguments.get("fd") is not None:
            instead = _WITHOUT_NUMBERS[step.execute]
            reason = f"fd: {step.arguments['fd']} is a descriptor of another process; {instead}"
            raise RecipeInvalid(source=recipe.source, where=f"command {number} ({step.execute})", reason=reason)


def _check_whole(source: str, steps: tuple[Step, ...]) -> None:
    names = [step.execute for step in steps]
    for name in NEEDED:
        if names.count(name) != 1:
            reason = f"it has {name} {names.count(name)} times; the recipe of a whole machine has it once"
            raise RecipeInvalid(source=source, where="as a whole", reason=reason)
    seen: set[str] = set()
    last = steps[0]
    for number, step in enumerate(steps, 1):
        where = f"command {number} ({step.execute})"
        if rank(step) < rank(last):
            reason = f"it comes before {last.execute}, not after it: a recipe has the order of the phases"
            raise RecipeInvalid(source=source, where=where, reason=reason)
        last = step
        if "id" in step.arguments:
            name = name_of(step)
            if name in seen:
                raise RecipeInvalid(source=source, where=where, reason=f"{name!r} is there twice; a name is given once")
            seen.add(name)


def _overridden(source: Recipe, overrides: Recipe) -> Recipe:
    steps = list(source)
    if any(step.execute == "set-numa-node" for step in overrides):
        steps = [step for step in steps if step.execute != "set-numa-node"]
    for override in overrides:
        steps = _laid_over(steps, override)
    return Recipe(source.source, tuple(steps)).ordered(rank)


def _laid_over(steps: list[Step], override: Step) -> list[Step]:
    if override.execute == "set-numa-node":
        return [*steps, override]
    if override.execute in DECISIONS:
        return [
            Step(step.execute, {**step.arguments, **override.arguments}) if step.execute == override.execute else step
            for step in steps
        ]
    # What has no name of its own stands for itself, and is none of those that are there.
    if "id" not in override.arguments or not any(name_of(step) == name_of(override) for step in steps):
        return [*steps, override]
    return [override if name_of(step) == name_of(override) else step for step in steps]


def _opened(overrides: Recipe) -> Iterable[str]:
    return (resource.name for step in overrides for resource in resources_of(step))
