from __future__ import annotations

from collections.abc import Awaitable  # noqa: TC003 - handlers' annotations are read at run time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import attrs
import pytest
import trio
import trio.testing

from tests.trees import Facet, Log, basic, settings, tree
from vmm.capabilities import (
    ADMIN,
    KINDS,
    MIGRATE,
    OBSERVE,
    OPERATE,
    REPLAY,
    Grant,
    MayCreateBackend,
    MayListen,
    MayOpenHostFile,
    MayQuery,
    MayQuit,
    MaySetMigrationCap,
)
from vmm.decisions import Inbox, Turn
from vmm.errors import (
    CommandAborted,
    CommandNotFound,
    DrainTimeout,
    InvalidArguments,
    MachineReserved,
    NameTaken,
    SessionNotGranted,
    TokenNotGranted,
    TokenWithheld,
    VmmError,
)
from vmm.monitor.command import Command, CommandTable, For, ForEach, Need
from vmm.monitor.ports import Caller  # noqa: TC001 - as above
from vmm.phases.catalog import COMMANDS
from vmm.phases.chain import hint, phases_granting

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from vmm.nursery_tree import Phase


@attrs.define(eq=False)
class Session:
    """A caller with a grant."""

    name: str = "qmp0/1"
    grant: Grant = ADMIN
    descriptors: dict[str, int] = attrs.Factory(dict)
    by_number: bool = False

    def take_descriptors(self) -> list[int]:
        return []


@attrs.frozen(kw_only=True)
class Named:
    """Arguments with a name."""

    name: str = "nobody"


@attrs.frozen(kw_only=True)
class ByKind:
    """Arguments with a kind."""

    kind: Literal["a", "b", "c"]


@attrs.frozen(kw_only=True)
class Seen:
    """What a query returns."""

    name: str
    by: str


# Handlers. Each takes what it says it takes, and notes on the facet of may-quit or may-set-migration-cap what it did.


def look(may: MayQuery, caller: Caller, args: Named) -> Seen:
    """Say who asked for what."""
    return Seen(name=args.name, by=caller.name)


async def look_slowly(may: MayQuery) -> str:
    """Query, with a wait in it."""
    await trio.lowlevel.checkpoint()
    return "seen"


async def wait_for_event(may: MaySetMigrationCap) -> None:
    """Change something for a while."""
    may.update({"slow begins": True})
    facet: Any = may._cell.facet("")
    await facet.release.wait()
    may.update({"slow ends": True})


async def change(may: MaySetMigrationCap, args: Named) -> None:
    """Change something."""
    await trio.lowlevel.checkpoint()
    may.update({args.name: True})


def change_at_once(may: MaySetMigrationCap, args: Named) -> None:
    """Change something without waiting."""
    may.update({args.name: True})


async def refuse(may: MaySetMigrationCap) -> None:
    """Fail."""
    await trio.lowlevel.checkpoint()
    raise NameTaken(what="Chardev", name="serial0")


def go(may: MaySetMigrationCap) -> Awaitable[None]:
    """Move the machine on."""
    facet: Any = may._cell.facet("")
    turn: Turn[str] = facet.inbox.post("go")
    return turn


def leave(may: MayQuit) -> None:
    """End the machine."""
    may.end("host-qmp-quit")


def either(may: MayOpenHostFile | MaySetMigrationCap) -> Awaitable[None]:
    """Take the one token or the other."""
    assert isinstance(may, MaySetMigrationCap)
    may.update({type(may).wire_name: True})
    return _done()


def scoped(may: Annotated[MayCreateBackend, For("chardev")]) -> Awaitable[None]:
    """Take a narrowed token."""
    return may.adopt("chardev", "serial0", None)


async def may_have(may: MayQuery, file: MayOpenHostFile | None, cap: MaySetMigrationCap | MayListen | None) -> str:
    await trio.lowlevel.checkpoint()
    return ", ".join(token.wire_name for token in (may, file, cap) if token is not None)


async def _done() -> None:
    await trio.lowlevel.checkpoint()


