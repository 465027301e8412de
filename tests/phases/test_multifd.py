"""A guest is copied over several channels at a time; and who comes besides, or what is damaged, is refused."""

from __future__ import annotations

import hashlib
import random
import socket
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

import vmm
from tests.migration.pki import Pki
from tests.phases.copy_kit import (
    commands,
    empty,
    given,
    goes_on,
    in_status,
    listening,
    outcome,
    parts,
    port_of,
    ram,
    started,
)
from vmm.errors import MigrationRefused
from vmm.migration.further import SIZE, Preamble
from vmm.phases.start import Start
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

_random: Final = random.Random(1)

FILLED: Final = (6 << 20, 8 << 20)
"""Where in RAM the tests put pages that must arrive as they are, from one stripe into the next: address and bytes."""


def fill(machine: EmbeddedMachine) -> None:
    """Put random pages into the guest's RAM, and every fourth of zeros."""
    view = parts(machine).memory.view(*FILLED)
    for at in range(0, FILLED[1], 4 * 4096):
        view[at : at + 4 * 4096] = _random.randbytes(3 * 4096) + bytes(4096)


def digest(machine: EmbeddedMachine) -> str:
    """Return what is there."""
    return hashlib.blake2b(parts(machine).memory.view(*FILLED)).hexdigest()


async def wants(machine: EmbeddedMachine, *names: str, **parameters: Any) -> None:
    """Turn migration capabilities on, and set parameters."""
    capabilities = [{"capability": name, "state": True} for name in ("multifd", *names)]
    await machine.execute("migrate-set-capabilities", capabilities=capabilities)
    if parameters:
        await machine.execute("migrate-set-parameters", **parameters)


@asynccontextmanager
async def both(*names: str, **parameters: Any) -> AsyncGenerator[tuple[EmbeddedMachine, EmbeddedMachine]]:
    """Run a source that wants this, and a destination, which needs no setting of its own."""
    async with started() as source, empty() as destination:
        fill(source)
        await wants(source, *names, **parameters)
        yield source, destination


async def moves(source: EmbeddedMachine, destination: EmbeddedMachine, uri: str = "tcp:127.0.0.1:0") -> dict[str, Any]:
    """Copy the guest; return what the source says at the end."""
    await destination.execute("migrate-incoming", uri=uri)
    if uri.startswith("tcp:"):
        uri = f"tcp:127.0.0.1:{await port_of(destination)}"
    await source.execute("migrate", uri=uri)
    info = await outcome(source)
    assert info["status"] == "completed", info
    await in_status(destination, "running")
    await goes_on(destination)
    assert digest(destination) == digest(source)
    return info


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.make(tmp_path_factory.mktemp("pki"))


# --- what goes over them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 16])
async def test_a_guest_goes_over_so_many_channels(channels: int) -> None:
    async with both(multifd_channels=channels) as (source, destination):
        figures = (await moves(source, destination))["ram"]
        assert FILLED[1] * 3 // 4 < figures["multifd-bytes"] < FILLED[1]
        assert figures["transferred"] > figures["multifd-bytes"]
        assert figures["duplicate"] >= FILLED[1] // 4 // 4096
        assert figures["dirty-sync-missed-zero-copy"] == 0


