"""`object-add` of what RAM is made of, and machines that have it: on the real KVM, and through live updates."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

import vmm
from tests.phases.copy_kit import (
    SIZE,
    commands,
    empty,
    goes_on,
    in_status,
    look,
    move,
    outcome,
    parts,
    ram,
    refusal,
    ticked,
)
from tests.phases.memory_kit import in_file, lock_of, locks_on, memfd, recipe, try_lock, update, with_ram
from tests.phases.update_kit import channels
from vmm import hostio, hostmem
from vmm.cpr.steps import DESTINATION_STEPS, SOURCE_STEPS, Steps
from vmm.errors import MigrationRefused, VmmError
from vmm.kvm.memory import GuestMemory
from vmm.phases.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

HUGE: Final = 2 << 20
POOL: Final = Path(f"{hostmem.HUGE_PAGES}/hugepages-2048kB/nr_hugepages")


async def failure(machine: EmbeddedMachine, command: str, /, **arguments: Any) -> str:
    with pytest.raises(VmmError) as caught:
        await machine.execute(command, **arguments)
    return str(caught.value)


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Have the host keep `count` huge pages more, for as long as the block lasts."""
    try:
        before = int(POOL.read_text())
        POOL.write_text(str(before + count))
    except OSError as error:
        pytest.skip(f"huge pages of 2 MiB cannot be had: {error}")
    try:
        if int(POOL.read_text()) < before + count:
            pytest.skip(f"this host has no {count} huge pages of 2 MiB to spare")
        yield
    finally:
        POOL.write_text(str(before))


# --- the objects -------------------------------------------------------------------------------------------------


async def test_what_cannot_be_ram_is_refused_by_name(tmp_path: Path) -> None:
    async with vmm.machine() as machine:
        for wrong, text in (
            (memfd(size=4097), "object-add m0: size: 4097 is not a multiple of 4 KiB between 1 MiB and 1 TiB"),
            (
                memfd(share=False),
                "Option of memory-backend-memfd 'share=off' is not supported here; "
                "set it to on: a machine's RAM is shared with a successor, always",
            ),
            (
                in_file(tmp_path / "f", share=False),
                "Option of memory-backend-file 'share=off' is not supported here; "
                "set it to on: a machine's RAM is shared with a successor, always",
            ),
            (
                memfd(seal=False),
                "Option of memory-backend-memfd 'seal=off' is not supported here; "
                "leave it on: who has the descriptor could cut the RAM off from under the guest",
            ),
            (memfd(hugetlbsize=HUGE), f"object-add m0: hugetlbsize: {HUGE} is not possible without hugetlb=on"),
            (
                memfd(size=HUGE + 4096, hugetlb=True),
                f"object-add m0: size: {HUGE + 4096} is not a multiple of its huge pages of {HUGE} bytes",
            ),
            (
                in_file(tmp_path / "f", align=4096),
                "Command 'object-add': 'align' is unexpected; "
                "there are 'qom-type', 'id', 'size', 'mem-path', 'prealloc', 'share'",
            ),
        ):
            assert await failure(machine, "object-add", **wrong) == text
        sizes = ", ".join(map(str, hostmem.huge_page_sizes()))
        assert await failure(machine, "object-add", **memfd(hugetlb=True, hugetlbsize=12288)) == (
            f"object-add m0: hugetlbsize: 12288 is not a size of huge pages of this host: {sizes}"
        )
        assert machine.recipe.to_json() == []
    assert os.listdir(tmp_path) == []


async def test_the_machine_has_the_back_end_that_it_names_and_that_has_its_size(tmp_path: Path) -> None:
    async with vmm.machine() as machine:
        define = commands()[0]["arguments"] | {"memory-backend": "m0"}
        assert await failure(machine, "machine-set", **define) == (
            "Memory back end 'm0' does not exist; there are: none"
        )
        await machine.execute("object-add", **memfd(size=SIZE * 2))
        assert await failure(machine, "machine-set", **define) == (
            f"memory.size: {SIZE} is not the size of memory back end 'm0', which is {SIZE * 2}"
        )
        await machine.execute("object-del", id="m0")
        await machine.execute("object-add", **memfd())
        assert await failure(machine, "object-add", **memfd()) == "Object 'm0' exists already; choose another name"
        await machine.execute("machine-set", **define)
        assert await failure(machine, "object-del", id="m0") == (
            "Object 'm0' is in use by the machine, whose RAM it is"
        )
        assert await failure(machine, "object-del", id="m1") == "Object 'm1' does not exist; there are: m0"


