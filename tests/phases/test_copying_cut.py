"""The network goes away under a migration, and nobody is told: each side gives up, and the guest goes on."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.phases.copy_kit import Peer, empty, goes_on, in_status, outcome, parts, refusal, started
from tests.phases.link_host import link
from vmm.errors import StreamCorrupt
from vmm.migration import silence

if TYPE_CHECKING:
    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks", "impatient")]

SILENT: Final = "does not answer any more (Connection timed out)"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer is given up as soon as the kernel can, which asks an idle one once a second at most."""
    for name, value in {"UNANSWERED_MS": 300, "IDLE_SECONDS": 1, "INTERVAL_SECONDS": 1, "PROBES": 1}.items():
        monkeypatch.setattr(silence, name, value)


async def failed(source: EmbeddedMachine) -> None:
    """Require that the source has given up, and that the guest goes on there."""
    info = await outcome(source)
    reason = f"The destination {SILENT}; the guest goes on in the source"
    assert (info["status"], info["error-desc"]) == ("failed", reason)
    await in_status(source, "running")
    await goes_on(source)


async def test_a_source_that_is_cut_off_while_it_sends_keeps_its_guest() -> None:
    async with link() as net, started() as source:
        # More than sockets take: it is in the middle of it.
        parts(source).memory.write(8 << 20, os.urandom(8 << 20))
        await source.execute("migrate", uri=f"fd:{net.ends[0].detach()}")
        async with trio.SocketStream(trio.socket.from_stdlib_socket(net.ends[1].dup())) as stream:
            peer = Peer(stream)
            await peer.invite()
            await peer.read(100_000)
            await net.cut()
            await failed(source)


async def test_both_sides_that_are_cut_off_from_each_other_give_up() -> None:
    async with link() as net, started() as source:
        await net.cut()
        await source.execute("migrate", uri=f"fd:{net.ends[0].detach()}")
        with refusal(StreamCorrupt, rf"^State stream: the source {re.escape(SILENT)}$"):
            async with empty() as destination:
                # It hears nothing, and owes nothing.
                await destination.execute("migrate-incoming", uri=f"fd:{net.ends[1].detach()}")
                await trio.sleep_forever()
        await failed(source)
