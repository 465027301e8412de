from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
import re
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest

from vmm import capabilities, tokens
from vmm.capabilities import (
    ADMIN,
    KINDS,
    MIGRATE,
    OBSERVE,
    OPERATE,
    REPLAY,
    Cell,
    MayAddDescriptor,
    MayAdoptDescriptor,
    MayCancelMigration,
    MayConfigureMachine,
    MayCreateBackend,
    MayDismissJob,
    MayListen,
    MayOpenHostFile,
    MayPlugDevice,
    MayQuery,
    MayQuit,
    MayRestoreGuest,
    MayResumeHere,
    MayRunVcpus,
    MaySetMigrationCap,
    MaySetMigrationParam,
    MayStartMigration,
    MaySteerPostcopy,
    MaySwitchOver,
    Mint,
    Token,
)
from vmm.errors import TokenOutOfScope, TokenRevoked
from vmm.tokens import mechanism

if TYPE_CHECKING:
    from collections.abc import Awaitable

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.wire_name)


class Ender:
    """The facet of `may-quit`: notes why the end was asked for."""

    def __init__(self) -> None:
        self.causes: list[str] = []

    def end(self, cause: str) -> None:
        self.causes.append(cause)


class Sink:
    """The facet of `may-create-backend`."""

    def __init__(self) -> None:
        self.names: list[str] = []

    async def adopt(self, family: str, name: str, backend: Any) -> None:
        self.names.append(f"{family}/{name}")

    async def dismiss(self, family: str, name: str) -> None:
        self.names.remove(f"{family}/{name}")


class Configurator:
    """The facet of `may-configure-machine`."""

    def __init__(self) -> None:
        self.decisions: list[object] = []

    def decide(self, decision: object) -> Awaitable[None]:
        self.decisions.append(decision)
        return _done()


async def _done() -> None:
    return


# --- cells ------------------------------------------------------------------------------------------------


def test_a_token_leads_to_the_facet_it_was_minted_for() -> None:
    ender = Ender()
    Mint("boot")(MayQuit, ender).end("host-qmp-quit")
    assert ender.causes == ["host-qmp-quit"]


def test_a_cell_gives_the_facet_until_it_is_revoked() -> None:
    facet = object()
    cell = Cell(facet, "boot")
    assert cell.facet("may-quit") is facet
    cell.revoke()
    with pytest.raises(TokenRevoked) as caught:
        cell.facet("may-quit")
    assert str(caught.value) == "may-quit was granted by phase boot and ended with it"


def test_a_revoked_cell_keeps_nothing_alive() -> None:
    cell = Cell(Ender(), "boot")
    cell.revoke()
    assert cell._facet is None


def test_revocation_reaches_every_token_of_the_window_and_no_other() -> None:
    ender = Ender()
    gone, stays = Mint("boot/precreate"), Mint("boot")
    first, second, other = gone(MayQuit, ender), gone(MayQuit, ender), stays(MayQuit, ender)
    gone.revoke_all()
    for token in (first, second):
        with pytest.raises(TokenRevoked) as caught:
            token.end("guest-reset")
        assert str(caught.value) == "may-quit was granted by phase boot/precreate and ended with it"
    other.end("host-ui")
    assert ender.causes == ["host-ui"]


async def test_an_asynchronous_use_after_revocation_is_refused_too() -> None:
    mint = Mint("boot")
    sink = Sink()
    may = mint(MayCreateBackend, sink, only=frozenset({"chardev"}))
    mint.revoke_all()
    with pytest.raises(TokenRevoked, match=r"^may-create-backend was granted by phase boot and ended with it$"):
        await may.adopt("chardev", "serial0", object())
    assert sink.names == []


def test_a_token_shows_its_kind_window_and_scope() -> None:
    mint = Mint("boot")
    assert repr(mint(MayQuit, Ender())) == "<may-quit of boot>"
    may = mint(MayCreateBackend, Sink(), only=frozenset({"monitor", "chardev"}))
    assert repr(may) == "<may-create-backend of boot for chardev, monitor>"
    assert may.window == "boot"


# --- narrowing --------------------------------------------------------------------------------------------


