"""A guest goes over a network that is slow, loses packets, and is cut: two namespaces, and netem between them."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final, final

import attrs
import pytest
import trio

from tests.kvmbox.box import IN_THE_BOX
from tests.kvmbox.machine import OVER, outcome, port_of, session_once_there
from tests.phases.update_kit import descriptors_in
from vmm.guests.heartbeat import HeartbeatReader

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.kvmbox.stock_linux import StockLinux
    from vmm.qmp_client import QmpClient

pytestmark = [
    pytest.mark.kvmbox,
    pytest.mark.skipif(
        os.environ.get(IN_THE_BOX) != "1", reason="loads modules, which are the box's: python -m tests.kvmbox"
    ),
]

LIMIT: Final = 240.0
"""Seconds for anything here."""

IMPATIENT: Final = """\
from vmm.migration import silence
silence.UNANSWERED_MS, silence.IDLE_SECONDS, silence.INTERVAL_SECONDS, silence.PROBES = 12_000, 4, 4, 2
from vmm.cli import main
raise SystemExit(main())
"""
"""A VMM that gives a silent peer up after twelve seconds and not after thirty, which nobody need wait for twice."""

THIN: Final = "delay 10ms rate 4mbit"
LOSSY: Final = "delay 5ms loss 1% rate 100mbit"
CUT: Final = "loss 100%"

CUT_OFF: Final = r"\(.*\); the guest waits for its pages; see migrate-recover"

GUEST: Final = ("-m", "64", "-kernel", "builtin:heartbeat", "-append", "hz=100 pages=1 region=1M", "-nodefaults")
FILLED: Final = (8 << 20, 16 << 20)
"""How many bytes of RAM are not zero, and from where: more than sockets take at once, and some seconds' worth."""

_INIT_MODULE: Final = 175
"""System call of x86-64."""


def load_module(content: bytes) -> None:
    """Load a module into the kernel, unless it is there."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_INIT_MODULE, content, ctypes.c_ulong(len(content)), b"") and ctypes.get_errno() != errno.EEXIST:
        raise OSError(ctypes.get_errno(), "init_module")


def run(*words: str) -> None:
    """Run a command."""
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)


@final
class Link:
    """Network namespaces `left` and `right`, and a cable."""

    ADDRESSES: Final = {"left": "10.7.0.1", "right": "10.7.0.2"}

    def __init__(self, linux: StockLinux, stack: ExitStack) -> None:
        for _, content in linux.modules_in_order(["veth", "sch_netem"]):
            load_module(content)
        run("ip", "link", "add", "left", "type", "veth", "peer", "name", "right")
        for name, address in self.ADDRESSES.items():
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "del", name)
            run("ip", "link", "set", name, "netns", name)
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", name)
            run("ip", "-n", name, "link", "set", name, "up")

    def becomes(self, how: str) -> None:
        """Be like `how`, which is netem's, in both directions."""
        for name in self.ADDRESSES:
            run("tc", "-n", name, "qdisc", "replace", "dev", name, "root", "netem", *how.split(), "limit", "10000")


@final
@attrs.define(eq=False)
class Side:
    """A process in one of the namespaces."""

    process: subprocess.Popen[bytes]
    qmp: Path
    log: Path

    @asynccontextmanager
    async def session(self) -> AsyncIterator[QmpClient]:
        """A session of its monitor."""
        async with session_once_there(self.qmp) as client:
            yield client

    async def ended(self) -> int:
        """Its exit status."""
        return await trio.to_thread.run_sync(self.process.wait)

    def stop(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


def start(namespace: str, folder: Path, name: str, stack: ExitStack, *options: str) -> Side:
    """Start a VMM in a namespace."""
    qmp, log = folder / f"{name}.qmp", folder / f"{name}.log"
    inside = ("ip", "netns", "exec", namespace)
    command = [*inside, sys.executable, "-c", IMPATIENT, "run", "-qmp", f"unix:{qmp}", *options]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    side = Side(process, qmp, log)
    stack.callback(side.stop)
    return side


@final
class Ram:
    """The RAM of the guest in a process, and what it says of itself."""

    def __init__(self, pid: int, stack: ExitStack) -> None:
        path = next(path for path, target in descriptors_in(pid) if target.startswith("/memfd:ram"))
        self.fd: Final = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, self.fd)
        self._reader = HeartbeatReader(lambda address, size: os.pread(self.fd, size, address))

    async def ticks(self, more: int = 10) -> int:
        """Wait until the guest has ticked some more, with nothing lost; return how often it has."""
        wanted: int | None = None
        while (report := self._reader.look()) is None or wanted is None or report.ticks < wanted:
            if wanted is None and report is not None:
                wanted = report.ticks + more
            await trio.sleep(0.1)
        assert report.intact, report
        return report.ticks

    def filled(self) -> bytes:
        """What is where it was filled."""
        size, at = FILLED
        return os.pread(self.fd, size, at)


