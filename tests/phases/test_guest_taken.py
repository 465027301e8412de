"""A guest that is copied to a process of the same host, which takes it without waiting to be told; and what goes ahead.

Over a unix socket both processes share an ownership cell. What its swaps say decides, whatever else is heard.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

import vmm
from tests.phases.copy_kit import (
    Peer,
    arrived,
    commands,
    destination_peer,
    empty,
    goes_on,
    move,
    outcome,
    parts,
    port_of,
    started,
    status,
    ticked,
)
from vmm.cpr.cell import Owner, OwnershipCell
from vmm.errors import HostFileRefused
from vmm.migration.outflow import Outflow
from vmm.migration.precopy import Precopy
from vmm.migration.pump import Bulk
from vmm.migration.ram_records import RamPass
from vmm.migration.registry import StateRegistry
from vmm.migration.stream_records import PROCESSOR, Section
from vmm.phases import copying
from vmm.phases.copy_control import Canceller, Claim
from vmm.phases.machine import Machine
from vmm.phases.processors import KvmProcessors
from vmm.phases.quiesced import Pause
from vmm.phases.running import Run
from vmm.phases.start import Start
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine
    from vmm.migration.registry import CheckedAhead

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

WITHOUT_A_WORD: Final = (
    "migrate: the destination has taken the guest, and did not say that it runs; cont runs it here again, for whoever "
    "knows that it does not run there"
)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note each time that a source tells a destination that the guest is its own."""
    found: list[str] = []
    let_go = Outflow.let_go

    async def noted(flow: Outflow) -> None:
        found.append("yours")
        await let_go(flow)

    monkeypatch.setattr(Outflow, "let_go", noted)
    return found


@asynccontextmanager
async def sharing(source: EmbeddedMachine, folder: Path) -> AsyncGenerator[tuple[Peer, OwnershipCell], None]:
    """Have `source` copy its guest to the test, which shares a cell, until the guest stands and was sent."""
    with closing(OwnershipCell.create(ours=False)) as cell:
        async with destination_peer(source, folder) as peer:
            peer.sends_along = cell.fd
            await peer.prepare()
            await outcome(source, "device")
            yield peer, cell


async def test_a_destination_on_the_same_host_takes_the_guest_without_being_told(
    told: list[str], tmp_path: Path
) -> None:
    async with started() as source, empty() as destination:
        assert (await move(source, destination, tmp_path))["status"] == "completed"
        await arrived(source, destination)
        assert await status(source) == "postmigrate"
        assert not told


async def test_one_that_is_connected_otherwise_is_told(told: list[str]) -> None:
    async with started() as source, empty() as destination:
        await destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        await source.execute("migrate", uri=f"tcp:127.0.0.1:{await port_of(destination)}")
        await arrived(source, destination)
        assert told == ["yours"]


def no_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*, ours: bool) -> OwnershipCell:
        raise HostFileRefused(action="create", path="an ownership cell", reason="Too many open files")

    monkeypatch.setattr(OwnershipCell, "create", create)


def not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Claim, "offer", lambda claim: None)