async def test_a_narrowed_token_reaches_what_it_names_and_no_more() -> None:
    sink = Sink()
    may = Mint("boot")(MayCreateBackend, sink, only=frozenset({"chardev", "monitor"}))
    await may.adopt("chardev", "serial0", object())
    with pytest.raises(TokenOutOfScope) as caught:
        await may.adopt("netdev", "net0", object())
    assert str(caught.value) == "may-create-backend of phase boot covers only chardev, monitor, not 'netdev'"
    assert sink.names == ["chardev/serial0"]


async def test_only_narrows_and_leaves_the_original_as_it_was() -> None:
    sink = Sink()
    may = Mint("running")(MayCreateBackend, sink)
    narrow = may.only("chardev")
    assert type(narrow) is MayCreateBackend
    assert narrow.scope == frozenset({"chardev"})
    assert may.scope is None
    with pytest.raises(
        TokenOutOfScope, match=r"^may-create-backend of phase running covers only chardev, not 'netdev'$"
    ):
        await narrow.adopt("netdev", "net0", object())
    await may.adopt("netdev", "net0", object())
    await narrow.adopt("chardev", "serial0", object())
    assert sink.names == ["netdev/net0", "chardev/serial0"]


async def test_only_never_widens() -> None:
    may = Mint("boot")(MayCreateBackend, Sink(), only=frozenset({"chardev"}))
    both = may.only("chardev", "netdev")
    assert both.scope == frozenset({"chardev"})
    nothing = both.only("netdev")
    assert nothing.scope == frozenset()
    with pytest.raises(TokenOutOfScope) as caught:
        await nothing.adopt("netdev", "net0", object())
    assert str(caught.value) == "may-create-backend of phase boot covers only nothing, not 'netdev'"


def test_a_token_narrowed_to_nothing_does_not_come_back_as_all() -> None:
    assert Mint("boot")(MayCreateBackend, Sink()).only().only("chardev").scope == frozenset()


def test_a_narrowed_token_is_revoked_with_its_original() -> None:
    mint = Mint("boot")
    narrow = mint(MayConfigureMachine, Configurator()).only("machine")
    mint.revoke_all()
    with pytest.raises(TokenRevoked):
        narrow.decide("machine", object())


def test_a_scope_is_judged_before_revocation_so_that_the_text_names_the_first_fault() -> None:
    mint = Mint("boot")
    may = mint(MayConfigureMachine, Configurator(), only=frozenset({"machine"}))
    mint.revoke_all()
    with pytest.raises(TokenOutOfScope):
        may.decide("board", object())


@pytest.mark.parametrize(
    ("scope", "name", "covered"),
    [
        (None, None, True),
        (None, "chardev", True),
        (frozenset({"chardev"}), "chardev", True),
        (frozenset({"chardev"}), "monitor", False),
        (frozenset({"chardev"}), None, False),
        (frozenset[str](), "chardev", False),
    ],
)
def test_covers_says_what_a_use_would_find(scope: frozenset[str] | None, name: str | None, covered: bool) -> None:
    assert Mint("boot")(MayCreateBackend, Sink(), only=scope).covers(name) is covered


def test_a_token_that_is_narrowed_cannot_be_used_for_what_has_no_name() -> None:
    may = Mint("boot")(MayQuit, Ender()).only("anything")
    with pytest.raises(TokenOutOfScope) as caught:
        may.end("host-ui")
    assert str(caught.value) == "may-quit of phase boot covers only anything, not 'None'"


# --- the closed set of kinds ------------------------------------------------------------------------------


def test_every_kind_is_listed_once_and_imported_from_one_module() -> None:
    modules = [importlib.import_module(found.name) for found in pkgutil.iter_modules(tokens.__path__, "vmm.tokens.")]
    declared = {
        value
        for name, value in chain.from_iterable(vars(module).items() for module in modules)
        if isinstance(value, type) and issubclass(value, Token) and value is not Token and not name.startswith("_")
    }
    assert declared == set(KINDS)
    assert len(KINDS) == len(set(KINDS))
    assert all(getattr(capabilities, kind.__name__) is kind for kind in KINDS)


