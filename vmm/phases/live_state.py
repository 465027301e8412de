"""How the state of a guest comes in that has just been paused elsewhere. Each turn of the loop here is of its pause."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

import trio

from vmm.errors import StreamCorrupt
from vmm.migration.status import MigrationStatus
from vmm.migration.stream_io import StreamIntake

if TYPE_CHECKING:
    from vmm.cpr.channel import CprChannel, Message
    from vmm.cpr.steps import Steps
    from vmm.migration.connect import Listener
    from vmm.migration.status import MigrationProgress
    from vmm.migration.stream_io import StateStream

_LAST_WORDS: Final = 0.5
"""Seconds for a source whose state stream broke off to say why, if it was on purpose."""


async def receive_state(
    channel: CprChannel, steps: Steps, listener: Listener, progress: MigrationProgress
) -> tuple[Message, StateStream]:
    """Wait until the guest is paused, and read its state. Waits as long as the source lives.

    Raises:
        VmmError: alone or in a group: the source refused, died, or sent what is no state.
    """
    main = await _early_connection(channel, listener)
    try:
        message = await channel.receive("paused")
        try:
            steps.reach("paused")
            progress.advance(MigrationStatus.ACTIVE)
            intake = StreamIntake(main) if main is not None else None
            # Most often all of it has come by now.
            stream = await _at_once(intake, channel) if intake is not None else None
            if stream is None:
                async with trio.open_nursery() as nursery:
                    # A source that gives up says so there, and may never say so on the main channel.
                    nursery.start_soon(channel.watch)
                    if intake is None:
                        main = await _accepted(channel, listener)
                        intake = StreamIntake(main)
                    try:
                        stream = await intake.all()
                    except StreamCorrupt:
                        # A source that gives up closes the main channel first. Why is what there is to tell.
                        await trio.sleep(_LAST_WORDS)
                        raise
                    nursery.cancel_scope.cancel()
        except BaseException:
            message.close()
            raise
    finally:
        if main is not None:
            main.close()
    return message, stream


async def _at_once(intake: StreamIntake, channel: CprChannel) -> StateStream | None:
    """Return the state if all of it is here. Waits for nothing but, if it is damaged, for the source to say why."""
    try:
        return intake.at_once()
    except StreamCorrupt:
        with trio.move_on_after(_LAST_WORDS):
            await channel.watch()
        raise


async def _early_connection(channel: CprChannel, listener: Listener) -> socket.socket | None:
    """Wait for the source to connect the main channel, as it does before it pauses the guest; or for a message."""
    accepted: list[socket.socket] = []
    async with trio.open_nursery() as nursery:

        async def until_a_message() -> None:
            await channel.wait_for_any()
            nursery.cancel_scope.cancel()

        nursery.start_soon(until_a_message)
        accepted.append(await _accepted(channel, listener))
        nursery.cancel_scope.cancel()
    return accepted[0] if accepted else None


async def _accepted(channel: CprChannel, listener: Listener) -> socket.socket:
    """Wait for a connection, the only one. Of other users none counts: anybody finds a name that is no file."""
    while True:
        accepted = await listener.accept(patient=False)
        sock = socket.socket(fileno=accepted.detach())
        if channel.admits(sock):
            listener.close()
            sock.setblocking(False)
            return sock
        sock.close()
