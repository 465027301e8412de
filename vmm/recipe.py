"""A machine as an ordered list of monitor commands.

The command line, a recipe file, a client and an incoming stream are sources of the same recipe. This module knows
its form and its order; what carries it out is an argument.

A recipe file holds QMP requests, one JSON object after another (a line each, as `--print-recipe` writes them); lines
that begin with `#` are comments. `id` is not allowed: nobody would read it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm.errors import RecipeInvalid, VmmError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

MAX_COMMANDS: Final = 4096
"""More commands than any machine needs; a hostile recipe is refused whole."""

MAX_BYTES: Final = 4 << 20


@final
@attrs.frozen
class Step:
    """One command of a recipe."""

    execute: str
    arguments: Mapping[str, Any] = attrs.Factory(dict)

    def to_json(self) -> dict[str, Any]:
        """Return the QMP request."""
        request: dict[str, Any] = {"execute": self.execute}
        if self.arguments:
            request["arguments"] = dict(self.arguments)
        return request

    def __str__(self) -> str:
        return json.dumps(self.to_json())


@final
@attrs.frozen
class Recipe:
    """An ordered list of commands, with the name of where it came from (for error texts)."""

    source: str
    steps: tuple[Step, ...] = ()

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __str__(self) -> str:
        return "".join(f"{step}\n" for step in self.steps)

    def ordered(self, rank: Callable[[Step], int]) -> Recipe:
        """Return the recipe sorted by `rank(step)`, stable within equal ranks."""
        return Recipe(self.source, tuple(sorted(self.steps, key=rank)))

    def to_json(self) -> list[dict[str, Any]]:
        """Return the recipe as it travels."""
        return [step.to_json() for step in self.steps]

    @classmethod
    def from_json(cls, source: str, requests: object) -> Recipe:
        """Check `requests`, a list of QMP requests, and make a recipe of them. Raises `RecipeInvalid`."""
        if not isinstance(requests, list):
            raise RecipeInvalid(source=source, where="as a whole", reason="it must be a list of commands")
        if len(requests) > MAX_COMMANDS:
            reason = f"{len(requests)} commands are more than the {MAX_COMMANDS} admitted"
            raise RecipeInvalid(source=source, where="as a whole", reason=reason)
        return cls(source, tuple(_step(source, f"command {n}", request) for n, request in enumerate(requests, 1)))

    @classmethod
    def parse(cls, source: str, text: str) -> Recipe:
        """Read a recipe file's text. Raises `RecipeInvalid` naming the line."""
        if len(text) > MAX_BYTES:
            reason = f"{len(text)} characters are more than the {MAX_BYTES} admitted"
            raise RecipeInvalid(source=source, where="as a whole", reason=reason)
        decoder = json.JSONDecoder(parse_constant=_no_constant)
        # Comment lines become blank, so that positions stay those of the file. A line ends at a newline and nowhere
        # else: a string may hold what Unicode has besides.
        text = "\n".join("" if line.lstrip().startswith("#") else line for line in text.split("\n"))
        requests: list[tuple[int, object]] = []
        at = 0
        while (at := _skip_blank(text, at)) < len(text):
            line = text.count("\n", 0, at) + 1
            try:
                request, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                where = f"line {error.lineno}"
                raise RecipeInvalid(source=source, where=where, reason=f"no JSON object: {error.msg}") from error
            except (RecursionError, ValueError) as error:
                what = (
                    "nested too deeply" if isinstance(error, RecursionError) else "a number that is none, or too long"
                )
                raise RecipeInvalid(source=source, where=f"line {line}", reason=f"no command: {what}") from error
            requests.append((line, request))
        if len(requests) > MAX_COMMANDS:
            return cls.from_json(source, [request for _, request in requests])
        return cls(source, tuple(_step(source, f"line {line}", request) for line, request in requests))


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _skip_blank(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _step(source: str, where: str, request: object) -> Step:
    if not isinstance(request, dict):
        raise RecipeInvalid(source=source, where=where, reason="a command must be a JSON object")
    name, arguments = request.get("execute"), request.get("arguments", {})
    if not isinstance(name, str):
        raise RecipeInvalid(source=source, where=where, reason="member 'execute' with the command's name is missing")
    if not isinstance(arguments, dict):
        raise RecipeInvalid(source=source, where=where, reason="member 'arguments' must be an object")
    for member in request:
        if member not in ("execute", "arguments"):
            reason = f"member {member!r} is unexpected; only execute and arguments are allowed"
            raise RecipeInvalid(source=source, where=where, reason=reason)
    return Step(name, arguments)


async def replay(recipe: Recipe, execute: Callable[[Step], Awaitable[object]]) -> None:
    """Carry out `recipe` in order, each command after the one before was answered.

    Raises:
        RecipeInvalid: names the first command that failed, and why; the later ones were not begun.
    """
    for number, step in enumerate(recipe, 1):
        try:
            await execute(step)
        except VmmError as error:
            where = f"command {number} ({step.execute})"
            raise RecipeInvalid(source=recipe.source, where=where, reason=str(error)) from error