@attrs.define(eq=False)
class Waiting(Facet):
    """A facet on which a command can wait, and one that moves the machine on can post."""

    release: trio.Event = attrs.Factory(trio.Event)
    inbox: Inbox[str] = attrs.Factory(lambda: Inbox("inner"))


@attrs.define(eq=False)
class Bench:
    """A tree with two open windows, and a table of commands."""

    table: CommandTable
    boot: Phase
    inner: Phase
    facet: Waiting
    recorded: list[tuple[str, Mapping[str, object]]]

    async def run(self, name: str, session: Session | None = None, /, **arguments: object) -> object:
        return await self.table.execute(session or Session(), name, arguments)


TABLE: Final = (
    Command("look", look),
    Command("look-slowly", look_slowly),
    Command("slow", wait_for_event),
    Command("change", change, recorded=True),
    Command("change-at-once", change_at_once),
    Command("refuse", refuse, recorded=True),
    Command("go", go, moves_to="next"),
    Command("leave", leave),
    Command("either", either),
    Command("scoped", scoped),
    Command("may-have", may_have),
)


@asynccontextmanager
async def bench() -> AsyncGenerator[Bench, None]:
    recorded: list[tuple[str, Mapping[str, object]]] = []
    facet = Waiting()
    async with tree(Log()) as boot, boot.window(basic(facet)), boot.child("inner") as inner:
        table = CommandTable(
            TABLE,
            boot.tree,
            grant_of=lambda caller: caller.grant,  # type: ignore[attr-defined]
            hint=lambda kinds, scope: f"; try {kinds[0].wire_name}",
            record=lambda name, arguments: recorded.append((name, arguments)),
        )
        async with inner.window(settings(facet)):
            yield Bench(table, boot, inner, facet, recorded)


# --- signatures -------------------------------------------------------------------------------------------


def test_a_signature_is_read_off_the_handler() -> None:
    signature = Command("look", look).signature
    assert signature.needs == (Need("may", (MayQuery,), None),)
    assert signature.caller == "caller"
    assert signature.arguments == ("args", Named)
    assert signature.returns is Seen


def test_a_union_of_kinds_is_one_need() -> None:
    (need,) = Command("either", either).signature.needs
    assert need.kinds == (MayOpenHostFile, MaySetMigrationCap)
    assert need.describe() == "may-open-host-file|may-set-migration-cap"


def test_a_scope_is_part_of_the_need() -> None:
    (need,) = Command("scoped", scoped).signature.needs
    assert need == Need("may", (MayCreateBackend,), "chardev")
    assert need.describe() == "may-create-backend:chardev"


def by_kind(
    may: Annotated[MayCreateBackend, ForEach("kind", {"a": "chardev", "b": "rng", "c": "rng"})], args: ByKind
) -> None:
    """Make something of some kind."""


def test_a_scope_may_go_by_an_argument() -> None:
    command = Command("by-kind", by_kind)
    (need,) = command.signature.needs
    assert command.arguments == ByKind
    assert need.describe() == "may-create-backend:chardev|may-create-backend:rng"
    assert [alternative.scope for alternative in need.alternatives()] == ["chardev", "rng"]
    assert [need.chosen({"kind": kind}).scope for kind in ("a", "b", "c", "d", 7, ["a"])] == [
        *("chardev", "rng", "rng"),
        *(None, None, None),
    ]
    assert need.chosen({}).scope is None


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("a", None),
        (
            "b",
            "Command 'by-kind' needs may-create-backend:rng, which phase boot does not grant; "
            "phases that grant it: backends (reached by accel-set), preconfig (reached by accel-set), "
            "devices (reached by cpu-model-set or x-exit-preconfig), running (reached by finish-machine-init or cont)",
        ),
        ("d", "Command 'by-kind': 'kind' does not accept \"d\"; it accepts 'a', 'b', 'c'"),
        (None, "Command 'by-kind': 'kind' is missing"),
    ],
)
async def test_the_token_goes_by_the_argument(kind: str | None, error: str | None) -> None:
    made: Any = attrs.make_class("Grants", ["create_backend"], frozen=True)
    facet: Any = object()
    async with tree() as boot:
        table = CommandTable(
            [Command("by-kind", by_kind)], boot.tree, grant_of=lambda _: ADMIN, hint=hint, record=lambda *_: None
        )
        async with boot.window(lambda mint: made(mint(MayCreateBackend, facet, only=frozenset({"chardev"})))):
            assert table.admitted(table["by-kind"], Session())
            arguments = {} if kind is None else {"kind": kind}
            if error is None:
                assert await table.execute(Session(), "by-kind", arguments) == {}
                return
            with pytest.raises(VmmError) as caught:
                await table.execute(Session(), "by-kind", arguments)
            assert str(caught.value) == error


