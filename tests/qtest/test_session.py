"""One client of qtest on a real socket, with a machine that is a fake."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, final

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.qtest.client import PATIENCE, QtestClient
from tests.qtest.fakes import FakeAccess, FakeLender, FakeLog
from vmm.errors import CommandAborted
from vmm.monitor.unix import Gate, SocketTransport
from vmm.qtest.protocol import MAX_LINE
from vmm.qtest.session import BOUNDS, QtestSession

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytestmark = pytest.mark.usefixtures("no_leaks")


@final
@attrs.define(eq=False)
class Rig:
    """A session under way, its client, and what stands in for the machine."""

    session: QtestSession
    client: QtestClient
    lender: FakeLender
    log: FakeLog
    ended: trio.Event = attrs.Factory(trio.Event)

    @property
    def access(self) -> FakeAccess:
        return self.lender.access


@asynccontextmanager
async def rig() -> AsyncGenerator[Rig, None]:
    """Serve a client."""
    ours, theirs = socket.socketpair()
    lender, log = FakeLender(), FakeLog()
    session = QtestSession("q/1", SocketTransport(ours, Gate()), lender, log)
    client = QtestClient(trio.SocketStream(trio.socket.from_stdlib_socket(theirs)))
    it = Rig(session, client, lender, log)

    async def serve() -> None:
        await session.serve()
        it.ended.set()

    with trio.fail_after(PATIENCE):
        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield it
            nursery.cancel_scope.cancel()


async def test_lines_are_answered_in_their_order() -> None:
    async with rig() as it:
        await it.client.send("inb 1", "# nothing", "", "inb 2", "nonsense", "inb 3")
        replies = [await it.client.reply() for _ in range(4)]
        assert [reply[:9] for reply in replies] == ["OK 0x0001", "OK 0x0002", "FAIL qtes", "OK 0x0003"]


async def test_a_client_that_shuts_down_its_side_has_all_its_lines_answered() -> None:
    async with rig() as it:
        await it.client.send("inb 1", "inb 2")
        await it.client.stream.send_eof()
        assert [await it.client.line() for _ in range(3)] == ["OK 0x0001", "OK 0x0002", None]


async def test_half_a_line_is_forgotten() -> None:
    async with rig() as it:
        await it.client.stream.send_all(b"outb 1 2\noutb 3 4")
        await it.client.stream.send_eof()
        await it.ended.wait()
        assert it.access.done == [("out", 1, 1, 2)]


async def test_a_line_that_cannot_be_carried_out_leaves_the_session_as_it_is() -> None:
    async with rig() as it:
        it.lender.refusal = CommandAborted(command="inb")
        assert await it.client.ask("inb 1") == "FAIL Command 'inb' was cut short because its phase ended"
        it.lender.refusal = None
        assert await it.client.ask("inb 1") == "OK 0x0001"


async def test_a_line_that_is_too_long_is_answered_and_the_next_carried_out() -> None:
    async with rig() as it:

        async def flood() -> None:
            await it.client.stream.send_all(b"x" * (MAX_LINE + 1) + b"\ninb 1\n")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            assert await it.client.reply() == (
                f"ERR A line is longer than {MAX_LINE} bytes, which is the most it may have"
            )
            assert await it.client.reply() == "OK 0x0001"


async def test_an_interrupt_comes_before_the_answer_to_what_raised_it() -> None:
    async with rig() as it:
        await it.client.do("irq_intercept_in ioapic")
        await it.client.send("set_irq_in ioapic unnamed-gpio-in 5 1", "set_irq_in ioapic unnamed-gpio-in 5 0")
        assert [await it.client.line() for _ in range(4)] == ["IRQ raise 5", "OK", "IRQ lower 5", "OK"]


async def test_an_interrupt_from_another_thread_is_told() -> None:
    async with rig() as it:
        await it.client.do("irq_intercept_in ioapic")
        assert it.access.tell is not None
        await trio.to_thread.run_sync(it.access.tell, 4, True)
        assert await it.client.interrupt() == "raise 4"


async def test_interception_ends_with_the_session() -> None:
    async with rig() as it:
        await it.client.do("irq_intercept_in ioapic")
        assert it.access.tell is not None
        await it.client.stream.aclose()
        await it.ended.wait()
        assert it.access.tell is None


async def test_a_second_interception_is_the_first_or_refused() -> None:
    async with rig() as it:
        await it.client.do("irq_intercept_in ioapic")
        await it.client.do("irq_intercept_in ioapic")
        assert it.access.done == [("watch", "ioapic", None, True)]
        assert await it.client.ask("irq_intercept_out ioapic") == (
            "FAIL Interception at 'ioapic' is not possible once there is one at 'ioapic'; "
            "connect anew to choose another"
        )


async def test_a_client_that_does_not_read_answers_has_no_more_lines_carried_out() -> None:
    async with rig() as it:
        lines = b"outb 1 2\nread 0 1048576\n" * 50
        with trio.move_on_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(it.client.stream.send_all, lines)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert len(it.access.done) < 3
        assert not it.ended.is_set()


async def test_a_client_that_does_not_read_interrupts_is_dropped() -> None:
    async with rig() as it:
        await it.client.do("irq_intercept_in ioapic")
        it.access.changes = 10 * BOUNDS.events
        await it.client.send("set_irq_in ioapic unnamed-gpio-in 5 1")
        await it.ended.wait()
        assert it.session.dropped == f"did not read {BOUNDS.events + 1} events (120012 bytes)"
        assert it.access.tell is None


async def test_every_line_is_noted() -> None:
    async with rig() as it:
        await it.client.do("irq_intercept_in ioapic")
        await it.client.ask("set_irq_in ioapic unnamed-gpio-in 5 1")
        await it.client.stream.send_all(b"\xff\n")
        await it.client.reply()
        await it.client.stream.aclose()
        await it.ended.wait()
    assert it.log.lines == [
        ("I", "OPENED"),
        ("R", "irq_intercept_in ioapic"),
        ("S", "OK"),
        ("R", "set_irq_in ioapic unnamed-gpio-in 5 1"),
        ("S", "IRQ raise 5"),
        ("S", "OK"),
        ("R", "\\xff"),
        ("S", "ERR Byte 0xff at 0 is not ASCII, as all of a line must be"),
        ("I", "CLOSED"),
    ]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(max_size=60), max_size=8))
def test_whatever_a_client_sends_the_session_goes_on(chunks: list[bytes]) -> None:
    async def converse() -> None:
        async with rig() as it:
            for chunk in chunks:
                await it.client.stream.send_all(chunk)
            await it.client.stream.send_all(b"\nendianness\n")
            while await it.client.reply() != "OK little":
                pass

    trio.run(converse)