@pytest.mark.parametrize("where", ["memfd", "prealloc", "file", "folder", "tmpfs"])
async def test_a_guest_runs_in_ram_of_a_back_end_and_through_a_live_update(where: str, tmp_path: Path) -> None:
    file = Path(f"/dev/shm/trio-vmm-test-{os.getpid()}") if where == "tmpfs" else tmp_path / "ram"
    backend = {
        "memfd": memfd(),
        "prealloc": memfd(prealloc=True),
        "folder": in_file(tmp_path),
    }.get(where) or in_file(file)
    try:
        async with with_ram(backend) as source, empty() as destination:
            ticks = look(source).ticks
            made = [step["arguments"] for step in source.recipe.to_json() if step["execute"] == "object-add"]
            assert made == [{"prealloc": False, **backend, **({"hugetlb": False, "seal": True, "share": True}
                                                               if "memfd" in backend["qom-type"] else {})}]  # fmt: skip
            allocated = os.fstat(parts(source).memory.fd).st_blocks * 512
            assert (allocated >= SIZE) is (where == "prealloc")
            info = await update(source, destination, tmp_path)
            assert info["status"] == "completed", info
            await goes_on(destination)
            assert look(destination).ticks > ticks
            assert look(destination).intact
            assert destination.recipe.to_json() == source.recipe.to_json()
            assert os.path.samestat(*(os.fstat(parts(one).memory.fd) for one in (source, destination)))
    finally:
        file.unlink(missing_ok=True)


