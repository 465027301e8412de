"""A chardev on a unix socket: real sockets, real clients."""

from __future__ import annotations

import os
import resource
import socket
import stat
import sys
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.backends.chardev_kit import (
    Complaints,
    Frontend,
    Host,
    connect,
    read_all,
    read_exactly,
    served,
    socket_at,
)
from vmm.backends.chardev_open import open_chardev
from vmm.backends.chardev_state import BUFFER_LIMIT
from vmm.errors import HostFileRefused, SocketInUse, Unsupported

if TYPE_CHECKING:
    from vmm.backends.chardev import Chardev


def open_server(path: str, complain: Complaints) -> Chardev:
    return open_chardev("serial0", socket_at(path), Host(), complain)


def is_socket(path: str) -> bool:
    """Whether there is a socket file; False if there is nothing."""
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


async def connected(path: str) -> trio.SocketStream:
    """A client that the chardev has taken."""
    stream = await connect(path)
    await trio.testing.wait_all_tasks_blocked()
    return stream


async def test_a_client_reads_output_and_writes_input(path: str, complain: Complaints, frontend: Frontend) -> None:
    async with served(open_server(path, complain)) as chardev:
        chardev.attach(frontend)
        assert chardev.filename == f"disconnected:unix:{path},server=on"
        async with await connected(path) as client:
            assert chardev.filename == f"unix:{path},server=on"
            assert chardev.put(b"login: ") == 7
            assert await read_exactly(client, 7) == b"login: "
            await client.send_all(b"root\n")
            assert await frontend.wait_received(5) == b"root\n"
    assert complain.texts == []
    assert not is_socket(path)


async def test_output_is_dropped_while_nobody_is_connected(path: str, complain: Complaints) -> None:
    async with served(open_server(path, complain)) as chardev:
        assert chardev.put(bytes(10 * BUFFER_LIMIT)) == 10 * BUFFER_LIMIT
        async with await connected(path) as client:
            chardev.put(b"now")
            assert await read_exactly(client, 3) == b"now"


async def test_the_second_client_waits_for_the_first_to_leave(
    path: str, complain: Complaints, frontend: Frontend
) -> None:
    async with served(open_server(path, complain)) as chardev:
        chardev.attach(frontend)
        first = await connected(path)
        second = await connected(path)
        await second.send_all(b"two")
        await first.send_all(b"one ")
        await frontend.wait_received(4)
        await first.aclose()
        assert await frontend.wait_received(7) == b"one two"
        chardev.put(b"hello")
        assert await read_exactly(second, 5) == b"hello"
        await second.aclose()


async def test_a_client_that_leaves_is_noticed_even_if_the_guest_takes_no_input(
    path: str, complain: Complaints, frontend: Frontend
) -> None:
    frontend.space = 2
    async with served(open_server(path, complain)) as chardev:
        chardev.attach(frontend)
        first = await connected(path)
        await first.send_all(b"one ")
        await frontend.wait_received(2)
        await first.aclose()
        second = await connected(path)
        chardev.put(b"hello")
        assert await read_exactly(second, 5) == b"hello"
        await second.send_all(b"two")
        frontend.space = 100
        chardev.accept_input()
        assert await frontend.wait_received(7) == b"one two"
        await second.aclose()


async def test_the_guest_takes_all_that_a_client_left_at_its_own_pace(
    path: str, complain: Complaints, frontend: Frontend
) -> None:
    frontend.space = 0
    left = os.urandom(2 * BUFFER_LIMIT)
    async with served(open_server(path, complain)) as chardev:
        chardev.attach(frontend)
        client = await connected(path)
        await client.send_all(left)
        await client.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert chardev.filename.startswith("disconnected:")
        assert chardev.put(bytes(1 << 20)) == 1 << 20, "nobody reads it"
        while len(frontend.received) < len(left):
            frontend.space = 10_000
            chardev.accept_input()
            await frontend.wait_received(min(len(frontend.received) + 10_000, len(left)))
        assert frontend.received == left
        async with await connected(path) as second:
            chardev.put(b"for the second")
            assert await read_exactly(second, 14) == b"for the second"
    assert complain.texts == []