def test_several_tokens_keep_their_order() -> None:
    def both(may_query: MayQuery, may_listen: Annotated[MayListen | MayQuit, For("x")]) -> None:
        """Take two."""

    assert [need.describe() for need in Command("both", both).signature.needs] == ["may-query", "may-listen|may-quit:x"]


def test_a_parameter_that_is_nothing_of_all_that_is_refused() -> None:
    def wrong(may: MayQuery, number: int) -> None:
        """Take a number."""

    with pytest.raises(TypeError) as caught:
        _ = Command("wrong", wrong).signature
    assert str(caught.value) == "wrong: parameter 'number' is neither a token, the caller nor the arguments"


def test_there_is_one_class_of_arguments() -> None:
    def wrong(may: MayQuery, args: Named, more: Named) -> None:
        """Take two."""

    with pytest.raises(TypeError, match=r"^wrong: parameter 'more' is neither a token, the caller nor the arguments$"):
        _ = Command("wrong", wrong).signature


def test_a_command_without_a_token_is_refused() -> None:
    def wrong(args: Named) -> None:
        """Take none."""

    with pytest.raises(TypeError, match=r"^wrong: a command needs at least one token$"):
        _ = Command("wrong", wrong).signature


def test_a_reply_is_empty_where_the_handler_returns_nothing_or_waits_for_a_move() -> None:
    returns = {command.name: command.returns for command in TABLE}
    assert returns["look"] is Seen
    assert returns["look-slowly"] is str
    assert [name for name, kind in returns.items() if kind is None] == [
        *("slow", "change", "change-at-once", "refuse", "go", "leave", "either", "scoped"),
    ]


def test_who_only_queries_or_quits_waits_for_nobody() -> None:
    assert [command.name for command in TABLE if command.harmless] == ["look", "look-slowly", "leave"]
    assert [command.name for command in TABLE if not command.queues] == ["look", "look-slowly", "go", "leave"]
    assert not Command("x", change, oob=True).queues


def test_a_handler_may_be_named_and_is_imported_when_it_is_used() -> None:
    command = Command("query-status", "vmm.phases.commands_machine:query_status")
    assert command.handler.__name__ == "query_status"
    assert command.signature.needs[0].kinds == (MayQuery,)


# --- execution --------------------------------------------------------------------------------------------


async def test_a_query_runs_at_once_and_returns_json() -> None:
    async with bench() as it:
        assert await it.run("look", name="x") == {"name": "x", "by": "qmp0/1"}
        assert await it.run("look") == {"name": "nobody", "by": "qmp0/1"}
        assert it.table.can_run_at_once(it.table["look"])
        assert await it.run("look-slowly") == "seen"
        assert not it.table.can_run_at_once(it.table["look-slowly"])


async def test_a_command_without_async_that_changes_something_runs_as_a_user_too() -> None:
    async with bench() as it:
        assert not it.table.can_run_at_once(it.table["change-at-once"])
        assert await it.run("change-at-once", name="x") == {}
        assert it.facet.uses == ["x"]


async def test_quit_runs_at_once() -> None:
    async with bench() as it:
        assert await it.run("leave") == {}
        assert it.facet.uses == ["host-qmp-quit"]


