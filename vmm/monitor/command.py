"""QMP commands: a name, a handler, and what the handler's signature asks for.

A handler is a module-level function. Each of its parameters is annotated with

- a token kind, a union of kinds (any one of them will do), or `Annotated[kind, For("scope")]` for a narrowed one, or
  `Annotated[kind, ForEach("member", {...})]` where the scope goes by a member of the arguments;
- `kind | None`, for a token that only some arguments need: it is None where there is none to be had;
- `Caller`, for the commands that belong to a session (descriptors);
- one attrs class, or an annotated union of such, the arguments.

From this the table looks up tokens, the schema and the documentation are generated, and nothing is written twice.
A handler that only queries or quits and is not `async` runs at once; every other runs as a user of the innermost
window that lends to it. A handler that moves the machine on posts a `Turn` and returns it; the reply waits for it.

Commands that may change the machine take turns. Who waits does so outside all windows, so that the machine can move on
meanwhile; afterwards the tokens are looked up again.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Awaitable
from contextlib import suppress
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, Union, final, get_args, get_origin, get_type_hints

import attrs
import trio

from vmm.capabilities import Grant, MayAppendRecipe, MayCancelMigration, MayQuery, MayQuit, Token
from vmm.decisions import Turn
from vmm.errors import CommandDeferred, CommandNotFound, TokenError
from vmm.monitor import qapi
from vmm.monitor.arguments import structure, unstructure
from vmm.monitor.ports import Caller
from vmm.nursery_tree import Lending, require_granted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from vmm.capabilities import AnyToken
    from vmm.nursery_tree import Tree


@final
@attrs.frozen
class For:
    """Annotates a token parameter: the token must cover this name."""

    scope: str


@final
@attrs.frozen(eq=False)
class ForEach:
    """Annotates a token parameter: which name the token must cover goes by the value of a member of the arguments."""

    member: str
    """Its name on the wire."""
    scopes: Mapping[str, str]
    """What the token must cover, by each value that the member may have."""


@final
@attrs.frozen
class Need:
    """One token that a command asks for: any of `kinds`, covering `scope`, or what `choice` says instead."""

    parameter: str
    kinds: tuple[type[AnyToken], ...]
    scope: str | None
    choice: ForEach | None = None

    def alternatives(self) -> tuple[Need, ...]:
        """Return what may be needed, each with one scope; which it is goes by the arguments."""
        if self.choice is None:
            return (self,)
        scopes = dict.fromkeys(self.choice.scopes.values())
        return tuple(Need(self.parameter, self.kinds, scope) for scope in scopes)

    def chosen(self, arguments: Mapping[str, object]) -> Need:
        """Return the need with these unchecked `arguments`. What they leave open is not asked for."""
        if self.choice is None:
            return self
        value = arguments.get(self.choice.member)
        scope = self.choice.scopes.get(value) if isinstance(value, str) else None
        return Need(self.parameter, self.kinds, scope)

    def describe(self) -> str:
        """Return the wire names, alternatives joined by `|`, with the scope after a colon."""
        if self.choice is not None:
            return "|".join(alternative.describe() for alternative in self.alternatives())
        names = "|".join(kind.wire_name for kind in self.kinds)
        return names if self.scope is None else f"{names}:{self.scope}"


@final
@attrs.frozen
class Signature:
    """What a handler asks for, read off its annotations."""

    needs: tuple[Need, ...]
    extras: tuple[Need, ...]
    """Of tokens that may be absent."""
    caller: str | None
    arguments: tuple[str, object] | None
    returns: Any


@final
@attrs.define(slots=False, eq=False)
class Command:
    """One QMP command."""

    name: str
    _handler: Callable[..., Any] | str
    """The function; or `module:function`, so that a table can be made without importing what its commands need."""
    recorded: bool = False
    """Whether a successful execution becomes part of the machine's recipe."""
    oob: bool = False
    """Whether the command may be executed out of band."""
    moves_to: str = ""
    """For a command that moves the machine on: where to, for error texts and tables."""
    overrides: bool = False
    """Whether a process that awaits its machine from another one only notes it, to be laid over what comes."""

    @cached_property
    def handler(self) -> Callable[..., Any]:
        """The function; imported at first use."""
        if not isinstance(self._handler, str):
            return self._handler
        module, _, function = self._handler.partition(":")
        handler: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return handler

    @property
    def imported(self) -> bool:
        """Whether the handler's module is there."""
        return not isinstance(self._handler, str) or self._handler.partition(":")[0] in sys.modules

    @cached_property
    def signature(self) -> Signature:
        """The handler's annotations; read at first use, for a quick start."""
        hints = get_type_hints(self.handler, include_extras=True)
        needs: list[Need] = []
        extras: list[Need] = []
        caller: str | None = None
        arguments: tuple[str, object] | None = None
        for parameter in inspect.signature(self.handler).parameters:
            hint = hints[parameter]
            need = _need(parameter, hint)
            extra = _need(parameter, _without_none(hint)) if need is None else None
            if need is not None:
                needs.append(need)
            elif extra is not None:
                extras.append(extra)
            elif hint is Caller:
                caller = parameter
            elif arguments is None and _is_object(hint):
                arguments = (parameter, hint)
            else:
                raise TypeError(
                    f"{self.name}: parameter {parameter!r} is neither a token, the caller nor the arguments"
                )
        if not needs:
            raise TypeError(f"{self.name}: a command needs at least one token")
        return Signature(tuple(needs), tuple(extras), caller, arguments, hints.get("return"))

    @property
    def arguments(self) -> object:
        """The attrs class of the arguments, or the annotated union of such; None if there are none."""
        return self.signature.arguments[1] if self.signature.arguments else None

    @property
    def returns(self) -> Any:
        """The type of what a reply carries; None for an empty object."""
        returns = self.signature.returns
        return None if returns is type(None) or get_origin(returns) in (Turn, Awaitable) else returns

    @cached_property
    def harmless(self) -> bool:
        """Whether the command cannot do more than query, call a migration off, and quit."""
        signature = self.signature
        return all(_HARMLESS.issuperset(need.kinds) for need in (*signature.needs, *signature.extras))

    @property
    def queues(self) -> bool:
        """Whether the command waits its turn: all do that may change the machine, but those that move it on.

        These post a decision, and the phase that takes it waits for the command under way, within a time limit.
        """
        return not (self.moves_to or self.harmless or self.oob)