async def test_more_than_a_buffer_of_a_client_that_left_is_dropped_with_a_complaint_when_the_next_one_comes(
    path: str, complain: Complaints, frontend: Frontend
) -> None:
    frontend.space = 0
    async with served(open_server(path, complain)) as chardev:
        chardev.attach(frontend)
        client = await connected(path)
        await client.send_all(b"a" * BUFFER_LIMIT + b"b" * 4096)
        await client.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert complain.texts == []
        second = await connected(path)
        await second.aclose()
        assert complain.texts == ["Chardev 'serial0': a client left more than 65536 bytes; the rest is dropped"]
        frontend.space = 1 << 20
        chardev.accept_input()
        assert await frontend.wait_received(BUFFER_LIMIT) == b"a" * BUFFER_LIMIT


async def test_input_is_read_no_faster_than_the_guest_takes_it(
    path: str, complain: Complaints, frontend: Frontend
) -> None:
    text = bytes(range(256)) * 100
    frontend.space = 16
    async with served(open_server(path, complain)) as chardev:
        chardev.attach(frontend)
        async with await connected(path) as client, trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, text)
            while len(frontend.received) < len(text):
                await trio.to_thread.run_sync(chardev.accept_input)
                await frontend.wait_received(min(len(text), len(frontend.received) + frontend.space))
                assert chardev.pending().input == b""
                frontend.space = 16
        assert bytes(frontend.received) == text
        assert frontend.largest <= 16


async def test_a_client_that_does_not_read_holds_the_guest_back(
    path: str, complain: Complaints, frontend: Frontend
) -> None:
    async with served(open_server(path, complain)) as chardev:
        chardev.attach(frontend)
        async with await connected(path) as client:
            sent = bytearray()
            while True:
                chunk = os.urandom(8192)
                taken = chardev.put(chunk)
                sent += chunk[:taken]
                if taken < len(chunk):
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    if chardev.room() == 0:
                        break
            drained = frontend.times_drained
            assert await read_exactly(client, len(sent)) == bytes(sent)
            await frontend.wait_drained(drained + 1)
            assert chardev.room() > 0


async def test_a_guest_held_back_goes_on_when_the_client_leaves(
    path: str, complain: Complaints, frontend: Frontend
) -> None:
    async with served(open_server(path, complain)) as chardev:
        chardev.attach(frontend)
        client = await connected(path)
        while chardev.room():
            chardev.put(bytes(BUFFER_LIMIT))
            await trio.testing.wait_all_tasks_blocked(0.01)
        drained = frontend.times_drained
        await client.aclose()
        await frontend.wait_drained(drained + 1)
        assert chardev.put(bytes(BUFFER_LIMIT * 2)) == BUFFER_LIMIT * 2


async def test_a_client_that_has_no_more_to_say_still_hears(
    path: str, complain: Complaints, frontend: Frontend
) -> None:
    async with served(open_server(path, complain)) as chardev:
        chardev.attach(frontend)
        async with await connected(path) as client:
            await client.send_all(b"uname\n")
            await client.send_eof()
            await frontend.wait_received(6)
            await trio.testing.wait_all_tasks_blocked()
            chardev.put(b"Linux\n")
            assert await read_exactly(client, 6) == b"Linux\n"
        await trio.testing.wait_all_tasks_blocked()
        assert chardev.filename.startswith("disconnected:")


async def test_a_client_that_reads_no_more_is_still_heard(path: str, complain: Complaints, frontend: Frontend) -> None:
    async with served(open_server(path, complain)) as chardev:
        chardev.attach(frontend)
        async with await connected(path) as client:
            client.socket.shutdown(socket.SHUT_RD)
            chardev.put(b"nobody reads this")
            await client.send_all(b"still here")
            assert await frontend.wait_received(10) == b"still here"
            assert chardev.filename == f"unix:{path},server=on"
    assert complain.texts == []


async def test_a_client_that_hangs_up_on_unread_output_is_one_that_left(path: str, complain: Complaints) -> None:
    async with served(open_server(path, complain)) as chardev:
        client = await connected(path)
        chardev.put(b"unread")
        await trio.testing.wait_all_tasks_blocked()
        await client.aclose()
        async with await connected(path) as second:
            chardev.put(b"for the second")
            assert await read_exactly(second, 14) == b"for the second"
    assert complain.texts == []


