"""What else goes over in a live update: settings, descriptor sets, and how long it took."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.phases.machine import connected
from tests.phases.update_pair import add_fd, concluded, hand_over, migration, pair
from vmm.errors import StateRejected, StreamCorrupt
from vmm.monitor.events import EventHub
from vmm.phases.catalog import EVENTS
from vmm.phases.fd_receive import _stages
from vmm.phases.fdsets import VERSION, FdSets
from vmm.phases.fdsets_state import FdSetsState
from vmm.phases.jobs import Jobs
from vmm.phases.luggage import Luggage
from vmm.phases.machine import Machine
from vmm.phases.migration_state import MigrationState
from vmm.qmp_client import CommandFailed
from vmm.service import ServiceManager

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.monitor.events import Occurrence

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]


async def test_what_was_set_goes_over_but_for_what_the_destination_was_given_and_what_is_lent(tmp_path: Path) -> None:
    async with pair(tmp_path) as made, made.destination() as new, connected(made.qmp) as old:
        await old.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        await old.execute("migrate-set-parameters", downtime_limit=20, max_bandwidth=7)
        async with connected(made.own(1)) as client:
            await client.execute("migrate-set-parameters", downtime_limit=30)
        await hand_over(made, old, 1)
        assert (await concluded(new))["status"] == "completed"
        settings = migration(new)
        assert settings.capabilities["events"]
        assert (settings.parameters["max-bandwidth"], settings.parameters["downtime-limit"]) == (7, 30)
        assert settings.parameters.mode == "normal"
        assert settings.settings()["parameters"] == {"downtime-limit": 30, "max-bandwidth": 7}


async def test_both_sides_tell_how_long_the_guest_stood(tmp_path: Path) -> None:
    async with pair(tmp_path) as made, made.destination() as new, connected(made.qmp) as old:
        await hand_over(made, old, 1)
        told = await concluded(new)
        assert told["status"] == "completed"
        assert told["x-pause"] == (await old.execute("query-migrate"))["x-pause"]


async def test_the_service_manager_is_told_before_a_client_that_tells_the_old_process_to_quit(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
        manager.bind(str(tmp_path / "manager"))
        async with pair(tmp_path) as made, made.destination() as new, connected(made.qmp) as old:
            source = made.machines[0]
            source.host.service = ServiceManager.named(str(tmp_path / "manager"))

            def quit_at_once(occurrence: Occurrence) -> None:
                if occurrence.body.get("data") == {"status": "completed"}:
                    source.host.ending.end("host-qmp-quit")

            source.host.events.subscribe(quit_at_once)
            await old.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            await hand_over(made, old, 1)
            await source.ended.wait()
            assert manager.recv(100) == f"MAINPID={os.getpid()}\n".encode()
            assert (await concluded(new))["status"] == "completed"


async def test_descriptor_sets_go_over_under_the_numbers_that_clients_know(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        async with pair(tmp_path) as made, made.destination() as new:  # noqa: SIM117 - too long a line
            async with connected(made.qmp) as old, connected(made.own(1)) as client:
                await add_fd(client, reading, fdset_id=9)
                first = await add_fd(old, writing, fdset_id=3, opaque="a")
                await add_fd(old, reading, fdset_id=3)
                await add_fd(old, reading)
                before = await old.execute("query-fdsets")
                await hand_over(made, old, 1)
                assert (await concluded(new))["status"] == "completed"
                after = await client.execute("query-fdsets")
                assert [found for found in after if found["fdset-id"] != 9] == before
                kept = next(found for found in after if found["fdset-id"] == 9)["fds"]
                numbers = [entry["fd"] for found in after for entry in found["fds"]]
                assert len(numbers) == len(set(numbers)) == 4
                assert len(kept) == 1
                # By the number that add-fd answered, there is that very descriptor.
                held = new.host.stores._fdsets.sets[3][0]
                assert (held.number, os.fstat(held.fd).st_ino) == (first["fd"], os.fstat(writing).st_ino)
                added = await add_fd(client, writing, fdset_id=3)
                assert added["fd"] not in numbers
                await client.execute("remove-fd", fdset_id=3, fd=first["fd"])
                await client.execute("remove-fd", fdset_id=9, fd=kept[0]["fd"])
                async with made.destination() as third:
                    await hand_over(made, client, 2)
                    assert (await concluded(third))["status"] == "completed"
                    async with connected(made.own(2)) as last:
                        now = await last.execute("query-fdsets")
                        assert now == await client.execute("query-fdsets")
                        with pytest.raises(CommandFailed, match="Descriptor set 3 has no descriptor"):
                            await last.execute("remove-fd", fdset_id=3, fd=first["fd"])
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("change", ["none", "added", "removed", "all removed", "added and removed"])
async def test_what_is_told_of_sets_before_the_pause_holds_unless_they_change_until_then(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(tmp_path) as made, made.destination() as new:
        sets, stores = made.machines[0].tree.view(FdSets), made.machines[0].host.stores
        null = os.open("/dev/null", os.O_RDONLY)
        for number in range(300):
            sets.add(os.dup(null), number % 3, f"word {number}")
        changed = stores.changed_descriptors

        def in_the_pause() -> tuple[dict[str, int], list[str]]:
            sent, gone = changed()
            assert (bool(sent), bool(gone)) == (change == "added", change in ("removed", "all removed"))
            return sent, gone

        async def before_the_pause() -> None:
            # As a client might, while the destination builds.
            if change == "added":
                sets.add(os.dup(null), 1, None)
            elif change == "added and removed":
                sets.remove(*sets.add(os.dup(null), 1, None))
            elif change == "removed":
                sets.remove(1, sets.sets[1][7].number)
            elif change == "all removed":
                for number in tuple(sets.sets):
                    sets.remove(number, None)
            await stand_by()

        stand_by = made.machines[0].tree.view(Machine).quiesce
        monkeypatch.setattr(Machine, "quiesce", lambda self: before_the_pause())
        monkeypatch.setattr(stores, "changed_descriptors", in_the_pause)
        async with connected(made.qmp) as client, connected(made.own(1)) as there:
            await hand_over(made, client, 1)
            assert (await concluded(new))["status"] == "completed"
            assert await there.execute("query-fdsets") == await client.execute("query-fdsets")
        found = new.tree.view(FdSets)
        assert sum(len(held) for held in found.sets.values()) == {"added": 301, "removed": 299}.get(
            change, 0 if change == "all removed" else 300
        )
        assert all(
            os.fstat(entry.fd).st_rdev == os.fstat(null).st_rdev for held in found.sets.values() for entry in held
        )
        os.close(null)


# --- from a source that is none of ours -------------------------------------------------------------------------


def entry(**changes: Any) -> dict[str, Any]:
    return {"fdset": 1, "number": 5, "serial": 2, "opaque": b"why"} | changes


SETS: tuple[tuple[Any, str], ...] = (
    ({}, "fdsets.descriptors is missing"),
    ({"descriptors": [entry()], "more": 1}, "fdsets.more"),
    ({"descriptors": [7]}, "fdsets.descriptors[0]"),
    ({"descriptors": [entry(x=1)]}, "fdsets.descriptors[0].x"),
    ({"descriptors": [entry(fdset=-1)]}, "fdsets.descriptors[0].fdset"),
    ({"descriptors": [entry(number=True)]}, "fdsets.descriptors[0].number"),
    ({"descriptors": [entry(serial=1 << 31)]}, "fdsets.descriptors[0].serial"),
    ({"descriptors": [entry(opaque="why")]}, "fdsets.descriptors[0].opaque"),
    ({"descriptors": [entry(opaque=b"\xff")]}, "b'\\xff' is no UTF-8"),
    ({"descriptors": [entry(serial=3)]}, "descriptor fdset/1/3 did not come"),
    ({"descriptors": [entry(), entry(number=6)]}, "a descriptor is there twice"),
    ({"descriptors": [entry(), entry(serial=3)]}, "a descriptor is there twice"),
)


@pytest.mark.parametrize(("section", "fault"), SETS)
def test_sets_that_are_none_are_refused_by_name(section: Any, fault: str) -> None:
    luggage, sets = Luggage(), FdSets()
    luggage.add({"fdset/1/2": os.open("/dev/null", os.O_RDONLY)})
    with pytest.raises(StateRejected) as caught:
        sets.load(luggage, VERSION, section)
    assert fault in str(caught.value)
    assert sets.sets == {}
    luggage.close()


def test_the_version_of_the_section_is_that_of_its_class() -> None:
    assert FdSetsState.SCHEMA.version == VERSION


def test_a_descriptor_that_comes_again_takes_the_place_of_the_one_before() -> None:
    luggage = Luggage()
    luggage.add({"fdset/1/2": os.open("/dev/null", os.O_RDONLY)})
    luggage.add({"fdset/1/2": os.open("/dev/null", os.O_RDONLY)})
    luggage.drop(["fdset/1/2", "fdset/1/3"])
    assert list(luggage) == []


SETTINGS: tuple[tuple[Any, str], ...] = (
    (7, "settings without capabilities or parameters"),
    ({"capabilities": {}}, "settings without capabilities or parameters"),
    ({"capabilities": [], "parameters": {}}, "settings that are no objects"),
    ({"capabilities": {"warp": True}, "parameters": {}}, "Migration capability: 'warp' is not one that"),
    ({"capabilities": {"events": 1}, "parameters": {}}, "Migration capability events: 1 is not on or off"),
    ({"capabilities": {"xbzrle": True}, "parameters": {}}, "Migration capability 'xbzrle' is not supported here"),
    ({"capabilities": {}, "parameters": {"warp": 9}}, "Migration parameter: 'warp' is not one that"),
    ({"capabilities": {}, "parameters": {"downtime-limit": "x"}}, "Migration parameter downtime-limit: 'x' is not"),
)


@pytest.mark.parametrize(("settings", "fault"), SETTINGS)
def test_settings_that_are_none_are_refused_by_name(settings: Any, fault: str) -> None:
    state = settings_here()
    with pytest.raises(StreamCorrupt) as caught:
        state.inherit(settings)
    assert fault in str(caught.value)
    assert state.settings() == {"capabilities": {}, "parameters": {}}


def settings_here() -> MigrationState:
    events = EventHub(EVENTS)
    return MigrationState(events, Jobs(events.emit))


def test_a_source_that_tells_no_settings_is_an_older_one() -> None:
    state = settings_here()
    state.inherit(None)()
    assert state.settings() == {"capabilities": {}, "parameters": {}}


def test_what_is_lent_to_an_incoming_migration_is_as_it_came_once_that_is_over() -> None:
    state = settings_here()
    state.parameters.lend({"downtime-limit": 1, "max-bandwidth": 2})
    state.capabilities.lend({"events": False})
    state.inherit({"capabilities": {"events": True}, "parameters": {"downtime-limit": 20, "mode": "cpr-transfer"}})()
    assert (state.parameters["downtime-limit"], state.parameters.mode) == (1, "cpr-transfer")
    assert not state.capabilities["events"]
    state.parameters.give_back()
    state.capabilities.give_back()
    assert (state.parameters["downtime-limit"], state.parameters["max-bandwidth"]) == (20, 128 << 20)
    assert state.capabilities["events"]


@pytest.mark.parametrize(
    "pause",
    [None, 7, {}, {"stop": "long"}, {"stop": True}, {"stop": -1}, {"stop": float("nan")}, {"stop": 1e9},
     {"x" * 65: 1}, {str(number): 1 for number in range(65)}],
)  # fmt: skip
def test_stages_that_are_none_are_not_told(pause: Any) -> None:
    assert _stages(pause) is None
    assert _stages({"stop": 0.1, "total": 2}) == {"stop": 0.1, "total": 2}


ROWS: Final[tuple[tuple[object, str], ...]] = (
    (7, "no list of them"),
    ([[1, 5, 2]], "no list of them"),
    ([[1, 5, 2, 3]], "no list of them"),
    ([[1, True, 2, None]], "no list of them"),
    ([[-1, 5, 2, None]], "no list of them"),
    ([[1, 1 << 31, 2, None]], "no list of them"),
    ([[1, 5, 2, None]] * 8193, "no list of them"),
    ([[1, 5, 3, None]], "descriptor fdset/1/3 did not come"),
    ([[1, 5, 2, None], [1, 5, 2, None]], "a descriptor is there twice"),
)


@pytest.mark.parametrize(("told", "fault"), ROWS)
def test_what_is_told_of_sets_and_cannot_be_is_refused(told: object, fault: str) -> None:
    with closing(Luggage()) as luggage, closing(FdSets()) as sets:
        luggage.add({"fdset/1/2": os.open("/dev/null", os.O_RDONLY)})
        with pytest.raises(StateRejected) as caught:
            sets.expect(told, luggage)
        assert fault in str(caught.value)
        assert sets.sets == {}


def test_sets_that_were_told_and_are_not_taken_up_are_let_go() -> None:
    reading, writing = os.pipe()
    with closing(Luggage()) as luggage, closing(FdSets()) as sets:
        luggage.add({"fdset/1/2": writing})
        sets.expect([[1, 5, 2, None]], luggage)
    assert os.read(reading, 1) == b""
    os.close(reading)
