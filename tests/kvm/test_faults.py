"""Pages that come when they are used, and pages that are kept as they were."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.lowlevel
import trio.testing

from tests.kvm.tiny import TinyMachine
from vmm.errors import GuestPageLost, HostFileRefused, PageFaultsUnavailable
from vmm.hostio import create_ram
from vmm.kvm import _faults, faults
from vmm.kvm._mapped import ffi, lib
from vmm.kvm.faults import KeptPages, PagesFromFile, PagesFromLink, require_features
from vmm.kvm.memory import PAGE_SIZE, GuestMemory
from vmm.kvm.page_file import PageFile, all_pages
from vmm.kvm.page_map import PageMap
from vmm.migration.page_frames import FRAME_SIZE, Frame, FrameKind

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGES = 2048
AT = 1 << 20
EMPTY = (7, 8, 9, 1000, *range(1500, 1600))
"""Pages that are zero."""


@pytest.fixture
def memory() -> Generator[GuestMemory, None, None]:
    size = PAGES * PAGE_SIZE
    with closing(GuestMemory.from_memfd(create_ram(size, "test"), size)) as made:
        for page in range(PAGES):
            if page not in EMPTY:
                made.write(page * PAGE_SIZE, content(page))
        yield made


@pytest.fixture
def file(tmp_path: Path) -> Generator[PageFile, None, None]:
    fd = os.open(tmp_path / "pages", os.O_RDWR | os.O_CREAT)
    yield PageFile(fd, AT, PAGES)
    os.close(fd)


def content(page: int) -> bytes:
    return b"" if page in EMPTY else (page + 1).to_bytes(2, "little") * (PAGE_SIZE // 2)


def saved(memory: GuestMemory, file: PageFile) -> bytes:
    """Save all of the memory, make it zero, and return what it was."""
    file.save(memory, all_pages(PAGES), 0, PAGES)
    before = memory.read(0, memory.size)
    memory.clear()
    return before


def touch(memory: GuestMemory, page: int) -> bytes:
    """Read a page as a thread does that has the interpreter's lock and knows of nothing."""
    assert memory._bytes is not None
    return memory._bytes[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


async def test_pages_come_as_they_are_touched_and_the_rest_meanwhile(memory: GuestMemory, file: PageFile) -> None:
    before = saved(memory, file)
    with closing(PagesFromFile(memory, file)) as pages:
        for page in (2047, 0, 7, 1000, 1234, 1550):
            assert touch(memory, page) == content(page).ljust(PAGE_SIZE, b"\0")
        assert await pages.wait_over() is None
        assert pages.report().moved == PAGES - len(EMPTY)
    assert pages.report().moved == PAGES - len(EMPTY)
    assert memory.absent is None
    assert memory.read(0, memory.size) == before


async def test_reads_and_writes_of_ours_have_their_pages_first(memory: GuestMemory, file: PageFile) -> None:
    before = saved(memory, file)
    with closing(PagesFromFile(memory, file)) as pages:
        memory.write(5000, b"new")
        assert memory.read(4990, 30) == before[4990:5000] + b"new" + before[5003:5020]
        memory.write(7 * PAGE_SIZE, b"also new")
        assert bytes(memory.view(8190, 4)) == before[8190:8194]
        assert await pages.wait_over() is None
    assert memory.read(5000, 3) == b"new"
    assert memory.read(7 * PAGE_SIZE, 10) == b"also new\0\0"


async def test_a_damaged_page_is_told_and_nobody_who_waits_hangs(memory: GuestMemory, file: PageFile) -> None:
    saved(memory, file)
    os.pwrite(file.fd, b"!", AT + 1234 * PAGE_SIZE)
    waiting = trio.Event()
    sums: list[int] = []

    def use() -> None:
        trio.from_thread.run_sync(waiting.set)
        # In C, without the interpreter's lock, as a vCPU would.
        sums.append(lib.tm_crc32c(0, ffi.cast("void *", memory.hva(1234 * PAGE_SIZE)), PAGE_SIZE))

    with closing(PagesFromFile(memory, file)) as pages:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, use)
            await waiting.wait()
            failure = await pages.wait_over()
            assert isinstance(failure, GuestPageLost)
            assert failure.damaged
            assert "RAM at 0x4d2000 from " in str(failure)
            with pytest.raises(GuestPageLost, match="it is damaged"):
                memory.read(1234 * PAGE_SIZE, 1)
            pages.release()
        assert sums == [lib.tm_crc32c(0, ffi.from_buffer("char[]", bytes(PAGE_SIZE)), PAGE_SIZE)]


