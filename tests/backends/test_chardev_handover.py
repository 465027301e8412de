"""Chardevs in a live update: two in one process, descriptors passed over a real socket."""

from __future__ import annotations

import os
import socket
import stat
import sys
import termios
import threading
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
import trio.testing

from tests.backends.chardev_kit import (
    PATIENCE,
    Complaints,
    Frontend,
    Heritage,
    Host,
    connect,
    connect_tcp,
    from_descriptors,
    named_pipe,
    port_of,
    read_all,
    read_exactly,
    served,
    socket_at,
    tcp_at,
)
from vmm import host_sockets, hostio, terminals
from vmm.backends.chardev_open import make_chardev, open_chardev
from vmm.backends.chardev_options import (
    ChardevBackend,
    ChardevFile,
    ChardevFileWrapper,
    ChardevHostdev,
    ChardevNullWrapper,
    ChardevPipeWrapper,
    ChardevPtyWrapper,
    ChardevStdioWrapper,
)
from vmm.backends.chardev_socket import SocketChardev
from vmm.backends.chardev_state import BUFFER_LIMIT, ChardevState
from vmm.backends.chardev_stdio import StdioChardev
from vmm.errors import DescriptorMissing, DescriptorsUnclaimed, DescriptorWrongKind

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.backends.chardev import Chardev

HAND_OVERS = 25


def exists(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def pass_on(descriptors: dict[str, int]) -> dict[str, int]:
    """Send `descriptors` through a socket; return what arrives: other descriptors of the same open files."""
    if not descriptors:
        return {}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], list(descriptors.values()))
        _, arrived, _, _ = socket.recv_fds(theirs, 1, 16, socket.MSG_CMSG_CLOEXEC)
    return dict(zip(descriptors, arrived, strict=True))


async def successor_of(old: Chardev, backend: ChardevBackend, complain: Complaints) -> Chardev:
    """Hand `old` over to a new chardev, at rest."""
    await old.quiesce()
    new = from_descriptors("serial0", backend, pass_on(old.descriptors()), old.pending(), complain)
    old.give_up()
    return new


# --- no byte is lost or repeated --------------------------------------------------------------------------


@attrs.define(eq=False)
class WakingFrontend(Frontend):
    """A device that wakes its guest."""

    may_go_on: threading.Event = attrs.Factory(threading.Event)

    def drained(self) -> None:
        super().drained()
        self.may_go_on.set()


@attrs.define(eq=False)
class Guest:
    """A vCPU thread that prints numbered lines through whichever chardev is its own, and takes 16 bytes at a time."""

    lines: int
    chardev: Chardev
    frontend: WakingFrontend
    marks: dict[int, trio.Event]
    """Events to set on the loop when so many lines have been printed."""
    stuck: trio.Event = attrs.Factory(trio.Event)
    """Whether it was held back at least once."""

    def run(self) -> None:
        for number in range(self.lines):
            if number in self.marks:
                trio.from_thread.run_sync(self.marks[number].set)
            line = b"%07d\n" % number
            while line:
                self.frontend.may_go_on.clear()
                line = line[self.chardev.put(line) :]
                if line:
                    trio.from_thread.run_sync(self.stuck.set)
                    assert self.frontend.may_go_on.wait(PATIENCE)
            self.take_input()

    def take_input(self) -> None:
        if self.frontend.space == 0:
            self.frontend.space = 16
            self.chardev.accept_input()


@attrs.define(eq=False)
class Console:
    """The host's side: reads `lines` lines and types `typed`, but reads nothing before `reading` is set."""

    stream: trio.abc.Stream
    lines: int
    typed: bytes
    reading: trio.Event = attrs.Factory(trio.Event)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.stream.send_all, self.typed)
            await self.reading.wait()
            assert await read_exactly(self.stream, 8 * self.lines) == numbered(self.lines)


def numbered(count: int) -> bytes:
    return b"".join(b"%07d\n" % number for number in range(count))