async def test_an_unknown_command_is_named() -> None:
    async with bench() as it:
        with pytest.raises(
            CommandNotFound, match=r"^There is no command 'nope'; query-commands lists those there are$"
        ):
            await it.run("nope")
        assert not it.table.knows("nope")
        assert it.table.knows("look")
        assert not it.table.admits_oob("look")


async def test_arguments_are_checked_before_anything_is_done() -> None:
    async with bench() as it:
        with pytest.raises(InvalidArguments) as caught:
            await it.run("change", name=5, colour="red")
        assert str(caught.value) == (
            "Command 'change': 'colour' is unexpected; there are 'name'; 'name' must be a string, not 5"
        )
        with pytest.raises(InvalidArguments, match=r"^Command 'look-slowly': 'x' is unexpected; there are none$"):
            await it.run("look-slowly", x=1)
        assert it.facet.uses == []


async def test_a_missing_token_is_told_before_wrong_arguments() -> None:
    async with bench() as it:
        with pytest.raises(TokenNotGranted):
            await it.run("scoped", colour="red")


async def test_a_command_that_fails_raises_and_leaves_the_next_one_its_turn() -> None:
    async with bench() as it:
        with pytest.raises(NameTaken):
            await it.run("refuse")
        await it.run("change", name="x")
        assert it.facet.uses == ["x"]


async def test_a_command_that_no_phase_grants_is_told_with_the_hint() -> None:
    async with bench() as it:
        with pytest.raises(TokenNotGranted) as caught:
            await it.run("scoped")
    assert str(caught.value) == (
        "Command 'scoped' needs may-create-backend:chardev, which phase boot/inner does not grant; "
        "try may-create-backend"
    )


async def test_any_kind_of_a_union_will_do() -> None:
    async with bench() as it:
        await it.run("either")
        assert it.facet.uses == ["may-set-migration-cap"]


def test_a_token_that_may_be_absent_is_no_need() -> None:
    signature = Command("may-have", may_have).signature
    assert signature.needs == (Need("may", (MayQuery,), None),)
    assert signature.extras == (
        Need("file", (MayOpenHostFile,), None),
        Need("cap", (MaySetMigrationCap, MayListen), None),
    )


async def test_a_token_that_may_be_absent_is_there_if_it_can_be_had() -> None:
    async with bench() as it:
        assert await it.run("may-have") == "may-query, may-set-migration-cap"
        assert await it.run("may-have", Session(grant=OBSERVE)) == "may-query"


async def test_a_kind_that_the_session_may_not_be_lent_is_no_alternative() -> None:
    files = Grant("files", frozenset({MayQuery, MayOpenHostFile}))
    async with bench() as it:
        with pytest.raises(TokenNotGranted) as caught:
            await it.run("either", Session(grant=files))
    assert str(caught.value) == (
        "Command 'either' needs may-open-host-file, which phase boot/inner does not grant; try may-open-host-file"
    )


async def test_a_withheld_command_is_told_by_whom() -> None:
    async with bench() as it, it.inner.child("moving") as moving, moving.window(settings(), withholds=(MayQuit,)):
        with pytest.raises(TokenWithheld, match=r"withholds until it ends$"):
            await it.run("leave")


async def test_only_what_has_succeeded_is_recorded() -> None:
    async with bench() as it:
        await it.run("change", name="x")
        await it.run("change-at-once", name="y")
        with pytest.raises(NameTaken):
            await it.run("refuse")
        assert it.recorded == [("change", {"name": "x"})]


async def test_what_is_done_is_recorded_even_if_its_client_has_hung_up() -> None:
    async with bench() as it:
        with trio.CancelScope() as client:
            client.cancel()
            # Everything is done in the client's task up to the start of the command.
            await it.run("change", name="never begun")
        assert it.facet.uses == []
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def call() -> None:
                with scope:
                    await it.run("change", name="begun")

            nursery.start_soon(call)
            while not it.inner.open_window or not it.inner.open_window.lendings:
                await trio.lowlevel.checkpoint()
            scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert it.facet.uses == ["begun"]
        assert it.recorded == [("change", {"name": "begun"})]


