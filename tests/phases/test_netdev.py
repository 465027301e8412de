"""Taps: made, ended, refused, and handed over. With a real one, in a network namespace of its own."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING

import pytest
import trio

from tests.phases.machine import bare, failure
from tests.phases.tap_host import numbers, tap_host
from tests.phases.update_kit import begin_update, outcome
from tests.qtest.update import hand_over, here, successor
from vmm import taps
from vmm.capabilities import ADMIN
from vmm.errors import DescriptorWrongKind, HostFileRefused, OptionInvalid, RecipeInvalid
from vmm.monitor.command import CommandTable
from vmm.phases.arriving import arrive
from vmm.phases.catalog import COMMANDS
from vmm.phases.chain import hint
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from pathlib import Path

    from tests.phases.machine import Running
    from vmm.qmp_client import QmpClient

pytestmark = pytest.mark.usefixtures("no_leaks")


async def build(client: QmpClient) -> None:
    await client.execute("machine-set", memory={"size": 8 << 20})
    await client.execute("accel-set", accel="qtest")
    await client.execute("cpu-model-set")
    await client.execute("finish-machine-init")
    await client.execute("cont")


def tap_of(running: Running) -> int:
    return running.host.stores.netdevs["n0"][0].fd


async def give(client: QmpClient, fd: int, name: str) -> None:
    """Send a descriptor, and give it a name."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))]
    await client._sock.sendmsg([b" "], rights)
    await client.execute("getfd", fdname=name)


async def test_a_tap_goes_over_and_its_interface_notices_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tap_host() as host, bare(tmp_path) as (running, client):
        await build(client)
        await give(client, host.fd, "tap")
        await client.execute("netdev_add", type="tap", id="n0", fd="tap", script="no", downscript="no", vhost=False)
        host.close_tap()
        assert await host.ask("state") == "up"
        await host.ask("changes")
        await host.ask("send 0 10")
        assert list(numbers(tap_of(running))) == list(range(10))
        await host.ask("send 10 20")
        stores, paused_in = running.host.stores, list[str]()
        changed = stores.changed_descriptors

        def in_the_pause() -> tuple[dict[str, int], list[str]]:
            paused_in.append(running.host.status.name)
            host.ask_now("send 20 30")
            return changed()

        monkeypatch.setattr(stores, "changed_descriptors", in_the_pause)
        async with successor(tmp_path / "new") as (new, other, where):
            await hand_over(client, where)
            await here(other)
            assert paused_in == ["finish-migrate"]
            assert tap_of(running) == -1
            await host.ask("send 30 40")
            assert list(numbers(tap_of(new))) == list(range(10, 40))
            assert [await host.ask(what) for what in ("state", "changes", "dropped")] == ["up", "0", "0"]
            made = [step.arguments for step in new.host.recorder.recipe() if step.execute == "netdev_add"]
            assert made == [{"type": "tap", "id": "n0", "ifname": "tap7"}]
            await other.execute("netdev_del", id="n0")
            assert await failure(other, "netdev_del", id="n0") == "Netdev 'n0' does not exist; there are: none"


async def test_a_tap_is_as_it_was_after_an_update_that_failed(tmp_path: Path) -> None:
    async with tap_host() as host, bare(tmp_path) as (running, client):
        await build(client)
        await give(client, host.fd, "tap")
        await client.execute("netdev_add", type="tap", id="n0", fd="tap")
        host.close_tap()
        with pytest.RaisesGroup(pytest.RaisesExc(RecipeInvalid, match="no such:name"), flatten_subgroups=True):
            async with successor(tmp_path / "new") as (_, other, where):
                await other.execute("netdev_add", type="tap", id="n1", ifname="no such:name")
                await begin_update(client, where)
                assert (await outcome(client))["status"] == "failed"
                # Only now is the destination's end of interest.
                await trio.sleep_forever()
        await host.ask("send 0 3")
        assert list(numbers(tap_of(running))) == [0, 1, 2]


