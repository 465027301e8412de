"""How a guest's state comes in, and from whom."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import closing

import pytest
import trio
import trio.testing

from tests.phases.update_kit import due
from vmm.cpr.berth import Berth
from vmm.cpr.channel import CprChannel
from vmm.cpr.steps import Steps
from vmm.migration.address import UnixAddress
from vmm.migration.channel import Channel
from vmm.migration.connect import close_descriptors, listen
from vmm.migration.status import MigrationProgress
from vmm.migration.stream import StreamWriter
from vmm.phases.live_state import receive_state

pytestmark = pytest.mark.usefixtures("no_leaks")

STRANGER = 65534


@pytest.mark.skipif(os.getuid() != 0, reason="another user's process can only be had by root")
@pytest.mark.parametrize("early", [True, False])
async def test_another_user_who_connects_to_the_main_channel_is_not_the_source(*, early: bool) -> None:
    berth = Berth.bind()
    main = berth.channels.main
    assert isinstance(main, UnixAddress)
    channels = [Channel.from_json(value, "a test") for value in berth.occupy()]
    address = channels[0].address
    listener = await listen(address)  # type: ignore[arg-type] # a descriptor's
    close_descriptors(channel.address for channel in channels)
    connects = f"s = socket.socket(socket.AF_UNIX); s.connect({main.socket_name()!r}); s.send(bytes(64))"
    await trio.run_process([sys.executable, "-c", f"import os, socket; os.setuid({STRANGER}); {connects}"])
    ours, theirs = trio.socket.socketpair()
    progress = MigrationProgress("target", lambda _: None, trio.current_time)
    progress.begin()
    with (
        closing(listener),
        closing(CprChannel(ours, side="destination", peer="source")) as here,
        closing(CprChannel(theirs, side="source", peer="destination")) as there,
        socket.socket(socket.AF_UNIX) as source,
    ):
        if not early:
            await there.send("paused", {})

        async def connect() -> None:
            source.connect(main.socket_name())
            source.sendall(b"".join(StreamWriter("a test").finish()))
            if early:
                await trio.testing.wait_all_tasks_blocked()
                await there.send("paused", {})

        async with due("the state"), trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            message, stream = await receive_state(here, Steps("destination"), listener, progress)
        message.close()
        assert stream.sections == ()
