"""A guest on the real KVM draws random bytes through its virtio slot: by notifications that do not exit, and by
level-triggered interrupts."""

from __future__ import annotations

import mmap
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import pytest

import vmm
from tests.backends.pseudo_source import pseudo_source
from tests.phases.copy_kit import save
from tests.phases.rng_guest import RAM, USED, RngGuest, definition, rng_guest
from tests.phases.update_kit import (
    begin_update,
    descriptors_in,
    descriptors_of,
    move,
    open_bench,
    outcome,
    ready,
)
from vmm.phases.machine import Machine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

RNG = {"driver": "virtio-rng-device"}
STEPS = (("preconfig", "cpu-model-set"), ("devices", "finish-machine-init"), ("running", "cont"))


@asynccontextmanager
async def machine(kernel: str, *extra: dict[str, Any]) -> AsyncGenerator[tuple[EmbeddedMachine, RngGuest], None]:
    """A machine in phase preconfig, and its guest, which begins with `cont`."""
    recipe: list[dict[str, Any]] = [
        {"execute": "machine-set", "arguments": definition(kernel)},
        {"execute": "accel-set"},
        *extra,
    ]
    async with vmm.machine(recipe) as made:

        def read(address: int, size: int) -> bytes:
            return made._host.tree.view(Machine).memory.read(address, size)

        yield made, RngGuest(read)


@pytest.mark.parametrize("phase", ["preconfig", "devices", "running"])
async def test_a_guest_draws_from_a_device_however_it_was_plugged_in(tmp_path: Path, phase: str) -> None:
    async with machine(rng_guest(tmp_path)) as (made, guest):
        for here, command in STEPS:
            if here == phase:
                await made.execute("device_add", **RNG)
            await made.execute(command)
        progress = await guest.answers(50)
        assert progress.interrupts >= 1
        assert progress.asked - progress.answered in (0, 1)


async def test_a_guest_finds_a_device_in_the_last_slot_while_it_looks_for_it(tmp_path: Path) -> None:
    async with machine(rng_guest(tmp_path, slot=7)) as (made, guest):
        await made.execute("cont")
        looking = await guest.until("a look", lambda it: it.looked > 100)
        assert looking.asked == 0
        await made.execute("device_add", **RNG, bus="virtio-mmio-bus.7")
        await guest.answers(20)
        await made.execute("device_del", id="device0")
        # A request that nobody answers any more; the machine lives.
        assert (await made.execute("query-status"))["running"]
        await made.execute("device_add", **RNG, bus="virtio-mmio-bus.7")
        await made.execute("system_reset")
        await guest.answers(20)


async def test_a_reset_keeps_the_device_and_the_guest_starts_anew_with_it(tmp_path: Path) -> None:
    async with machine(rng_guest(tmp_path), {"execute": "device_add", "arguments": RNG}) as (made, guest):
        await made.execute("cont")
        for _ in range(3):
            await guest.answers(20)
            await made.execute("system_reset")
        await guest.answers(20)


async def test_a_guest_that_stands_asks_for_nothing_and_goes_on(tmp_path: Path) -> None:
    async with machine(rng_guest(tmp_path), {"execute": "device_add", "arguments": RNG}) as (made, guest):
        await made.execute("cont")
        for _ in range(5):
            await guest.answers(5)
            await made.execute("stop")
            await made.execute("cont")
        await guest.answers(5)


async def test_a_device_is_plugged_in_and_taken_off_a_hundred_times_while_the_guest_draws_from_another(
    tmp_path: Path,
) -> None:
    async with machine(rng_guest(tmp_path), {"execute": "device_add", "arguments": RNG}) as (made, guest):
        await made.execute("cont")
        for _ in range(100):
            await made.execute("device_add", **RNG, id="other")
            await made.execute("device_del", id="other")
        await guest.answers(20)


# --- live update ------------------------------------------------------------------------------------------


class Mapping:
    """The memory of a machine that is another process; stays good when it moves."""

    def __init__(self, pid: int) -> None:
        (path,) = [path for path, target in descriptors_in(pid) if target.startswith("/memfd:ram")]
        with path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), RAM, prot=mmap.PROT_READ)

    def read(self, address: int, size: int) -> bytes:
        return self._memory[address : address + size]

    def close(self) -> None:
        self._memory.close()


def options(kernel: str, filename: str, *more: str) -> list[str]:
    source = f"rng-random,id=rng0,filename={filename}"
    return ["-kernel", kernel, "-m", "2M", "-object", source, "-device", "virtio-rng-device,id=d,rng=rng0", *more]


