"""A model of who owns the guest, small enough that every state of it can be looked at.

Three processes: `0` has the guest; it begins an attempt to hand it to `1`; whoever has it then begins a second one,
with a cell of its own, to hand it to `2`. In every state every process may take its next step, die, or do nothing: so a
stall of any length, and a late waker, are among the interleavings. A limit of time may pass at any moment. A process
that dies closes its channels first, and its pidfd tells later.

What is real: each swap of a cell is carried out by `OwnershipCell`. `SOURCE` and `DESTINATION`, what either side does
from the offer on, are tables that a test holds against `vmm.cpr.handover`. What leads there is modelled by hand.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm.cpr.cell import Owner, OwnershipCell

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

if TYPE_CHECKING:
    Table = Mapping[str, tuple[str, Mapping[object, str]]]

SOURCE: Final[Table] = {
    "offer": ("offer", {None: "tell"}),
    "tell": ("send offered", {"sent": "await taking", "closed": "take back", "late": "take back"}),
    "await taking": (
        "receive running", {"running": "look", "closed": "take back", "refused": "take back", "late": "take back"},
    ),
    "look": ("owner", {True: "given", False: "take back"}),
    "take back": ("take_back", {True: "kept", False: "watch"}),
    "watch": ("owner", {True: "given", False: "ask pidfd"}),
    "ask pidfd": ("peer_is_dead", {True: "reclaim", False: "watch"}),
    "reclaim": ("reclaim", {True: "kept", False: "watch"}),
}  # fmt: skip
"""Place -> what is done there, and where each result leads. `owner` is whether the cell says RUNNING."""

DESTINATION: Final[Table] = {
    "await offer": ("receive offered", {"offered": "take", "closed": "take", "refused": "take"}),
    "take": ("take", {True: "enter", False: "ended"}),
    "enter": ("run", {True: "owns", False: "ended"}),
}

ALIVE, DYING, DEAD = "alive", "dying", "dead"


@final
@attrs.frozen
class Process:
    """One of the three."""

    at: str
    life: str = ALIVE
    attempt: int = -1
    """The attempt that it takes part in; -1 for none."""
    holds: bool = False
    """Whether it has the guest, as its own last swap said."""
    loaded: int = -1
    """How often the guest had been resumed when the state was saved that it loaded; -1 for none."""


@final
@attrs.frozen
class Attempt:
    """A hand-over: who gives, who takes, the cell's word, the messages under way, and which ends are open."""

    giver: int
    taker: int
    word: int = Owner.SOURCE
    down: tuple[str, ...] = ()
    up: tuple[str, ...] = ()
    giver_open: bool = True
    taker_open: bool = True


@final
@attrs.frozen
class State:
    """All there is."""

    processes: tuple[Process, ...]
    attempts: tuple[Attempt, ...] = ()
    resumed: int = 0
    """How often the guest went on after a pause: its state is another then."""

    def process(self, number: int, **changes: Any) -> State:
        """Return this with a process changed."""
        processes = list(self.processes)
        processes[number] = attrs.evolve(processes[number], **changes)
        return attrs.evolve(self, processes=tuple(processes))

    def attempt(self, number: int, **changes: Any) -> State:
        """Return this with an attempt changed."""
        attempts = list(self.attempts)
        attempts[number] = attrs.evolve(attempts[number], **changes)
        return attrs.evolve(self, attempts=tuple(attempts))

    def owners(self) -> list[int]:
        """Return the processes that live and have the guest."""
        return [n for n, process in enumerate(self.processes) if process.life == ALIVE and process.holds]


START: Final = State((Process("runs", holds=True), Process("idle"), Process("idle")))


class Broken(Exception):
    """A property does not hold. The text names it."""


@final
class Rules:
    """What a mutant does otherwise; the default is the protocol."""

    def __init__(self, name: str = "") -> None:
        self.name: Final = name

    def __call__(self, name: str) -> bool:
        """Say whether this is mutant `name`."""
        return self.name == name


