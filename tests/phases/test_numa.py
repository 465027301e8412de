"""`set-numa-node`: what is taken, what is refused, and that it is in the guest's memory in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.hw.boot.acpi_kit import tables
from tests.hw.boot.images import MIB
from tests.phases.machine import PATHS, advance, bare, failure
from vmm.hw.boot import layout
from vmm.hw.boot.plan import Data
from vmm.kvm.vcpu_fd import VcpuFd
from vmm.phases.cpus import CpuOffer
from vmm.phases.machine import Machine

if TYPE_CHECKING:
    from pathlib import Path

    from tests.phases.machine import Running
    from vmm.kvm.cpuid import CpuidEntry
    from vmm.qmp_client import QmpClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

HALF = 8 * MIB  # of the machine's RAM


async def begin(client: QmpClient, phase: str = "preconfig") -> None:
    """Build a machine of 3 vCPUs and 16 MiB as far as `phase`."""
    await client.execute("machine-set", kernel="builtin:heartbeat", memory={"size": 2 * HALF}, smp={"cpus": 3})
    await client.execute("accel-set")
    if phase == "devices":
        await client.execute("cpu-model-set")


async def node(client: QmpClient, **arguments: Any) -> None:
    await client.execute("set-numa-node", type="node", **arguments)


async def where(client: QmpClient) -> str:
    path: str = (await client.execute("query-machine-phase"))["path"]
    return path


def written(running: Running) -> dict[bytes, bytes]:
    """The ACPI tables in the guest's memory."""
    machine = running.tree.view(Machine)
    return tables(Data(layout.ACPI, machine.memory.read(layout.ACPI, layout.ACPI_ROOM)))


