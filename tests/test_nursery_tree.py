from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import trio
import trio.testing

from tests.trees import (
    Facet,
    Log,
    basic,
    grants_of,
    lending,
    looked_up,
    nothing,
    refusal,
    settings,
    tree,
    window_of,
)
from vmm.capabilities import (
    KINDS,
    OBSERVE,
    OPERATE,
    MayAdoptDescriptor,
    MayCreateBackend,
    MayOpenHostFile,
    MayQuery,
    MayQuit,
    MayRunVcpus,
    MaySetMigrationCap,
)
from vmm.errors import (
    CommandAborted,
    DeviceNotActive,
    MachineReserved,
    NameTaken,
    SessionNotGranted,
    TokenNotGranted,
    TokenRevoked,
    TokenWithheld,
    leaves,
)

if TYPE_CHECKING:
    from vmm.capabilities import AnyToken
    from vmm.nursery_tree import Phase, Window


# --- windows ----------------------------------------------------------------------------------------------


async def test_a_window_grants_while_it_is_open_and_revokes_when_it_has_closed() -> None:
    facet = Facet()
    async with tree() as boot:
        async with boot.window(basic(facet)) as window:
            may = window.grants.quit
            may.end("host-ui")
            assert window_of(boot) is window
            assert [token.wire_name for token in window.tokens] == ["may-query", "may-quit"]
        assert window_of(boot) is None
        with pytest.raises(TokenRevoked) as caught:
            may.end("guest-reset")
    assert str(caught.value) == "may-quit was granted by phase boot and ended with it"
    assert facet.uses == ["host-ui"]


async def test_a_field_that_holds_no_token_grants_none() -> None:
    import attrs

    @attrs.frozen
    class Grants:
        query: MayQuery
        quit: MayQuit | None

    async with tree() as boot, boot.window(lambda mint: Grants(mint(MayQuery, Facet()), None)) as window:  # type: ignore[arg-type]
        assert [type(token) for token in window.tokens] == [MayQuery]


async def test_a_window_waits_for_its_users_and_revokes_only_then() -> None:
    log, facet = Log(), Facet()
    begun, release = trio.Event(), trio.Event()

    async def use(may: MayQuit) -> None:
        begun.set()
        await release.wait()
        may.end("still granted")
        log.note("use ends")

    async def hold(boot: Phase, nursery: trio.Nursery) -> None:
        async with boot.window(basic(facet)) as window:
            nursery.start_soon(window.call, lending(), use, {"may": window.grants.quit})
            await begun.wait()
        log.note("closed")

    async with tree(log) as boot, trio.open_nursery() as nursery:
        nursery.start_soon(hold, boot, nursery)
        await trio.testing.wait_all_tasks_blocked()
        assert log.lines == ["open boot", "granted may-query of boot", "granted may-quit of boot"]
        release.set()
    assert facet.uses == ["still granted"]
    assert log.lines[3:] == [
        "use ends",
        "revoked may-quit of boot",
        "revoked may-query of boot",
        "closed",
        "leave boot",
    ]


async def test_a_window_that_closes_takes_no_new_users() -> None:
    begun, release = trio.Event(), trio.Event()

    async def use() -> None:
        begun.set()
        await release.wait()

    async def hold(boot: Phase, nursery: trio.Nursery) -> None:
        async with boot.window(basic()) as window:
            nursery.start_soon(window.call, lending(), use, {})
            await begun.wait()

    async with tree() as boot, trio.open_nursery() as nursery:
        nursery.start_soon(hold, boot, nursery)
        await trio.testing.wait_all_tasks_blocked()
        assert boot.open_window is not None, "it waits for its user"
        with pytest.raises(CommandAborted) as caught:
            looked_up(boot, MayQuery)
        release.set()
    assert str(caught.value) == "Command 'some-command' was cut short because its phase ended"


async def test_a_call_returns_what_its_function_returns_and_raises_what_it_raises() -> None:
    async def double(number: int) -> int:
        await trio.lowlevel.checkpoint()
        return 2 * number

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise refusal()

    async with tree() as boot, boot.window(basic()) as window:
        assert await window.call(lending(), double, {"number": 21}) == 42
        with pytest.raises(NameTaken):
            await window.call(lending(), fail, {})
        assert await window.call(lending(), double, {"number": 4}) == 8, "a failure leaves the window as it was"