MUTANTS: Final[Mapping[str, str]] = {
    "offers before it is loaded": "offered to one that has not loaded its state",
    "reclaims without asking the pidfd": "two owners",
    "uses a cell again": "runs with a state that is not the guest's",
    "resumes while it is offered": "two owners",
    "resumes whatever taking back said": "two owners",
    "runs without having taken": "two owners",
    "gives up watching": "runs what it has lost",
    "never takes back": "no owner is reached",
}


@final
class Cells:
    """Carries swaps out: by the real class, on one real memfd that is set to what the model's cell is."""

    def __init__(self) -> None:
        self._giver = OwnershipCell.create()
        self._taker = OwnershipCell.adopt(os.dup(self._giver.fd))

    def swap(self, name: str, word: int, *, holds: bool) -> tuple[object, int, bool]:
        """Do `name`; return its result, the cell's word, and whether who did it has the guest now."""
        view = self._giver if name in ("offer", "take_back", "reclaim") else self._taker
        os.pwrite(view.fd, word.to_bytes(4, "little"), 0)
        view._ours = holds
        result = getattr(view, name)()
        # Whoever has taken has it: nobody else may, though it does nothing yet.
        return result, int(view.owner), view.ours or (name == "take" and result)

    def close(self) -> None:
        """Close both."""
        self._giver.close()
        self._taker.close()