async def print_through_hand_overs(
    first: Chardev, backend: ChardevBackend, complain: Complaints, lines: int, console: Console | None
) -> None:
    """Run a guest that prints `lines` lines while its chardev changes hands: first when it is full, then in passing."""
    frontend = WakingFrontend(space=16)
    marks = {lines * count // (HAND_OVERS + 1): trio.Event() for count in range(1, HAND_OVERS + 1)}
    guest = Guest(lines, first, frontend, marks)
    first.attach(frontend)

    async def hand_over() -> int:
        new = await successor_of(guest.chardev, backend, complain)
        held = len(new.pending().output)
        new.attach(frontend)
        await residents.start(new.serve)
        guest.chardev = new
        new.resume()
        return held

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as residents:
            await residents.start(first.serve)
            await trio.testing.wait_all_tasks_blocked()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, guest.run)
                if console is not None:
                    nursery.start_soon(console.run)
                    await guest.stuck.wait()
                    assert await hand_over() > BUFFER_LIMIT // 2
                    console.reading.set()
                for mark in marks.values():
                    await mark.wait()
                    await hand_over()
                while console is not None and len(frontend.received) < len(console.typed):
                    guest.take_input()
                    await trio.lowlevel.checkpoint()
            residents.cancel_scope.cancel()
    assert bytes(frontend.received) == (b"" if console is None else console.typed)
    assert complain.texts == []


LINES = 60_000
"""Lines that fit in no buffer of the host."""


async def test_a_socket_loses_and_repeats_nothing(path: str, complain: Complaints) -> None:
    first = open_chardev("serial0", socket_at(path), Host(), complain)
    async with await connect(path) as client:
        console = Console(client, LINES, numbered(500))
        await print_through_hand_overs(first, socket_at(path), complain, LINES, console)
        assert await read_all(client) == b""
    assert not exists(path), "the last owner removes the socket file"


async def test_a_tcp_socket_loses_and_repeats_nothing(complain: Complaints) -> None:
    first = await make_chardev("serial0", tcp_at(), Host(), complain)
    port = port_of(first)
    with socket.socket(fileno=hostio.dup(first.descriptors()["listener"])) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # its client has it, too
    async with await connect_tcp(first) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        console = Console(client, LINES, numbered(500))
        await print_through_hand_overs(first, tcp_at(port=port), complain, LINES, console)
        assert await read_all(client) == b""
    with pytest.raises(OSError, match="all attempts to connect to"):
        await trio.open_tcp_stream("127.0.0.1", port)


async def test_named_pipes_lose_and_repeat_nothing(tmp_path: Path, complain: Complaints) -> None:
    path = str(tmp_path / "com1")
    typing, reading = (named_pipe(f"{path}.{end}") for end in ("in", "out"))
    backend = ChardevPipeWrapper(ChardevHostdev(path))
    first = open_chardev("serial0", backend, Host(), complain)
    async with trio.lowlevel.FdStream(typing) as input_end, trio.lowlevel.FdStream(reading) as output_end:
        console = Console(trio.StapledStream(input_end, output_end), LINES, numbered(500))
        await print_through_hand_overs(first, backend, complain, LINES, console)


async def test_a_pty_loses_and_repeats_nothing(complain: Complaints) -> None:
    first = open_chardev("serial0", ChardevPtyWrapper(), Host(), complain)
    assert first.pty is not None
    async with trio.lowlevel.FdStream(os.open(first.pty, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)) as slave:
        console = Console(trio.StapledStream(slave, slave), LINES, numbered(200))
        await print_through_hand_overs(first, ChardevPtyWrapper(), complain, LINES, console)


async def test_a_file_loses_and_repeats_nothing(tmp_path: Path, complain: Complaints) -> None:
    backend = ChardevFileWrapper(ChardevFile(f"{tmp_path}/log"))
    first = open_chardev("serial0", backend, Host(), complain)
    await print_through_hand_overs(first, backend, complain, LINES, None)
    assert (tmp_path / "log").read_bytes() == numbered(LINES)


async def test_standard_streams_lose_and_repeat_nothing(complain: Complaints) -> None:
    source, typing = os.pipe()
    reading, sink = os.pipe()
    first = StdioChardev("serial0", terminals.open_private(source), terminals.open_private(sink), complain, print)
    os.close(source)
    os.close(sink)
    async with trio.lowlevel.FdStream(typing) as input_end, trio.lowlevel.FdStream(reading) as output_end:
        console = Console(trio.StapledStream(input_end, output_end), LINES, numbered(500))
        await print_through_hand_overs(first, ChardevStdioWrapper(), complain, LINES, console)


# --- at rest ----------------------------------------------------------------------------------------------