async def begun(source: QmpClient) -> None:
    """Wait until a part of the guest's RAM has gone."""
    while (info := await source.execute("query-migrate"))["status"] != "active" or (
        info["ram"]["transferred"] < 1 << 20
    ):
        assert info["status"] in ("setup", "active"), info
        await trio.sleep(0.1)


async def in_status(end: QmpClient, wanted: str) -> None:
    """Wait until a migration is in this status."""
    while (found := (await end.execute("query-migrate"))["status"]) != wanted:
        assert found not in OVER
        await trio.sleep(0.1)


async def returns_by_postcopy(source: QmpClient, heir: Side, link: Link) -> None:
    """The guest goes over a thin link, runs there with most of its RAM here, and is cut off; and gets the rest."""
    async with heir.session() as there:
        port = await port_of(there)
        states = [{"capability": "postcopy-ram", "state": True}]
        await source.execute("migrate-set-capabilities", capabilities=states)
        await source.execute("migrate", uri=f"tcp:{link.ADDRESSES['left']}:{port}")
        await begun(source)
        await source.execute("migrate-start-postcopy")
        await in_status(there, "postcopy-active")
        await in_status(source, "postcopy-active")
        link.becomes(CUT)
        await in_status(source, "postcopy-paused")
        await in_status(there, "postcopy-paused")
        link.becomes(LOSSY)
        uri = f"tcp:{link.ADDRESSES['left']}:4445"
        await there.execute("migrate-recover", uri=uri)
        await source.execute("migrate", uri=uri, resume=True)
        assert (await outcome(source))["status"] == "completed"
        assert (await outcome(there))["status"] == "completed"


@pytest.mark.usefixtures("no_leaks")
async def test_a_guest_goes_over_a_bad_network_or_stays_where_it_is_or_gets_the_rest_later(
    stock_linux: StockLinux, tmp_path: Path
) -> None:
    with ExitStack() as stack, trio.fail_after(4 * LIMIT):
        link = Link(stock_linux, stack)
        source = start("left", tmp_path, "source", stack, *GUEST)
        heirs = [
            start(name, tmp_path, f"heir{number}", stack, "-incoming", f"tcp:{link.ADDRESSES[name]}:0")
            for number, name in enumerate(("right", "right", "right", "left"))
        ]
        async with source.session() as client:
            while (await client.execute("query-status"))["status"] != "running":  # noqa: ASYNC110
                await trio.sleep(0.1)
            ram = Ram(source.process.pid, stack)
            await ram.ticks()
            content = os.urandom(FILLED[0])
            os.pwrite(ram.fd, content, FILLED[1])

            async def migrate(heir: Side) -> None:
                async with heir.session() as there:
                    port = await port_of(there)
                await client.execute("migrate", uri=f"tcp:{link.ADDRESSES['right']}:{port}")

            # Thin: it is called off.
            link.becomes(THIN)
            await migrate(heirs[0])
            await begun(client)
            await client.execute("migrate_cancel")
            assert (await outcome(client))["status"] == "cancelled"
            await ram.ticks()
            assert await heirs[0].ended() == 1

            # Cut on the way: both sides give up, though nobody tells them.
            await migrate(heirs[1])
            await begun(client)
            link.becomes(CUT)
            assert (await outcome(client))["status"] == "failed"
            await ram.ticks()
            assert await heirs[1].ended() == 1

            # Mended, though not well.
            link.becomes(LOSSY)
            await migrate(heirs[2])
            assert (await outcome(client))["status"] == "completed"
            left = await ram.ticks(0)
        async with heirs[2].session() as client:
            assert (await outcome(client))["status"] == "completed"
            there = Ram(heirs[2].process.pid, stack)
            assert await there.ticks() > left
            assert there.filled() == content
            link.becomes(THIN)
            await returns_by_postcopy(client, heirs[3], link)
            back = Ram(heirs[3].process.pid, stack)
            assert await back.ticks() > left
            assert back.filled() == content
        assert source.log.read_text() == heirs[2].log.read_text() == ""
        assert re.fullmatch(rf"trio-vmm: The source is gone {CUT_OFF}\n", heirs[3].log.read_text())
