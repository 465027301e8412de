from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests.monitor.fakes import EVENTS
from vmm.monitor.events import Event, EventHub, Occurrence

if TYPE_CHECKING:
    from trio.testing import MockClock


@attrs.frozen(kw_only=True)
class Stopped:
    by_whom: str


def told(hub: EventHub) -> list[tuple[float, str, object]]:
    """Subscribe; what comes is appended with the time of its coming."""
    found: list[tuple[float, str, object]] = []

    def tell(occurrence: Occurrence) -> None:
        body: Any = json.loads(occurrence.line)
        found.append((trio.current_time(), body["event"], body.get("data")))

    hub.subscribe(tell)
    return found


def test_an_event_has_its_name_data_and_time() -> None:
    hub = EventHub([Event("STOP", Stopped)], now=lambda: 1_700_000_000_123_456_789)
    lines: list[bytes] = []
    hub.subscribe(lambda occurrence: lines.append(occurrence.line))
    hub.emit("STOP", Stopped(by_whom="é"))
    stamp = '"timestamp": {"seconds": 1700000000, "microseconds": 123456}'
    assert lines == [f'{{"event": "STOP", "data": {{"by-whom": "\\u00e9"}}, {stamp}}}\r\n'.encode()]


def test_an_event_that_is_told_late_has_the_time_when_it_was() -> None:
    hub = EventHub([Event("RESUME")], now=lambda: 1_700_000_000_123_456_789)
    told: list[object] = []
    hub.subscribe(lambda occurrence: told.append(occurrence.body["timestamp"]))
    hub.emit("RESUME", at=1_699_999_999_999_001_999)
    assert told == [{"seconds": 1699999999, "microseconds": 999001}]


def test_an_event_that_is_not_declared_is_a_bug() -> None:
    with pytest.raises(KeyError):
        EventHub([]).emit("STOP")


def test_events_are_numbered_and_remembered_for_those_who_come_back() -> None:
    hub = EventHub([Event("STOP"), Event("RESUME")], history=3)
    for name in ("STOP", "RESUME", "STOP", "RESUME"):
        hub.emit(name)
    missed = hub.since(2)
    assert missed is not None
    assert [(occurrence.number, occurrence.body["event"]) for occurrence in missed] == [(3, "STOP"), (4, "RESUME")]
    assert hub.since(4) == ()
    assert hub.since(0) is None
    assert hub.since(5) is None
    assert hub.last == 4


async def test_a_limited_event_is_told_at_once_then_the_last_one_after_the_interval(autojump_clock: MockClock) -> None:
    hub = EventHub(EVENTS)
    async with trio.open_nursery() as nursery:
        await nursery.start(hub.serve)
        found = told(hub)
        start = trio.current_time()
        for offset in (1, 2, 3):
            hub.emit("RTC_CHANGE", {"offset": offset})
        await trio.sleep(0.5)
        hub.emit("RTC_CHANGE", {"offset": 4})
        await trio.sleep(1.0)
        hub.emit("RTC_CHANGE", {"offset": 5})
        await trio.sleep(10)
        hub.emit("RTC_CHANGE", {"offset": 6})
        nursery.cancel_scope.cancel()
    assert [(round(when - start, 6), data) for when, _, data in found] == [
        (0.0, {"offset": 1}),
        (1.0, {"offset": 4}),
        (2.0, {"offset": 5}),
        (11.5, {"offset": 6}),
    ]


async def test_a_rate_limit_holds_for_each_key_by_itself(autojump_clock: MockClock) -> None:
    hub = EventHub(EVENTS)
    async with trio.open_nursery() as nursery:
        await nursery.start(hub.serve)
        found = told(hub)
        start = trio.current_time()
        for port, is_open in (("a", True), ("b", True), ("a", False)):
            hub.emit("VSERPORT_CHANGE", {"id": port, "open": is_open})
        hub.emit("STOP")
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    assert [(round(when - start, 6), name, data) for when, name, data in found] == [
        (0.0, "VSERPORT_CHANGE", {"id": "a", "open": True}),
        (0.0, "VSERPORT_CHANGE", {"id": "b", "open": True}),
        (0.0, "STOP", None),
        (1.0, "VSERPORT_CHANGE", {"id": "a", "open": False}),
    ]


def test_who_unsubscribed_is_told_nothing() -> None:
    hub = EventHub([Event("STOP")])
    found: list[Occurrence] = []
    hub.subscribe(found.append)
    hub.unsubscribe(found.append)
    hub.emit("STOP")
    assert found == []


def test_what_is_held_is_told_in_order_once_it_is_released_and_remembered_before() -> None:
    hub = EventHub([Event("STOP"), Event("RESUME")])
    names: list[object] = []
    hub.subscribe(lambda occurrence: names.append(occurrence.body["event"]))
    hub.release()
    hub.hold()
    hub.hold()
    hub.emit("STOP")
    hub.emit("RESUME")
    assert names == []
    assert hub.last == 2
    hub.release()
    hub.release()
    assert names == ["STOP", "RESUME"]
    hub.emit("STOP")
    assert names == ["STOP", "RESUME", "STOP"]
