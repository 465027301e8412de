"""The machine's own recipe: each command that made it what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, final

from vmm.monitor.arguments import unstructure
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from collections.abc import Mapping


@final
class Recorder:
    """Grows with each recorded command; what a live update sends along."""

    what: ClassVar[str] = "The recipe"
    phase: ClassVar[str] = "boot"

    def __init__(self) -> None:
        self._steps: list[Step] = []

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
        self._steps = [
            step for step in self._steps if not (step.execute == name and step.arguments.get(member) == value)
        ]

    def rename(self, renamed: Mapping[str, str]) -> None:
        """Let the commands that made what was renamed say the new names."""
        self._steps = [
            Step(step.execute, {member: _renamed(member, value, renamed) for member, value in step.arguments.items()})
            for step in self._steps
        ]

    def recipe(self) -> Recipe:
        """Return the recipe so far."""
        return Recipe("of this machine", tuple(self._steps))


def _renamed(member: str, value: Any, renamed: Mapping[str, str]) -> Any:
    return renamed.get(value, value) if member in ("id", "chardev") and isinstance(value, str) else value