@pytest.mark.parametrize("why", [no_cell, not_offered])
async def test_a_destination_that_is_offered_nothing_waits_to_be_told(
    why: Callable[[pytest.MonkeyPatch], None], told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why(monkeypatch)
    async with started() as source, empty() as destination:
        assert (await move(source, destination, tmp_path))["status"] == "completed"
        await arrived(source, destination)
        assert told == ["yours"]


async def test_a_source_that_is_asked_by_word_takes_its_offer_back_and_tells(told: list[str], tmp_path: Path) -> None:
    async with started() as source, sharing(source, tmp_path) as (peer, cell):
        assert cell.owner is Owner.OFFERED
        await peer.say("loaded")
        assert (await outcome(source))["status"] == "completed"
        assert told == ["yours"]
        assert not cell.take()


async def test_a_destination_that_hangs_up_before_it_has_taken_the_guest_keeps_nothing(tmp_path: Path) -> None:
    async with started() as source, sharing(source, tmp_path) as (peer, cell):
        peer.close()
        info = await outcome(source)
        assert (info["status"], info["error-desc"]) == (
            "failed", "The destination closed the connection; the guest goes on in the source"
        )  # fmt: skip
        assert not cell.take()
        await goes_on(source)


@pytest.mark.parametrize("word", ["", "refused"])
async def test_what_was_taken_is_gone_whatever_is_heard_afterwards(word: str, tmp_path: Path) -> None:
    complaints: list[str] = []
    start = Start(Recipe.from_json("of this test", commands()), complain=complaints.append)
    async with vmm.machine(start=start) as source:
        await ticked(source, 5)
        async with sharing(source, tmp_path) as (peer, cell):
            assert cell.take()
            if word:
                await peer.say("refused", "on second thoughts")
            peer.close()
            assert (await outcome(source))["status"] == "completed"
        assert await status(source) == "postmigrate"
        assert complaints == [WITHOUT_A_WORD]
        await source.execute("cont")
        await goes_on(source)


async def test_the_downtime_ends_when_the_guest_runs_and_not_when_that_is_heard(tmp_path: Path) -> None:
    async with started() as source:
        began = time.monotonic_ns()
        async with sharing(source, tmp_path) as (peer, cell):
            assert cell.take()
            at = time.monotonic_ns()
            await ticks_of_the_clock(100_000_000)
            await peer.say("loaded", at=at)
            info = await outcome(source)
        assert info["downtime"] <= (at - began) // 1_000_000 + 1
        assert info["total-time"] >= 100


async def ticks_of_the_clock(count: int) -> None:
    """Let so many ns pass."""
    until = time.monotonic_ns() + count
    while time.monotonic_ns() < until:
        await trio.lowlevel.checkpoint()


async def test_a_cancel_takes_the_offer_back(tmp_path: Path) -> None:
    async with started() as source, sharing(source, tmp_path) as (_, cell):
        await source.execute("migrate_cancel")
        assert not cell.take()
        assert (await outcome(source))["status"] == "cancelled"
        await goes_on(source)


async def test_a_cancel_while_the_guest_is_being_stopped_offers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest, offer, offers = Machine.rest, Claim.offer, []
    async with started() as source:

        async def cancelled(machine: Machine) -> None:
            await rest(machine)
            await source.execute("migrate_cancel")

        def noted(claim: Claim) -> None:
            offers.append(claim)
            offer(claim)

        monkeypatch.setattr(Machine, "rest", cancelled)
        monkeypatch.setattr(Claim, "offer", noted)
        with closing(OwnershipCell.create(ours=False)) as cell:
            async with destination_peer(source, tmp_path) as peer:
                peer.sends_along = cell.fd
                await peer.prepare()
                await peer.ended()
            assert not offers
            assert (await outcome(source))["status"] == "cancelled"
        await goes_on(source)


async def test_a_cancel_that_comes_with_the_word_of_the_destination_keeps_the_guest(
    told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_loaded, made = Outflow.wait_loaded, list[Canceller]()

    class Noted(Canceller):  # type: ignore[misc]  # to have the one of this migration
        def __init__(self, claim: Claim) -> None:
            super().__init__(claim)
            made.append(self)

    async with started() as source:

        async def cancelled(flow: Outflow, late: Callable[[], None]) -> int | None:
            at = await wait_loaded(flow, late)
            made[0].cancel("a test")  # in the same turn of the loop
            return at

        monkeypatch.setattr(copying, "Canceller", Noted)
        monkeypatch.setattr(Outflow, "wait_loaded", cancelled)
        async with destination_peer(source, tmp_path) as peer:
            await peer.prepare()
            await outcome(source, "device")
            await peer.say("loaded")
            assert (await outcome(source))["status"] == "cancelled"
        assert not told
        await goes_on(source)


def test_what_was_taken_stays_so_whatever_is_written_to_the_cell() -> None:
    with closing(OwnershipCell.create(ours=False)) as cell, closing(Claim()) as claim:
        claim.share(os.dup(cell.fd))
        assert claim.keep()
        claim.offer()
        assert cell.take()
        assert not claim.keep()
        os.pwrite(cell.fd, bytes([Owner.OFFERED]), 0)
        assert not claim.keep()


async def test_a_cancel_comes_too_late_for_a_guest_that_was_taken(tmp_path: Path) -> None:
    async with started() as source, sharing(source, tmp_path) as (peer, cell):
        assert cell.take()
        await source.execute("migrate_cancel")
        await peer.say("loaded")
        assert (await outcome(source))["status"] == "completed"
        assert await status(source) == "postmigrate"


async def test_a_guest_that_was_taken_does_not_run_on_in_a_source_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started() as source, sharing(source, tmp_path) as (_, cell):
        monkeypatch.setattr(Run, "start_nowait", lambda run: pytest.fail("it runs twice"))
        assert cell.take()
        await source.execute("quit")


async def test_a_destination_that_takes_unasked_is_refused_and_the_guest_goes_on(tmp_path: Path) -> None:
    async with started() as source:
        with closing(OwnershipCell.create(ours=False)) as cell:
            async with destination_peer(source, tmp_path) as peer:
                peer.sends_along = cell.fd
                await peer.invite()
                await peer.read_pages()
                os.pwrite(cell.fd, b"\3", 0)
                await peer.say_prepared()
                info = await outcome(source)
        assert info["error-desc"] == "Descriptor 'owner' is a cell that says 3, not a fresh one"
        await goes_on(source)


async def test_what_is_no_cell_is_refused_and_the_guest_goes_on(tmp_path: Path) -> None:
    with tempfile.TemporaryFile() as file:
        async with started() as source:
            async with destination_peer(source, tmp_path) as peer:
                peer.sends_along = file.fileno()
                await peer.prepare()
                info = await outcome(source)
            assert info["status"] == "failed"
            assert "owner" in info["error-desc"]
            await goes_on(source)


# --- what goes ahead ----------------------------------------------------------------------------------------------


async def test_only_what_has_changed_is_sent_while_the_guest_stands(tmp_path: Path) -> None:
    serial = [
        {"execute": "chardev-add", "arguments": {"id": "one", "backend": {"type": "null", "data": {}}}},
        *commands(serial=["one"]),
    ]
    async with vmm.machine(serial) as source:
        await ticked(source, 5)
        ahead_of_all = {section.name for section in parts(source).sections} | {"chardev/COM1"}
        async with destination_peer(source, tmp_path) as peer:
            await peer.prepare()
            ahead = peer.sections.copy()
            await peer.read_all()
            rest = peer.sections[len(ahead) :]
    assert ahead[0] == PROCESSOR
    assert sorted(ahead[1:]) == sorted(ahead_of_all)
    assert sorted(rest) == ["kvm", Pause.KIND]


async def test_the_processors_come_first_when_the_guest_stands(tmp_path: Path) -> None:
    async with started() as source, destination_peer(source, tmp_path) as peer:
        await peer.prepare()
        before = len(peer.records)
        await peer.read_all()
    names = [
        record.name if isinstance(record, Section) else record.NOUN
        for record in peer.records[before:]
        if isinstance(record, Section | RamPass)
    ]
    last_pass = len(names) - 1 - names[::-1].index(RamPass.NOUN)
    assert names[last_pass - 1] == "kvm"
    assert set(names[: last_pass - 1]) <= {RamPass.NOUN}


@pytest.mark.parametrize("full", [False, True])
async def test_a_guest_of_which_much_is_left_goes_too_though_its_processors_have_gone(
    *, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Precopy.stand
    if full:  # the socket, into which nothing goes at once
        monkeypatch.setattr(Bulk, "push", lambda bulk: None)

    def stands(precopy: Precopy) -> bool:
        stand(precopy)
        return False

    monkeypatch.setattr(Precopy, "stand", stands)
    async with started() as source, empty() as destination:
        assert (await move(source, destination, tmp_path))["status"] == "completed"
        await arrived(source, destination)


async def test_processors_that_were_loaded_for_nothing_are_as_they_were(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        state = parts(source).state
        save = state.save
        state.save = lambda *, optional=True: (  # type: ignore[method-assign]
            torn(each) if each.name == "post-code" else each for each in save(optional=optional)
        )
        uri = f"unix:{tmp_path / 'main'}"
        await destination.execute("migrate-incoming", uri=uri, exit_on_error=False)
        await source.execute("migrate", uri=uri)
        info = await outcome(source)
        assert info["status"] == "failed"
        assert "post-code" in info["error-desc"]
        await goes_on(source)
        await outcome(destination)
        (kvm,) = (section.state for section in parts(destination).state.save() if section.name == "kvm")
        assert registers(kvm) == registers(parts(destination).processors.reset_state()["kvm"])
        state.save = save  # type: ignore[method-assign]
        uri = f"unix:{tmp_path / 'again'}"
        await destination.execute("migrate-incoming", uri=uri)
        await source.execute("migrate", uri=uri)
        await arrived(source, destination)


@pytest.mark.parametrize("apart", [True, False])
async def test_processors_that_are_loaded_by_what_is_in_ram_wait_for_it(
    *, apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a kernel without KVM_CAP_SREGS2, which finds a part of a PAE guest's state there.
    early: list[str] = []
    load_ahead = StateRegistry.load_ahead

    def loading(registry: StateRegistry, section: Section, ahead: CheckedAhead) -> None:
        early.append(section.name)
        load_ahead(registry, section, ahead)

    monkeypatch.setattr(StateRegistry, "load_ahead", loading)
    async with started() as source, empty() as destination:
        uri = f"unix:{tmp_path / 'main'}"
        await destination.execute("migrate-incoming", uri=uri)
        make = KvmProcessors.make

        def made(*arguments: Any) -> KvmProcessors:
            processors = make(*arguments)
            processors.apart_from_ram &= apart  # type: ignore[misc]
            return processors

        monkeypatch.setattr(KvmProcessors, "make", made)
        await source.execute("migrate", uri=uri)
        await arrived(source, destination)
    assert early == ["kvm"] * apart


def registers(kvm: Mapping[str, Any]) -> list[bytes]:
    """Return the general registers of the vCPUs in a section, and what they do."""
    return [vcpu[name] for vcpu in kvm["vcpus"] for name in ("regs", "mp_state")]


def other(section: Section) -> Section:
    """Return what `section` is no more when the guest stands."""
    return Section(section.name, section.version, {**section.state, "code": 0x5A})


def torn(section: Section) -> Section:
    """Return what no device can be."""
    return Section(section.name, section.version, {"torn": True})


@pytest.mark.parametrize("changed", [other, torn])
async def test_the_state_is_that_of_the_pause_whatever_went_ahead(
    changed: Callable[[Section], Section], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_ahead = Machine.save_ahead
    monkeypatch.setattr(
        Machine,
        "save_ahead",
        lambda machine: [changed(each) if each.name == "post-code" else each for each in save_ahead(machine)],
    )
    async with started() as source, empty() as destination:
        assert (await move(source, destination, tmp_path))["status"] == "completed"
        await arrived(source, destination)
        ours, theirs = (post_code(machine) for machine in (source, destination))
        assert ours == theirs


def post_code(machine: EmbeddedMachine) -> Any:
    """Return the state of its POST code port."""
    (found,) = (section.save() for section in parts(machine).sections if section.name == "post-code")
    return found
