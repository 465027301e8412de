"""Streams that are damaged, or made with intent: each is refused, and nothing of it stays."""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import attrs
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vmm
from tests.phases.copy_kit import (
    commands,
    goes_on,
    in_status,
    outcome,
    parts,
    ram,
    save,
    source_peer,
    started,
    status,
)
from tests.phases.streams import PREAMBLE, Pages, answered, head_of, records_of, stream_of
from vmm.errors import StateRejected, StreamCorrupt, VmmError
from vmm.migration.ram_records import RamExtents, RamPages, RamPass, Switchover
from vmm.migration.stream import HEAD_SIZE
from vmm.migration.stream_records import Header, Recipe, Section, recipe_digest
from vmm.migration.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

PAGE: Final = b"x" * 4096


async def saved(folder: Path) -> bytes:
    """Return a guest as a stream."""
    async with started() as source:
        return await save(source, folder / "good")


async def refused(machine: EmbeddedMachine, folder: Path, data: bytes) -> VmmError:
    """Load a stream, which must be refused whole; return why."""
    path = trio.Path(folder / "bad")
    await path.write_bytes(data)
    with pytest.raises(VmmError) as caught:
        await machine.execute("loadvm", name=str(path))
    assert await status(machine) == "inmigrate"
    assert ram(machine) == []
    return caught.value


async def loads(machine: EmbeddedMachine, folder: Path) -> None:
    """Load the good stream after all of them."""
    await machine.execute("loadvm", name=str(folder / "good"))
    assert await status(machine) == "running"
    await goes_on(machine)


def boundaries(data: bytes) -> list[int]:
    """Return where each record begins, with what follows it of pages, and the end."""
    at, found = PREAMBLE, [PREAMBLE]
    while at < len(data):
        kind, payload = data[at : at + 2], at + HEAD_SIZE
        at = payload + int.from_bytes(data[at + 8 : at + 12], "little")
        if kind == RamPages.TYPE.to_bytes(2, "little"):
            at += RamPages.decode(data[payload:at]).content
        found.append(at)
    return found


async def test_every_record_is_missed_and_every_end_noticed(tmp_path: Path) -> None:
    data = await saved(tmp_path)
    cuts = boundaries(data)
    async with vmm.machine(commands(upto="accel-set")) as machine:
        for start, end in pairwise(cuts):
            for bad in (data[:start], data[: start + 1], data[: end - 1], data[:start] + data[end:]):
                error = await refused(machine, tmp_path, bad)
                assert isinstance(error, StreamCorrupt)
                assert "offset" in str(error) or "preamble" in str(error)
        await loads(machine, tmp_path)


async def test_records_that_are_swapped_or_repeated_are_noticed(tmp_path: Path) -> None:
    data = await saved(tmp_path)
    cuts = boundaries(data)
    records = [data[start:end] for start, end in pairwise(cuts)]
    async with vmm.machine(commands(upto="accel-set")) as machine:
        for at in range(len(records) - 1):
            swapped = [*records[:at], records[at + 1], records[at], *records[at + 2 :]]
            repeated = [*records[: at + 1], records[at], *records[at + 1 :]]
            for bad in (swapped, repeated):
                error = await refused(machine, tmp_path, data[:PREAMBLE] + b"".join(bad))
                assert f"record {at}" in str(error) or f"record {at + 1}" in str(error)
        await loads(machine, tmp_path)