async def test_input_waits_for_a_device(path: str, complain: Complaints, frontend: Frontend) -> None:
    async with served(open_server(path, complain)) as chardev, await connected(path) as client:
        await client.send_all(b"early")
        await trio.testing.wait_all_tasks_blocked()
        chardev.attach(frontend)
        assert await frontend.wait_received(5) == b"early"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_client_of_another_user_is_hung_up_on_and_complained_of(path: str, complain: Complaints) -> None:
    script = (
        "import os, socket\n"
        f"sock = socket.socket(socket.AF_UNIX); os.chdir({os.path.dirname(path)!r}); os.setuid(65534)\n"
        "sock.connect('serial.sock'); print(repr(sock.recv(1)))"
    )
    async with served(open_server(path, complain)) as chardev:
        os.chmod(path, 0o666)
        os.chmod(os.path.dirname(path), 0o755)
        done = await trio.run_process([sys.executable, "-S", "-c", script], capture_stdout=True)
        assert done.stdout == b"b''\n"
        async with await connected(path) as client:
            chardev.put(b"ours")
            assert await read_exactly(client, 4) == b"ours"
    assert complain.texts == [f"Chardev 'serial0': Peer of {path} has uid 65534; only uid 0 and root are admitted"]


async def test_a_client_for_whom_there_is_no_descriptor_is_taken_later(path: str, complain: Complaints) -> None:
    async with served(open_server(path, complain)) as chardev:
        client, other = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        lowest_free = os.open("/", os.O_RDONLY)
        os.close(lowest_free)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
        try:
            client.connect(path)
            await trio.testing.wait_all_tasks_blocked()
            assert complain.texts == [f"Chardev 'serial0': Cannot accept a client on {path}: Too many open files"]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        other.connect(path)
        await trio.testing.wait_all_tasks_blocked()
        chardev.put(b"at last")
        assert await trio.to_thread.run_sync(client.recv, 100) == b"at last"
        client.close()
        other.close()


async def test_the_end_flushes_what_can_be_written_without_waiting(path: str, complain: Complaints) -> None:
    async with served(open_server(path, complain)) as chardev:
        client = await connected(path)
        chardev.put(b"goodbye")
    async with client:
        assert await read_all(client) == b"goodbye"


async def test_the_end_waits_for_no_client(path: str, complain: Complaints) -> None:
    async with served(open_server(path, complain)) as chardev:
        client = await connected(path)
        while chardev.room():
            chardev.put(bytes(BUFFER_LIMIT))
            await trio.testing.wait_all_tasks_blocked(0.01)
    await client.aclose()
    assert not is_socket(path)


async def test_a_socket_file_that_another_has_replaced_is_left(path: str, complain: Complaints) -> None:
    async with served(open_server(path, complain)):
        os.unlink(path)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(path)
            other.listen()
    assert is_socket(path)


async def test_a_path_in_use_is_refused_and_nothing_is_left(path: str, complain: Complaints) -> None:
    async with served(open_server(path, complain)):
        with pytest.raises(SocketInUse):
            open_server(path, complain)


async def test_to_wait_for_a_client_is_not_supported(path: str, complain: Complaints) -> None:
    with pytest.raises(Unsupported) as caught:
        open_chardev("serial0", socket_at(path, wait=True), Host(), complain)
    assert str(caught.value) == (
        "Option of a socket chardev 'wait=on' is not supported here; "
        "the guest starts without waiting for a client; say wait=off"
    )
    assert not is_socket(path)


async def test_a_client_chardev_talks_to_a_server(path: str, complain: Complaints, frontend: Frontend) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        async with served(open_chardev("serial0", socket_at(path, server=False), Host(), complain)) as chardev:
            chardev.attach(frontend)
            assert chardev.filename == f"unix:{path}"
            server = trio.SocketStream(trio.socket.from_stdlib_socket(listener.accept()[0]))
            chardev.put(b"ping")
            assert await read_exactly(server, 4) == b"ping"
            await server.send_all(b"pong")
            assert await frontend.wait_received(4) == b"pong"
            await server.aclose()
            await trio.testing.wait_all_tasks_blocked()
            assert chardev.filename == f"disconnected:unix:{path}"
            assert chardev.put(bytes(1 << 20)) == 1 << 20, "it is not connected again, and output is dropped"
    assert is_socket(path), "the file is the server's"


async def test_a_client_chardev_without_a_server_is_refused(path: str, complain: Complaints) -> None:
    with pytest.raises(HostFileRefused) as caught:
        open_chardev("serial0", socket_at(path, server=False), Host(), complain)
    assert str(caught.value) == f"Cannot connect to {path}: No such file or directory"
