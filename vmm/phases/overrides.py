"""What a destination is told before its machine comes: noted, and laid over the recipe that arrives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from vmm.phases.differences import DECISIONS, name_of
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from collections.abc import Mapping


@final
class Overrides:
    """The commands, in the order of their first mention. The facet of `may-append-recipe` in phase precreate."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self.noting = False
        """Whether a machine is awaited, and so commands that would make one are noted."""

    def append(self, command: str, arguments: Mapping[str, Any]) -> None:
        """Note a command. Of a decision the members add up; what else is said again replaces what was said before."""
        step = Step(command, dict(arguments))
        for number, old in enumerate(self._steps):
            if old.execute == command and command in DECISIONS:
                self._steps[number] = Step(command, {**old.arguments, **step.arguments})
                return
            if "id" in step.arguments and name_of(old) == name_of(step):
                self._steps[number] = step
                return
        self._steps.append(step)

    def recipe(self) -> Recipe:
        """Return them."""
        return Recipe("of the overrides", tuple(self._steps))

    def begin(self) -> None:
        """Note from now on."""
        self.noting = True

    def end(self) -> None:
        """Note no more, and forget what was noted."""
        self.noting = False
        self._steps.clear()
