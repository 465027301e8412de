"""Pages over a connection, both sides of it: a source that serves, and absent pages that are asked for."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Final, final

import pytest
import trio

from vmm.errors import MigrationPeerGone, MigrationRefused, StreamCorrupt
from vmm.hostio import create_ram
from vmm.hw.doorbell import open_doorbell
from vmm.kvm.faults import PagesFromLink
from vmm.kvm.memory import PAGE_SIZE, GuestMemory
from vmm.kvm.page_file import checksum
from vmm.kvm.page_map import PageMap
from vmm.migration.page_frames import FRAME_SIZE, Frame, FrameKind
from vmm.migration.page_server import LinkBroken, PageServer
from vmm.migration.pump import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGES: Final = 2048
EMPTY: Final = (0, 7, *range(1500, 1600))
HERE: Final = (3, 4, 2000)
"""Pages that the destination has from the beginning."""
HANGS: Final = 30


def content(page: int) -> bytes:
    """Return what is in a page."""
    return (b"" if page in EMPTY else (page + 1).to_bytes(2, "little") * (PAGE_SIZE // 2)).ljust(PAGE_SIZE, b"\0")


@pytest.fixture
def source() -> Generator[GuestMemory, None, None]:
    with closing(made()) as memory:
        for page in range(PAGES):
            memory.write(page * PAGE_SIZE, content(page))
        yield memory


@pytest.fixture
def target() -> Generator[GuestMemory, None, None]:
    with closing(made()) as memory:
        for page in HERE:
            memory.write(page * PAGE_SIZE, content(page))
        yield memory


def made() -> GuestMemory:
    return GuestMemory.from_memfd(create_ram(PAGES * PAGE_SIZE, "test"), PAGES * PAGE_SIZE)


def absent() -> PageMap:
    pages = PageMap(PAGES)
    pages.set_all()
    for page in HERE:
        pages.discard(page)
    return pages


def here() -> PageMap:
    pages = PageMap(PAGES)
    for page in HERE:
        pages.add(page)
    return pages


def touch(memory: GuestMemory, page: int) -> bytes:
    """Read a page as a thread does that has the interpreter's lock and knows of nothing."""
    assert memory._bytes is not None
    return memory._bytes[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


@final
class Pair:
    """Connected sockets."""

    def __init__(self) -> None:
        self.source, self.target = socket.socketpair()

    def cut(self) -> None:
        """Break the connection."""
        self.source.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.source.close()
        self.target.close()


async def serve(
    server: PageServer, pair: Pair, urgent: Pair | None = None, loaded: Callable[[], object] | None = None
) -> str:
    """Run a server in a thread to its end; return how it ended."""
    with open_doorbell() as bell:
        try:
            rush = urgent.source.fileno() if urgent else None
            await trio.to_thread.run_sync(server.run, pair.source.fileno(), rush, bell.fd, loaded)
        except LinkBroken as error:
            return str(error)
    return ""


@pytest.mark.parametrize("rush", [False, True], ids=["one", "preempt"])
async def test_all_pages_come_those_that_are_waited_for_first(
    rush: bool, source: GuestMemory, target: GuestMemory
) -> None:
    server = PageServer(source, absent(), lambda: 0)
    with closing(Pair()) as pair, closing(Pair()) as second:
        urgent = second if rush else None
        link = PagesFromLink(target, here(), pair.target.fileno(), second.target.fileno() if rush else None, 1)
        with closing(link), trio.fail_after(HANGS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, server, pair, urgent)
                for page in (2047, 0, 3, 7, 1000, 1550):
                    read = await trio.to_thread.run_sync(target.read, page * PAGE_SIZE, PAGE_SIZE)
                    assert read == content(page)
                assert await link.wait_changed() is None
            assert link.report().passed == PAGES
            assert link.here().count() == PAGES
    assert all(touch(target, page) == content(page) for page in range(PAGES))
    assert len(server.todo) == 0
    assert server.data_pages == PAGES - len(EMPTY) - len(HERE)
    assert server.zero_pages == len(EMPTY)


async def test_a_thread_that_waits_with_the_interpreter_s_lock_is_served_by_others(target: GuestMemory) -> None:
    with closing(Pair()) as pair, closing(PagesFromLink(target, here(), pair.target.fileno(), None, 1)) as link:
        # It is sent before it is asked for: nothing here can run while the page is waited for.
        pair.source.sendall(Frame(FrameKind.ZEROS, 9, 1).encode())
        assert touch(target, 9) == bytes(PAGE_SIZE)
        assert link.report().passed == len(HERE) + 1


async def asked_for(sock: socket.socket) -> Frame:
    """Read one frame of the destination."""
    kind = FrameKind.BEGIN
    while kind is not FrameKind.NEED:
        data = await trio.to_thread.run_sync(sock.recv, FRAME_SIZE, socket.MSG_WAITALL)
        frame = Frame.decode(data, FrameKind.BEGIN, FrameKind.LOADED, FrameKind.NEED)
        kind = frame.kind
    return frame


async def test_a_page_is_asked_for_once_and_again_after_a_break(source: GuestMemory, target: GuestMemory) -> None:
    got: list[bytes] = []
    with trio.fail_after(HANGS), closing(Pair()) as first, closing(Pair()) as second:
        link = PagesFromLink(target, here(), first.target.fileno(), None, 1)
        with closing(link):
            link.say_loaded()
            async with trio.open_nursery() as nursery:

                async def use() -> None:
                    # In a system call, as one that the interpreter's lock is not held in.
                    read, write = os.pipe()
                    try:
                        view = memoryview(target._bytes)[1234 * PAGE_SIZE : 1235 * PAGE_SIZE]  # type: ignore[arg-type]
                        await trio.to_thread.run_sync(os.write, write, view)
                        got.append(os.read(read, PAGE_SIZE))
                    finally:
                        os.close(read)
                        os.close(write)

                nursery.start_soon(use)
                assert (await asked_for(first.source)).page == 1234
                first.cut()
                failure = await link.wait_changed()
                assert str(failure) == (
                    "The source closed the connection; the guest waits for its pages; see migrate-recover"
                )
                assert link.here().count() == len(HERE)
                await trio.to_thread.run_sync(link.relink, second.target.fileno(), None)
                nursery.start_soon(serve, PageServer(source, absent(), lambda: 0), second)
                assert await link.wait_changed() is None
            assert link.asked() == 1
            assert link.waited(0) >= 0
    assert got == [content(1234)]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"x" * FRAME_SIZE, "sent damaged pages"),
        (Frame(FrameKind.PAGES, 9, 1, 1).encode() + bytes(4), "sent damaged pages"),
        (Frame(FrameKind.ZEROS, PAGES, 1).encode(), "sent what are no pages of this guest"),
        (Frame(FrameKind.ZEROS, PAGES - 1, 2).encode(), "sent what are no pages of this guest"),
        (Frame(FrameKind.ZEROS, 9, 0).encode(), "sent what are no pages of this guest"),
        (Frame(FrameKind.PAGES, 9, 65).encode(), "sent what are no pages of this guest"),
        (Frame(FrameKind.NEED, 9, 1).encode(), "sent what are no pages of this guest"),
        (Frame(FrameKind.SENT).encode(), "sent what are no pages of this guest"),
    ],
)
async def test_what_is_no_page_breaks_the_connection(data: bytes, text: str, target: GuestMemory) -> None:
    with closing(Pair()) as pair, closing(PagesFromLink(target, here(), pair.target.fileno(), None, 1)) as link:
        pair.source.sendall(data)
        with trio.fail_after(HANGS):
            failure = await link.wait_changed()
        assert isinstance(failure, MigrationPeerGone)
        assert text in str(failure)
        with pytest.raises(MigrationPeerGone, match=text):
            target.read(9 * PAGE_SIZE, 1)


