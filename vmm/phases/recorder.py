"""The machine's own recipe: each command that made it what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, final

from vmm.monitor.arguments import unstructure
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


@final
class Recorder:
    """Grows with each recorded command; what a live update sends along."""

    what: ClassVar[str] = "The recipe"
    phase: ClassVar[str] = "boot"

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._aside: list[Step] = []
        """What made a monitor over a single connection, which goes along only with its client."""

    def record(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Append a command that has succeeded."""
        self._steps.append(Step(name, dict(arguments)))

    def record_options(self, name: str, options: object) -> None:
        """Append a decision that was carried out, with all its defaults."""
        arguments = unstructure(options)
        assert isinstance(arguments, dict)
        self.record(name, arguments)

    def forget(self, name: str, member: str, value: str) -> None:
        """Drop the commands `name` whose argument `member` is `value`: what they made is gone."""
        self._steps = [step for step in self._steps if not _is(step, name, member, value)]
        self._aside = [step for step in self._aside if not _is(step, name, member, value)]

    def set_aside(self, name: str, member: str, value: str) -> None:
        """Keep the commands `name` whose argument `member` is `value` out of the recipe, but for who asks for them."""
        self._aside += [step for step in self._steps if _is(step, name, member, value)]
        self._steps = [step for step in self._steps if not _is(step, name, member, value)]

    def rename(self, renamed: Mapping[str, str]) -> None:
        """Let the commands that made what was renamed say the new names."""
        self._steps = [_with_new_names(step, renamed) for step in self._steps]
        self._aside = [_with_new_names(step, renamed) for step in self._aside]

    def recipe(self, *, besides: Collection[str] = ()) -> Recipe:
        """Return the recipe so far, with those commands that were set aside which made one of `besides`."""
        aside = [step for step in self._aside if step.arguments["id"] in besides]
        return Recipe("of this machine", (*self._steps, *aside))


def _is(step: Step, name: str, member: str, value: str) -> bool:
    return step.execute == name and step.arguments.get(member) == value


def _with_new_names(step: Step, renamed: Mapping[str, str]) -> Step:
    arguments = {member: _renamed(member, value, renamed) for member, value in step.arguments.items()}
    return Step(step.execute, arguments)


def _renamed(member: str, value: Any, renamed: Mapping[str, str]) -> Any:
    return renamed.get(value, value) if member in ("id", "chardev") and isinstance(value, str) else value