async def test_at_rest_nothing_is_read_written_or_accepted(path: str, complain: Complaints, frontend: Frontend) -> None:
    async with served(open_chardev("serial0", socket_at(path), Host(), complain)) as chardev:
        chardev.attach(frontend)
        await chardev.quiesce()
        async with await connect(path) as client:
            await client.send_all(b"typed at rest")
            assert chardev.put(b"printed at rest") == 0
            assert chardev.room() == 0
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert chardev.descriptors().keys() == {"listener"}
            assert chardev.pending() == ChardevState()
            assert frontend.received == b""
            chardev.resume()
            assert frontend.times_drained == 1, "put found no room"
            assert await frontend.wait_received(13) == b"typed at rest"
            chardev.put(b"printed")
            assert await read_exactly(client, 7) == b"printed"


async def test_what_was_put_before_the_rest_is_pending_or_written(path: str, complain: Complaints) -> None:
    chardev = open_chardev("serial0", socket_at(path), Host(), complain)
    async with served(chardev), await connect(path) as client:
        await trio.testing.wait_all_tasks_blocked()
        sent = bytearray()
        while chardev.room():
            chunk = os.urandom(10_000)
            sent += chunk[: chardev.put(chunk)]
            await trio.testing.wait_all_tasks_blocked(0.01)
        await chardev.quiesce()
        pending = chardev.pending().output
        assert len(pending) > 0
        assert await read_exactly(client, len(sent) - len(pending)) == sent[: -len(pending)]
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert chardev.pending().output == pending == sent[-len(pending) :]
        chardev.resume()
        assert await read_exactly(client, len(pending)) == pending


async def test_a_rest_can_be_broken_off(path: str, complain: Complaints) -> None:
    chardev = open_chardev("serial0", socket_at(path), Host(), complain)
    async with served(chardev), await connect(path) as client:
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await chardev.quiesce()
        chardev.resume()
        chardev.put(b"going on")
        assert await read_exactly(client, 8) == b"going on"
        for _ in range(3):
            await chardev.quiesce()
            await chardev.quiesce()
            chardev.resume()
            chardev.resume()
        chardev.put(b"and on")
        assert await read_exactly(client, 6) == b"and on"


async def test_a_chardev_can_be_at_rest_before_it_is_served(path: str, complain: Complaints) -> None:
    chardev = open_chardev("serial0", socket_at(path), Host(), complain)
    await chardev.quiesce()
    async with await connect(path) as client, served(chardev):
        await trio.testing.wait_all_tasks_blocked()
        assert chardev.descriptors().keys() == {"listener"}
        chardev.resume()
        await trio.testing.wait_all_tasks_blocked()
        chardev.put(b"hello")
        assert await read_exactly(client, 5) == b"hello"


async def test_serving_ends_when_the_chardev_is_given_up(path: str, complain: Complaints) -> None:
    chardev = open_chardev("serial0", socket_at(path), Host(), complain)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(chardev.serve)
            await chardev.quiesce()
            chardev.give_up()
            chardev.give_up()
    assert exists(path)
    assert chardev.put(b"x") == 0, "it would be lost"


@pytest.mark.parametrize("state", ["before the start", "idle", "busy", "on the way to rest", "at rest", "given up"])
async def test_a_cancel_in_any_state_leaves_nothing(path: str, complain: Complaints, state: str) -> None:
    chardev = open_chardev("serial0", socket_at(path), Host(), complain)
    client = await connect(path)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            if state == "before the start":
                nursery.cancel_scope.cancel()
            await nursery.start(chardev.serve)
            await trio.testing.wait_all_tasks_blocked()
            if state == "busy":
                while chardev.room():
                    chardev.put(bytes(BUFFER_LIMIT))
                    await trio.testing.wait_all_tasks_blocked(0.01)
            if state == "on the way to rest":
                nursery.start_soon(chardev.quiesce)
            if state in ("at rest", "given up"):
                await chardev.quiesce()
            if state == "given up":
                chardev.give_up()
            nursery.cancel_scope.cancel()
    await read_all(client)
    await client.aclose()
    assert exists(path) is (state == "given up")


async def test_set_free_it_goes_on_unless_it_is_another_processs(path: str, complain: Complaints) -> None:
    async with served(open_chardev("serial0", socket_at(path), Host(), complain)) as old, await connect(path):
        await trio.testing.wait_all_tasks_blocked()
        await old.quiesce()
        assert old.put(b"x") == 0
        old.set_free()
        assert old.put(b"x") == 1
        async with served(await successor_of(old, socket_at(path), complain)) as new:
            for chardev in (old, new):
                chardev.set_free()
                assert chardev.put(b"x") == 0
            new.resume()
            assert new.put(b"x") == 1