# --- one at a time ----------------------------------------------------------------------------------------


async def test_commands_that_change_the_machine_run_one_at_a_time() -> None:
    async with bench() as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.run, "slow")
        await trio.testing.wait_all_tasks_blocked()
        for name in ("one", "two", "three"):

            async def later(name: str = name) -> None:
                await it.run("change", Session(name), name=name)

            nursery.start_soon(later)
            await trio.testing.wait_all_tasks_blocked()
        assert it.facet.uses == ["slow begins"]
        it.facet.release.set()
        await trio.testing.wait_all_tasks_blocked()
        assert it.facet.uses == ["slow begins", "slow ends", "one", "two", "three"]


async def test_queries_do_not_wait_and_neither_does_quit() -> None:
    async with bench() as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.run, "slow")
        await trio.testing.wait_all_tasks_blocked()
        assert await it.run("look-slowly") == "seen"
        await it.run("leave")
        assert it.facet.uses == ["slow begins", "host-qmp-quit"]
        it.facet.release.set()


async def test_who_waits_is_not_lent_anything_yet() -> None:
    async with bench() as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.run, "slow")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(it.run, "change")
        await trio.testing.wait_all_tasks_blocked()
        window = it.inner.open_window
        assert window is not None
        assert [lending.command for lending in window.lendings] == ["slow"]
        it.facet.release.set()


async def test_a_client_that_hangs_up_while_it_waits_is_forgotten() -> None:
    async with bench() as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.run, "slow")
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0):
            await it.run("change", name="never")
        it.facet.release.set()
        await trio.testing.wait_all_tasks_blocked()
        await it.run("change", name="next")
        assert it.facet.uses == ["slow begins", "slow ends", "next"]


async def test_a_token_is_looked_up_again_after_the_wait() -> None:
    """What was granted when a command came may be withheld when its turn comes."""
    async with bench() as it, trio.open_nursery() as nursery:
        told: list[str] = []

        async def late() -> None:
            with pytest.raises(TokenWithheld) as caught:
                await it.run("change", name="late")
            told.append(str(caught.value))

        nursery.start_soon(it.run, "slow")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(late)
        await trio.testing.wait_all_tasks_blocked()
        async with it.inner.child("moving") as moving, moving.window(basic(), withholds=(MaySetMigrationCap,)):
            it.facet.release.set()
            await trio.testing.wait_all_tasks_blocked()
            assert told == [
                "Command 'change' needs may-set-migration-cap, which phase boot/inner/moving withholds until it ends"
            ]
        await it.run("change", name="and the turn has been given back")
        assert it.facet.uses[-1] == "and the turn has been given back"


# --- moving on --------------------------------------------------------------------------------------------


async def test_the_reply_to_a_move_comes_when_the_machine_has_got_there() -> None:
    async with bench() as it, trio.open_nursery() as nursery:
        replies: list[object] = []

        async def call() -> None:
            replies.append(await it.run("go"))

        nursery.start_soon(call)
        assert await it.inner.decided(it.facet.inbox, str.upper) == "GO"
        await trio.testing.wait_all_tasks_blocked()
        assert replies == []
        async with it.inner.child("next") as following, following.window(basic()):
            await trio.testing.wait_all_tasks_blocked()
            assert replies == [{}]


async def test_a_move_that_fails_is_told() -> None:
    def refuse_it(value: str) -> None:
        raise NameTaken(what="Machine", name=value)

    async with bench() as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.inner.decided, it.facet.inbox, refuse_it)
        with pytest.raises(NameTaken, match=r"^Machine 'go' exists already; choose another name$"):
            await it.run("go")
        nursery.cancel_scope.cancel()


async def test_a_move_waits_for_the_command_under_way_but_not_for_ever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with bench() as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.inner.decided, it.facet.inbox, str)
        nursery.start_soon(it.run, "slow", Session("qmp0/9"))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(DrainTimeout) as caught:
            await it.run("go")
        it.facet.release.set()
        nursery.cancel_scope.cancel()
    assert str(caught.value) == (
        "Phase after boot/inner could not open within 10 s: slow of qmp0/9 is still in progress"
    )


