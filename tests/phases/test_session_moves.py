"""What goes over of a monitor's clients, looked at closely, and when it comes from a source that is none of ours."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any, Final

import pytest
from trio.testing import wait_all_tasks_blocked

from tests.monitor.fakes import VERSION, Bench, bench
from vmm.capabilities import OBSERVE
from vmm.deferral import Deferral
from vmm.errors import MigrationRefused, StateRejected
from vmm.monitor.session import SessionOptions
from vmm.monitor.unix import qmp_monitor
from vmm.phases import session_moves
from vmm.phases.luggage import Luggage
from vmm.phases.session_moves import VERSION as PRESENT
from vmm.phases.session_moves import MovingSessions, come_to_rest, go_on
from vmm.phases.session_state import MonitorState

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.monitor.session import Session
    from vmm.monitor.unix import SocketMonitor

pytestmark = pytest.mark.usefixtures("no_leaks")

OPTIONS: Final = SessionOptions(VERSION)


def moving(
    it: Bench, monitor: SocketMonitor[Session] | None = None, options: SessionOptions = OPTIONS
) -> MovingSessions:
    """Return the clients of `monitor`; without one, those of a monitor that has none yet."""
    made = monitor or qmp_monitor("qmp0", it.executor, it.hub, options, it.log.append)
    return MovingSessions("qmp0", made, it.executor, it.hub, options)


def copies(leaving: MovingSessions) -> Luggage:
    """Return what a successor gets of their descriptors."""
    luggage = Luggage()
    luggage.add({f"monitor/qmp0/{name}": os.dup(fd) for name, fd in leaving.descriptors().items()})
    return luggage


def client(section: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = section["sessions"][0]
    return found


FAULTS: tuple[tuple[Any, str], ...] = (
    (lambda s: s.update(more=1), "monitor/qmp0.more"),
    (lambda s: s.pop("grant"), "monitor/qmp0.grant is missing"),
    (lambda s: s.update(grant=b"observe"), "its clients were lent b'observe', and 'admin' would be lent here"),
    (lambda s: client(s).update(number=0), "monitor/qmp0.sessions[0].number"),
    (lambda s: client(s).update(number=2), "descriptor monitor/qmp0/session-2 did not come"),
    (lambda s: s["sessions"].append(client(s)), "a session or a descriptor is there twice"),
    (lambda s: client(s).update(oob=True, negotiated=False), "session-1 has oob, and has negotiated nothing"),
    (lambda s: client(s).update(skipping="away"), "monitor/qmp0.sessions[0].skipping"),
    (lambda s: client(s).update(quote=1), "monitor/qmp0.sessions[0].quote"),
    (lambda s: client(s).update(braces=1 << 40), "monitor/qmp0.sessions[0].braces"),
    (lambda s: client(s).update(unsent="text"), "monitor/qmp0.sessions[0].unsent"),
    (lambda s: client(s).update(waiting=b"{"), "session-1.waiting: Malformed JSON"),
    (lambda s: client(s).update(waiting=b"{}"), "session-1.waiting is no array of messages and faults"),
    (lambda s: client(s).update(waiting=b'[{"message": 1, "x": 2}]'), "session-1.waiting is no array of messages and"),
    (lambda s: client(s).update(waiting=b'[{"fault": 1}]'), "session-1.waiting is no array of messages and faults"),
    (lambda s: client(s).update(unclaimed=[7]), "descriptor monitor/qmp0/session-1.fd-7 did not come"),
    (lambda s: client(s)["named"].append(client(s)["named"][0]), "a session or a descriptor is there twice"),
    (
        lambda s: client(s)["named"][0].update(name=b"\xff"),
        "session-1 has a descriptor whose name b'\\xff' is no UTF-8",
    ),
    (
        lambda s: client(s)["named"].append(dict(client(s)["named"][0], serial=client(s)["unclaimed"].pop())),
        "session-1 has two descriptors of one name",
    ),
)


@pytest.mark.parametrize(("change", "fault"), FAULTS)
async def test_a_section_that_is_none_is_refused_by_name(
    change: Callable[[dict[str, Any]], object], fault: str
) -> None:
    async with bench() as it:
        section, luggage = await held(it)
        arriving = moving(it)
        change(section)
        with pytest.raises(StateRejected) as caught:
            arriving.load(luggage, PRESENT, section)
        assert fault in str(caught.value)
        assert arriving.take_up() == []
        luggage.close()


async def held(it: Bench) -> tuple[dict[str, Any], Luggage]:
    """Hold a client that has a named and an unclaimed descriptor; return its section, and copies of what it has."""
    await it.client.negotiate()
    fd = os.open("/dev/null", os.O_RDONLY)
    for request in (b'{"execute": "getfd"}', b'{"execute": "ec'):
        socket.send_fds(it.client.sock._sock, [request], [fd])  # type: ignore[attr-defined]
        await wait_all_tasks_blocked()
    os.close(fd)
    leaving = moving(it, it.monitor)
    leaving.prepare()
    leaving.hold()
    await leaving.rest()
    section = leaving.save()
    assert isinstance(section, dict)
    return section, copies(leaving)


async def test_what_comes_as_a_client_must_be_a_stream_socket() -> None:
    async with bench() as it:
        section, luggage = await held(it)
        luggage.add({"monitor/qmp0/session-1": os.open("/dev/null", os.O_RDONLY)})
        with pytest.raises(StateRejected, match="monitor/qmp0/session-1"):
            moving(it).load(luggage, PRESENT, section)
        luggage.close()


async def test_clients_of_all_rights_are_not_taken_in_by_a_monitor_that_lends_fewer() -> None:
    async with bench() as it:
        section, luggage = await held(it)
        arriving = moving(it, options=SessionOptions(VERSION, grant=OBSERVE))
        with pytest.raises(StateRejected, match="its clients were lent b'admin', and 'observe' would be lent here"):
            arriving.load(luggage, PRESENT, section)
        luggage.close()


async def test_what_has_come_and_is_not_taken_up_is_closed() -> None:
    async with bench() as it:
        section, luggage = await held(it)
        arriving = moving(it)
        arriving.load(luggage, PRESENT, section)()
        assert list(luggage) == []
        arriving.close()
        arriving.close()


async def test_a_client_that_was_hung_up_on_does_not_go_along() -> None:
    async with bench() as it:
        await it.client.negotiate()
        leaving = moving(it, it.monitor)
        leaving.hold()
        await leaving.rest()
        (session,) = it.monitor.sessions.values()
        session.give_up()
        assert leaving.descriptors() == {}
        section = leaving.save()
        assert section is not None
        assert section["sessions"] == []


async def test_clients_that_stay_have_no_section() -> None:
    async with bench() as it:
        await it.client.negotiate()
        assert moving(it, it.monitor).save() is None


def test_the_version_of_a_section_is_that_of_its_class() -> None:
    assert MonitorState.SCHEMA.version == PRESENT


async def test_a_command_that_does_not_finish_holds_an_update_off_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_moves, "_REST", 0)
    async with bench() as it:
        await it.client.negotiate()
        await it.client.send({"execute": "slow"})
        await it.executor.begun.wait()
        leaving, deferral = moving(it, it.monitor), Deferral()
        with pytest.raises(MigrationRefused) as caught:
            await come_to_rest([leaving], deferral)
        assert str(caught.value) == "migrate: a command of qmp0/1 did not finish within 0 s"
        it.executor.release.set()
        go_on([leaving], deferral)
        assert await it.client.receive() == {"return": {}}