# --- who owns what ----------------------------------------------------------------------------------------


async def test_the_successor_of_a_socket_owns_its_file(path: str, complain: Complaints) -> None:
    async with served(open_chardev("serial0", socket_at(path), Host(), complain)) as old:
        async with served(await successor_of(old, socket_at(path), complain)) as new:
            new.resume()
            async with await connect(path) as client:
                await trio.testing.wait_all_tasks_blocked()
                new.put(b"successor")
                assert await read_exactly(client, 9) == b"successor"
            assert exists(path)
        assert not exists(path)


async def test_a_successor_that_never_took_over_leaves_the_socket_as_it_is(path: str, complain: Complaints) -> None:
    async with served(open_chardev("serial0", socket_at(path), Host(), complain)) as old:
        async with await connect(path) as client:
            await trio.testing.wait_all_tasks_blocked()
            await old.quiesce()
            new = from_descriptors("serial0", socket_at(path), pass_on(old.descriptors()), old.pending(), complain)
            async with served(new):
                new.put(b"nothing")
            old.resume()
            old.put(b"source")
            assert await read_exactly(client, 6) == b"source"
        assert exists(path)
    assert not exists(path)


async def test_a_successor_that_owns_a_socket_at_rest_removes_its_file(path: str, complain: Complaints) -> None:
    old = open_chardev("qmp0", socket_at(path), Host(), complain)
    new = await successor_of(old, socket_at(path), complain)
    new.own()
    new.close()
    assert not exists(path)


async def test_a_client_given_away_is_the_takers(path: str, complain: Complaints) -> None:
    chardev = open_chardev("qmp0", socket_at(path), Host(), complain)
    assert isinstance(chardev, SocketChardev)
    assert chardev.surrender_client() is None
    async with await connect(path) as client:
        async with served(chardev):
            await trio.testing.wait_all_tasks_blocked()
            await chardev.quiesce()
            fd = chardev.surrender_client()
            assert fd is not None
            assert chardev.descriptors().keys() == {"listener"}
        os.write(fd, b"greeting")
        os.close(fd)
        assert await read_all(client) == b"greeting"


async def test_an_owner_that_ends_at_rest_flushes_nothing_and_cleans_up(path: str, complain: Complaints) -> None:
    async with served(open_chardev("serial0", socket_at(path), Host(), complain)) as chardev:
        client = await connect(path)
        await trio.testing.wait_all_tasks_blocked()
        chardev.put(b"x")
        await chardev.quiesce()
        held = chardev.pending().output
    assert await read_all(client) == b"x"[len(held) :]
    await client.aclose()
    assert not exists(path)


async def test_the_successor_on_a_terminal_restores_it_and_knows_the_keys_under_way(
    complain: Complaints, frontend: Frontend
) -> None:
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    frontend.space = 0
    left = trio.Event()
    async with trio.lowlevel.FdStream(master) as screen:
        old = StdioChardev("serial0", terminals.open_private(slave), terminals.open_private(slave), complain, print)
        async with served(old):
            await screen.send_all(b"typed ahead\x01")
            while not old.pending().escape:
                await trio.testing.wait_all_tasks_blocked()
            await old.quiesce()
            pending = old.pending()
            assert (pending.input, len(pending.terminal)) == (b"typed ahead", 56)
            new = from_descriptors(
                "serial0", ChardevStdioWrapper(), pass_on(old.descriptors()), pending, complain, left.set
            )
            old.give_up()
        assert termios.tcgetattr(slave) != before
        async with served(new):
            new.attach(frontend)
            new.resume()
            await screen.send_all(b"x")
            await left.wait()
            assert frontend.received == b""
            frontend.space = 100
            new.accept_input()
            assert await frontend.wait_received(11) == b"typed ahead"
            assert termios.tcgetattr(slave) != before
        assert termios.tcgetattr(slave) == before
    os.close(slave)


async def test_a_successor_that_never_took_over_leaves_the_terminal_as_it_is(complain: Complaints) -> None:
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    old = StdioChardev("serial0", terminals.open_private(slave), terminals.open_private(slave), complain, print)
    async with served(old):
        raw = termios.tcgetattr(slave)
        await old.quiesce()
        new = from_descriptors("serial0", ChardevStdioWrapper(), pass_on(old.descriptors()), old.pending(), complain)
        async with served(new):
            pass
        assert termios.tcgetattr(slave) == raw
        old.resume()
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


