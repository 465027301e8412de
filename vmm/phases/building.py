"""Run control before there is anything to run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, final

import attrs
import trio

from vmm.decisions import Turn
from vmm.errors import InvalidState
from vmm.phases.config import GoOn
from vmm.phases.migration_state import NO_WISHES, Wishes
from vmm.phases.stream_port import Admission

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from vmm.decisions import Inbox
    from vmm.migration.channel import Channel
    from vmm.phases.incoming_port import IncomingPort


@final
@attrs.define(eq=False)
class SavedState:
    """A file with a state stream, open. Owns the descriptor until somebody takes it."""

    file: int
    wishes: Wishes = NO_WISHES
    """With a job, that it is loaded is the job's outcome; without, the command's."""

    def take(self) -> int:
        """Hand the descriptor over."""
        file, self.file = self.file, -1
        return file

    def close(self) -> None:
        """Close it if nobody has taken it."""
        if self.file >= 0:
            os.close(self.take())


@final
class Onward(Admission):
    """The facet of `may-listen` and `may-restore-guest` in the phases that build.

    What is to come in is bound, or open, before the machine moves on; if it cannot move on, that is undone.
    """

    def __init__(self, inbox: Inbox[Any], port: IncomingPort) -> None:
        super().__init__(port)
        self._inbox = inbox

    async def listen(self, channels: Sequence[Channel], *, exit_on_error: bool, wishes: Wishes) -> Awaitable[None]:
        """Bind `channels`, and go on to phase incoming."""
        await self._port.listen(channels, exit_on_error=exit_on_error, wishes=wishes)
        turn: Turn[Any] = self._inbox.post(GoOn(start=False, to_incoming=True), until="incoming")
        turn.on_settled(lambda: self._port.streams.give_up() if turn.failed else None)
        return turn

    def decide(self, saved: object) -> Awaitable[None]:
        """Go on to phase incoming, and load what is in the file; settles once it is in force."""
        turn: Turn[Any] = Turn(GoOn(start=False, to_incoming=True), until="running")
        assert isinstance(saved, SavedState)
        self._port.streams.restore(saved.take(), saved.wishes, tell=turn.fail)
        turn.on_settled(lambda: self._port.streams.give_up() if turn.failed else None)
        self._inbox.post_turn(turn)
        return turn


@final
class WishToRun:
    """The facet of `may-run-vcpus` in the phases that build: `cont` leads through all of them, to a running guest."""

    def __init__(self, inbox: Inbox[Any], port: IncomingPort) -> None:
        self._inbox = inbox
        self._port = port

    def cont(self) -> Awaitable[None]:
        """Go on to phase running and start the guest; or to phase incoming, where its state is awaited."""
        return self._inbox.post(GoOn(start=True), until=self._port.leads_to())

    async def stop(self) -> None:
        """Do nothing: nothing runs."""
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Refuse: there is no state to reset."""
        await trio.lowlevel.checkpoint()
        raise InvalidState(
            what="system_reset",
            state="before the machine is ready",
            instead="finish-machine-init or cont makes it ready",
        )
