"""Random commands in random phases: what is admitted, and where the machine is afterwards, as the model has it.

Hypothesis explores from a worker thread; the machine lives in the test's own trio loop, and each rule is one visit.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import hypothesis.strategies as st
import pytest
import trio
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.phases.admission_cases import CASES, DEFINITION, WAY_ON, Case, State, proper
from tests.phases.admission_model import (
    DESIGN,
    GRANTED,
    LENDABLE,
    NEEDS,
    NOTED,
    WITHHELD,
    has,
    phases_of,
    refusals,
    told,
)
from tests.phases.admission_rig import GRANTS, HANGS, Rig, open_rig, opened, unexpected
from tests.trees import out_of_order
from vmm.phases.catalog import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

STEPS: Final = 10_000
"""At least so many are taken."""
ROUNDS: Final = 200
PER_ROUND: Final = 100
"""At most; hypothesis spends some of them on choosing."""


# --- the check ----------------------------------------------------------------------------------------------


@final
class Checked:
    """A machine beside its model: whatever is done to the one is done to the other, and compared."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.state = State()
        self.unready: str = ""

    async def execute(self, grant: str, case: Case) -> None:
        """Have the session with `grant` send `case`; compare the reply and where the machine is with the model."""
        state = self.state
        before = state.phase
        expected = refusals(
            case.command,
            state.phase,
            grant,
            case.arguments,
            reserved=state.reserved,
            noting=state.awaits,
            traits=state.traits,
        )
        fds = [os.open("/dev/null", os.O_RDONLY)] if case.sends_fd else []
        if case.sends_fd:
            state.unclaimed.add(grant)
        reply = await self.rig.ask(grant, case.command, self.arguments(case), fds)
        where = f"{case} by {grant} in {self.rig.path}, model {state}: {reply}"
        error = reply.get("error")
        found = told(case.command, error) if error is not None else None
        if expected:
            assert found in expected, f"{where}: expected one of {expected}"
            return
        assert found is None, f"{where}: not admitted"
        if state.awaits and case.command in NOTED:
            assert case.can_be_noted == (error is None), (
                f"{where}: should {'' if case.can_be_noted else 'not '}be noted"
            )
            state.noted = state.noted or error is None
            await self.follow(before)
            return
        works = case.works(state, grant)
        assert works is None or works == (error is None), f"{where}: should {'work' if works else 'fail'}"
        if error is None:
            case.then(state, grant)
        if case.claims_fd:
            state.unclaimed.discard(grant)
        await self.follow(before)

    def arguments(self, case: Case) -> dict[str, Any]:
        """Return the arguments with the rig's own paths."""
        rig = self.rig
        text = json.dumps(dict(case.arguments))
        for name, path in (
            ("@to-main", rig.destination.main),
            ("@to-cpr", rig.destination.cpr),
            ("@from-main", rig.source.main),
            ("@from-cpr", rig.source.cpr),
            ("@nowhere", str(rig.sockets / "nowhere")),
            ("@state", str(rig.sockets.parent / "state")),
        ):
            text = text.replace(name, path)
        arguments: dict[str, Any] = json.loads(text)
        return arguments

    async def follow(self, before: str) -> None:
        """Take note of where the machine has gone; it must be there, or under way."""
        state, rig = self.state, self.rig
        if state.phase == "ended":
            rig.destination.hang_up()
            with trio.fail_after(HANGS):
                await rig.ended.wait()
            assert unexpected(rig.failure) == []
            return
        if state.phase == before:
            assert rig.path == DESIGN[before].path
            return
        if state.phase == "migrating" and before == "running":
            rig.destination.accept(update=state.stage == "hello")
        if before in ("migrating", "quiesced", "handover") or (before, state.phase) == ("running", "postmigrate"):
            await rig.wait_path(DESIGN[state.phase].path)
            if state.phase == "running":
                rig.destination.hang_up()
        # Everywhere else the reply waits until the machine is there.
        assert rig.path == DESIGN[state.phase].path, f"{rig.path}, model {state}"
        await self.compare_tokens()

    async def compare_tokens(self) -> None:
        """Compare what each open window grants and withholds with the model."""
        node = await self.rig.admin("query-nursery-tree")
        found = dict(_windows(node))
        open_phases = [self.state.phase, *DESIGN[self.state.phase].around]
        expected = {
            phase: (
                {
                    kind: None if scope is None else sorted(scope)
                    for kind, scope in GRANTED[phase].items()
                    if has(phase, kind, self.state.traits)
                },
                sorted(WITHHELD[phase]),
            )
            for phase in open_phases
        }
        for aside in ("fd_receive", "stream_receive"):
            found.pop(aside, None)
        assert found == expected, f"granted {found}, model {expected}"

    async def compare_commands(self, grant: str) -> None:
        """Compare what `query-commands` tells the session with `grant` with the model."""
        state = self.state
        reply = await self.rig.ask(grant, "query-commands", {"extended": True})
        for info in reply["return"]:
            name = info["name"]
            assert info["phases"] == phases_of(name), name
            expected = not refusals(
                name, state.phase, grant, reserved=state.reserved, noting=state.awaits, traits=state.traits
            )
            assert info["admitted"] == expected, f"{name} by {grant}, {state}"

    # What happens beside commands.

    async def destination_goes_on(self) -> None:
        """Let the live update's destination do its next step."""
        state, destination = self.state, self.rig.destination
        before = state.phase
        with trio.fail_after(HANGS):
            if state.stage == "hello":
                await destination.describe()
                state.stage = "building"
            elif state.stage == "building":
                await destination.build()
                # Phase quiesced waits for nobody: handover opens while the destination loads.
                state.stage, state.phase = "loading", "handover"
            elif state.stage == "loading":
                await destination.load()
                state.stage = "offered"
            else:
                await destination.take()
                state.stage, state.phase = "", "postmigrate"
        await self.follow(before)

    async def destination_hangs_up(self) -> None:
        """Let the destination go away: the guest stays."""
        before = self.state.phase
        self.rig.destination.hang_up()
        self.state.stage, self.state.phase = "", "running"
        await self.follow(before)

    async def source_describes(self) -> None:
        """Let a source come: the machine is built as it says."""
        recipe: list[dict[str, Any]] = [
            {"execute": "machine-set", "arguments": DEFINITION},
            *({"execute": name} for name in ("accel-set", "cpu-model-set", "finish-machine-init")),
        ]
        before = self.state.phase
        with trio.fail_after(HANGS):
            await self.rig.source.describe(recipe)
        self.state.phase, self.state.awaits, self.state.reserved = "incoming", False, True
        await self.follow(before)

    async def source_hangs_up(self) -> None:
        """Let the source go away: there is nothing to go on with."""
        before = self.state.phase
        self.rig.source.hang_up()
        self.state.phase = "ended"
        await self.follow(before)

    def require_all_closed(self) -> None:
        """After the end: everything was closed in reverse, and nothing is left on disk."""
        events = self.rig.told()
        if len(events) < 1000:
            assert out_of_order(opened(events), ("open", "granted"), ("leave", "revoked")) == []
        assert os.listdir(self.rig.sockets) == []