@final
class Model:
    """The steps of all processes."""

    def __init__(self, cells: Cells, rules: Rules) -> None:
        self._cells = cells
        self._is = rules

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """Yield what can happen next, deaths excepted, with a word for it. Raises `Broken`."""
        for n, process in enumerate(state.processes):
            if process.life == DYING:
                yield f"{n} is seen to be dead", state.process(n, life=DEAD)
            elif process.life == ALIVE:
                for what, after in self._steps_of(state, n):
                    yield f"{n}: {what}", after

    @staticmethod
    def deaths(state: State) -> Iterator[tuple[str, State]]:
        """Yield the deaths that can happen next."""
        for n, process in enumerate(state.processes):
            if process.life == ALIVE:
                yield f"{n} dies", _closed(state, n).process(n, life=DYING)

    def _steps_of(self, state: State, n: int) -> Iterator[tuple[str, State]]:
        me = state.processes[n]
        at = me.at
        if at in SOURCE:
            yield from self._by_table(SOURCE, state, n)
        elif at in DESTINATION:
            yield from self._by_table(DESTINATION, state, n)
            if at == "await offer":
                yield "is called off", _closed(_sent(state, n, "refused"), n).process(n, at="ended")
        else:
            yield from {
                "runs": self._runs, "await ready": self._await_ready, "pause": self._pause,
                "await loaded": self._await_loaded, "kept": self._kept, "given": self._given, "build": self._build,
                "await state": self._await_state, "load": self._load, "owns": self._owns,
            }.get(at, self._nothing)(state, n)  # fmt: skip

    def _nothing(self, state: State, n: int) -> Iterator[tuple[str, State]]:
        yield from ()

    # The source, up to the offer.

    def _runs(self, state: State, n: int) -> Iterator[tuple[str, State]]:
        number = len(state.attempts)
        taker = number + 1
        if number < 2 and taker != n and state.processes[taker] == Process("idle"):
            again = self._is("uses a cell again") and number == 1 and state.attempts[0].giver == n
            word = state.attempts[0].word if again else Owner.SOURCE
            begun = attrs.evolve(state, attempts=(*state.attempts, Attempt(n, taker, word)))
            begun = begun.process(n, at="await ready", attempt=number).process(taker, at="build", attempt=number)
            yield "begins an attempt", begun

    def _await_ready(self, state: State, n: int) -> Iterator[tuple[str, State]]:
        for got, after in _received(state, n, late=True):
            if got == "ready":
                yield "hears ready", after.process(n, at="pause")
            else:
                yield f"ready? {got}", _closed(after, n).process(n, at="runs")

    def _pause(self, state: State, n: int) -> Iterator[tuple[str, State]]:
        following = "offer" if self._is("offers before it is loaded") else "await loaded"
        yield "pauses and sends the state", _sent(state, n, f"state {state.resumed}").process(n, at=following)

    def _await_loaded(self, state: State, n: int) -> Iterator[tuple[str, State]]:
        for got, after in _received(state, n, late=True):
            yield f"loaded? {got}", after.process(n, at="offer" if got == "loaded" else "kept")

    def _kept(self, state: State, n: int) -> Iterator[tuple[str, State]]:
        after = _closed(state, n).process(n, at="runs")
        yield "resumes", attrs.evolve(after, resumed=after.resumed + 1)

    def _given(self, state: State, n: int) -> Iterator[tuple[str, State]]:
        yield "lets go", _closed(state, n).process(n, at="gone")

    # The destination, up to the offer.

    def _build(self, state: State, n: int) -> Iterator[tuple[str, State]]:
        yield "is ready", _sent(state, n, "ready").process(n, at="await state")
        yield "refuses", _closed(_sent(state, n, "refused"), n).process(n, at="ended")

    def _await_state(self, state: State, n: int) -> Iterator[tuple[str, State]]:
        for got, after in _received(state, n):
            if got.startswith("state"):
                yield "has the state", after.process(n, at="load", loaded=int(got.split()[1]))
            else:
                yield f"state? {got}", _closed(after, n).process(n, at="ended")

    def _load(self, state: State, n: int) -> Iterator[tuple[str, State]]:
        yield "has loaded", _sent(state, n, "loaded").process(n, at="await offer")
        yield "refuses", _closed(_sent(state, n, "refused"), n).process(n, at="ended", loaded=-1)

    def _owns(self, state: State, n: int) -> Iterator[tuple[str, State]]:
        if state.processes[n].loaded != state.resumed:
            raise Broken("runs with a state that is not the guest's")
        yield "says that it runs", _sent(state, n, "running").process(n, at="runs")

    # From the offer on.

    def _by_table(self, table: Table, state: State, n: int) -> Iterator[tuple[str, State]]:
        me = state.processes[n]
        what, leads = table[me.at]
        attempt = state.attempts[me.attempt]
        if what.startswith("send"):
            after = _sent(state, n, what.split()[1])
            for result in ("sent" if attempt.taker_open else "closed", "late"):
                yield f"{what}: {result}", after.process(n, at=self._next(leads, result, me))
            return
        if what.startswith("receive"):
            for got, after in _received(state, n, late="late" in leads):
                yield f"{what}: {got}", after.process(n, at=self._next(leads, got, me))
            return
        if what == "owner":
            running: object = attempt.word == Owner.RUNNING
            yield f"the cell says RUNNING: {running}", state.process(n, at=self._next(leads, running, me))
            return
        if what == "peer_is_dead":
            dead: object = state.processes[attempt.taker].life == DEAD
            if self._is("reclaims without asking the pidfd"):
                dead = True
            yield f"it is dead: {dead}", state.process(n, at=self._next(leads, dead, me))
            return
        yield from self._swapped(state, n, what, leads)

    def _next(self, leads: Mapping[object, str], result: object, me: Process) -> str:
        following = leads[result]
        if self._is("gives up watching") and (me.at, following) == ("ask pidfd", "watch"):
            return "kept"
        if self._is("never takes back") and following == "take back":
            return "watch"
        return following

    def _swapped(self, state: State, n: int, what: str, leads: Mapping[object, str]) -> Iterator[tuple[str, State]]:
        me = state.processes[n]
        attempt = state.attempts[me.attempt]
        taker = state.processes[attempt.taker]
        if what == "offer" and taker.loaded < 0 and taker.life == ALIVE and taker.at != "ended":
            raise Broken("offered to one that has not loaded its state")
        result, word, holds = self._cells.swap(what, attempt.word, holds=me.holds)
        following = leads[result]
        if what == "offer" and self._is("resumes while it is offered"):
            holds = True
        if what == "take_back" and self._is("resumes whatever taking back said"):
            holds, following = True, "kept"
        if what == "take" and self._is("runs without having taken"):
            holds, following = True, "owns"
        after = state.process(n, at=following, holds=holds)
        if self._is("uses a cell again") and len({a.giver for a in state.attempts}) == 1:
            for number in range(len(state.attempts)):
                after = after.attempt(number, word=word)
        else:
            after = after.attempt(me.attempt, word=word)
        if following == "ended":
            after = _closed(after, n)
        yield f"{what}: {result}", after


