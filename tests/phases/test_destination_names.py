"""A destination that was started with back ends of its own, whose names the guest's machine uses too."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

import vmm

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

NULL: dict[str, Any] = {"execute": "chardev-add", "arguments": {"id": "serial0", "backend": {"type": "null"}}}
OPTIONS = {"memory": {"size": 16 << 20}, "kernel": "builtin:heartbeat", "serial": ["serial0"]}
GUEST: list[dict[str, Any]] = [
    NULL,
    {"execute": "machine-set", "arguments": OPTIONS},
    {"execute": "accel-set"},
    {"execute": "cpu-model-set"},
    {"execute": "finish-machine-init"},
    {"execute": "cont"},
]


async def settle(source: EmbeddedMachine) -> str:
    """Wait until the source's migration is over, and return its status."""
    async with source.events() as events:
        while (status := (await source.execute("query-migrate")).get("status")) not in ("completed", "failed"):
            await anext(events)
    return str(status)


async def test_they_step_aside_for_those_of_the_guest(tmp_path: Path) -> None:
    channels = [
        {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": str(tmp_path / kind)}}
        for kind in ("main", "cpr")
    ]
    async with vmm.machine([NULL]) as destination, vmm.machine(GUEST) as source:
        await destination.execute("migrate-incoming", channels=channels)
        await source.execute("migrate-set-parameters", mode="cpr-transfer")
        await source.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        await source.execute("migrate", channels=channels)
        assert await settle(source) == "completed", await source.execute("query-migrate")
        labels = [chardev["label"] for chardev in await destination.execute("query-chardev")]
        assert sorted(labels) == ["serial0", f"serial0@{os.getpid()}"]
        made = [step.arguments.get("id") for step in destination.recipe if step.execute == "chardev-add"]
        assert sorted(map(str, made)) == ["serial0", f"serial0@{os.getpid()}"]
        assert (await destination.execute("query-status"))["status"] == "running"