async def test_an_interface_is_made_by_its_name_and_taken_by_one(tmp_path: Path) -> None:
    async with tap_host() as host, bare(tmp_path) as (_, client):
        await build(client)
        await give(client, host.fd, "tap")
        await client.execute("netdev_add", type="tap", id="n0", fd="tap")
        await give(client, host.fd, "tap")
        said = await failure(client, "netdev_add", type="tap", id="n0", fd="tap")
        assert said == "Netdev 'n0' exists already; choose another name"
        said = await failure(client, "netdev_add", type="tap", id="n1", fd="nap")
        assert said == "This session has no descriptor 'nap' (it has: tap); send it by getfd"


@pytest.mark.parametrize("kind", ["pipe", "random", "unattached"])
def test_what_is_no_tap_is_refused_and_stays(kind: str) -> None:
    paths = {"random": "/dev/urandom", "unattached": "/dev/net/tun"}
    fds = [os.open(paths[kind], os.O_RDWR)] if kind in paths else list(os.pipe())
    found = "a pipe" if kind == "pipe" else "a character device"
    try:
        with pytest.raises(DescriptorWrongKind) as caught:
            taps.adopt_tap(fds[0], "netdev/n0")
        assert str(caught.value) == (
            f"Descriptor 'netdev/n0' is {found}, not a tap with one queue, whose frames come bare"
        )
    finally:
        for fd in fds:
            os.close(fd)


def test_a_descriptor_that_is_not_open_is_no_tap() -> None:
    with pytest.raises(DescriptorWrongKind, match="is not open, not a tap"):
        taps.adopt_tap(1 << 20, "x")


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (0x1001, "a tun, which has no Ethernet frames"),
        (0x1102, "one of several queues of a tap"),
        (0x5002, "a tap whose frames come behind a header"),
        (0x0002, "a tap whose frames come behind a protocol number"),
    ],
)
def test_a_tap_of_another_form_is_refused(monkeypatch: pytest.MonkeyPatch, flags: int, found: str) -> None:
    answer = struct.pack("16sH22x", b"tap7", flags)
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: answer)
    with open("/dev/null") as null, pytest.raises(DescriptorWrongKind) as caught:
        taps.adopt_tap(null.fileno(), "x")
    assert str(caught.value).startswith(f"Descriptor 'x' is {found}, not a tap with one queue")


@pytest.mark.parametrize("name", ["", "a" * 16, "a/b", "a:b", "tap%d", "a b", ".."])
def test_a_name_that_no_interface_can_have_is_refused(name: str) -> None:
    with pytest.raises(OptionInvalid, match=r"^ifname: "):
        taps.open_tap(name)


def test_an_interface_that_the_host_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.EBUSY, "")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with pytest.raises(HostFileRefused) as caught:
        taps.open_tap("tap7")
    assert str(caught.value) == "Cannot attach to interface tap7: Device or resource busy"
    monkeypatch.setattr(taps, "_DEVICE", "/nowhere")
    with pytest.raises(HostFileRefused) as caught:
        taps.open_tap("tap7")
    assert str(caught.value) == "Cannot open /nowhere: No such file or directory"


def test_a_recipe_from_elsewhere_has_no_number_of_a_tap() -> None:
    step = Step("netdev_add", {"type": "tap", "id": "n0", "fd": "5"})
    table = CommandTable(COMMANDS, None, grant_of=lambda _: ADMIN, hint=hint, record=lambda *_: None)  # type: ignore[arg-type]
    around = [Step(name) for name in ("machine-set", "accel-set", "cpu-model-set", "finish-machine-init")]
    made = (*around[:2], step, *around[2:])
    with pytest.raises(RecipeInvalid) as caught:
        arrive(Recipe("of x", made), table, Recipe("o", ()), {})
    assert str(caught.value) == (
        "Recipe of x, command 3 (netdev_add): fd: 5 is a descriptor of another process; a recipe's tap has an ifname"
    )