async def test_ram_of_huge_pages_goes_through_a_live_update_and_a_copy(tmp_path: Path) -> None:
    backend = memfd(hugetlb=True)
    with huge_pages(2 * SIZE // HUGE):
        async with with_ram(backend) as source, empty() as destination:
            assert parts(source).memory.page_size == HUGE
            assert (await update(source, destination, tmp_path))["status"] == "completed"
            await goes_on(destination)
            assert parts(destination).memory.page_size == HUGE
            async with empty(autostart=False) as copy:
                assert (await move(destination, copy, tmp_path))["status"] == "completed"
                await in_status(copy, "paused")
                assert ram(copy) == ram(destination)
                # What is loaded twice is cleared in between; all pages are still its own.
                assert parts(copy).memory.page_size == HUGE
                parts(copy).memory.clear()
                assert ram(copy) == []


async def test_huge_pages_that_are_lacking_are_told_of_before_there_is_a_machine() -> None:
    terabyte = 1 << 40
    async with vmm.machine() as machine:
        assert (await failure(machine, "object-add", **memfd(size=terabyte, hugetlb=True))).endswith(
            "Cannot allocate memory; /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages says how many there are, "
            "and can be set"
        )


# --- the lock ----------------------------------------------------------------------------------------------------


async def test_the_lock_of_a_file_goes_over_and_is_never_free_and_never_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ram"
    seen: list[tuple[str, bool, tuple[int, int, int] | None, int]] = []
    reach = Steps.reach

    def look_at_the_lock(steps: Steps, step: str) -> None:
        seen.append((f"{steps._side}:{step}", try_lock(path), lock_of(path), locks_on(path)))
        reach(steps, step)

    monkeypatch.setattr(Steps, "reach", look_at_the_lock)
    async with empty() as destination:
        async with with_ram(in_file(path)) as source:
            assert (await update(source, destination, tmp_path))["status"] == "completed"
            await goes_on(destination)
        # The source has ended.
        assert (try_lock(path), lock_of(path), locks_on(path)) == (False, (1, 0, 0), 1)
        await goes_on(destination)
    assert {name for name, *_ in seen} == {
        *(f"source:{step}" for step in SOURCE_STEPS),
        *(f"destination:{step}" for step in DESTINATION_STEPS),
    }
    assert {found for _, *found_ in seen for found in [tuple(found_)]} == {(False, (1, 0, 0), 1)}
    assert (try_lock(path), lock_of(path), locks_on(path)) == (True, None, 0)


async def test_an_update_that_fails_leaves_the_lock_with_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ram"
    reach = Steps.reach

    def fail(steps: Steps, step: str) -> None:
        reach(steps, step)
        if (steps._side, step) == ("destination", "state-received"):
            raise MigrationRefused(reason="by this test")

    monkeypatch.setattr(Steps, "reach", fail)
    async with with_ram(in_file(path)) as source:
        with refusal(MigrationRefused, "by this test"):
            async with empty() as destination:
                assert (await update(source, destination, tmp_path))["status"] == "failed"
                await trio.sleep_forever()  # until it ends with the reason
        assert (try_lock(path), locks_on(path)) == (False, 1)
        await goes_on(source)
    assert try_lock(path)


async def test_two_machines_cannot_have_one_file(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    async with with_ram(in_file(path)) as first, vmm.machine() as second:
        assert await failure(second, "object-add", **in_file(path)) == (
            f"Cannot use as RAM {path}: it is locked: it is the RAM of another machine, which must end first"
        )
        await goes_on(first)


# --- what comes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noted", "text"),
    [
        (memfd(size=SIZE), None),
        (memfd(size=SIZE, prealloc=True), "object-add m0 is not the same here as at the source"),
        ({"memory-backend": "other"}, "machine-set has memory-backend 'other' here, and 'm0' at the source"),
    ],
    ids=["the same", "another", "another name"],
)
async def test_what_a_destination_says_of_the_ram_must_be_what_the_source_has(
    noted: dict[str, Any], text: str | None, tmp_path: Path
) -> None:
    where = channels(str(tmp_path / "main"), str(tmp_path / "cpr"))
    async with with_ram(memfd()) as source, empty() as destination:
        await destination.execute("migrate-incoming", channels=where)
        await destination.execute("object-add" if "id" in noted else "machine-set", **noted)
        verdict = await source.execute("x-cpr-check", channels=where)
        assert verdict["admitted"] is (text is None), verdict
        if text is not None:
            assert verdict["reason"] == (
                f"{text}; in a live update the guest's RAM is the source's, so leave it out here"
            )
        else:
            await source.execute("migrate", channels=where, parameters={"mode": "cpr-transfer"})
            await in_status(destination, "running")
        await goes_on(source if text is not None else destination)


async def test_a_copied_guest_has_ram_of_the_same_kind_and_a_file_needs_permission(tmp_path: Path) -> None:
    file = tmp_path / "here"
    async with with_ram(memfd()) as source, empty() as destination:
        assert (await move(source, destination, tmp_path))["status"] == "completed"
        await goes_on(destination)
        assert destination.recipe.to_json() == source.recipe.to_json()
    async with with_ram(in_file(tmp_path / "there")) as source:
        async with empty(allowed={"object/m0": str(file)}) as destination:
            assert (await move(source, destination, tmp_path))["status"] == "completed"
            await goes_on(destination)
            assert not try_lock(file)
        await source.execute("cont")
        async with empty() as destination:
            await destination.execute("migrate-incoming", uri=f"unix:{tmp_path}/main", **{"exit-on-error": False})
            await source.execute("migrate", uri=f"unix:{tmp_path}/main")
            info = await outcome(source)
            assert info["status"] == "failed"
            assert "object/m0" in info["error-desc"]
        await goes_on(source)


async def test_a_refused_stream_leaves_no_memory_behind(tmp_path: Path) -> None:
    uri, taken = f"unix:{tmp_path}/main", tmp_path / "taken"
    two = [{"execute": "object-add", "arguments": memfd(name="l0")}, *recipe(in_file(tmp_path / "ram"))]
    async with vmm.machine(two) as source, empty(allowed={"object/m0": str(taken)}) as destination:
        await destination.execute("object-add", **in_file(taken, name="m0"))
        await destination.execute("migrate-incoming", uri=uri, **{"exit-on-error": False})
        await source.execute("migrate", uri=uri)
        info = await outcome(source)
        assert info["status"] == "failed"
        assert f"Cannot use as RAM {taken}: it is locked" in info["error-desc"]
        # What had been made of it by then has gone, and what had made way has its name again.
        assert await failure(destination, "object-del", id="l0") == "Object 'l0' does not exist; there are: m0"
        await destination.execute("object-del", id="m0")
        assert destination.recipe.to_json() == []
        await in_status(source, "running")


def unsealed(size: int) -> int:
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


@pytest.mark.parametrize(
    ("kind", "bad", "found"),
    [
        ("own", lambda: unsealed(SIZE), "not sealed against shrinking"),
        ("own", lambda: hostio.create_ram(SIZE - 4096, "ram"), f"{SIZE - 4096} bytes long"),
        ("memfd", lambda: unsealed(SIZE), "not sealed against shrinking"),
        ("memfd", lambda: os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC), "a character device"),
        ("file", lambda: os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC), "not open to read and write"),
        ("file", lambda: hostio.create_ram(4096, "ram"), "4096 bytes long"),
    ],
)
async def test_ram_that_a_source_could_take_away_is_refused_before_it_is_mapped(
    kind: str, bad: Callable[[], int], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = {"own": None, "memfd": memfd(), "file": in_file(tmp_path / "ram")}[kind]
    made = commands() if backend is None else recipe(backend)
    name = "ram" if backend is None else "object/m0/memory"
    descriptors = Machine.descriptors
    fd = bad()
    monkeypatch.setattr(Machine, "descriptors", lambda self, **which: {**descriptors(self, **which), name: fd})
    try:
        async with vmm.machine(made) as source:
            await ticked(source, 5)
            with refusal(VmmError, f"Descriptor '{name}' is {found}, not a "):
                async with empty() as destination:
                    monkeypatch.setattr(GuestMemory, "from_memfd", None)
                    info = await update(source, destination, tmp_path)
                    assert info["status"] == "failed"
                    assert f"Descriptor '{name}' is {found}, not a " in info["error-desc"]
                    await trio.sleep_forever()  # until it ends with the reason
            await goes_on(source)
    finally:
        os.close(fd)