@kinds
def test_a_wire_name_is_the_class_name(kind: type[Token[Any]]) -> None:
    words = re.findall("[A-Z][a-z]*", kind.__name__)
    assert words[0] == "May"
    assert "".join(words) == kind.__name__
    assert kind.wire_name == "-".join(word.lower() for word in words)
    assert 2 <= len(words) <= 4, "may, a verb, and at most two words of a noun"


@kinds
def test_a_kind_is_final_and_has_no_room_for_more(kind: type[Token[Any]]) -> None:
    assert kind.__final__ is True  # type: ignore[attr-defined]
    token = Mint("boot")(kind, object())
    with pytest.raises(AttributeError):
        token.facet = object()  # type: ignore[attr-defined]
    assert not hasattr(token, "__dict__")


def test_no_kind_is_declared_outside_the_module() -> None:
    with pytest.raises(TypeError) as caught:

        class MayDoAnything(Token[object]):
            wire_name = "may-do-anything"

    assert str(caught.value) == "token kinds form a closed set: declare MayDoAnything in vmm.tokens"


def test_no_kind_is_derived_outside_the_module() -> None:
    with pytest.raises(TypeError, match=r"^token kinds form a closed set: declare MayQuitTwice in vmm\.tokens$"):

        class MayQuitTwice(MayQuit):  # type: ignore[misc]
            pass


@kinds
def test_only_a_mint_makes_tokens(kind: type[Token[Any]]) -> None:
    with pytest.raises(TypeError) as caught:
        kind(object(), Cell(object(), "boot"), None)  # type: ignore[arg-type]
    assert str(caught.value) == f"{kind.__name__} is minted by a phase's window only"


def test_a_second_key_opens_nothing() -> None:
    with pytest.raises(TypeError, match=r"^MayQuit is minted by a phase's window only$"):
        MayQuit(mechanism._MintKey(), Cell(Ender(), "boot"), None)


@kinds
def test_a_token_cannot_be_copied_or_sent_elsewhere(kind: type[Token[Any]]) -> None:
    token = Mint("boot")(kind, object())
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError) as caught:
            attempt(token)
        assert str(caught.value) == f"{kind.wire_name} cannot be copied or sent elsewhere"


def test_what_holds_a_token_cannot_be_pickled_or_deeply_copied_either() -> None:
    token = Mint("boot")(MayQuit, Ender())
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"^may-quit cannot be copied or sent elsewhere$"):
            attempt({"tokens": [token]})


def test_tokens_are_themselves_and_equal_to_nothing_else() -> None:
    mint, ender = Mint("boot"), Ender()
    assert mint(MayQuit, ender) != mint(MayQuit, ender)


# --- grants -----------------------------------------------------------------------------------------------


def test_each_grant_contains_the_one_below_it() -> None:
    assert OBSERVE.kinds < OPERATE.kinds < MIGRATE.kinds < ADMIN.kinds < set(KINDS)


def test_grants_are_what_they_are_called() -> None:
    assert OBSERVE.kinds == {MayQuery}
    assert OPERATE.kinds - OBSERVE.kinds == {MayQuit, MayRunVcpus, MayResumeHere, MayPlugDevice}
    assert MIGRATE.kinds - OPERATE.kinds == {
        MayDismissJob,
        MaySetMigrationCap,
        MaySetMigrationParam,
        MayListen,
        MayStartMigration,
        MayCancelMigration,
        MaySwitchOver,
        MaySteerPostcopy,
    }
    assert [grant.name for grant in (OBSERVE, OPERATE, MIGRATE, ADMIN, REPLAY)] == [
        "observe",
        "operate",
        "migrate",
        "admin",
        "incoming-recipe",
    ]


def test_no_session_may_claim_what_a_predecessor_sent() -> None:
    assert set(KINDS) - ADMIN.kinds == {MayAdoptDescriptor}


def test_a_recipe_that_came_in_a_stream_opens_no_file_and_starts_no_migration() -> None:
    assert set(KINDS) - REPLAY.kinds == {MayOpenHostFile, MayStartMigration, MayRestoreGuest}
    assert MayAdoptDescriptor in REPLAY.kinds
    assert MayAddDescriptor in REPLAY.kinds
