from __future__ import annotations

from typing import get_args

import attrs
import pytest

from vmm.migration.address import InetAddress
from vmm.migration.status import (
    SOURCE_STEPS,
    TARGET_STEPS,
    MigrationInfo,
    MigrationProgress,
    MigrationRamStats,
    MigrationStatus,
    Side,
    StatusName,
)
from vmm.monitor.arguments import unstructure
from vmm.monitor.qapi import Object, shape_of

RAM = {
    "transferred": 0, "remaining": 0, "total": 4096, "duplicate": 0, "normal": 0, "normal-bytes": 0,
    "dirty-pages-rate": 0, "mbps": 0.0, "dirty-sync-count": 0, "postcopy-requests": 0, "page-size": 4096,
    "multifd-bytes": 0, "pages-per-second": 0, "precopy-bytes": 0, "downtime-bytes": 0, "postcopy-bytes": 0,
    "dirty-sync-missed-zero-copy": 0,
}  # fmt: skip


@attrs.define
class Bench:
    """A migration with a clock that is set by hand and a list of what was observed."""

    now: float = 100.0
    seen: list[MigrationStatus] = attrs.field(factory=list)

    def progress(self, side: Side = "source") -> MigrationProgress:
        return MigrationProgress(side, self.seen.append, lambda: self.now)


@pytest.mark.parametrize("steps", [SOURCE_STEPS, TARGET_STEPS])
def test_steps_lead_to_statuses_that_have_steps(steps: dict[MigrationStatus, frozenset[MigrationStatus]]) -> None:
    assert set(steps) <= set(MigrationStatus)
    assert all(to in steps for tos in steps.values() for to in tos)


def test_a_source_goes_its_way_and_every_status_is_observed() -> None:
    bench = Bench()
    progress = bench.progress()
    assert unstructure(progress.info()) == {}
    progress.begin()
    for status in (
        MigrationStatus.ACTIVE,
        MigrationStatus.PRE_SWITCHOVER,
        MigrationStatus.DEVICE,
        MigrationStatus.COMPLETED,
    ):
        assert progress.under_way
        progress.advance(status)
    assert not progress.under_way
    assert bench.seen == ["setup", "active", "pre-switchover", "device", "completed"]


def test_a_step_that_is_not_in_the_table_is_a_bug() -> None:
    progress = Bench().progress()
    with pytest.raises(RuntimeError, match="migration source: none does not lead to active"):
        progress.advance(MigrationStatus.ACTIVE)
    progress.begin()
    with pytest.raises(RuntimeError, match="migration source: setup does not lead to setup"):
        progress.begin()
    with pytest.raises(RuntimeError, match="enters setup by begin"):
        progress.advance(MigrationStatus.SETUP)
    assert progress.status == "setup"


def test_the_times_of_a_source_are_told_in_milliseconds() -> None:
    bench = Bench()
    progress = bench.progress()
    progress.begin()
    assert unstructure(progress.info()) == {"status": "setup"}
    bench.now += 0.010
    progress.advance(MigrationStatus.ACTIVE)
    progress.ram = MigrationRamStats(total=4096)
    progress.expected_downtime = 300
    bench.now += 0.005
    assert unstructure(progress.info()) == {
        "status": "active", "ram": RAM, "remaining": 0, "total-time": 15, "setup-time": 10, "expected-downtime": 300,
    }  # fmt: skip
    progress.advance(MigrationStatus.DEVICE)
    progress.pause_begins()
    bench.now += 0.007
    progress.pause_ends()
    bench.now += 0.001
    progress.advance(MigrationStatus.COMPLETED)
    bench.now += 60.0
    assert unstructure(progress.info()) == {
        "status": "completed", "ram": RAM, "total-time": 23, "setup-time": 10, "downtime": 7,
    }  # fmt: skip


@pytest.mark.parametrize(("ago", "downtime"), [(0.0, 7), (0.004, 3), (0.007, 0), (0.008, 7), (-0.001, 7)])
def test_a_pause_that_ended_before_it_was_heard_of_is_shorter_if_that_can_be(ago: float, downtime: int) -> None:
    bench = Bench()
    progress = bench.progress()
    progress.begin()
    progress.advance(MigrationStatus.ACTIVE)
    progress.advance(MigrationStatus.DEVICE)
    bench.now = 0.0
    progress.pause_begins()
    bench.now = 0.007
    progress.pause_ends(ago)
    progress.pause_ends()
    progress.advance(MigrationStatus.COMPLETED)
    reply = unstructure(progress.info())
    assert isinstance(reply, dict)
    assert reply["downtime"] == downtime


