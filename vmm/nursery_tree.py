"""Phases as nurseries: who may do what, until when, and in which order all of it ends.

A phase is two lifetimes, one inside the other::

    residents   the tasks that the phase leaves behind; they end with the machine
      window    the code that holds the phase's tokens; ends with the phase

Leaving a window waits for its users, then revokes its tokens. The next phase opens inside the residents, so tear-down
is construction reversed: the phase has its residents leave (`vmm.residents`), last started first, once its body (with
all inner phases) has left.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, final

import attrs
import trio

from vmm.capabilities import AnyToken, Grant, MayCancelMigration, MayQuery, MayQuit, Mint, Token
from vmm.decisions import Inbox, Turn, left
from vmm.deferral import Deferral
from vmm.errors import (
    CommandAborted,
    CommandDeferred,
    DeviceNotActive,
    DrainTimeout,
    MachineReserved,
    SessionNotGranted,
    TokenNotGranted,
    TokenWithheld,
    VmmError,
    leaves,
)
from vmm.residents import Residents

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence

GrantsT = TypeVar("GrantsT")
ResultT = TypeVar("ResultT")
ValueT = TypeVar("ValueT")
ViewT = TypeVar("ViewT")

_ALWAYS_LENT: Final = frozenset({MayQuery, MayQuit, MayCancelMigration})
"""What every session may be lent even while somebody else builds the machine."""


# --- windows ------------------------------------------------------------------------------------------------------


@final
@attrs.frozen(eq=False)
class Lending:
    """Tokens lent to one command of one caller."""

    command: str
    holder: str
    kinds: tuple[type[AnyToken], ...]
    since: float
    """When it was asked for; loop time, in seconds."""


@final
@attrs.define(eq=False)
class Window(Generic[GrantsT]):
    """An open window: its tokens, and the nursery of their users."""

    path: str
    grants: GrantsT
    withholds: frozenset[type[AnyToken]]
    tokens: tuple[AnyToken, ...]
    _nursery: trio.Nursery
    lendings: list[Lending] = attrs.Factory(list)

    async def call(
        self,
        lending: Lending,
        fn: Callable[..., Awaitable[ResultT]],
        arguments: Mapping[str, Any],
        *,
        outer: Iterable[Window[Any]] = (),
    ) -> ResultT:
        """Run `fn(**arguments)` as a user of the window and return what it returns. `fn` begins to run in any case.

        The window cannot close under `fn`, nor can the `outer` ones whose tokens are lent as well. Cancelling the
        caller leaves `fn` running: a client that hangs up does not undo its command.

        Raises:
            CommandAborted: the window was cancelled before `fn` finished.
        """
        lenders = (self, *outer)
        finished = trio.Event()
        result: list[ResultT] = []
        failure: list[VmmError] = []

        async def user() -> None:
            # Bugs are not caught here: they fail the window, hence the tree, whether or not a client still waits.
            try:
                result.append(await fn(**arguments))
            except* VmmError as group:
                failure.extend(error for error in leaves(group) if isinstance(error, VmmError))
            finally:
                for window in lenders:
                    window.lendings.remove(lending)
                finished.set()

        for window in lenders:
            window.lendings.append(lending)
        self._nursery.start_soon(user, name=f"{self.path}: {lending.command}")
        await finished.wait()
        if failure:
            raise failure[0]
        if not result:
            raise CommandAborted(command=lending.command)
        return result[0]


@final
@attrs.define(eq=False)
class Phase:
    """One node of the tree: a name, its residents, and what it publishes while it is open."""

    name: str
    path: str
    machine_phase: str
    tree: Tree
    residents: Residents
    since: float
    children: list[Phase] = attrs.Factory(list)
    open_window: Window[Any] | None = None
    _views: list[object] = attrs.Factory(list)

    @asynccontextmanager
    async def window(
        self,
        build: Callable[[Mint], GrantsT],
        *,
        withholds: Iterable[type[AnyToken]] = (),
    ) -> AsyncGenerator[Window[GrantsT], None]:
        """Open the window whose tokens `build` mints; close it on exit.

        Blocks on exit until every user of the window has ended, then revokes its tokens.
        """
        mint = Mint(self.path)
        grants = build(mint)
        fields = [getattr(grants, field.name) for field in attrs.fields(type(grants))]  # type: ignore[arg-type]
        tokens = tuple(held for held in fields if isinstance(held, Token))
        try:
            async with trio.open_nursery() as users:
                window = Window(self.path, grants, frozenset(withholds), tokens, users)
                self.open_window = window
                self.tree._opened(self, window)
                try:
                    yield window
                finally:
                    self.tree._closing(window)
        finally:
            mint.revoke_all()
            self.open_window = None
            self.tree._closed(self, tokens)

    @asynccontextmanager
    async def child(
        self, name: str, *, machine_phase: str | None = None, aside: bool = False
    ) -> AsyncGenerator[Phase, None]:
        """Open phase `name` inside this one. Blocks on exit until its residents have left, last started first.

        With `aside` the phase runs in a resident task beside the chain: the machine's own phase is not changed by it.
        """
        async with _phase(self.tree, self, name, machine_phase or self.machine_phase, aside=aside) as phase:
            yield phase

    async def decided(self, inbox: Inbox[ValueT], carry_out: Callable[[ValueT], ResultT]) -> ResultT:
        """Wait for a decision that `carry_out` can carry out; return its result, and close the inbox.

        A decision that fails is answered with its `VmmError` and leaves the phase as it was. One that succeeds is
        answered when the window that it leads to has opened. What the phase was cancelled in the middle of, fails. One
        that was settled before its turn came is not carried out.
        """
        try:
            while True:
                turn = await inbox.take()
                if turn.settled:
                    continue
                try:
                    await self.tree.drain(turn, f"after {self.path}")
                    result = carry_out(turn.value)
                except VmmError as error:
                    turn.fail(error)
                    continue
                except BaseException:
                    turn.fail(left(self.name))
                    raise
                self.tree.move(turn)
                return result
        finally:
            inbox.close()

    def publish(self, view: object) -> None:
        """Let `may-query` see `view`, under its class, for as long as this phase is open."""
        self._views.append(view)
        self.tree._views.setdefault(type(view), []).append(view)


# --- the tree -----------------------------------------------------------------------------------------------------


@final
class Tree:
    """The open phases of one machine, and the one place where tokens are looked up."""

    def __init__(self, observer: Callable[[str, Mapping[str, object]], None]) -> None:
        self._observer = observer
        self._open: list[Window[Any]] = []
        self._views: dict[type, list[object]] = {}
        self._turnstile = trio.CapacityLimiter(1)
        self._held_off: Turn[Any] | None = None
        self.deferral: Final = Deferral()
        """For the time in which it is not known which process has the guest."""
        self._passing: Lending | Turn[Any] | None = None
        self._moving: list[Turn[Any]] = []
        self._awaited: list[tuple[str, Turn[Any]]] = []
        self.root: Phase | None = None
        self.innermost: Phase | None = None
        self.reserved_for: str | None = None
        """Who alone may be lent more than what all always may; None for nobody in particular."""
        self._begun = trio.Event()
        self._begun.set()
        self._over = False

    @property
    def path(self) -> str:
        """Path of the innermost open phase."""
        return self.innermost.path if self.innermost else ""

    @property
    def machine_phase(self) -> str:
        """How far the machine is, in the words of `query-machine-phase`."""
        return self.innermost.machine_phase if self.innermost else "no-machine"

    def view(self, kind: type[ViewT]) -> ViewT:
        """Return the innermost published view of class `kind`. Raises `DeviceNotActive`."""
        found = self._views.get(kind)
        if not found:
            raise DeviceNotActive(
                what=getattr(kind, "what", kind.__name__), phase=getattr(kind, "phase", "a later one")
            )
        view = found[-1]
        assert isinstance(view, kind)
        return view

    # Who goes first.

    def begin_with(self, holder: str) -> None:
        """Let `holder` build the machine before anybody else may do more than query, call off and quit."""
        self.reserved_for = holder
        self._begun = trio.Event()

    def begun(self) -> None:
        """Let the others in."""
        self.reserved_for = None
        self._begun.set()

    async def wait_begun(self, command: str, holder: str) -> None:
        """Wait until whoever begins has begun, if that is not `holder` itself.

        Raises:
            CommandAborted: it never came to that.
        """
        if holder == self.reserved_for or self._begun.is_set():
            return
        await self._begun.wait()
        if self._over:
            raise CommandAborted(command=command)

    # Lending.

    def find(
        self,
        command: str,
        kinds: tuple[type[AnyToken], ...],
        scope: str | None,
        grant: Grant,
        holder: str,
        hint: Callable[[Sequence[type[AnyToken]], str | None], str] = lambda kinds, scope: "",
    ) -> tuple[AnyToken, Window[Any]]:
        """Find a token of one of `kinds` that covers `scope`, from the innermost open window outwards.

        Raises:
            SessionNotGranted: the caller's `grant` has none of the kinds.
            CommandAborted: no window is open, the machine is at its end.
            MachineReserved: somebody else is building the machine.
            TokenWithheld: an exclusive phase withholds the kind.
            TokenNotGranted: no open window has it; `hint` says what would.
        """
        allowed = require_granted(command, kinds, scope, grant)
        if self.reserved_for not in (None, holder) and not _ALWAYS_LENT.issuperset(allowed):
            raise MachineReserved(command=command, kind=_asked(allowed[0], scope), holder=str(self.reserved_for))
        if not self._open:
            raise CommandAborted(command=command)
        withheld: TokenWithheld | None = None
        possible = allowed
        for window in reversed(self._open):
            for token in window.tokens:
                if type(token) in possible and (scope is None or token.covers(scope)):
                    return token, window
            held = [kind for kind in possible if kind in window.withholds]
            if held and withheld is None:
                withheld = TokenWithheld(command=command, kind=_asked(held[0], scope), phase=window.path)
            possible = [kind for kind in possible if kind not in held]
        if withheld is not None:
            raise withheld
        kind = allowed[0]
        raise TokenNotGranted(command=command, kind=_asked(kind, scope), phase=self.path, hint=hint(allowed, scope))

    def depth(self, window: Window[Any]) -> int:
        """How far inside `window` lies; the innermost of a command's windows is where it runs."""
        return self._open.index(window)

    async def pass_turnstile(self, lending: Lending) -> None:
        """Wait until no other command that changes the machine is under way, and none moves it.

        To be awaited outside all windows: while the machine moves, the window that it leaves waits for its users.

        Raises:
            CommandAborted: the machine has come to its end meanwhile.
            CommandDeferred: see `vmm.deferral`.
        """
        await self.deferral.wait(partial(self._turnstile.acquire_on_behalf_of, lending))
        if self._over:
            self._turnstile.release_on_behalf_of(lending)
            raise CommandAborted(command=lending.command)
        self._passing = lending
        try:
            await self.wait_held_off(lending.command)
        except BaseException:
            self.leave_turnstile(lending)
            raise

    def leave_turnstile(self, holder: Lending | Turn[Any]) -> None:
        """Let the next command pass."""
        self._passing = None
        self._turnstile.release_on_behalf_of(holder)

    # Moving on.

    async def drain(self, turn: Turn[Any], phase: str, *, within: float = 10.0) -> None:
        """Wait, at most `within` seconds, for the command under way, and hold off new ones until `turn` is settled.

        Raises:
            DrainTimeout: names who did not finish.
        """
        with trio.move_on_after(within):
            await self._turnstile.acquire_on_behalf_of(turn)
            self._passing = turn
            turn.on_settled(lambda: self.leave_turnstile(turn))
            return
        holder = self._passing
        holders = (
            f"{holder.command} of {holder.holder} is" if isinstance(holder, Lending) else "a move of the machine is"
        )
        raise DrainTimeout(phase=phase, seconds=within, holders=holders)

    def hold_off(self, *, until: str) -> None:
        """Have commands that change the machine wait until the window of phase `until` opens.

        For a move between two windows that has happened before the second one is open. A command under way goes on.
        """
        self._held_off = Turn(None, until=until)
        self.move(self._held_off)

    async def wait_held_off(self, command: str) -> None:
        """Wait as long as commands are held off.

        Raises:
            CommandAborted: the machine has come to its end meanwhile.
            CommandDeferred: see `vmm.deferral`.
        """
        turn = self._held_off
        if turn is None or turn.settled:
            return
        await self.deferral.wait(turn.wait_settled)
        if self._over:
            raise CommandAborted(command=command)

    def move(self, turn: Turn[Any]) -> None:
        """Let `turn` settle by itself, when the window that it leads to opens."""
        self._moving.append(turn)

    def halt(self, error: VmmError) -> None:
        """The machine stays where it is, because of `error`: fail what should have led further."""
        moving, self._moving = self._moving, []
        for turn in moving:
            turn.fail(error)

    async def outcome(self, command: str, turn: Turn[Any]) -> None:
        """Wait until `turn`, which `command` has posted, is settled; raise what it failed with.

        Raises:
            CommandDeferred: no phase has taken it, and none will any more.
        """
        entry = (command, turn)
        self._awaited.append(entry)
        try:
            await self.deferral.wait(turn.wait)
        except CommandDeferred as deferred:
            if not turn.taken:
                turn.fail(deferred)
            await turn
        finally:
            self._awaited.remove(entry)

    def settle(self, error: VmmError | None = None) -> None:
        """The machine ends, because of `error` or as somebody asked. Fail all that waits for it to get somewhere."""
        self._over = True
        self._begun.set()
        for command, turn in self._awaited:
            turn.fail(error or CommandAborted(command=command))
        self.halt(error or left(self.path))

    # What phases and windows report.

    def _opened(self, phase: Phase, window: Window[Any]) -> None:
        self._open.append(window)
        for token in window.tokens:
            self._observer("TOKEN_GRANTED", _token_data(phase, token))
        for turn in [turn for turn in self._moving if turn.until in (None, phase.name)]:
            self._moving.remove(turn)
            turn.succeed()

    def _closing(self, window: Window[Any]) -> None:
        self._open.remove(window)

    def _closed(self, phase: Phase, tokens: Sequence[AnyToken]) -> None:
        for token in reversed(tokens):
            self._observer("TOKEN_REVOKED", _token_data(phase, token))

    def _enter(self, phase: Phase, *, innermost: Phase | None) -> None:
        self.innermost = innermost
        self._observer("PHASE_CHANGED", _phase_data(phase, opened=True))

    def _leave(self, phase: Phase, *, innermost: Phase | None) -> None:
        for view in phase._views:
            self._views[type(view)].remove(view)
        self.innermost = innermost
        self._observer("PHASE_CHANGED", _phase_data(phase, opened=False))