async def test_that_all_was_sent_waits_for_what_comes_on_the_other_channel(target: GuestMemory) -> None:
    with closing(Pair()) as pair, closing(Pair()) as second, trio.fail_after(HANGS):
        link = PagesFromLink(target, here(), pair.target.fileno(), second.target.fileno(), 1)
        with closing(link):
            pair.source.sendall(Frame(FrameKind.SENT).encode())
            for page in HERE:
                assert page in link.here()
            first = 0
            for page in (*HERE, PAGES):
                if page > first:
                    second.source.sendall(Frame(FrameKind.ZEROS, first, page - first).encode())
                first = page + 1
            assert await link.wait_changed() is None


async def test_a_source_that_has_not_sent_all_can_be_given_up(target: GuestMemory) -> None:
    with closing(Pair()) as pair, closing(Pair()) as second:
        link = PagesFromLink(target, here(), pair.target.fileno(), second.target.fileno(), 1)
        pair.source.sendall(Frame(FrameKind.SENT).encode())
        link.close()


async def test_a_source_that_is_there_and_sends_nothing_is_not_waited_for_for_ever(target: GuestMemory) -> None:
    with closing(Pair()) as pair, closing(PagesFromLink(target, here(), pair.target.fileno(), None, 1, 0.01)) as link:
        for _ in range(2):
            with pytest.raises(MigrationPeerGone, match=r"The source has not sent a page within 0\.01 s; "):
                target.read(9 * PAGE_SIZE, 1)
        pair.source.sendall(Frame(FrameKind.ZEROS, 9, 1).encode())
        with trio.fail_after(HANGS):
            while 9 not in link.here():
                await trio.lowlevel.checkpoint()
        assert target.read(9 * PAGE_SIZE, 1) == b"\0"