async def test_null_has_nothing_to_hand_over(complain: Complaints) -> None:
    old = open_chardev("serial0", ChardevNullWrapper(), Host(), complain)
    new = await successor_of(old, ChardevNullWrapper(), complain)
    async with served(new):
        assert new.put(b"x") == 0, "at rest"
        new.resume()
        assert new.put(b"x") == 1


# --- descriptors that came and went, and wrong ones -------------------------------------------------------


async def test_descriptors_are_claimed_by_the_names_they_were_opened_under(path: str, complain: Complaints) -> None:
    old = open_chardev("serial0", socket_at(path), Host(), complain)
    async with served(old), await connect(path) as client:
        await trio.testing.wait_all_tasks_blocked()
        await old.quiesce()
        arrived = pass_on(old.descriptors())
        heritage = Heritage({f"chardev/serial0/{name}": fd for name, fd in arrived.items()})
        new = open_chardev("serial0", socket_at(path), heritage, complain)
        assert heritage.sent == {}
        old.give_up()
        async with served(new):
            new.take_over(ChardevState(output=b"pending "))
            assert new.pending() == ChardevState(output=b"pending ")
            new.resume()
            new.put(b"and new")
            assert await read_exactly(client, 15) == b"pending and new"


async def test_a_client_that_replaced_another_since_is_a_new_descriptor(
    path: str, complain: Complaints, frontend: Frontend
) -> None:
    async with served(open_chardev("serial0", socket_at(path), Host(), complain)) as old:
        first = await connect(path)
        await trio.testing.wait_all_tasks_blocked()
        before = old.descriptors()
        assert before.keys() == {"listener", "client-1"}
        new = from_descriptors("serial0", socket_at(path), pass_on(before), None, complain)
        await first.aclose()
        second = await connect(path)
        await trio.testing.wait_all_tasks_blocked()
        await old.quiesce()
        after = old.descriptors()
        assert after.keys() == {"listener", "client-2"}
        came = pass_on({name: fd for name, fd in after.items() if name not in before})
        new.take_over(old.pending(), came, before.keys() - after.keys())
        old.give_up()
        async with served(new), second:
            new.attach(frontend)
            new.resume()
            new.put(b"second")
            assert await read_exactly(second, 6) == b"second"
            await second.send_all(b"heard")
            assert await frontend.wait_received(5) == b"heard"
            assert new.descriptors().keys() == {"listener", "client-2"}


async def test_a_client_that_has_left_since_is_gone(path: str, complain: Complaints) -> None:
    async with served(open_chardev("serial0", socket_at(path), Host(), complain)) as old:
        client = await connect(path)
        await trio.testing.wait_all_tasks_blocked()
        new = from_descriptors("serial0", socket_at(path), pass_on(old.descriptors()), None, complain)
        await client.aclose()
        await trio.testing.wait_all_tasks_blocked()
        await old.quiesce()
        new.take_over(old.pending(), gone=["client-1"])
        old.give_up()
        async with served(new):
            new.resume()
            assert new.descriptors().keys() == {"listener"}
            assert new.put(bytes(1 << 20)) == 1 << 20


async def test_the_successor_of_a_client_that_was_hung_up_on_is_not_connected(path: str, complain: Complaints) -> None:
    new = from_descriptors("serial0", socket_at(path, server=False), {}, ChardevState(), complain)
    assert new.filename == f"disconnected:unix:{path}"
    new.close()


def a_socket() -> int:
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


async def test_a_missing_descriptor_is_named_and_the_others_are_closed(path: str, complain: Complaints) -> None:
    with pytest.raises(DescriptorMissing) as caught:
        from_descriptors("serial0", socket_at(path), {"client-1": a_socket()}, None, complain)
    assert str(caught.value) == "The source sent no descriptor named 'chardev/serial0/listener'"


async def test_descriptors_that_mean_nothing_are_named_and_closed(complain: Complaints) -> None:
    with pytest.raises(DescriptorsUnclaimed) as caught:
        from_descriptors("serial0", ChardevNullWrapper(), {"a": a_socket(), "b": a_socket()}, None, complain)
    assert caught.value.names == ("chardev/serial0/a", "chardev/serial0/b")
    new = from_descriptors("serial0", ChardevNullWrapper(), {}, None, complain)
    with pytest.raises(DescriptorsUnclaimed):
        new.take_over(ChardevState(), {"a": a_socket()})
    new.close()


