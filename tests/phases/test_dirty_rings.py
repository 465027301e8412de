"""Machines whose vCPUs say in rings what they write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.kvm.rings import skip_without_rings
from tests.phases.copy_kit import HANGS, commands, empty, goes_on, in_status, move, parts, ticked
from vmm import machine
from vmm.errors import OptionInvalid, Unsupported
from vmm.guests.dirtier import DirtierReader
from vmm.kvm import dirty_ring
from vmm.phases.differences import compare, visible
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

GUEST = {"kernel": "builtin:dirtier", "append": "region=8M pages=64 hz=100"}


def recipe(size: int, **options: Any) -> list[dict[str, Any]]:
    """Return the recipe of a machine with rings of `size` entries."""
    return [
        {**step, "arguments": {"accel": "kvm", "dirty-ring-size": size}} if step["execute"] == "accel-set" else step
        for step in commands(**options)
    ]


async def test_a_size_that_cannot_be_is_refused() -> None:
    async with machine(commands(upto="machine-set")) as guest:
        for size in (1000, 512, 1 << 20):
            with pytest.raises(OptionInvalid) as caught:
                await guest.execute("accel-set", dirty_ring_size=size)
            assert str(caught.value) == f"dirty-ring-size: {size} is not a power of two from 1024 to 65536, or 0"
        with pytest.raises(OptionInvalid) as caught:
            await guest.execute("accel-set", accel="qtest", dirty_ring_size=1024)
        assert str(caught.value) == "dirty-ring-size: 1024 is not possible but with kvm"
        await guest.execute("accel-set", dirty_ring_size=0)
        step = guest.recipe.to_json()[-1]
        assert step == {"execute": "accel-set", "arguments": {"accel": "kvm", "dirty-ring-size": 0}}


async def test_a_host_on_which_they_do_not_work_refuses_them_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty_ring, "_work", lambda kvm: False)
    async with machine(commands(upto="machine-set")) as guest:
        with pytest.raises(Unsupported, match="Accelerator property 'dirty-ring-size' is not supported here"):
            await guest.execute("accel-set", dirty_ring_size=4096)
        await guest.execute("accel-set")
        assert guest.recipe.to_json()[-1] == {"execute": "accel-set", "arguments": {"accel": "kvm"}}


def test_whether_there_are_rings_is_the_host_s_business() -> None:
    with_rings = Recipe("one", (Step("accel-set", {"accel": "kvm", "dirty-ring-size": 1024}),))
    without = Recipe("two", (Step("accel-set", {"accel": "kvm"}),))
    assert visible(compare(with_rings, without)) == ()
    assert visible(compare(without, with_rings)) == ()


@pytest.fixture
def working() -> None:
    """Skip where rings do not work."""
    skip_without_rings()


@pytest.mark.usefixtures("working")
async def test_a_guest_whose_vcpus_have_rings_is_copied_whole(tmp_path: Path) -> None:
    async with machine(recipe(1024, **GUEST)) as source, empty() as destination:
        await ticked(source, 50)
        await source.execute("migrate-set-parameters", downtime_limit=2_000_000)
        info = await move(source, destination, tmp_path)
        assert info["status"] == "completed", info
        assert info["ram"]["dirty-sync-count"] > 1
        await in_status(destination, "running")
        await goes_on(destination)
        report = DirtierReader(parts(destination).memory.read).look()
        assert report is not None
        assert report.intact, str(report)


@pytest.mark.usefixtures("working")
async def test_one_of_several_vcpus_can_be_limited_since_it_is_known_what_it_writes() -> None:
    async with machine(recipe(4096, smp={"cpus": 2}, **GUEST)) as guest:
        await guest.execute("set-vcpu-dirty-limit", cpu_index=0, dirty_rate=5)
        await guest.execute("set-vcpu-dirty-limit", cpu_index=1, dirty_rate=7)
        with trio.fail_after(HANGS):
            while not (found := await guest.execute("query-vcpu-dirty-limit"))[0]["current-rate"]:  # noqa: ASYNC110
                await trio.sleep(0.01)  # there is no event
        # The other one has never been started.
        assert [(cpu["cpu-index"], cpu["limit-rate"]) for cpu in found] == [(0, 5), (1, 7)]
        assert found[1]["current-rate"] == 0
        await guest.execute("cancel-vcpu-dirty-limit", cpu_index=0)
        assert [cpu["cpu-index"] for cpu in await guest.execute("query-vcpu-dirty-limit")] == [1]
