"""What cannot go over is said before anything starts, and refused in the same words."""

from __future__ import annotations

import ctypes
import os
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

import vmm
from tests.phases.machine import bare, failure
from tests.phases.update_kit import channels
from tests.qtest.client import build, qtest_object, unix
from vmm import host_fds, host_sockets
from vmm.phases.blockers import blocked_reasons
from vmm.phases.fdsets import FdsetFd, FdSets
from vmm.phases.monitors import Monitor
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.qmp_client import QmpClient

pytestmark = pytest.mark.usefixtures("no_leaks")

UPDATE = {"mode": "cpr-transfer"}


def open_io_uring() -> int:
    """Return an io_uring; skip the test where there is none."""
    fd: int = ctypes.CDLL(None, use_errno=True).syscall(425, 1, ctypes.create_string_buffer(120))
    if fd < 0:
        pytest.skip("this host has no io_uring")
    return fd


async def reasons(client: QmpClient) -> list[str]:
    found: list[str] = (await client.execute("query-migrate")).get("blocked-reasons", [])
    return found


async def refusals(client: QmpClient, tmp_path: Path) -> list[str]:
    """Return what `migrate` and `x-cpr-check` say, which find nobody where they would connect to."""
    where = channels(str(tmp_path / "nobody"), str(tmp_path / "nobody"))
    return [await failure(client, command, channels=where) for command in ("migrate", "x-cpr-check")]


async def complete(client: QmpClient) -> None:
    """Build a machine that could go."""
    await build(client, "qtest")
    await client.execute("finish-machine-init")


async def test_a_descriptor_that_the_kernel_does_not_pass_blocks_and_is_named(tmp_path: Path) -> None:
    async with bare(tmp_path) as (running, client):
        await complete(client)
        running.tree.view(FdSets).add(open_io_uring(), 3, None)
        # A copy leaves it here.
        assert await reasons(client) == []
        await client.execute("migrate-set-parameters", **UPDATE)
        said = (
            "a descriptor of fdset 3 is anon_inode:[io_uring], which the kernel passes to no process "
            "(Invalid argument); remove-fd it"
        )
        assert await reasons(client) == [said]
        assert await refusals(client, tmp_path) == [f"migrate: {said}", f"x-cpr-check: {said}"]
        await client.execute("remove-fd", fdset_id=3)
        assert await reasons(client) == []
        assert all("Cannot connect" in text for text in await refusals(client, tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([1 << 20], ""),
        ([(1 << 20) + 1], "an opaque of 1048577 bytes, at most 1048576 fit"),
        ([1 << 20] * 3, "opaques of 3145728 bytes together, at most 2097152 fit"),
    ],
)
async def test_descriptor_sets_that_are_too_large_for_a_successor_block(
    tmp_path: Path, words: list[int], said: str
) -> None:
    async with bare(tmp_path) as (running, client):
        await complete(client)
        for size in words:
            running.tree.view(FdSets).add(os.open("/dev/null", os.O_RDONLY), 3, "x" * size)
        await client.execute("migrate-set-parameters", **UPDATE)
        found = [f"the descriptor sets hold too much ({said}); remove-fd some"] if said else []
        assert await reasons(client) == found


def test_more_descriptors_than_a_successor_takes_block() -> None:
    sets = FdSets()
    sets.sets[3] = [FdsetFd(-1, number, number, None) for number in range(8193)]
    assert sets.too_much() == "8193 descriptors, at most 8192 go over"
    sets.sets[3].pop()
    assert sets.too_much() == ""


async def test_a_qtest_whose_one_client_stays_blocks(tmp_path: Path) -> None:
    path = tmp_path / "qt"
    with closing(host_sockets.listen_unix(str(path))) as listener:
        async with bare(tmp_path, unix("qt", path, server=False), qtest_object()) as (_, client):
            await complete(client)
            await client.execute("migrate-set-parameters", **UPDATE)
            said = (
                "the client of qtest 'qtest0' has a connection that stays with this process; "
                "have it connect to one that listens (server=on), or object-del 'qtest0'"
            )
            assert await reasons(client) == [said]
            assert (await refusals(client, tmp_path))[0] == f"migrate: {said}"
            await client.execute("object-del", id="qtest0")
            assert await reasons(client) == []
        listener.accept()[0].close()


async def test_what_a_client_has_named_blocks_only_where_it_is_to_go(tmp_path: Path) -> None:
    async with bare(tmp_path) as (running, client):
        await complete(client)
        backend = running.host.stores.monitors["qmp_mon0"][0]
        assert isinstance(backend, Monitor)
        (session,) = backend._monitor.sessions.values()
        session.descriptors["ring"] = open_io_uring()
        assert blocked_reasons(running.host, UPDATE) == []
        assert blocked_reasons(running.host, {**UPDATE, "migrate-sessions": True}) == [
            f"descriptor 'ring' of session {session.name} is anon_inode:[io_uring], which the kernel passes to no "
            "process (Invalid argument); closefd it, or leave migrate-sessions off",
        ]
        await client.execute("closefd", fdname="ring")


async def test_a_program_that_has_a_machine_in_it_cannot_be_replaced() -> None:
    async with vmm.machine(Recipe("of this test", (Step("machine-set", {"memory": {"size": 8 << 20}}),))) as m:
        host = m._host
        assert blocked_reasons(host, {"mode": "cpr-exec"}) == [
            "the machine runs inside another program, whose process is not its own to replace; use mode cpr-transfer"
        ]
        assert blocked_reasons(host, UPDATE) == []


async def test_websockets_never_block(tmp_path: Path) -> None:
    step = Step("object-add", {"qom-type": "monitor-websocket", "id": "w", "addr": {"host": "127.0.0.1", "port": "0"}})
    async with bare(tmp_path, step) as (running, _):
        assert blocked_reasons(running.host, {**UPDATE, "migrate-sessions": True}) == []


def test_a_descriptor_that_is_not_open_is_told_as_such() -> None:
    assert host_fds.why_not_passed(1 << 20) == "Bad file descriptor"
    assert host_fds.opened_as(1 << 20) == "No such file or directory"