def _windows(node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if node["window"]:
        yield node["phase"], ({it["token"]: it.get("scope") for it in node["tokens"]}, node["withholds"])
    for child in node["children"]:
        yield from _windows(child)


# --- the exploration ----------------------------------------------------------------------------------------


@final
@attrs.define(eq=False)
class Yard:
    """Where machines are started and ended; lives in the trio loop."""

    folder: Path
    nursery: trio.Nursery
    steps: int = 0
    seen: set[tuple[str, str]] = attrs.Factory(set)
    """Phases with the commands that were admitted, or not, there."""
    asked: set[tuple[str, str]] = attrs.Factory(set)
    """Phases, and the sessions that have asked there what is admitted."""
    _leave: trio.Event = attrs.Factory(trio.Event)
    _left: trio.Event = attrs.Factory(trio.Event)
    _held: tuple[list[str], int] = ([], 0)

    async def start(self) -> Checked:
        """Start a machine."""
        self._leave, self._left = trio.Event(), trio.Event()
        self._held = sorted(os.listdir("/proc/self/fd")), trio.lowlevel.current_statistics().tasks_living
        checked: Checked = await self.nursery.start(self._keep)
        return checked

    async def _keep(self, *, task_status: trio.TaskStatus[Checked]) -> None:
        async with open_rig(self.folder) as rig:
            checked = Checked(rig)
            task_status.started(checked)
            await self._leave.wait()
        self._left.set()

    async def end(self, checked: Checked) -> None:
        """End the machine, by a cancel if need be; nothing of it may be left."""
        self._leave.set()
        with trio.fail_after(HANGS):
            await self._left.wait()
        await trio.lowlevel.checkpoint()
        assert unexpected(checked.rig.failure) == []
        checked.require_all_closed()
        assert (sorted(os.listdir("/proc/self/fd")), trio.lowlevel.current_statistics().tasks_living) == self._held


def explorer(yard: Yard) -> type[RuleBasedStateMachine]:
    """Return the state machine whose machines stand in `yard`."""

    def visit(fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        return trio.from_thread.run(fn, *args)

    phases = st.sampled_from(("precreate", "accel", "preconfig", "devices", "running"))
    grants = st.sampled_from(tuple(GRANTS))
    cases = st.sampled_from(CASES)

    class Explorer(RuleBasedStateMachine):
        checked: Checked | None = None

        @property
        def phase(self) -> str:
            return "none" if self.checked is None else self.checked.state.phase

        def _execute(self, grant: str, case: Case) -> None:
            assert self.checked is not None
            yard.seen.add((self.phase, case.command))
            visit(self.checked.execute, grant, case)
            yard.steps += 1

        @initialize(phase=phases)
        def begin(self, phase: str) -> None:
            self.checked = visit(yard.start)
            while self.phase != phase:
                self.go_on()

        @precondition(lambda self: self.phase != "ended")
        @rule(grant=grants, case=cases)
        def somebody_sends(self, grant: str, case: Case) -> None:
            self._execute(grant, case)

        @precondition(lambda self: self.phase != "ended")
        @rule(case=cases)
        def who_may_all_sends(self, case: Case) -> None:
            if case.command != "quit":  # which would else end most machines early
                self._execute("admin", case)

        @precondition(lambda self: self.phase in WAY_ON and not self.checked.state.awaits)
        @rule()
        def go_on(self) -> None:
            state = self.checked.state  # type: ignore[union-attr]
            if state.phase == "running" and state.mode == "normal":
                self._execute("admin", proper("migrate-set-parameters"))
            self._execute("admin", proper(WAY_ON[state.phase]))

        @precondition(
            lambda self: self.phase == "precreate" and not self.checked.state.awaits and not self.checked.state.streams
        )
        @rule(grant=st.sampled_from(("migrate", "admin")))
        def await_an_update(self, grant: str) -> None:
            self._execute(grant, proper("migrate-incoming"))

        @precondition(
            lambda self: self.phase == "precreate" and self.checked.state.awaits and not self.checked.state.noted
        )
        @rule()
        def source_describes(self) -> None:
            visit(self.checked.source_describes)  # type: ignore[union-attr]
            yard.steps += 1

        @precondition(lambda self: self.phase == "incoming" and self.checked.state.reserved)
        @rule()
        def source_hangs_up(self) -> None:
            visit(self.checked.source_hangs_up)  # type: ignore[union-attr]
            yard.steps += 1

        @precondition(lambda self: self.checked is not None and self.checked.state.stage not in ("", "copying"))
        @rule()
        def destination_goes_on(self) -> None:
            visit(self.checked.destination_goes_on)  # type: ignore[union-attr]
            yard.steps += 1

        @precondition(lambda self: self.checked is not None and self.checked.state.stage != "")
        @rule()
        def destination_hangs_up(self) -> None:
            visit(self.checked.destination_hangs_up)  # type: ignore[union-attr]
            yard.steps += 1

        @precondition(lambda self: self.phase != "ended")
        @rule(grant=grants)
        def ask_what_is_admitted(self, grant: str) -> None:
            if (self.phase, grant) not in yard.asked:  # it takes long, and changes nothing
                visit(self.checked.compare_commands, grant)  # type: ignore[union-attr]
                yard.asked.add((self.phase, grant))

        @precondition(lambda self: self.phase in ("ended", "postmigrate"))
        @rule(phase=phases)
        def start_over(self, phase: str) -> None:
            self.teardown()
            self.begin(phase)

        def teardown(self) -> None:
            if self.checked is not None:
                visit(yard.end, self.checked)
                self.checked = None

    return Explorer


@pytest.mark.long
async def test_ten_thousand_random_commands_are_admitted_as_the_design_says(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        yard = Yard(tmp_path, nursery)

        def explore() -> None:
            run_state_machine_as_test(
                explorer(yard),
                settings=settings(
                    max_examples=ROUNDS,
                    stateful_step_count=PER_ROUND,
                    derandomize=True,
                    database=None,
                    deadline=None,
                    phases=(Phase.generate,),
                    suppress_health_check=list(HealthCheck),
                ),
            )

        await trio.to_thread.run_sync(explore)
    assert yard.steps >= STEPS
    # Nobody stands in these: two are no part of the chain, and three are over when a command has been answered.
    elsewhere = {"boot", "fd_receive", "stream_receive", "backends", "restoring", "quiesced", "postcopy"}
    assert {phase for phase, _ in yard.seen} >= set(DESIGN) - elsewhere
    assert {command for _, command in yard.seen} == {command.name for command in COMMANDS}


def test_the_model_knows_every_command_and_every_grant() -> None:
    assert set(NEEDS) == {command.name for command in COMMANDS}
    assert {case.command for case in CASES} == set(NEEDS)
    assert set(LENDABLE) == set(GRANTS)