async def test_a_command_that_comes_while_the_machine_moves_does_not_keep_it_from_moving() -> None:
    """It once waited as a user of the window that the machine was about to leave."""
    async with tree() as boot, trio.open_nursery() as nursery:
        facet = Waiting()
        table = CommandTable(
            TABLE, boot.tree, grant_of=lambda caller: ADMIN, hint=lambda kind, scope: "", record=lambda *_: None
        )
        async with boot.child("inner") as inner:
            async with inner.window(settings(facet)):
                nursery.start_soon(table.execute, Session(), "go", {})
                await inner.decided(facet.inbox, str)
                nursery.start_soon(table.execute, Session("qmp0/2"), "change", {"name": "meanwhile"})
                await trio.testing.wait_all_tasks_blocked()
                assert facet.uses == []
            async with inner.child("next") as following, following.window(settings(facet)):
                await trio.testing.wait_all_tasks_blocked()
                assert facet.uses == ["meanwhile"]


async def test_the_end_of_the_machine_is_told_to_who_waits_for_a_move() -> None:
    async with bench() as it, trio.open_nursery() as nursery:
        told: list[str] = []

        async def call() -> None:
            with pytest.raises(CommandAborted) as caught:
                await it.run("go")
            told.append(str(caught.value))

        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        it.boot.tree.settle()
        await trio.testing.wait_all_tasks_blocked()
        assert told == ["Command 'go' was cut short because its phase ended"]


# --- who goes first ---------------------------------------------------------------------------------------


async def test_who_comes_during_the_start_may_query_and_quit_and_waits_with_the_rest() -> None:
    async with bench() as it, trio.open_nursery() as nursery:
        it.boot.tree.begin_with("the start recipe")
        nursery.start_soon(it.run, "change")
        await it.run("look")
        await it.run("look-slowly")
        await it.run("leave")
        await it.run("change", Session("the start recipe"), name="recipe")
        await trio.testing.wait_all_tasks_blocked()
        assert it.facet.uses == ["host-qmp-quit", "recipe"]
        it.boot.tree.begun()
        await trio.testing.wait_all_tasks_blocked()
        assert it.facet.uses == ["host-qmp-quit", "recipe", "nobody"]


async def test_a_machine_that_comes_from_elsewhere_is_reserved() -> None:
    async with bench() as it:
        it.boot.tree.reserved_for = "the incoming recipe"
        with pytest.raises(MachineReserved, match=r"^Command 'change' needs may-set-migration-cap, reserved for"):
            await it.run("change")
        await it.run("look")
        await it.run("change", Session("the incoming recipe"), name="recipe")
        assert it.facet.uses == ["recipe"]


# --- the real catalogue -----------------------------------------------------------------------------------

READING = {
    *("query-version", "query-commands", "query-qmp-schema", "query-name", "query-uuid", "query-machine-phase"),
    *("query-nursery-tree", "query-fdsets", "query-chardev", "query-status", "query-cpus-fast"),
    *("query-migrate-capabilities", "query-migrate-parameters", "query-migrate"),
}