async def test_a_guest_draws_on_through_three_live_updates(tmp_path: Path) -> None:
    async with open_bench() as bench:
        process = bench.start(*options(rng_guest(tmp_path), "/dev/urandom"), qmp=bench.qmp)
        async with bench.session(bench.qmp) as client:
            await ready(client)
        with closing(Mapping(process.pid)) as memory:
            guest = RngGuest(memory.read)
            for _ in range(3):
                await guest.answers(20)
                process = await move(bench, process)
                await guest.answers(20)
                assert descriptors_of(process.pid).count("/dev/urandom") == 1
            assert guest.now().asked - guest.now().answered in (0, 1)
        assert process.said() == []


async def test_a_request_in_flight_is_answered_by_the_successor(tmp_path: Path) -> None:
    with pseudo_source() as source:
        async with open_bench() as bench:
            process = bench.start(*options(rng_guest(tmp_path), source.path), qmp=bench.qmp)
            async with bench.session(bench.qmp) as client:
                await ready(client)
            with closing(Mapping(process.pid)) as memory:
                guest = RngGuest(memory.read)
                for round_ in range(3):
                    waiting = await guest.until("a request", lambda it, n=round_: it.asked == n + 1)  # type: ignore[misc]
                    assert waiting.answered == round_
                    process = await move(bench, process)
                    assert guest.now().answered == round_
                    source.feed(b"0123456789abcdef")
                    await guest.until("the answer", lambda it, n=round_: it.answered == n + 1)  # type: ignore[misc]
            assert process.said() == []


async def test_a_device_that_was_hot_plugged_is_the_successors_and_one_that_was_taken_off_is_not(
    tmp_path: Path,
) -> None:
    async with open_bench() as bench:
        process = bench.start("-kernel", rng_guest(tmp_path, slot=2), "-m", "2M", qmp=bench.qmp)
        async with bench.session(bench.qmp) as client:
            await ready(client)
            await client.execute("object-add", **{"qom-type": "rng-random", "id": "r", "filename": "/dev/random"})
            await client.execute("device_add", **RNG, id="gone")
            await client.execute("device_add", **RNG, id="stays", bus="virtio-mmio-bus.2", rng="r")
            await client.execute("device_del", id="gone")
        with closing(Mapping(process.pid)) as memory:
            guest = RngGuest(memory.read)
            await guest.answers(20)
            process = await move(bench, process)
            await guest.answers(20)
            assert "/dev/random" in descriptors_of(process.pid)
            async with bench.session(bench.qmp) as client:
                await client.execute("device_del", id="stays")
                await client.execute("object-del", id="r")
            assert "/dev/random" not in descriptors_of(process.pid)


@pytest.mark.parametrize("step", ["destination:built", "destination:state-received", "destination:taken"])
async def test_after_an_update_that_failed_the_source_answers_on(tmp_path: Path, step: str) -> None:
    with pseudo_source() as source:
        async with open_bench() as bench:
            process = bench.start(*options(rng_guest(tmp_path), source.path), qmp=bench.qmp)
            async with bench.session(bench.qmp) as client:
                await ready(client)
            with closing(Mapping(process.pid)) as memory:
                guest = RngGuest(memory.read)
                await guest.until("a request", lambda it: it.asked == 1)
                destination = bench.destination("--x-cpr-stop-at", step)
                await bench.listening(destination)
                async with bench.session(bench.qmp) as client:
                    await begin_update(client, bench.channels(destination))
                    await destination.stopped()
                    source.feed(b"0123456789abcdef")
                    # Turns of the source's loop: were it not at rest, it would write to the guest's memory.
                    for _ in range(2):
                        await client.execute("query-status")
                    assert memory.read(USED, 4) == bytes(4) or step == "destination:built"
                    destination.kill()
                    assert (await outcome(client))["status"] == "failed"
                await guest.until("the answer", lambda it: (it.asked, it.answered, it.empty) == (2, 1, 0))


async def test_a_request_that_was_saved_into_a_file_is_answered_where_it_is_loaded(tmp_path: Path) -> None:
    kernel, state = rng_guest(tmp_path), tmp_path / "state"
    with pseudo_source() as source:
        sources = {"qom-type": "rng-random", "id": "r", "filename": source.path}
        extra = (
            {"execute": "object-add", "arguments": sources},
            {"execute": "device_add", "arguments": RNG | {"rng": "r"}},
        )
        async with machine(kernel, *extra) as (made, guest):
            await made.execute("cont")
            await guest.until("a request", lambda it: it.asked == 1)
            await save(made, state)
        async with machine(kernel, *extra) as (made, guest):
            await made.execute("cpu-model-set")
            await made.execute("loadvm", name=str(state))
            await made.execute("cont")
            source.feed(b"0123456789abcdef")
            await guest.until("the answer", lambda it: (it.asked, it.answered, it.empty) == (2, 1, 0))