async def test_a_damaged_page_is_not_put_in_place(target: GuestMemory) -> None:
    with closing(Pair()) as pair, closing(PagesFromLink(target, here(), pair.target.fileno(), None, 1)) as link:
        sums = bytes(4)
        pair.source.sendall(Frame(FrameKind.PAGES, 9, 1, checksum(sums)).encode() + sums + bytes(PAGE_SIZE))
        with trio.fail_after(HANGS):
            assert "damaged" in str(await link.wait_changed())
        assert 9 not in link.here()


async def test_before_the_guest_can_be_ours_a_break_lets_everybody_go_on(target: GuestMemory) -> None:
    with closing(Pair()) as pair, closing(PagesFromLink(target, here(), pair.target.fileno(), None, 1)) as link:
        pair.cut()
        with trio.fail_after(HANGS):
            assert "closed the connection" in str(await link.wait_changed())
        assert touch(target, 9) == bytes(PAGE_SIZE)
        with pytest.raises(MigrationPeerGone, match="The source closed the connection; the guest stays there"):
            link.say_loaded()


@pytest.mark.parametrize("closes", [False, True], ids=["release", "close"])
async def test_whoever_waits_goes_on_when_it_is_given_up(closes: bool, target: GuestMemory) -> None:
    with closing(Pair()) as pair, closing(PagesFromLink(target, here(), pair.target.fileno(), None, 1)) as link:
        with trio.fail_after(HANGS):
            async with trio.open_nursery() as nursery:

                async def use() -> None:
                    with pytest.raises(MigrationPeerGone):
                        await trio.to_thread.run_sync(target.read, 9 * PAGE_SIZE, 1)

                nursery.start_soon(use)
                assert (await asked_for(pair.source)).page == 9
                if closes:
                    link.close()
                    link.require(9, 1)
                else:
                    link.release()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"x" * FRAME_SIZE, "a damaged frame of pages: 7878"),
        (Frame(FrameKind.NEED, PAGES, 1).encode(), f"the destination waits for page {PAGES} of {PAGES}"),
        (Frame(FrameKind.NEED, 0, PAGES).encode(), f"the destination waits for {PAGES} pages in a frame, expected 1"),
        (
            Frame(FrameKind.PAGES, 1, 1).encode(),
            "a frame of pages of kind 1, expected NEED or GOT or BEGIN or LOADED or REFUSED",
        ),
        (Frame(FrameKind.GOT).encode(), "the destination has all pages before they were sent"),
        (b"", "the destination closed the connection"),
    ],
)
async def test_a_source_that_hears_nonsense_breaks_off(data: bytes, text: str, source: GuestMemory) -> None:
    server = PageServer(source, absent(), lambda: 1)
    with closing(Pair()) as pair:
        pair.target.sendall(data)
        if not data:
            pair.target.shutdown(socket.SHUT_WR)
        with trio.fail_after(HANGS):
            assert (await serve(server, pair)).startswith(text)


async def test_whoever_ends_with_something_unread_has_closed_the_connection(
    source: GuestMemory, target: GuestMemory
) -> None:
    ended: list[str] = []
    with closing(Pair()) as pair, trio.fail_after(HANGS):

        async def run() -> None:
            ended.append(await serve(PageServer(source, absent(), lambda: 0), pair))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.to_thread.run_sync(pair.target.recv, 1)
            pair.target.close()
    assert ended == ["the destination closed the connection"]
    with closing(Pair()) as pair, closing(PagesFromLink(target, here(), pair.target.fileno(), None, 1)) as link:
        pair.source.close()  # in which it is said that pages can be taken in
        with trio.fail_after(HANGS):
            failure = await link.wait_changed()
        assert str(failure).startswith("The source closed the connection; ")