async def test_a_file_that_ends_early_is_told(memory: GuestMemory, file: PageFile) -> None:
    saved(memory, file)
    os.ftruncate(file.fd, AT + 2000 * PAGE_SIZE)
    with closing(PagesFromFile(memory, file)) as pages:
        failure = await pages.wait_over()
        assert isinstance(failure, GuestPageLost)
        assert not failure.damaged
        assert str(failure).endswith("the file ends before it")


async def test_it_can_be_given_up_at_any_time(memory: GuestMemory, file: PageFile) -> None:
    before = saved(memory, file)
    for _ in range(20):
        pages = PagesFromFile(memory, file)
        touch(memory, 2047)
        pages.close()
        pages.close()
        memory.clear()
    with closing(PagesFromFile(memory, file)) as pages:
        assert await pages.wait_over() is None
    assert memory.read(0, memory.size) == before


async def test_memory_that_is_made_zero_or_closed_ends_what_comes(memory: GuestMemory, file: PageFile) -> None:
    saved(memory, file)
    PagesFromFile(memory, file)
    memory.clear()
    assert memory.absent is None
    assert not any(memory.read(0, memory.size))
    PagesFromFile(memory, file)
    memory.close()


@pytest.mark.kvm
async def test_a_guest_runs_on_pages_that_were_not_there(tmp_path: Path) -> None:
    program = """
 mov ax, 0x2000
 mov ds, ax
 xor bx, bx
 xor si, si
again: add si, [bx]
 add bx, 4096
 jnz again
 mov ax, si
 out 0x80, ax
 out 0x99, al
"""
    with TinyMachine() as machine:
        memory = machine.memory
        machine.boot(program)
        for page in range(16):
            memory.write(0x20000 + page * PAGE_SIZE, (page * 3).to_bytes(2, "little"))
        pages = memory.size // PAGE_SIZE
        fd = os.open(tmp_path / "pages", os.O_RDWR | os.O_CREAT)
        file = PageFile(fd, 0, pages)
        file.save(memory, all_pages(pages), 0, pages)
        memory.clear()
        with closing(PagesFromFile(memory, file)) as absent:
            os.close(fd)
            await trio.to_thread.run_sync(machine.vcpus[0].enter, lambda: None)
            assert await absent.wait_over() is None
        assert machine.ports.written[0] == (0x80, 2, sum(page * 3 for page in range(16)))


def kept(memory: GuestMemory, file: PageFile) -> bytes:
    """Return what the file has of the memory."""
    size = PAGES * PAGE_SIZE
    with closing(GuestMemory.from_memfd(create_ram(size, "copy"), size)) as copy:
        file.load(copy, 0, PAGES)
        return copy.read(0, size)


async def test_pages_are_kept_as_they_were_however_they_change(memory: GuestMemory, file: PageFile) -> None:
    memory.write(0, b"changed while it got ready")
    with closing(KeptPages(memory, file)) as pages:
        memory.write(4096, b"and again")
        before = memory.read(0, memory.size)
        pages.begin()
        for page in (2047, 0, 1, 7, 1500, 1000, *range(300, 400)):
            memory.write(page * PAGE_SIZE + 8, b"later")
        assert await pages.wait_over() is None
        report = pages.report()
        assert (report.passed, report.moved) == (PAGES, PAGES - len(EMPTY))
    assert kept(memory, file) == before
    assert memory.read(2047 * PAGE_SIZE + 8, 5) == b"later"


async def test_a_file_that_takes_no_more_costs_the_guest_nothing(memory: GuestMemory, tmp_path: Path) -> None:
    (tmp_path / "pages").touch()
    fd = os.open(tmp_path / "pages", os.O_RDONLY)
    with closing(KeptPages(memory, PageFile(fd, AT, PAGES))) as pages:
        pages.begin()
        memory.write(0, b"goes on")
        failure = await pages.wait_over()
        assert isinstance(failure, HostFileRefused)
        assert str(failure) == f"Cannot write {tmp_path / 'pages'}: Bad file descriptor"
        for page in range(PAGES):
            memory.write(page * PAGE_SIZE, b"goes on")
    os.close(fd)