async def test_a_guest_goes_over_unix_sockets(tmp_path: Path) -> None:
    async with both() as (source, destination):
        await moves(source, destination, f"unix:{tmp_path / 'main'}")


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
async def test_pages_are_packed(compression: str) -> None:
    levels = {f"multifd_{compression}_level": 2}
    async with both(multifd_compression=compression, **levels) as (source, destination):
        # As much again that can be packed.
        view = parts(source).memory.view(*FILLED)
        view[: FILLED[1] // 2] = bytes(range(256)) * (FILLED[1] // 512)
        figures = (await moves(source, destination))["ram"]
        assert figures["multifd-bytes"] < FILLED[1] // 2 * 0.9


async def test_pages_of_zeros_go_as_any_where_nobody_looks_for_them() -> None:
    async with both(zero_page_detection="none") as (source, destination):
        figures = (await moves(source, destination))["ram"]
        assert figures["multifd-bytes"] > FILLED[1]


async def test_pages_go_from_where_they_lie() -> None:
    async with both("zero-copy-send") as (source, destination):
        figures = (await moves(source, destination))["ram"]
        # The loopback copies all the same, and says so.
        assert figures["dirty-sync-missed-zero-copy"] > 0


async def test_every_channel_is_encrypted(pki: Pki) -> None:
    async with both(multifd_channels=4) as (source, destination):
        await given(source, pki.folder(), "client")
        await given(destination, pki.folder(), "server")
        await moves(source, destination)


async def test_a_guest_that_stands_goes_in_one_pass() -> None:
    async with both() as (source, destination):
        await source.execute("stop")
        await destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        await source.execute("migrate", uri=f"tcp:127.0.0.1:{await port_of(destination)}")
        assert (await outcome(source))["status"] == "completed"
        await in_status(destination, "paused")
        assert digest(destination) == digest(source)


async def test_a_guest_goes_there_and_back() -> None:
    async with both() as (source, destination):
        await moves(source, destination)
        async with empty() as third:
            await wants(destination, multifd_channels=3)
            await moves(destination, third)


# --- what cannot be -----------------------------------------------------------------------------------------------


async def refused(machine: EmbeddedMachine, uri: str) -> str:
    with pytest.raises(MigrationRefused) as caught:
        await machine.execute("migrate", uri=uri)
    return str(caught.value)


async def test_what_cannot_have_several_channels_is_refused(pki: Pki, tmp_path: Path) -> None:
    async with vmm.machine(commands()) as machine:
        await wants(machine)
        ours, theirs = socket.socketpair()
        for uri in (f"file:{tmp_path / 'state'}", "exec:true", f"fd:{ours.detach()}"):
            assert await refused(machine, uri) == (
                "migrate: multifd needs an address that can be connected to several times: tcp:, unix: or vsock:; "
                "turn it off for any other"
            )
        theirs.close()
        await wants(machine, "zero-copy-send")
        cannot = "migrate: zero-copy-send is not possible: "
        assert await refused(machine, f"unix:{tmp_path / 'main'}") == (
            f"{cannot}the network reads pages where they lie, which it does for tcp: alone; turn it off"
        )
        await machine.execute("migrate-set-parameters", multifd_compression="zlib")
        assert await refused(machine, "tcp:127.0.0.1:1") == (
            f"{cannot}what is packed is a copy; turn it off, or set multifd-compression to none"
        )
        await given(machine, pki.folder(), "client")
        assert await refused(machine, "tcp:127.0.0.1:1") == (
            f"{cannot}what is encrypted is a copy; turn it off, or unset tls-creds"
        )
    assert not (tmp_path / "state").exists()


async def test_a_destination_that_does_not_listen_refuses_further_channels(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "main"))
        listener.listen()
        async with started() as source, empty(autostart=False) as destination:
            await wants(source)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: source.execute("migrate", uri=f"unix:{tmp_path / 'main'}"))
                taken = await trio.to_thread.run_sync(listener.accept)
            fd = taken[0].detach()
            await destination.execute("migrate-incoming", uri=f"fd:{fd}", exit_on_error=False)
            info = await outcome(source)
            assert info["status"] == "failed"
            assert info["error-desc"] == (
                "Refused by the destination: The source opens further channels, and nobody listens for them here: "
                "await it on tcp:, unix: or vsock:, or turn off what needs them (multifd, postcopy-preempt)"
            )
            await goes_on(source)


# --- strangers, and damage ------------------------------------------------------------------------------------------


class Between:
    """Stands between a source and its destination, connection by connection."""

    def __init__(self, there: str) -> None:
        self._there = there
        self.connections = 0

    async def serve(
        self,
        listener: trio.SocketListener,
        change: Callable[[int, bytes], bytes | None],
        hold: Callable[[int], Awaitable[None]],
    ) -> None:
        """Pass on what comes; `change` has each piece that a source sends on connection n, or ends it by None.

        Connection n gets through when `hold` has returned.
        """
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            while True:
                near = await stack.enter_async_context(await listener.accept())
                await hold(self.connections)
                far = await stack.enter_async_context(await trio.open_unix_socket(self._there))
                nursery.start_soon(self._carry, near, far, partial(change, self.connections))
                nursery.start_soon(self._carry, far, near, lambda data: data)
                self.connections += 1

    @staticmethod
    async def _carry(a: trio.SocketStream, b: trio.SocketStream, change: Callable[[bytes], bytes | None]) -> None:
        try:
            async for data in a:
                changed = change(bytes(data))
                if changed is None:
                    break
                await b.send_all(changed)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            for end in (a, b):
                with suppress(OSError):
                    end.socket.shutdown(socket.SHUT_RDWR)