async def test_a_failure_inside_a_nursery_is_told_as_itself() -> None:
    async def fail() -> None:
        async with trio.open_nursery() as nursery:

            async def child() -> None:
                raise refusal("serial1")

            nursery.start_soon(child)

    async with tree() as boot, boot.window(basic()) as window:
        with pytest.raises(NameTaken, match=r"^Chardev 'serial1' exists already; choose another name$"):
            await window.call(lending(), fail, {})


async def test_a_client_that_hangs_up_does_not_undo_its_command() -> None:
    log = Log()
    begun, release = trio.Event(), trio.Event()

    async def command() -> None:
        begun.set()
        await release.wait()
        log.note("command done")

    async with tree(log) as boot, boot.window(basic()) as window, trio.open_nursery() as nursery:
        client = trio.CancelScope()

        async def connected() -> None:
            with client:
                await window.call(lending(), command, {})
            log.note("client gone")

        nursery.start_soon(connected)
        await begun.wait()
        client.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert log.lines[-1] == "client gone"
        release.set()
    assert log.lines[-4:] == ["command done", "revoked may-quit of boot", "revoked may-query of boot", "leave boot"]


async def test_a_command_that_its_phase_cuts_short_is_told_to_its_caller() -> None:
    told: list[str] = []
    begun = trio.Event()

    async def slow() -> None:
        begun.set()
        await trio.sleep_forever()

    async def call(window: Window[Any]) -> None:
        with pytest.raises(CommandAborted) as caught:
            await window.call(lending("slow"), slow, {})
        told.append(str(caught.value))

    async with tree() as boot, trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with boot.window(basic()) as window:
                nursery.start_soon(call, window)
                await begun.wait()
                scope.cancel()
    assert told == ["Command 'slow' was cut short because its phase ended"]


async def test_a_bug_in_a_command_fails_the_tree_whoever_waits() -> None:
    async def bug() -> None:
        raise ZeroDivisionError

    log = Log()

    async def machine() -> None:
        async with tree(log) as boot, trio.open_nursery() as nursery:

            async def call(window: Window[Any]) -> None:
                with pytest.raises(CommandAborted):
                    await window.call(lending(), bug, {})
                log.note("told")

            async with boot.window(basic()) as window:
                nursery.start_soon(call, window)
                await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        await machine()
    assert [type(error) for error in leaves(caught.value)] == [ZeroDivisionError]
    assert "told" in log.lines
    assert log.lines[-1] == "leave boot"


async def test_lendings_are_shown_in_every_window_that_lends() -> None:
    release = trio.Event()
    async with (
        tree() as boot,
        boot.window(basic()) as outer,
        boot.child("inner") as phase,
        phase.window(settings()) as inner,
        trio.open_nursery() as nursery,
    ):

        async def call() -> None:
            await inner.call(lending("both"), release.wait, {}, outer=[outer])

        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        for window in (outer, inner):
            assert [(held.command, held.holder) for held in window.lendings] == [("both", "qmp0/1")]
        release.set()
        await trio.testing.wait_all_tasks_blocked()
        assert outer.lendings == inner.lendings == []


# --- lookup -----------------------------------------------------------------------------------------------


async def test_a_token_is_looked_up_from_the_innermost_window_outwards() -> None:
    async with tree() as boot, boot.window(basic()) as outer:
        assert looked_up(boot, MayQuery) == (outer.grants.query, outer)
        async with boot.child("inner") as phase, phase.window(basic()) as inner:
            assert looked_up(boot, MayQuery) == (inner.grants.query, inner)
            assert boot.tree.depth(inner) > boot.tree.depth(outer)
        assert looked_up(boot, MayQuery) == (outer.grants.query, outer)


async def test_a_window_that_stays_open_lends_to_the_phases_inside() -> None:
    async with (
        tree() as boot,
        boot.window(basic()) as outer,
        boot.child("inner") as phase,
        phase.window(settings()) as inner,
    ):
        assert looked_up(phase, MayQuit)[1] is outer
        assert looked_up(phase, MaySetMigrationCap)[1] is inner


async def test_a_narrowed_token_is_passed_over_for_what_it_does_not_cover() -> None:
    def narrowed(*names: str) -> Any:
        import attrs

        @attrs.frozen
        class Grants:
            create_backend: MayCreateBackend

        return lambda mint: Grants(mint(MayCreateBackend, Facet(), only=frozenset(names)))

    async with (
        tree() as boot,
        boot.window(narrowed("chardev", "monitor")) as outer,
        boot.child("inner") as phase,
        phase.window(narrowed("netdev")) as inner,
    ):
        assert looked_up(boot, MayCreateBackend, scope="netdev")[1] is inner
        assert looked_up(boot, MayCreateBackend, scope="chardev")[1] is outer
        with pytest.raises(TokenNotGranted) as caught:
            looked_up(boot, MayCreateBackend, scope="blockdev")
    assert str(caught.value) == (
        "Command 'some-command' needs may-create-backend:blockdev, which phase boot/inner does not grant"
    )