def require_granted(
    command: str, kinds: tuple[type[AnyToken], ...], scope: str | None, grant: Grant
) -> list[type[AnyToken]]:
    """Return those of `kinds` that `grant` has. Raises `SessionNotGranted` if there is none."""
    allowed = [kind for kind in kinds if kind in grant.kinds]
    if not allowed:
        raise SessionNotGranted(command=command, kind=_asked(kinds[0], scope), grant=grant.name)
    return allowed


def _asked(kind: type[AnyToken], scope: str | None) -> str:
    return kind.wire_name if scope is None else f"{kind.wire_name}:{scope}"


def _token_data(phase: Phase, token: AnyToken) -> dict[str, object]:
    data: dict[str, object] = {"token": token.wire_name, "path": phase.path, "phase": phase.name}
    if token.scope is not None:
        data["scope"] = sorted(token.scope)
    return data


def _phase_data(phase: Phase, *, opened: bool) -> dict[str, object]:
    return {"path": phase.path, "phase": phase.name, "machine-phase": phase.machine_phase, "opened": opened}


@asynccontextmanager
async def _phase(
    tree: Tree, parent: Phase | None, name: str, machine_phase: str, *, aside: bool = False
) -> AsyncGenerator[Phase, None]:
    path = f"{parent.path}/{name}" if parent else name
    async with trio.open_nursery() as nursery:
        residents = Residents(nursery)
        phase = Phase(name, path, machine_phase, tree, residents, trio.current_time())
        if parent:
            parent.children.append(phase)
        else:
            tree.root = phase
        tree._enter(phase, innermost=tree.innermost if aside else phase)
        try:
            yield phase
        finally:
            try:
                # Residents bound their own clean-up, so the shield is bounded by them. Without it a cancel from
                # outside would end them all at once, in no order.
                with trio.CancelScope(shield=True):
                    await residents.leave_all()
            finally:
                if parent:
                    parent.children.remove(phase)
                tree._leave(phase, innermost=tree.innermost if aside else parent)


@asynccontextmanager
async def open_tree(
    name: str, observer: Callable[[str, Mapping[str, object]], None], *, machine_phase: str = "no-machine"
) -> AsyncGenerator[Phase, None]:
    """Open the root phase of a new tree. `observer` is told of every phase and token that comes and goes."""
    async with _phase(Tree(observer), None, name, machine_phase) as phase:
        yield phase