async def _at_once(_number: int) -> None:
    """Hold nothing."""


@asynccontextmanager
async def between(
    destination: EmbeddedMachine,
    folder: Path,
    change: Callable[[int, bytes], bytes | None],
    hold: Callable[[int], Awaitable[None]] = _at_once,
) -> AsyncGenerator[str]:
    """Await a source, and yield the address at which a source gets there by way of the test."""
    there = folder / "there"
    await destination.execute("migrate-incoming", uri=f"unix:{there}", exit_on_error=False)
    async with listening(folder) as (uri, listener), trio.open_nursery() as nursery:
        nursery.start_soon(Between(str(there)).serve, listener, change, hold)
        yield uri
        nursery.cancel_scope.cancel()


async def test_a_channel_that_is_none_is_complained_of_and_the_guest_goes_on(tmp_path: Path) -> None:
    complaints: list[str] = []
    start = Start(Recipe("of this test"), complain=complaints.append)
    seen: set[int] = set()

    def change(number: int, data: bytes) -> bytes:
        if number == 1 and number not in seen:
            seen.add(number)
            return data[:8] + b"\2" + data[9:]
        return data

    async with started() as source, vmm.machine(start=start) as destination:
        await wants(source)
        async with between(destination, tmp_path, change) as uri:
            await source.execute("migrate", uri=uri)
            info = await outcome(source)
            assert info["status"] == "failed"
            assert info["error-desc"] == "The destination closed a channel; the guest goes on in the source"
            await goes_on(source)
            info = await outcome(destination)
            assert info["error-desc"] == (
                "The source closed the connection, and opened 1 of 2 channels of kind multifd; the guest stays there"
            )
    assert complaints[0].startswith("State stream: a further channel's beginning has CRC-32 ")