def test_a_failure_is_told_and_forgotten_by_the_next_begin() -> None:
    bench = Bench()
    progress = bench.progress()
    progress.begin()
    progress.advance(MigrationStatus.ACTIVE)
    progress.fail("The successor is gone")
    progress.fail("and so on")
    progress.advance(MigrationStatus.FAILED)
    assert unstructure(progress.info()) == {"status": "failed", "error-desc": "The successor is gone"}
    progress.begin()
    assert unstructure(progress.info()) == {"status": "setup"}
    assert bench.seen == ["setup", "active", "failing", "failed", "setup"]


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_cancelled_migration_does_not_fail_any_more(side: Side) -> None:
    progress = Bench().progress(side)
    progress.begin()
    progress.advance(MigrationStatus.CANCELLING)
    progress.fail("The channel was closed")
    progress.advance(MigrationStatus.CANCELLED)
    progress.fail("again")
    assert unstructure(progress.info()) == {"status": "cancelled"}


def test_a_target_tells_where_it_listens() -> None:
    progress = Bench().progress("target")
    progress.begin([InetAddress(host="127.0.0.1", port="40001")])
    listening = [{"type": "inet", "host": "127.0.0.1", "port": "40001"}]
    assert unstructure(progress.info()) == {"status": "setup", "socket-address": listening}
    progress.advance(MigrationStatus.ACTIVE)
    progress.advance(MigrationStatus.COMPLETED)
    assert unstructure(progress.info()) == {"status": "completed", "socket-address": listening}


def test_a_target_tells_what_has_come_and_goes_on_where_pages_come_after_the_guest() -> None:
    progress = Bench().progress("target")
    progress.begin()
    left = [30, 20, 10, 0]
    progress.follow_ram(lambda: MigrationRamStats(total=40, remaining=left.pop(0)), beyond=True)
    assert progress.info().ram is None
    progress.advance(MigrationStatus.ACTIVE)
    assert told(progress) == 30
    progress.advance(MigrationStatus.COMPLETED)
    assert told(progress) == 20
    progress.keep_ram()
    assert told(progress) == told(progress) == 10
    progress.begin()
    progress.advance(MigrationStatus.ACTIVE)
    assert progress.info().ram is None  # in a live update none comes


def told(progress: MigrationProgress) -> int:
    ram = progress.info().ram
    assert ram is not None
    return ram.remaining


def test_blocked_reasons_are_told_in_every_state() -> None:
    progress = Bench().progress()
    assert unstructure(progress.info(["a disk"])) == {"blocked-reasons": ["a disk"]}
    progress.begin()
    assert unstructure(progress.info(["a disk"])) == {"status": "setup", "blocked-reasons": ["a disk"]}


def test_the_stages_of_a_live_updates_pause_are_attached() -> None:
    progress = Bench().progress()
    progress.begin()
    progress.advance(MigrationStatus.ACTIVE)
    progress.pause_stages = {"vcpus-out": 0.25, "save": 0.5}
    progress.advance(MigrationStatus.DEVICE)
    progress.pause_ends()
    progress.advance(MigrationStatus.COMPLETED)
    reply = unstructure(progress.info())
    assert isinstance(reply, dict)
    assert reply["x-pause"] == {"vcpus-out": 0.25, "save": 0.5}
    assert reply["downtime"] == 0


def test_the_reply_has_a_form_on_the_wire() -> None:
    shape = shape_of(MigrationInfo)
    assert isinstance(shape, Object)
    assert [member.wire for member in shape.members] == [
        "status", "ram", "remaining", "total-time", "expected-downtime", "downtime", "setup-time",
        "cpu-throttle-percentage", "postcopy-blocktime", "postcopy-vcpu-blocktime",
            "error-desc", "blocked-reasons", "socket-address", "x-pause", "x-step",
        "x-pause-before", "x-kept",
    ]  # fmt: skip
    assert [status.value for status in MigrationStatus] == list(get_args(StatusName))