async def test_whatever_bit_is_flipped_the_stream_is_refused(tmp_path: Path) -> None:
    async with started() as source:
        await source.execute("stop")  # else some pages come twice, and damage to the first does not matter
        data = await save(source, tmp_path / "good")

    async with vmm.machine(commands(upto="accel-set")) as machine:
        attempts: list[bytes] = []

        @settings(
            max_examples=200, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.integers(0, len(data) * 8 - 1))
        def collect(bit: int) -> None:
            bad = bytearray(data)
            bad[bit // 8] ^= 1 << bit % 8
            attempts.append(bytes(bad))

        await trio.to_thread.run_sync(collect)
        for bad in attempts:
            assert isinstance(await refused(machine, tmp_path, bad), StreamCorrupt)
        await machine.execute("loadvm", name=str(tmp_path / "good"))
        await machine.execute("cont")
        await goes_on(machine)


# --- made with intent: every checksum is right ------------------------------------------------------------------


def changed(kind: type, change: Callable[[Any], list[Any]]) -> Callable[[list[Any]], list[Any]]:
    """Replace the first record of a kind."""

    def apply(records: list[Any]) -> list[Any]:
        at = next(number for number, record in enumerate(records) if isinstance(record, kind))
        return [*records[:at], *change(records[at]), *records[at + 1 :]]

    return apply


def without(name: str) -> Callable[[list[Any]], list[Any]]:
    """Leave a section out."""
    return lambda records: [it for it in records if not (isinstance(it, Section) and it.name == name)]


def with_section(name: str, **state: Any) -> Callable[[list[Any]], list[Any]]:
    """Replace members of a section's state."""

    def apply(records: list[Any]) -> list[Any]:
        return [
            attrs.evolve(it, state={**it.state, **state}) if isinstance(it, Section) and it.name == name else it
            for it in records
        ]

    return apply


def with_recipe(*steps: dict[str, Any]) -> Callable[[list[Any]], list[Any]]:
    """Put another recipe, and its digest, in place of the source's."""

    def apply(records: list[Any]) -> list[Any]:
        header = Header("hostile", recipe_digest(steps))
        return [header, Recipe(steps), *records[2:]]

    return apply


HOSTILE: Final[dict[str, tuple[Callable[[list[Any]], list[Any]], str]]] = {
    "extents that are not RAM": (
        lambda records: [
            RamExtents(((0xF000_0000, 4096),), in_stream=True) if isinstance(it, RamExtents) else it
            for it in records
            if not isinstance(it, Pages)
        ],
        "its RAM is 4096 bytes at 0xf0000000, this machine has 16777216 bytes at 0x0",
    ),
    "extents without end": (
        changed(RamExtents, lambda it: [RamExtents(((0, (1 << 64) - 4096),), in_stream=True)]),
        "its RAM is 18446744073709547520 bytes at 0x0, this machine has 16777216 bytes at 0x0",
    ),
    "extents twice": (
        changed(RamExtents, lambda it: [it, it]),
        "a misplaced list of RAM extents: extent 0x0 of 0x1000000 bytes begins before the end of one before it",
    ),
    "no extents": (
        lambda records: [it for it in records if not isinstance(it, RamExtents | RamPass | Pages)],
        "its RAM is nowhere, this machine has 16777216 bytes at 0x0",
    ),
    "extents of shared memory": (
        changed(RamExtents, lambda it: [RamExtents(it.extents)]),
        "beginning of a pass, expected after the RAM extents",
    ),
    "shared memory and no content": (
        lambda records: [
            RamExtents(it.extents) if isinstance(it, RamExtents) else it
            for it in records
            if not isinstance(it, Pages | RamPass)
        ],
        "the content of the guest's RAM is not in it; only a live update comes so",
    ),
    "the guest stands twice": (
        changed(RamPass, lambda it: [it, Switchover(), Switchover()]),
        "a second notice of the switchover",
    ),
    "the guest stands before there is RAM": (
        changed(RamExtents, lambda it: [Switchover(), it]),
        "notice of the switchover, expected after the RAM extents",
    ),
    "no extents before the pages": (
        lambda records: [it for it in records if not isinstance(it, RamExtents | RamPass)],
        "list of RAM pages, expected after the RAM extents",
    ),
    "pages outside": (
        changed(Pages, lambda it: [Pages.of((1 << 40, PAGE))]),
        "a run of pages is outside of the guest's RAM",
    ),
    "pages over the end": (
        changed(Pages, lambda it: [Pages.of(((16 << 20) - 4096, PAGE * 2))]),
        "a run of pages goes beyond the guest's RAM",
    ),
    "pages that are damaged and do not come again": (
        changed(Pages, lambda it: [it, Pages.of((0x5000, PAGE), (0x8000, PAGE), checksum=1)]),
        "1 pages of RAM came with a wrong checksum and did not come again, the first at guest-physical address 0x5000",
    ),
    "pages that are packed where none are": (
        changed(Pages, lambda it: [Pages(RamPages(struct.pack("<IIQQIII", 1, 1, 9, 0x5000, 1, 0, 0)), b"x" * 9)]),
        "are packed in a way that its terms do not say",
    ),
    "further channels that there are not": (
        changed(Terms, lambda it: [attrs.evolve(it, multifd=2, id="00" * 16)]),
        "The source opens further channels, and nobody listens for them here: await it on tcp:, unix: or vsock:",
    ),
    "pages that nobody could be asked for": (
        changed(Terms, lambda it: [attrs.evolve(it, postcopy=True, id="00" * 16)]),
        "'postcopy' without 'answers' or 'id': nobody could be asked for the pages that are left",
    ),
    "pages without a table": (
        changed(Pages, lambda it: [Pages(RamPages(struct.pack("<IIQ", 2, 0, 0)), b"")]),
        "a malformed list of RAM pages: 2 runs of pages, expected 1 to 512, all of them in it",
    ),
    "no terms": (
        lambda records: [it for it in records if not isinstance(it, Terms)],
        "it does not say on what terms the guest comes",
    ),
    "a section that is missing": (without("kvm"), "'kvm' is missing from the stream"),
    "no word of the pause": (without("pause"), "'pause' is missing from the stream"),
    "a section too many": (
        changed(RamExtents, lambda it: [Section("ghost", 1, {}), it]),
        "'ghost' is in the stream, and no device here has it",
    ),
    "a pause that cannot be": (with_section("pause", running=7), "lacks running"),
    "a run state that is none": (with_section("pause", **{"run-state": "flying"}), "run state 'flying' is none"),
    "vCPUs that are none": (with_section("kvm", vcpus=[]), "0 states for 1 vCPUs"),
    "a chip of a wrong size": (with_section("kvm", chips={}), "chips must have exactly the members"),
    "another digest": (
        changed(Header, lambda it: [attrs.evolve(it, recipe_digest=bytes(32))]),
        "its recipe is not the one whose digest is in its header",
    ),
    "no recipe": (lambda records: [records[0], *records[2:]], "it has no recipe"),
    "no processor": (without("processor"), "its first section is not 'processor' of version 1"),
    "a processor that is none": (
        with_section("processor", leaves=[[0] * 6]),
        "what it says of the processor is no list of CPUID leaves",
    ),
    "another processor": (with_section("processor", leaves=[[1, 0, 0, 7, 7, 7, 7]]), "cpuid 0x1.0 ("),
    "a recipe that opens files": (
        with_recipe({"execute": "machine-set", "arguments": {"kernel": "/etc/passwd"}}, *commands()[1:4]),
        "machine-set.kernel ('/etc/passwd' there, 'builtin:heartbeat' here)",
    ),
    "a recipe with a command of its own": (
        with_recipe(*commands()[:4], {"execute": "quit"}),
        "a recipe from elsewhere has only commands that make a machine",
    ),
    "a recipe of nothing": (with_recipe(), "the recipe of a whole machine has it once"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_stream_made_with_intent_is_refused(name: str, tmp_path: Path) -> None:
    change, reason = HOSTILE[name]
    data = await saved(tmp_path)
    bad = stream_of(change(records_of(data)))
    async with vmm.machine(commands(upto="accel-set")) as machine:
        error = await refused(machine, tmp_path, bad)
        assert reason in str(error)
        await loads(machine, tmp_path)


async def test_the_good_stream_survives_being_taken_apart(tmp_path: Path) -> None:
    data = await saved(tmp_path)
    assert stream_of(records_of(data)) == data


@pytest.mark.parametrize("pages", [1, 600])
async def test_what_comes_while_the_guest_stands_is_taken_in_however_much_it_is(pages: int, tmp_path: Path) -> None:
    """More than is read on the loop goes on in a thread; and what does not come at all is noticed in either."""
    content = os.urandom(pages * 4096)
    parted = [(at, content[at : at + 4096 * 100]) for at in range(0, len(content), 4096 * 100)]
    last = [Switchover(), *(Pages.of(((8 << 20) + at, part)) for at, part in parted)]
    records = records_of(answered(await saved(tmp_path)))
    at = 1 + max(number for number, record in enumerate(records) if isinstance(record, Pages))
    good = stream_of([*records[:at], *last, *records[at:]])
    head = head_of(good)
    async with vmm.machine(commands(upto="accel-set")) as machine:
        for number, data in enumerate((good[:-1], good)):
            path = tmp_path / f"main{number}"
            await machine.execute("migrate-incoming", uri=f"unix:{path}", exit_on_error=False)
            async with source_peer(path) as peer:
                await peer.send(data[:head])
                assert (await peer.hear()).name == "ready"
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(peer.send, data[head:])
                    assert (await peer.hear()).name == "prepared"
                if data is good:
                    assert (await peer.hear()).name == "loaded"
                    await peer.say("yours")
                else:
                    await peer.send_eof()
                    word = await peer.hear()
                    assert word.name == "refused"
                    assert "expected record" in word.reason
            if data is not good:
                assert (await outcome(machine))["status"] == "failed"
        await in_status(machine, "running")
        await goes_on(machine)
        assert parts(machine).memory.read(8 << 20, len(content)) == content


async def test_a_device_s_state_that_cannot_be_is_named(tmp_path: Path) -> None:
    data = await saved(tmp_path)
    bad = stream_of(with_section("rtc", index=999999)(records_of(data)))
    async with vmm.machine(commands(upto="accel-set")) as machine:
        error = await refused(machine, tmp_path, bad)
        assert isinstance(error, StateRejected)
        assert error.section == "rtc"