def from_further(kind: str) -> Callable[[int, bytes], bytes | None]:
    """Return what is done to the second piece of a further channel: a bit is flipped in it, or it is the end."""
    pieces: dict[int, int] = {}

    def change(number: int, data: bytes) -> bytes | None:
        pieces[number] = pieces.get(number, 0) + 1
        if number != 1 or pieces[number] != 2:
            return data
        if kind == "cut":
            return None
        return data[:30] + bytes([data[30] ^ 1]) + data[31:]

    return change


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cut", "State stream: multifd channel 0, record 0, before offset 0: it ends there, before its end record"),
        ("flip", "State stream: multifd channel 0, record 0, before offset "),
    ],
)
async def test_a_channel_that_is_damaged_leaves_the_guest_where_it_is(kind: str, reason: str, tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        fill(source)
        await wants(source)
        async with between(destination, tmp_path, from_further(kind)) as uri:
            await source.execute("migrate", uri=uri)
            info = await outcome(source)
            assert info["status"] == "failed"
            assert info["error-desc"].startswith(f"Refused by the destination: {reason}")
            await goes_on(source)
            assert (await outcome(destination))["error-desc"].startswith(reason)
            await in_status(destination, "inmigrate")
            assert ram(destination) == []


async def test_a_migration_is_cancelled_while_its_channels_are_full(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        fill(source)
        await wants(source, multifd_channels=4)
        stuck, never = trio.Event(), trio.Event()

        async def hold(number: int) -> None:
            if number == 4:
                stuck.set()
                await never.wait()

        async with between(destination, tmp_path, lambda _, data: data, hold) as uri:
            await source.execute("migrate", uri=uri)
            await stuck.wait()
            await source.execute("migrate_cancel")
            assert (await outcome(source))["status"] == "cancelled"
            await goes_on(source)
            info = await outcome(destination)
            assert info["status"] == "failed"
            assert info["error-desc"] == (
                "The source closed the connection, and opened 3 of 4 channels of kind multifd; the guest stays there"
            )


async def test_a_destination_that_dies_leaves_the_guest_where_it_is(tmp_path: Path) -> None:
    async with started() as source:
        fill(source)
        await wants(source, multifd_channels=4)
        stuck, never = trio.Event(), trio.Event()

        async def hold(number: int) -> None:
            if number == 4:
                stuck.set()
                await never.wait()

        async with AsyncExitStack() as there:
            destination = await there.enter_async_context(empty())
            uri = await there.enter_async_context(between(destination, tmp_path, lambda _, data: data, hold))
            await source.execute("migrate", uri=uri)
            await stuck.wait()
        info = await outcome(source)
        assert info["status"] == "failed"
        assert info["error-desc"].endswith("; the guest goes on in the source")
        await goes_on(source)


async def test_strangers_and_what_comes_twice_harm_nothing(tmp_path: Path) -> None:
    complaints: list[str] = []
    start = Start(Recipe("of this test"), complain=complaints.append)
    preamble = trio.Event()
    found: list[bytes] = []
    settled = trio.Event()

    def change(number: int, data: bytes) -> bytes:
        if number == 1 and not found:
            found.append(data[:SIZE])
            preamble.set()
        return data

    async with started() as source, vmm.machine(start=start) as destination:
        fill(source)
        await wants(source, multifd_channels=2)
        there = tmp_path / "there"
        async with trio.open_nursery() as nursery:

            async def strangers() -> None:
                await preamble.wait()
                other = Preamble("multifd", 0, "00" * 16)
                ours = Preamble.decode(found[0])
                for data in (
                    found[0],
                    other.encode(),
                    Preamble("multifd", 2, ours.id).encode(),
                    Preamble("preempt", 0, ours.id).encode(),
                    b"GET / HTTP/1.1\r\n\r\n" + bytes(SIZE),
                    b"",
                ):
                    stream = await trio.open_unix_socket(str(there))
                    async with stream:
                        await stream.send_all(data)
                        await stream.send_eof()
                        with suppress(trio.BrokenResourceError):
                            assert await stream.receive_some() == b""
                settled.set()

            async def hold(number: int) -> None:
                # The second channel gets through when the strangers have been refused.
                if number == 2:
                    await settled.wait()

            nursery.start_soon(strangers)
            async with between(destination, tmp_path, change, hold) as uri:
                await source.execute("migrate", uri=uri)
                assert (await outcome(source))["status"] == "completed"
                await in_status(destination, "running")
                await goes_on(destination)
                assert digest(destination) == digest(source)
    assert complaints == [
        "State stream: channel 0 of kind multifd has come already",
        f"State stream: channel 0 of kind multifd is of another migration, {'00' * 16}, than is under way here",
        "State stream: channel 2 of kind multifd is not expected; numbers 0 to 1 of kind multifd are",
        "State stream: channel 0 of kind preempt is not expected; numbers 0 to 1 of kind multifd are",
        "State stream: a further channel begins with b'GET / HT', expected b'\\x89TVMC\\r\\n\\x1a'",
        f"State stream: a further channel ended after 0 of the {SIZE} bytes it begins with",
    ]


async def test_nobody_is_listened_to_once_all_channels_are_there(tmp_path: Path) -> None:
    listening_still: list[bool] = []

    def change(number: int, data: bytes) -> bytes:
        listening_still.append((tmp_path / "there").exists())
        return data

    async with both() as (source, destination), between(destination, tmp_path, change) as uri:
        await source.execute("migrate", uri=uri)
        assert (await outcome(source))["status"] == "completed"
        await in_status(destination, "running")
    # While its pages came, and not before they did.
    assert listening_still[0]
    assert not listening_still[-1]


async def test_a_file_with_a_place_for_each_page_takes_no_further_channels(tmp_path: Path) -> None:
    async with started() as source:
        await wants(source, "mapped-ram")
        await source.execute("migrate", uri=f"file:{tmp_path / 'state'}")
        assert (await outcome(source))["status"] == "completed"
