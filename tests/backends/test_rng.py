from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.backends.pseudo_source import pseudo_source
from vmm import hostio
from vmm.backends.rng import BuiltinRng, DeviceRng
from vmm.errors import DescriptorWrongKind, HostFileRefused

if TYPE_CHECKING:
    from pathlib import Path


async def test_the_builtin_source_gives_as_much_as_is_asked_for() -> None:
    rng = BuiltinRng()
    first, second = await rng.read(4096), await rng.read(4096)
    assert len(first) == len(second) == 4096
    assert first != second
    assert rng.descriptors() == {}


@pytest.mark.parametrize("path", ["/dev/urandom", "/dev/random", "/dev/zero"])
async def test_a_device_gives_what_can_be_read_of_it(path: str) -> None:
    rng = DeviceRng(hostio.open_random_source(path), path)
    data = await rng.read(32)
    assert len(data) == 32
    assert (data == bytes(32)) is (path == "/dev/zero")
    rng.close()


async def test_a_device_that_has_nothing_is_waited_for() -> None:
    with pseudo_source() as source:
        rng = DeviceRng(hostio.open_random_source(source.path), source.path)
        got: list[bytes] = []

        async def read() -> None:
            got.append(await rng.read(8))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            assert got == []
            source.feed(b"abc")
        assert got == [b"abc"]
        rng.close()


async def test_many_wait_for_one_device_and_each_gets_bytes_of_its_own() -> None:
    with pseudo_source() as source:
        rng = DeviceRng(hostio.open_random_source(source.path), source.path)
        got: list[bytes] = []

        async def read() -> None:
            got.append(await rng.read(2))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            source.feed(b"aabbcc")
        assert got == [b"aa", b"bb", b"cc"]
        rng.close()


async def test_one_that_waits_no_longer_lets_the_next_one_wait() -> None:
    with pseudo_source() as source:
        rng = DeviceRng(hostio.open_random_source(source.path), source.path)
        async with trio.open_nursery() as nursery:
            first = trio.CancelScope()

            async def wait_in_vain() -> None:
                with first:
                    await rng.read(8)

            nursery.start_soon(wait_in_vain)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(rng.read, 8)
            await trio.testing.wait_all_tasks_blocked()
            first.cancel()
            await trio.testing.wait_all_tasks_blocked()
            source.feed(b"abc")
        rng.close()


async def test_a_read_that_is_cancelled_takes_nothing() -> None:
    with pseudo_source() as source:
        rng = DeviceRng(hostio.open_random_source(source.path), source.path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rng.read, 8)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        source.feed(b"abc")
        assert await rng.read(8) == b"abc"
        rng.close()


async def test_a_device_that_cannot_be_polled_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "hwrng"
    path.write_bytes(b"abc")
    fd = os.open(path, os.O_RDONLY)  # epoll refuses a regular file as it refuses /dev/hwrng
    read, asked = os.read, list[float]()

    def empty_at_first(fd: int, size: int) -> bytes:
        asked.append(trio.current_time())
        if len(asked) < 4:
            raise BlockingIOError
        return read(fd, size)

    monkeypatch.setattr(os, "read", empty_at_first)
    rng = DeviceRng(fd, str(path))
    assert await rng.read(8) == b"abc"
    assert [at - asked[0] for at in asked] == pytest.approx([0, 0.05, 0.1, 0.15])
    rng.close()


async def test_a_device_with_an_end_is_no_source() -> None:
    rng = DeviceRng(hostio.open_random_source("/dev/null"), "/dev/null")
    with pytest.raises(HostFileRefused) as caught:
        await rng.read(8)
    assert str(caught.value) == "Cannot read /dev/null: it has an end; a random source has none"
    rng.close()


async def test_a_device_that_fails_is_named(tmp_path: Path) -> None:
    rng = DeviceRng(os.open(tmp_path, os.O_RDONLY), "/dev/broken")
    with pytest.raises(HostFileRefused) as caught:
        await rng.read(8)
    assert str(caught.value) == "Cannot read /dev/broken: Is a directory"
    rng.close()


async def test_its_task_keeps_the_device_open_until_the_end() -> None:
    fd = hostio.open_random_source("/dev/urandom")
    rng = DeviceRng(fd, "/dev/urandom")
    async with trio.open_nursery() as nursery:
        await nursery.start(rng.serve)
        assert rng.descriptors() == {"file": fd}
        os.fstat(fd)
        nursery.cancel_scope.cancel()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_only_a_character_device_is_a_source(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    for wrong, reason in (
        (str(path), "it is a regular file, not a character device such as /dev/urandom"),
        (str(tmp_path), "it is a directory, not a character device such as /dev/urandom"),
        ("/nowhere", "No such file or directory"),
    ):
        with pytest.raises(HostFileRefused) as caught:
            hostio.open_random_source(wrong)
        assert str(caught.value) == f"Cannot read {wrong}: {reason}"


def test_a_descriptor_that_is_none_is_refused_and_closed(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(DescriptorWrongKind) as caught:
        hostio.adopt_random_source(fd, "object/rng0/file")
    assert str(caught.value) == "Descriptor 'object/rng0/file' is a directory, not a character device"


def test_a_descriptor_does_not_block_afterwards() -> None:
    fd = hostio.adopt_random_source(os.open("/dev/urandom", os.O_RDONLY), "object/rng0/file")
    assert not os.get_blocking(fd)
    os.close(fd)