def test_names_are_unique() -> None:
    names = [command.name for command in COMMANDS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_a_signature_a_word_about_itself_and_a_phase(command: Command) -> None:
    assert command.signature.needs
    assert (command.handler.__doc__ or "").strip().endswith(".")
    assert phases_granting(command.signature.needs), "no phase grants all that it needs"


OTHER_READERS: Final = {"device-list-properties", "x-query-snapshots"}
"""Named by QEMU, and as what QEMU has not."""


def test_what_begins_with_query_reads_and_nothing_else_does() -> None:
    reading = {
        command.name for command in COMMANDS if all(need.kinds == (MayQuery,) for need in command.signature.needs)
    }
    assert reading == {command.name for command in COMMANDS if command.name.startswith("query-")} | OTHER_READERS
    assert reading >= READING


def test_what_moves_the_machine_on_says_where_to_and_posts_a_turn() -> None:
    movers = {command.name: command.moves_to for command in COMMANDS if command.moves_to}
    assert movers == {
        "machine-set": "accel",
        "x-exit-precreate": "accel",
        "accel-set": "preconfig",
        "cpu-model-set": "devices",
        "x-exit-preconfig": "devices",
        "finish-machine-init": "running",
        "migrate": "migrating",
        "snapshot-save": "migrating",
    }


@asynccontextmanager
async def everything() -> AsyncGenerator[CommandTable, None]:
    """A window that grants every kind there is, under the real table: what a grant refuses is refused by it alone."""
    made: Any = attrs.make_class("Everything", [kind.wire_name.replace("-", "_") for kind in KINDS], frozen=True)
    async with tree() as boot:
        table = CommandTable(
            COMMANDS,
            boot.tree,
            grant_of=lambda caller: caller.grant,  # type: ignore[attr-defined]
            hint=hint,
            record=lambda *_: None,
        )
        async with boot.window(lambda mint: made(*(mint(kind, object()) for kind in KINDS))):
            yield table


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
async def test_who_may_observe_may_change_nothing(command: Command) -> None:
    async with everything() as table:
        if command.name.startswith("query-") or command.name in OTHER_READERS:
            assert table.admitted(command, Session(grant=OBSERVE))
            return
        with pytest.raises(SessionNotGranted) as caught:
            await table.execute(Session(grant=OBSERVE), command.name, {})
        first = next(need for need in command.signature.needs if MayQuery not in need.kinds)
        asked = first.kinds[0].wire_name + ("" if first.scope is None else f":{first.scope}")
        assert str(caught.value) == (
            f"Command '{command.name}' needs {asked}, which this session (grant observe) may not be lent"
        )


async def test_each_grant_admits_what_it_is_called_after() -> None:
    def admitted(table: CommandTable, grant: Grant) -> set[str]:
        found = set()
        for command in COMMANDS:
            try:
                table.admitted(command, Session(grant=grant))
            except SessionNotGranted:
                continue
            found.add(command.name)
        return found

    async with everything() as table:
        observe, operate, migrate = (admitted(table, grant) for grant in (OBSERVE, OPERATE, MIGRATE))
        assert operate - observe == {"cont", "stop", "system_reset", "quit", "device_add", "device_del"}
        assert migrate - operate == {
            *("migrate-set-capabilities", "migrate-set-parameters", "migrate", "migrate-incoming", "migrate_cancel"),
            *("migrate-continue", "migrate-start-postcopy", "migrate-pause", "migrate-recover"),
            *("calc-dirty-rate", "set-vcpu-dirty-limit", "cancel-vcpu-dirty-limit"),
            *(
                "x-cpr-check",
                "x-cpr-abandon",
                "x-cpr-undo",
                "x-cpr-forget",
                "x-allow-difference",
                "job-cancel",
                "job-dismiss",
                "snapshot-save",
                "snapshot-delete",
            ),
        }
        assert admitted(table, ADMIN) == {command.name for command in COMMANDS}
        beyond_a_recipe = {command.name for command in COMMANDS} - admitted(table, REPLAY)
        assert beyond_a_recipe == {
            *("migrate", "loadvm", "x-cpr-check", "x-cpr-undo", "x-cpr-forget", "x-allow-resource", "calc-dirty-rate"),
            *("set-vcpu-dirty-limit", "cancel-vcpu-dirty-limit"),
            *("snapshot-save", "snapshot-load", "snapshot-delete"),
        }


async def test_a_command_that_comes_too_early_is_told_the_token_the_phases_and_the_way() -> None:
    async with tree() as boot, boot.window(basic()):
        table = CommandTable(COMMANDS, boot.tree, grant_of=lambda caller: ADMIN, hint=hint, record=lambda *_: None)
        with pytest.raises(TokenNotGranted) as caught:
            await table.execute(Session(), "migrate", {})
    assert str(caught.value) == (
        "Command 'migrate' needs may-start-migration, which phase boot does not grant; "
        "phases that grant it: running (reached by finish-machine-init or cont)"
    )
