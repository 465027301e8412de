"""What a client can ask about machines in general, and about this one, and from when on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.phases.machine import DEFINITION, advance, bare
from vmm.qmp_client import CommandFailed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

ANY_TIME = ("query-target", "query-kvm", "query-machines", "query-cpu-definitions")
OF_A_DEFINITION = ("query-hotpluggable-cpus", "query-current-machine", "query-memory-size-summary")


@pytest.mark.parametrize("phase", ["precreate", "accel", "preconfig", "devices", "running"])
async def test_what_needs_no_machine_is_answered_in_every_phase(tmp_path: Path, phase: str) -> None:
    async with bare(tmp_path) as (_, client):
        await advance(client, phase)
        for command in ANY_TIME:
            assert await client.execute(command)
        for command in OF_A_DEFINITION:
            if phase == "precreate":
                with pytest.raises(CommandFailed) as caught:
                    await client.execute(command)
                assert caught.value.error_class == "DeviceNotActive"
            else:
                assert await client.execute(command)


@pytest.mark.parametrize("accel", ["kvm", "qtest"])
async def test_the_accelerator_is_known_once_it_is_chosen(tmp_path: Path, accel: str) -> None:
    async with bare(tmp_path) as (_, client):
        await client.execute("machine-set", **DEFINITION)
        with pytest.raises(CommandFailed) as caught:
            await client.execute("query-accelerators")
        assert caught.value.error_class == "DeviceNotActive"
        assert await client.execute("query-kvm") == {"enabled": False, "present": True}
        await client.execute("accel-set", accel=accel)
        assert await client.execute("query-accelerators") == {"enabled": accel, "present": ["kvm", "qtest"]}
        assert await client.execute("query-kvm") == {"enabled": accel == "kvm", "present": True}


async def test_kvm_that_may_not_be_opened_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_access(path: str, mode: int) -> bool:
        return False

    async with bare(tmp_path) as (_, client):
        monkeypatch.setattr(os, "access", no_access)
        assert await client.execute("query-kvm") == {"enabled": False, "present": False}
        assert (await client.execute("query-cpu-definitions"))[0]["unavailable-features"] == ["kvm"]
        await client.execute("machine-set", **DEFINITION)
        await client.execute("accel-set", accel="qtest")
        assert await client.execute("query-accelerators") == {"enabled": "qtest", "present": ["qtest"]}


async def test_places_for_vcpus_say_their_numa_node(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await client.execute("machine-set", memory={"size": 16 << 20}, smp={"cpus": 2})
        await client.execute("accel-set")
        await client.execute("set-numa-node", type="node", cpus=[0])
        await client.execute("set-numa-node", type="node", cpus=[1])
        places = [place["props"] for place in await client.execute("query-hotpluggable-cpus")]
        assert places == [{"socket-id": 0, "core-id": core, "thread-id": 0, "node-id": core} for core in (1, 0)]
        # As they are, they say which vCPU is meant.
        assert await client.execute("set-numa-node", type="cpu", **places[0]) == {}


async def test_without_kvm_no_feature_can_be_had_and_any_can_be_off(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await client.execute("machine-set", **DEFINITION)
        await client.execute("accel-set", accel="qtest")
        with pytest.raises(CommandFailed) as caught:
            await client.execute("cpu-model-set", props={"x2apic": True})
        assert caught.value.error_class == "KVMMissingCap"
        await client.execute("cpu-model-set", props={"x2apic": False})