@pytest.mark.parametrize(
    ("backend", "name", "wanted"),
    [
        (ChardevPtyWrapper(), "master", "a pty master"),
        (ChardevFileWrapper(ChardevFile("log")), "out", "a regular file or a pipe or a character device or a terminal"),
        (socket_at("/tmp/none"), "listener", "a listening unix socket"),
        (tcp_at(), "listener", "a listening tcp socket"),
    ],
    ids=["pty", "file", "socket", "tcp"],
)
async def test_a_descriptor_of_another_kind_is_refused_and_closed(
    complain: Complaints, backend: ChardevBackend, name: str, wanted: str
) -> None:
    with pytest.raises(DescriptorWrongKind) as caught:
        from_descriptors("serial0", backend, {name: a_socket()}, None, complain)
    assert str(caught.value) == f"Descriptor 'chardev/serial0/{name}' is a connected unix socket, not {wanted}"


async def test_each_end_of_a_pipe_must_be_one(tmp_path: Path, complain: Complaints) -> None:
    backend = ChardevPipeWrapper(ChardevHostdev("com1"))
    for end, other in (("in", "out"), ("out", "in")):
        with pytest.raises(DescriptorMissing, match=f"^The source sent no descriptor named 'chardev/serial0/{other}'$"):
            from_descriptors("serial0", backend, {end: a_socket()}, None, complain)
        sent = {end: os.open(tmp_path, os.O_RDONLY), other: named_pipe(f"{tmp_path}/{end}")}
        with pytest.raises(DescriptorWrongKind) as caught:
            from_descriptors("serial0", backend, sent, None, complain)
        assert str(caught.value) == (
            f"Descriptor 'chardev/serial0/{end}' is a directory, not a pipe or a character device or a terminal"
        )


async def test_clients_that_cannot_be_are_refused_and_closed(path: str, complain: Complaints) -> None:
    with host_sockets.listen_unix(path) as listener:
        new = from_descriptors("serial0", socket_at(path), {"listener": hostio.dup(listener.fileno())}, None, complain)
        with pytest.raises(DescriptorWrongKind):
            new.take_over(ChardevState(), {"client-1": hostio.dup(listener.fileno())})
        with pytest.raises(DescriptorsUnclaimed):
            new.take_over(ChardevState(), {"client-1": a_socket(), "client-2": a_socket()})
        new.close()
    assert exists(path)


async def test_a_listener_and_a_client_of_the_other_family_are_refused_by_name(path: str, complain: Complaints) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, host_sockets.listen_unix(path) as unix:
        client = socket.create_connection(tcp.getsockname())
        for backend, listener, found, wanted in (
            (socket_at(path), tcp, "tcp", "unix"),
            (tcp_at(), unix, "unix", "tcp"),
        ):
            with pytest.raises(DescriptorWrongKind) as caught:
                from_descriptors("serial0", backend, {"listener": hostio.dup(listener.fileno())}, None, complain)
            assert str(caught.value) == (
                f"Descriptor 'chardev/serial0/listener' is a listening {found} socket, not a listening {wanted} socket"
            )
        new = from_descriptors("serial0", socket_at(path), {"listener": hostio.dup(unix.fileno())}, None, complain)
        with pytest.raises(DescriptorWrongKind) as caught:
            new.take_over(ChardevState(), {"client-1": client.detach()})
        assert str(caught.value) == (
            "Descriptor 'chardev/serial0/client-1' is a connected tcp socket, not a connected unix socket"
        )
        new.close()


LISTENS_AND_ENDS = """
import os, socket, sys
from vmm.host_sockets import listen_unix
listener = listen_unix(sys.argv[2])
socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"%d" % os.getpid()], [listener.fileno()])
"""


async def test_clients_of_a_listener_are_told_of_the_process_that_owns_it(tmp_path: Path) -> None:
    path = str(tmp_path / "com1")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", LISTENS_AND_ENDS, str(theirs.fileno()), path]
        await trio.run_process(command, pass_fds=[theirs.fileno()])
        predecessor, (listener,), _, _ = socket.recv_fds(ours, 16, 1)
    chardev = from_descriptors("com1", socket_at(path), {"listener": listener}, None, Complaints())
    async with served(chardev):
        async with await connect(path) as before:
            assert host_sockets.peer_credentials(before.socket)[0] == int(predecessor)
        chardev.resume()
        async with await connect(path) as after:
            assert host_sockets.peer_credentials(after.socket)[0] == os.getpid()