async def test_a_token_that_no_phase_grants_is_refused_with_a_hint_for_kind_and_scope() -> None:
    async with tree() as boot, boot.window(basic()):
        with pytest.raises(TokenNotGranted) as caught:
            boot.tree.find(
                "cont",
                (MayRunVcpus, MaySetMigrationCap),
                "vcpu0",
                OPERATE,
                "qmp0/1",
                lambda kinds, scope: f"; {kinds[0].wire_name} for {scope} is granted elsewhere",
            )
    assert str(caught.value) == (
        "Command 'cont' needs may-run-vcpus:vcpu0, which phase boot does not grant; "
        "may-run-vcpus for vcpu0 is granted elsewhere"
    )


async def test_a_grant_bounds_what_a_session_is_lent() -> None:
    async with tree() as boot, boot.window(basic()) as window:
        assert looked_up(boot, MayQuery, grant=OBSERVE)[1] is window
        with pytest.raises(SessionNotGranted) as caught:
            looked_up(boot, MayQuit, grant=OBSERVE)
        assert looked_up(boot, MayQuit, MayQuery, grant=OBSERVE)[0] is window.grants.query
    assert str(caught.value) == (
        "Command 'some-command' needs may-quit, which this session (grant observe) may not be lent"
    )


async def test_an_exclusive_child_withholds_what_its_parent_would_grant() -> None:
    async with tree() as boot, boot.window(basic()) as outer, boot.child("exclusive") as phase:
        async with phase.window(nothing, withholds=(MayQuit,)):
            with pytest.raises(TokenWithheld) as caught:
                looked_up(phase, MayQuit)
            assert looked_up(phase, MayQuery)[1] is outer, "what it does not name, it does not withhold"
        assert looked_up(phase, MayQuit)[1] is outer, "and only while its window is open"
    assert str(caught.value) == (
        "Command 'some-command' needs may-quit, which phase boot/exclusive withholds until it ends"
    )


async def test_an_exclusive_child_may_grant_itself_what_it_withholds() -> None:
    async with (
        tree() as boot,
        boot.window(basic()),
        boot.child("exclusive") as phase,
        phase.window(basic(), withholds=(MayQuit,)) as inner,
    ):
        assert looked_up(phase, MayQuit)[1] is inner


async def test_withholding_one_kind_leaves_the_other_of_a_union() -> None:
    async with (
        tree() as boot,
        boot.window(grants_of(MayOpenHostFile, MayAdoptDescriptor)) as outer,
        boot.child("exclusive") as phase,
        phase.window(nothing, withholds=(MayOpenHostFile,)),
    ):
        token, window = boot.tree.find(
            "chardev-add", (MayOpenHostFile, MayAdoptDescriptor), None, _EVERYTHING, "qmp0/1"
        )
        assert (type(token), window) == (MayAdoptDescriptor, outer)
        with pytest.raises(TokenWithheld):
            boot.tree.find("chardev-add", (MayOpenHostFile,), None, _EVERYTHING, "qmp0/1")


class _Everything:
    name = "everything"
    kinds: ClassVar[frozenset[type[AnyToken]]] = frozenset(KINDS)


_EVERYTHING: Any = _Everything()


async def test_a_machine_that_somebody_builds_is_not_lent_to_others() -> None:
    async with tree() as boot, boot.window(basic()), boot.child("inner") as phase, phase.window(settings()):
        boot.tree.reserved_for = "the incoming recipe"
        with pytest.raises(MachineReserved) as caught:
            looked_up(boot, MaySetMigrationCap)
        looked_up(boot, MaySetMigrationCap, holder="the incoming recipe")
        looked_up(boot, MayQuery)
        looked_up(boot, MayQuit)
        boot.tree.reserved_for = None
        looked_up(boot, MaySetMigrationCap)
    assert str(caught.value) == (
        "Command 'some-command' needs may-set-migration-cap, reserved for the incoming recipe until it is done; "
        "query, quit and migrate_cancel are not"
    )


# --- views ------------------------------------------------------------------------------------------------