async def test_a_limited_source_sends_what_is_asked_for_all_the_same(source: GuestMemory) -> None:
    server = PageServer(source, absent(), lambda: 1)
    server._at = 100
    with closing(Pair()) as pair, trio.fail_after(HANGS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, server, pair)
            pair.target.sendall(Frame(FrameKind.NEED, 1999, 1).encode())
            found = -1
            while found != 1999:
                head = await trio.to_thread.run_sync(pair.target.recv, FRAME_SIZE, socket.MSG_WAITALL)
                frame = Frame.decode(head, FrameKind.PAGES, FrameKind.ZEROS)
                found = frame.page
                size = frame.pages * (4 + PAGE_SIZE) if frame.kind is FrameKind.PAGES else 0
                await trio.to_thread.run_sync(pair.target.recv, size, socket.MSG_WAITALL)
            assert server.bytes < 4 << 20
            pair.target.close()


async def test_a_source_can_be_stopped(source: GuestMemory) -> None:
    server = PageServer(source, absent(), lambda: 1)
    with closing(Pair()) as pair, open_doorbell() as bell:
        bell.ring()
        with pytest.raises(Stopped):
            server.run(pair.source.fileno(), None, bell.fd)


TWICE: Final = "the destination has loaded what it was not sent, or twice"


async def test_nothing_is_sent_before_the_destination_can_take_it_and_the_guest_goes_once(source: GuestMemory) -> None:
    server = PageServer(source, absent(), lambda: 0)
    told: list[str] = []
    with closing(Pair()) as pair, trio.fail_after(HANGS):

        async def run() -> None:
            assert not await serve(server, pair, loaded=lambda: told.append("yours"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            with pytest.raises(BlockingIOError):
                pair.target.recv(1, socket.MSG_DONTWAIT)
            pair.target.sendall(Frame(FrameKind.BEGIN).encode() + Frame(FrameKind.LOADED).encode())
            kind = FrameKind.ZEROS
            while kind is not FrameKind.YOURS:
                head = await trio.to_thread.run_sync(pair.target.recv, FRAME_SIZE, socket.MSG_WAITALL)
                frame = Frame.decode(head, FrameKind.PAGES, FrameKind.ZEROS, FrameKind.YOURS)
                kind = frame.kind
                size = frame.pages * (4 + PAGE_SIZE) if kind is FrameKind.PAGES else 0
                await trio.to_thread.run_sync(pair.target.recv, size, socket.MSG_WAITALL)
            assert told == ["yours"]


async def test_a_guest_that_is_gone_is_not_loaded_again(source: GuestMemory) -> None:
    server = PageServer(source, absent(), lambda: 0)
    with closing(Pair()) as pair, trio.fail_after(HANGS):
        pair.target.sendall(Frame(FrameKind.LOADED).encode())
        assert await serve(server, pair) == TWICE


async def test_a_destination_that_refuses_says_why(source: GuestMemory) -> None:
    server = PageServer(source, absent(), lambda: 0)
    with closing(Pair()) as pair, open_doorbell() as bell:
        pair.target.sendall(Frame(FrameKind.REFUSED, pages=7).encode() + b"no room")
        with pytest.raises(MigrationRefused, match="Refused by the destination: no room"):
            server.run(pair.source.fileno(), None, bell.fd, lambda: None)


async def test_the_destination_hears_that_the_guest_is_its_own(target: GuestMemory) -> None:
    with closing(Pair()) as pair, closing(PagesFromLink(target, here(), pair.target.fileno(), None, 1)) as link:
        with trio.fail_after(HANGS):
            assert Frame.decode(pair.source.recv(FRAME_SIZE), FrameKind.BEGIN)
            link.say_loaded()
            assert Frame.decode(pair.source.recv(FRAME_SIZE), FrameKind.LOADED)
            pair.source.sendall(Frame(FrameKind.YOURS).encode())
            assert await link.wait_ours() is None
            pair.cut()
            assert "closed the connection" in str(await link.wait_changed())
            assert await link.wait_ours() is None


def test_a_frame_of_another_kind_is_named() -> None:
    assert Frame.decode(Frame(FrameKind.NEED, 1 << 40, 7, 5).encode(), FrameKind.NEED).page == 1 << 40
    with pytest.raises(StreamCorrupt, match="a frame of pages of kind 3, expected NEED"):
        Frame.decode(Frame(FrameKind.SENT).encode(), FrameKind.NEED)