async def test_it_is_over_only_once_the_last_page_is_kept(memory: GuestMemory) -> None:
    last = (PAGES - 1) * PAGE_SIZE
    later = create_ram(PAGE_SIZE, "later")
    os.write(later, b"later ")
    memory.clear()
    memory.write(last, b"before")
    ours, theirs = socket.socketpair()
    over: list[object] = []
    ended = trio.Event()

    async def watch() -> None:
        over.append(await pages.wait_over())
        ended.set()

    with (
        ours, theirs,
        closing(GuestMemory.from_memfd(create_ram(memory.size, "slow"), memory.size)) as slow,
        closing(PagesFromLink(slow, PageMap(PAGES), ours.fileno(), None, 1)),
        closing(GuestMemory.from_memfd(create_ram(memory.size, "file"), memory.size)) as taken,
    ):  # fmt: skip
        file = PageFile(taken.fd, 0, PAGES)
        assert slow._bytes is not None
        absent = memoryview(slow._bytes).cast("B")[:PAGE_SIZE]  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            # Whoever writes to the file waits until what is being written there has come.
            nursery.start_soon(trio.to_thread.run_sync, os.pwrite, taken.fd, absent, 0)
            for kind in (FrameKind.BEGIN, FrameKind.NEED):
                Frame.decode(await trio.to_thread.run_sync(theirs.recv, FRAME_SIZE), kind)
            with closing(KeptPages(memory, file)) as pages:
                pages.begin()
                nursery.start_soon(watch)
                nursery.start_soon(trio.to_thread.run_sync, memory.fill, last, later, 0, 6)
                while pages.report().passed < PAGES - 64:
                    await trio.lowlevel.checkpoint()
                await trio.testing.wait_all_tasks_blocked(0.01)
                # The thread that goes through all pages is at its end. The other one waits for the file.
                early = list(over)
                theirs.sendall(Frame(FrameKind.ZEROS, 0, 1).encode())
                await ended.wait()
        assert (early, over) == ([], [None])
        assert memory.read(last, 6) == b"later "
        assert taken.read(last, 6) == b"before"
    os.close(later)


async def test_what_was_never_used_is_not_used_to_be_kept(memory: GuestMemory, file: PageFile) -> None:
    memory.clear()
    for page in (0, 1, 64, 1000, 2047):
        memory.write(page * PAGE_SIZE, content(page) or b"\0")
    before = memory.read(1000 * PAGE_SIZE, PAGE_SIZE)
    with closing(KeptPages(memory, file)) as pages:
        pages.begin()
        memory.write(500 * PAGE_SIZE, b"later")
        memory.write(2047 * PAGE_SIZE, b"later")
        assert await pages.wait_over() is None
        report = pages.report()
        assert (report.passed, report.moved) == (PAGES, 4)
    assert os.fstat(memory.fd).st_blocks * 512 == 6 * PAGE_SIZE
    with closing(GuestMemory.from_memfd(create_ram(memory.size, "copy"), memory.size)) as copy:
        file.load(copy, 0, PAGES)
        for page in (0, 1, 64, 2047):
            assert copy.read(page * PAGE_SIZE, PAGE_SIZE) == content(page)
        assert not any(copy.read(500 * PAGE_SIZE, PAGE_SIZE))
        assert copy.read(1000 * PAGE_SIZE, PAGE_SIZE) == before == bytes(PAGE_SIZE)


async def test_keeping_can_be_given_up(memory: GuestMemory, file: PageFile) -> None:
    for _ in range(20):
        pages = KeptPages(memory, file)
        pages.begin()
        memory.write(PAGE_SIZE * 2047, b"x")
        pages.close()
        memory.write(PAGE_SIZE * 2046, b"x")


def probe(monkeypatch: pytest.MonkeyPatch, error: int, found: int = 0) -> None:
    def answer(features: Any) -> int:
        features[0] = found
        return error

    names = {name: getattr(_faults.lib, name) for name in dir(_faults.lib) if name.startswith("UFFD")}
    monkeypatch.setattr(faults, "lib", SimpleNamespace(tf_probe=answer, **names))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (-1, "Cannot do this: this process may not use userfaultfd; it takes CAP_SYS_PTRACE, leave to open "),
        (-38, r"Cannot do this: this host's kernel has no userfaultfd \(Function not implemented\)"),
        (0, "Cannot do this: this host's kernel has userfaultfd without MISSING_SHMEM and WP_HUGETLBFS_SHMEM"),
    ],
)
def test_what_a_host_lacks_is_named(error: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["MISSING_SHMEM", "WP_HUGETLBFS_SHMEM"]
    require_features("do this", names)
    probe(monkeypatch, error)
    with pytest.raises(PageFaultsUnavailable, match=text):
        require_features("do this", names)


def test_ram_of_another_kind_is_refused(tmp_path: Path, file: PageFile) -> None:
    size = PAGES * PAGE_SIZE
    fd = os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size)
    with closing(GuestMemory.from_memfd(fd, size)) as memory:
        for make in (PagesFromFile, KeptPages):
            with pytest.raises(PageFaultsUnavailable, match="must be a memfd or a file on tmpfs, in pages of 4096"):
                make(memory, file)
        assert memory.absent is None