def _sent(state: State, n: int, message: str) -> State:
    """Return `state` with a message under way; what is sent to a closed end is lost."""
    number = state.processes[n].attempt
    attempt = state.attempts[number]
    if n == attempt.giver:
        return state.attempt(number, down=(*attempt.down, message)) if attempt.taker_open else state
    return state.attempt(number, up=(*attempt.up, message)) if attempt.giver_open else state


def _received(state: State, n: int, *, late: bool = False) -> Iterator[tuple[str, State]]:
    """Yield what `n`, which waits, can get now: the next message, the end, that its time is over; or nothing."""
    number = state.processes[n].attempt
    attempt = state.attempts[number]
    mine, other = ("up", attempt.taker_open) if n == attempt.giver else ("down", attempt.giver_open)
    waiting: tuple[str, ...] = getattr(attempt, mine)
    if waiting:
        yield waiting[0], state.attempt(number, **{mine: waiting[1:]})
    elif not other:
        yield "closed", state
    if late:
        yield "late", state


def _closed(state: State, n: int) -> State:
    """Return `state` with `n`'s ends of its channels closed."""
    for number, attempt in enumerate(state.attempts):
        if n == attempt.giver:
            state = state.attempt(number, giver_open=False, up=())
        if n == attempt.taker:
            state = state.attempt(number, taker_open=False, down=())
    return state


@final
@attrs.frozen
class Explored:
    """What was looked at."""

    states: int
    steps: int


def explore(rules: Rules) -> Explored:
    """Visit every state. Raises `Broken`, with the way there."""
    with closing(Cells()) as cells:
        model = Model(cells, rules)
        came_by: dict[State, tuple[State, str] | None] = {START: None}
        reverse: dict[State, list[State]] = {}
        queue = deque([START])
        count = 0
        while queue:
            state = queue.popleft()
            try:
                _check(state)
                lively = list(model.steps(state))
            except Broken as broken:
                raise Broken(f"{broken}: {_way(came_by, state)}") from None
            for _, after in lively:
                reverse.setdefault(after, []).append(state)
            for what, after in (*lively, *model.deaths(state)):
                count += 1
                if after not in came_by:
                    came_by[after] = state, what
                    queue.append(after)
        _check_that_an_owner_is_reached(came_by, reverse)
        return Explored(len(came_by), count)


def _check(state: State) -> None:
    if len(state.owners()) > 1:
        raise Broken("two owners")
    for process in state.processes:
        runs = process.life == ALIVE and process.at in ("runs", "await ready", "pause", "kept", "owns")
        if runs and not process.holds:
            raise Broken("runs what it has lost")


def _check_that_an_owner_is_reached(
    came_by: Mapping[State, tuple[State, str] | None], reverse: Mapping[State, list[State]]
) -> None:
    """From every state in which both sides of the present attempt live, without a death, somebody comes to own it."""
    reaching = {state for state in came_by if state.owners()}
    queue = deque(reaching)
    while queue:
        for before in reverse.get(queue.popleft(), ()):
            if before not in reaching:
                reaching.add(before)
                queue.append(before)
    for state in came_by:
        attempt = state.attempts[-1] if state.attempts else None
        both = attempt and all(state.processes[n].life == ALIVE for n in (attempt.giver, attempt.taker))
        if both and state not in reaching:
            raise Broken(f"no owner is reached: {_way(came_by, state)}")


def _way(came_by: Mapping[State, tuple[State, str] | None], state: State) -> str:
    words = []
    while (before := came_by[state]) is not None:
        state, what = before
        words.append(what)
    return "; ".join(reversed(words))