OVERRIDES: Final = "overrides"
"""What may-append-recipe must cover, to note a command that is to be laid over a machine that comes from elsewhere."""

_HARMLESS: Final = frozenset({MayQuery, MayQuit, MayCancelMigration})


def _need(parameter: str, hint: Any) -> Need | None:
    scope = choice = None
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        scope = next((extra.scope for extra in extras if isinstance(extra, For)), None)
        choice = next((extra for extra in extras if isinstance(extra, ForEach)), None)
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if all(isinstance(kind, type) and issubclass(kind, Token) for kind in kinds):
        return Need(parameter, kinds, scope, choice)
    return None


def _is_object(hint: Any) -> bool:
    """Say whether arguments may be of this type: an attrs class, or an annotated union of such."""
    if get_origin(hint) is Annotated:
        return any(isinstance(extra, qapi.Union) for extra in get_args(hint)[1:])
    return isinstance(hint, type) and attrs.has(hint)


def _without_none(hint: Any) -> Any:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    if type(None) not in members:
        return hint
    left = tuple(member for member in members if member is not type(None))
    return Union[left]  # noqa: UP007 - made at run time


@final
class CommandTable:
    """All commands of a machine's monitor, and the one way to run them."""

    def __init__(
        self,
        commands: Iterable[Command],
        tree: Tree,
        *,
        grant_of: Callable[[Caller], Grant],
        hint: Callable[[Sequence[type[AnyToken]], str | None], str],
        record: Callable[[str, Mapping[str, object]], None],
        notes: Callable[[Caller], bool] = lambda caller: False,
    ) -> None:
        """Make the table; `notes` says whether a caller's commands that would make a machine are noted only."""
        self._by_name: Final = {command.name: command for command in commands}
        self._tree = tree
        self._grant_of = grant_of
        self._hint = hint
        self._record = record
        self._notes = notes

    def __iter__(self) -> Iterator[Command]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Command:
        command = self._by_name.get(name)
        if command is None:
            raise CommandNotFound(reason=f"There is no command {name!r}; query-commands lists those there are")
        return command

    @property
    def imported(self) -> bool:
        """Whether every handler's module is there."""
        return all(command.imported for command in self)

    def import_handlers(self) -> None:
        """Import every handler now, where a command's first use might come at a worse time."""
        for command in self:
            _ = command.handler

    def knows(self, name: str) -> bool:
        """Say whether there is a command `name`."""
        return name in self._by_name

    def admits_oob(self, name: str) -> bool:
        """Say whether command `name` may be executed out of band."""
        return self[name].oob

    def admitted(
        self, command: Command, caller: Caller, arguments: Mapping[str, object] = MappingProxyType({})
    ) -> dict[str, tuple[AnyToken, Any]]:
        """Find the tokens for `command`, by parameter, each with its window. Raises a `TokenError`.

        Without `arguments`: those without which it could not be run with any.
        """
        grant = self._grant_of(caller)

        def find(need: Need) -> tuple[AnyToken, Any]:
            return self._tree.find(command.name, need.kinds, need.scope, grant, caller.name, self._hint)

        found = {need.parameter: find(need.chosen(arguments)) for need in command.signature.needs}
        for extra in command.signature.extras:
            with suppress(TokenError):
                found[extra.parameter] = find(extra)
        return found

    def require_admitted(self, command: Command, caller: Caller) -> None:
        """Raise the `TokenError` that `caller` would get for `command` now, if any."""
        if self.is_noted(command, caller):
            self._note_token(command, caller)
        else:
            self.admitted(command, caller)

    def is_noted(self, command: Command, caller: Caller) -> bool:
        """Say whether `command` of `caller` would only be noted now, to be laid over a machine that comes."""
        return command.overrides and self._notes(caller)

    def _note_token(
        self, command: Command, caller: Caller, arguments: Mapping[str, object] = MappingProxyType({})
    ) -> MayAppendRecipe:
        """Find the token to note `command`. The caller must be allowed what the command itself would take."""
        grant = self._grant_of(caller)
        for need in (need.chosen(arguments) for need in command.signature.needs):
            require_granted(command.name, need.kinds, need.scope, grant)
        kinds = (MayAppendRecipe,)
        token, _ = self._tree.find(command.name, kinds, OVERRIDES, grant, caller.name, self._hint)
        assert isinstance(token, MayAppendRecipe)
        return token

    def can_run_at_once(self, command: Command) -> bool:
        """Say whether `command` neither waits nor changes anything."""
        return command.harmless and not inspect.iscoroutinefunction(command.handler)

    async def execute(self, caller: Caller, name: str, arguments: Mapping[str, object]) -> object:
        """Run one command for `caller` and return its reply as JSON.

        Cancelling leaves a command that has begun running.

        Raises:
            VmmError: the command is unknown, inadmissible here, got wrong arguments, or failed.
            CommandDeferred: to a caller that is `held`, and begins it anew itself.
        """
        while True:
            try:
                return await self._execute(caller, name, arguments)
            except CommandDeferred:
                if getattr(caller, "held", False):
                    raise
                await self._tree.deferral.over()

    async def _execute(self, caller: Caller, name: str, arguments: Mapping[str, object]) -> object:
        command = self[name]
        if not command.harmless:
            await self._tree.wait_begun(name, caller.name)
            await self._tree.wait_held_off(name)
        if self.is_noted(command, caller):
            token = self._note_token(command, caller, arguments)
            structure(command.arguments or _NoArguments, arguments, name)
            token.append(OVERRIDES, name, arguments)
            return {}
        found = self.admitted(command, caller, arguments)
        signature = command.signature
        bound: dict[str, Any] = {extra.parameter: None for extra in signature.extras}
        bound.update({parameter: token for parameter, (token, _) in found.items()})
        if signature.arguments is not None:
            parameter, kind = signature.arguments
            bound[parameter] = structure(kind, arguments, name)
        elif arguments:
            structure(_NoArguments, arguments, name)
        if signature.caller is not None:
            bound[signature.caller] = caller
        if self.can_run_at_once(command):
            result = command.handler(**bound)
        else:
            result = await self._call(command, caller, bound, arguments)
        if isinstance(result, Turn):
            await self._tree.outcome(name, result)
            result = None
        return {} if result is None else unstructure(result)

    async def _call(
        self, command: Command, caller: Caller, bound: dict[str, Any], given: Mapping[str, object]
    ) -> object:
        kinds = tuple(type(token) for token in bound.values() if isinstance(token, Token))
        lending = Lending(command.name, caller.name, kinds, trio.current_time())

        async def run(**arguments: Any) -> object:
            try:
                result = await _finish(command.handler(**arguments))
                if command.recorded:
                    self._record(command.name, given)
                return result
            finally:
                if command.queues:
                    self._tree.leave_turnstile(lending)

        if command.queues:
            await self._tree.pass_turnstile(lending)
        try:
            found = self.admitted(command, caller, given)
        except BaseException:
            if command.queues:
                self._tree.leave_turnstile(lending)
            raise
        bound.update({extra.parameter: None for extra in command.signature.extras})
        bound.update({parameter: token for parameter, (token, _) in found.items()})
        inner, *outer = sorted({window for _, window in found.values()}, key=self._tree.depth, reverse=True)
        # From here to the user's start nothing waits: the windows are open, and `run` leaves the turnstile.
        result: object = await inner.call(lending, run, bound, outer=outer)
        return result


async def _finish(result: Any) -> object:
    """Await what an async handler returned; a `Turn` is left to be awaited outside the window."""
    return await result if inspect.iscoroutine(result) else result


@final
@attrs.frozen
class _NoArguments:
    """The arguments of a command that has none."""