def affinity(srat: bytes) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Node of each processor, and (node, address, size) of each piece of memory."""
    cpus: list[int] = []
    memory: list[tuple[int, int, int]] = []
    at = 48
    while at < len(srat):
        if srat[at] == 0:
            assert srat[at + 3] == len(cpus)
            cpus.append(srat[at + 2])
        else:
            memory.append(
                (
                    int.from_bytes(srat[at + 2 : at + 6], "little"),
                    int.from_bytes(srat[at + 8 : at + 16], "little"),
                    int.from_bytes(srat[at + 16 : at + 24], "little"),
                )
            )
        at += srat[at + 1]
    return cpus, memory


@pytest.mark.parametrize("phase", ["preconfig", "devices"])
@pytest.mark.parametrize("end", ["finish-machine-init", "cont"])
async def test_nodes_can_be_set_until_the_board_is_complete(tmp_path: Path, phase: str, end: str) -> None:
    async with bare(tmp_path) as (running, client):
        await begin(client, phase)
        await node(client, cpus=[0], mem=HALF)
        await node(client, mem=HALF)
        await client.execute("set-numa-node", type="cpu", **{"node-id": 1, "core-id": 2})
        await client.execute("set-numa-node", type="dist", src=0, dst=1, val=42)
        if phase == "preconfig" and end != "cont":
            await client.execute("cpu-model-set")
        await client.execute(end)
        found = written(running)
        # Nobody placed vCPU 1, which is in node 0 thus.
        assert affinity(found[b"SRAT"]) == ([0, 0, 1], [(0, 0, HALF), (1, HALF, HALF)])
        assert found[b"SLIT"][44:] == bytes([10, 42, 42, 10])
        text = await failure(client, "set-numa-node", type="node")
        assert text.startswith("Command 'set-numa-node' needs may-set-numa, which phase boot/precreate/accel/")


async def test_the_tables_are_there_again_after_a_reset(tmp_path: Path) -> None:
    async with bare(tmp_path) as (running, client):
        await begin(client)
        await node(client, mem=2 * HALF)
        await client.execute("cont")
        await client.execute("stop")
        memory = running.tree.view(Machine).memory
        memory.write(layout.ACPI, bytes(layout.ACPI_ROOM))
        await client.execute("system_reset")
        assert affinity(written(running)[b"SRAT"]) == ([0, 0, 0], [(0, 0, 2 * HALF)])


async def test_a_refused_node_changes_nothing_and_may_be_given_again(tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"type": "node", "nodeid": 128}, "nodeid: 128 is not a number of a node, 0 to 127"),
        ({"type": "node", "nodeid": 0}, "nodeid: 0 is not the number of a new node: it is there already"),
        ({"type": "node", "cpus": [1, 3]}, "cpus: 3 is not the number of a vCPU, 0 to 2"),
        ({"type": "node", "cpus": [0]}, "cpus: 0 is not free: it is in node 0"),
        ({"type": "node", "cpus": [1, 1]}, "cpus: [1, 1] is not a list of different vCPUs"),
        (
            {"type": "node", "mem": HALF + 4096},
            f"mem: {HALF + 4096} is not a multiple of 4 KiB up to {HALF}, what is left of the machine's memory",
        ),
        ({"type": "node", "mem": 1}, f"mem: 1 is not a multiple of 4 KiB up to {HALF}, what is left of the machine's "),
        (
            {"type": "node", "memdev": "ram0"},
            "NUMA option 'memdev' is not supported here; give mem, since there are no memory back ends",
        ),
        (
            {"type": "node", "initiator": 0},
            "NUMA option 'initiator' is not supported here; guests get no table of memory attributes (HMAT)",
        ),
        ({"type": "dist", "src": 0, "dst": 1, "val": 20}, "dst: 1 is not a node; there are: 0"),
        ({"type": "dist", "src": 2, "dst": 0, "val": 20}, "src: 2 is not a node; there are: 0"),
        ({"type": "dist", "src": 0, "dst": 0, "val": 11}, "val: 11 is not 10, the distance of a node from itself"),
        ({"type": "cpu", "node-id": 1, "core-id": 0}, "node-id: 1 is not a node; there are: 0"),
        (
            {"type": "cpu", "node-id": 0, "core-id": 3},
            "cpu: 'core-id=3' is not those of a vCPU; query-hotpluggable-cpus lists them",
        ),
        (
            {"type": "cpu", "node-id": 0, "die-id": 0},
            "CPU property 'die-id' is not supported here; a vCPU has socket-id, core-id and thread-id",
        ),
        (
            {"type": "hmat-cache"},
            "NUMA option type 'hmat-cache' is not supported here; there are node, dist and cpu",
        ),
        ({"type": "hmat-lb"}, "NUMA option type 'hmat-lb' is not supported here; there are node, dist and cpu"),
    ]
    async with bare(tmp_path) as (running, client):
        await begin(client)
        assert await failure(client, "set-numa-node", type="dist", src=0, dst=0, val=10) == (
            "src: 0 is not a node; there are: none yet"
        )
        await node(client, cpus=[0], mem=HALF)
        recipe = running.host.recorder.recipe()
        for arguments, text in refused:
            assert (await failure(client, "set-numa-node", **arguments)).startswith(text)
        assert running.host.recorder.recipe() == recipe
        await node(client, cpus=[1, 2], mem=HALF)
        assert await failure(client, "set-numa-node", type="dist", src=0, dst=1, val=10) == (
            "val: 10 is not a distance between two nodes, 11 to 255"
        )
        assert await failure(client, "set-numa-node", type="cpu", **{"node-id": 0, "core-id": 1}) == (
            "cpu: 1 is not free: it is in node 1"
        )
        await client.execute("cont")
        assert affinity(written(running)[b"SRAT"])[0] == [0, 1, 1]
        recorded = [step for step in running.host.recorder.recipe() if step.execute == "set-numa-node"]
        assert [step.arguments["cpus"] for step in recorded] == [[0], [1, 2]]


INCOMPLETE: list[tuple[list[dict[str, Any]], str]] = [
    (
        [{"mem": HALF}],
        f"set-numa-node: {HALF} is not all of the machine's memory: its nodes must have {2 * HALF} bytes together",
    ),
    (
        [{"mem": HALF, "nodeid": 0}, {"mem": HALF, "nodeid": 2}],
        "set-numa-node: [0, 2] is not a complete list of nodes: 1 is missing",
    ),
    (
        [{"mem": HALF}, {}, {"type": "dist", "src": 0, "dst": 1, "val": 20}, {"mem": HALF}],
        "set-numa-node: [0, 2] is not a pair of nodes with a distance, which all pairs have or none",
    ),
]
REST: list[list[dict[str, Any]]] = [
    [{"mem": HALF}],
    [{"nodeid": 1}],
    [{"type": "dist", "src": src, "dst": 2, "val": 30} for src in (0, 1)],
]


@pytest.mark.parametrize(("number", "phase"), [(0, "preconfig"), (1, "devices"), (2, "devices")])
async def test_what_is_incomplete_keeps_the_machine_where_it_is(tmp_path: Path, number: int, phase: str) -> None:
    commands, text = INCOMPLETE[number]
    async with bare(tmp_path) as (running, client):
        await begin(client, phase)
        for arguments in commands:
            await client.execute("set-numa-node", **{"type": "node", **arguments})
        before = running.events()
        for _ in range(2):
            assert await failure(client, "cont") == text
            assert await where(client) == PATHS[phase][1]
        assert running.events() == before
        for arguments in REST[number]:
            await client.execute("set-numa-node", **{"type": "node", **arguments})
        await client.execute("cont")
        assert await where(client) == PATHS["running"][1]


async def test_no_cache_is_shared_by_vcpus_of_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[CpuidEntry, ...]] = []
    tell = VcpuFd.set_cpuid

    def set_cpuid(vcpu: VcpuFd, leaves: tuple[CpuidEntry, ...]) -> None:
        told.append(leaves)
        tell(vcpu, leaves)

    monkeypatch.setattr(VcpuFd, "set_cpuid", set_cpuid)
    async with bare(tmp_path) as (running, client):
        await begin(client, "devices")
        offer = running.tree.view(CpuOffer)
        assert told == [offer.leaves(index) for index in range(3)]
        await node(client, cpus=[0, 1], mem=2 * HALF)
        await node(client, cpus=[2])
        await client.execute("cont")
        assert told[3:] == [offer.leaves(index, 2) for index in range(3)]


async def test_vcpus_are_listed_with_their_nodes(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await begin(client, "devices")
        assert all("node-id" not in cpu["props"] for cpu in await client.execute("query-cpus-fast"))
        await node(client, mem=2 * HALF)
        await node(client, cpus=[1])
        await client.execute("finish-machine-init")
        assert [cpu["props"]["node-id"] for cpu in await client.execute("query-cpus-fast")] == [0, 1, 0]


async def test_no_other_phase_grants_it(tmp_path: Path) -> None:
    for phase in ("precreate", "accel", "running"):
        (tmp_path / phase).mkdir()
        async with bare(tmp_path / phase) as (_, client):
            await advance(client, phase)
            assert await failure(client, "set-numa-node", type="node") == (
                f"Command 'set-numa-node' needs may-set-numa, which phase {PATHS[phase][1]} does not grant; "
                "phases that grant it: preconfig (reached by accel-set), "
                "devices (reached by cpu-model-set or x-exit-preconfig)"
            )