class Clock:
    what = "The clock"
    phase = "running"

    def __init__(self, name: str) -> None:
        self.name = name


class Plain:
    pass


async def test_a_view_is_seen_while_its_phase_is_open_and_the_innermost_first() -> None:
    async with tree() as boot:
        outer, inner = Clock("outer"), Clock("inner")
        boot.publish(outer)
        assert boot.tree.view(Clock) is outer
        async with boot.child("inner") as phase:
            phase.publish(inner)
            assert boot.tree.view(Clock) is inner
        assert boot.tree.view(Clock) is outer


async def test_a_view_that_is_not_there_is_named_with_the_phase_that_brings_it() -> None:
    async with tree() as boot:
        async with boot.child("inner") as phase:
            phase.publish(Clock("inner"))
        with pytest.raises(DeviceNotActive) as caught:
            boot.tree.view(Clock)
        assert str(caught.value) == "The clock is not there before phase running"
        assert caught.value.qmp_class == "DeviceNotActive"
        with pytest.raises(DeviceNotActive, match=r"^Plain is not there before phase a later one$"):
            boot.tree.view(Plain)


async def test_a_view_is_seen_through_may_query() -> None:
    async with tree() as boot, boot.window(lambda mint: basic(boot.tree)(mint)) as window:
        clock = Clock("outer")
        boot.publish(clock)
        assert window.grants.query.view(Clock) is clock


# --- phases ---------------------------------------------------------------------------------


async def test_the_tree_knows_its_innermost_phase_and_how_far_the_machine_is() -> None:
    async with tree() as boot:
        assert (boot.tree.path, boot.tree.machine_phase) == ("boot", "no-machine")
        async with boot.child("accel", machine_phase="machine-created") as accel:
            assert (boot.tree.path, boot.tree.machine_phase) == ("boot/accel", "machine-created")
            assert boot.children == [accel]
            async with accel.child("backends"):
                assert (boot.tree.path, boot.tree.machine_phase) == ("boot/accel/backends", "machine-created")
        assert (boot.tree.path, boot.tree.machine_phase) == ("boot", "no-machine")
        assert boot.children == []
    assert (boot.tree.path, boot.tree.machine_phase) == ("", "no-machine")


async def test_a_phase_beside_the_chain_does_not_move_the_machine() -> None:
    log = Log()
    async with tree(log) as boot:
        async with boot.child("aside", aside=True) as aside:
            assert boot.tree.innermost is boot
            assert boot.children == [aside]
            async with boot.child("next") as inner:
                assert boot.tree.innermost is inner
        assert boot.tree.innermost is boot
    assert log.lines[1:5] == ["open boot/aside", "open boot/next", "leave boot/next", "leave boot/aside"]


# --- events -----------------------------------------------------------------------------------------------


async def test_the_observer_is_told_of_every_phase_and_token() -> None:
    log = Log()
    async with (
        tree(log) as boot,
        boot.child("accel", machine_phase="machine-created") as accel,
        accel.window(lambda mint: settings()(mint)),
    ):
        pass
    assert log.events == [
        ("PHASE_CHANGED", {"path": "boot", "phase": "boot", "machine-phase": "no-machine", "opened": True}),
        (
            "PHASE_CHANGED",
            {"path": "boot/accel", "phase": "accel", "machine-phase": "machine-created", "opened": True},
        ),
        ("TOKEN_GRANTED", {"token": "may-set-migration-cap", "path": "boot/accel", "phase": "accel"}),
        ("TOKEN_REVOKED", {"token": "may-set-migration-cap", "path": "boot/accel", "phase": "accel"}),
        (
            "PHASE_CHANGED",
            {"path": "boot/accel", "phase": "accel", "machine-phase": "machine-created", "opened": False},
        ),
        ("PHASE_CHANGED", {"path": "boot", "phase": "boot", "machine-phase": "no-machine", "opened": False}),
    ]


async def test_a_narrowed_token_is_told_with_its_scope() -> None:
    log = Log()

    def narrowed(mint: Any) -> Any:
        import attrs

        @attrs.frozen
        class Grants:
            create_backend: MayCreateBackend

        return Grants(mint(MayCreateBackend, Facet(), only=frozenset({"monitor", "chardev"})))

    async with tree(log) as boot, boot.window(narrowed):
        pass
    told = {"token": "may-create-backend", "path": "boot", "phase": "boot", "scope": ["chardev", "monitor"]}
    assert log.events[1:3] == [("TOKEN_GRANTED", told), ("TOKEN_REVOKED", told)]
