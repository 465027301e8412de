"""Limits to how fast vCPUs write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.phases.copy_kit import HANGS, commands, goes_on, save, started
from vmm import machine
from vmm.errors import DeviceNotFound, InvalidState, KvmCallFailed, MigrationRefused, Unsupported
from vmm.kvm.dirty_log import DirtyLog
from vmm.migration.status import MigrationProgress
from vmm.phases import dirty_limits
from vmm.phases.dirty_limits import _share
from vmm.phases.postcopy_source import _Resumption

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

GUEST = {"kernel": "builtin:dirtier", "append": "region=8M pages=64 hz=200"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty_limits, "PERIOD", 0.05)


async def limited(guest: EmbeddedMachine, wanted: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
    """Wait until what is told of the limited vCPUs is so."""
    with trio.fail_after(HANGS):
        while not wanted(found := await guest.execute("query-vcpu-dirty-limit")):  # noqa: ASYNC110
            await trio.sleep(0.01)  # there is no event
    return list(found)


async def test_a_guest_is_limited_and_is_free_again() -> None:
    async with machine(commands(**GUEST)) as guest:
        assert await guest.execute("query-vcpu-dirty-limit") == []
        # So much that nothing has to be done: this is what it writes.
        await guest.execute("set-vcpu-dirty-limit", dirty_rate=1 << 40)
        (free,) = await limited(guest, lambda found: found[0]["current-rate"] >= 4)
        assert (free["cpu-index"], free["limit-rate"]) == (0, 1 << 40)
        await guest.execute("set-vcpu-dirty-limit", cpu_index=0, dirty_rate=1)
        (found,) = await limited(guest, lambda found: found[0]["current-rate"] <= free["current-rate"] // 2)
        assert found["limit-rate"] == 1
        await guest.execute("cancel-vcpu-dirty-limit")
        assert await guest.execute("query-vcpu-dirty-limit") == []
        await guest.execute("set-vcpu-dirty-limit", dirty_rate=1 << 40)
        await limited(guest, lambda found: found[0]["current-rate"] > 1)
        await guest.execute("set-vcpu-dirty-limit", dirty_rate=0)
        assert await guest.execute("query-vcpu-dirty-limit") == []


async def test_a_migration_suspends_it(tmp_path: Path) -> None:
    async with machine(commands(**GUEST)) as guest:
        await guest.execute("set-vcpu-dirty-limit", dirty_rate=5)
        await limited(guest, lambda found: found[0]["current-rate"])
        await save(guest, tmp_path / "state")
        await guest.execute("cont")  # it was saved, and is whole here: a new life, without limits
        assert await guest.execute("query-vcpu-dirty-limit") == []
        await guest.execute("migrate-set-parameters", mode="cpr-transfer")
        await guest.execute("set-vcpu-dirty-limit", dirty_rate=5)
        channels = [
            {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": f"{tmp_path}/none"}}
            for kind in ("main", "cpr")
        ]
        with pytest.raises(Exception, match="Cannot connect to"):
            await guest.execute("migrate", channels=channels)
        await limited(guest, lambda found: found[0]["current-rate"])


async def test_a_guest_that_is_put_in_its_place_has_them_too(tmp_path: Path) -> None:
    async with machine(commands(**GUEST)) as guest:
        await save(guest, tmp_path / "state")
        await guest.execute("cont")
        await guest.execute("set-vcpu-dirty-limit", dirty_rate=5)
        await guest.execute("loadvm", name=str(tmp_path / "state"))
        await limited(guest, lambda found: found[0]["current-rate"])
        await guest.execute("cancel-vcpu-dirty-limit")
        await guest.execute("calc-dirty-rate", calc_time=50, calc_time_unit="millisecond")


async def test_one_of_several_takes_rings_and_all_of_them_do_not() -> None:
    async with started(smp={"cpus": 2}) as guest:
        with pytest.raises(Unsupported) as caught:
            await guest.execute("set-vcpu-dirty-limit", cpu_index=1, dirty_rate=5)
        assert str(caught.value) == (
            "set-vcpu-dirty-limit of one vCPU '1' is not supported here; leave cpu-index out, which limits all alike, "
            "or use accel-set with dirty-ring-size"
        )
        await guest.execute("set-vcpu-dirty-limit", dirty_rate=5)
        found = await guest.execute("query-vcpu-dirty-limit")
        assert [(one["cpu-index"], one["limit-rate"]) for one in found] == [(0, 5), (1, 5)]
        await goes_on(guest)
        with pytest.raises(DeviceNotFound, match="vCPU '2' does not exist; there are: 0, 1"):
            await guest.execute("set-vcpu-dirty-limit", cpu_index=2, dirty_rate=5)


async def test_there_is_one_log() -> None:
    async with started() as guest:
        await guest.execute("calc-dirty-rate", calc_time=60, mode="dirty-bitmap")
        with pytest.raises(
            InvalidState, match="set-vcpu-dirty-limit is not possible while calc-dirty-rate measures by"
        ):
            await guest.execute("set-vcpu-dirty-limit", dirty_rate=5)
    async with started() as guest:
        await guest.execute("set-vcpu-dirty-limit", dirty_rate=5)
        with pytest.raises(
            InvalidState, match="calc-dirty-rate is not possible by dirty-bitmap while vCPUs are limited"
        ):
            await guest.execute("calc-dirty-rate", calc_time=1, mode="dirty-bitmap")
        await guest.execute("calc-dirty-rate", calc_time=50, calc_time_unit="millisecond")


async def test_a_log_that_fails_ends_the_limits_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(log: DirtyLog, into: object) -> None:
        raise KvmCallFailed(ioctl="KVM_GET_DIRTY_LOG", errno=12, context="slot 0")

    monkeypatch.setattr(DirtyLog, "collect", refuse)
    async with started() as guest:
        await guest.execute("set-vcpu-dirty-limit", dirty_rate=5)
        await limited(guest, lambda found: not found)
        await goes_on(guest)


@pytest.mark.parametrize(
    ("percent", "quota", "rate", "share"),
    [
        (0, None, 100.0, 0), (50, None, 100.0, 0), (0, 10, 100.0, 90), (90, 10, 10.0, 90), (90, 10, 5.0, 80),
        (90, 10, 0.0, 0), (0, 10, 5.0, 0), (99, 1, 1000.0, 99),
    ],
)  # fmt: skip
def test_the_share_is_what_makes_the_rate_the_limit(percent: int, quota: int | None, rate: float, share: int) -> None:
    assert _share(percent, quota, rate) == share


def test_where_the_guest_has_gone_by_postcopy_nothing_of_it_is_measured_or_limited() -> None:
    gone = _Resumption(MigrationProgress("source", lambda status: None, lambda: 0.0))
    with pytest.raises(MigrationRefused) as caught:
        gone.measure(None)
    assert str(caught.value) == "calc-dirty-rate: the guest has gone by postcopy, and writes there"
    with pytest.raises(MigrationRefused) as caught:
        gone.limit(None, 5)
    assert str(caught.value) == "set-vcpu-dirty-limit: the guest has gone by postcopy, and writes there"
