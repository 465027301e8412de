"""What a guest can ask of the machine it runs on: a reset, and the end of the VMM."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from vmm.errors import VmmError
from vmm.hw.doorbell import make_doorbell

if TYPE_CHECKING:
    from vmm.phases.running import Run


@final
@attrs.frozen
class GuestWishes:
    """What a guest has asked for, as it goes to a successor."""

    reset: bool = False
    exit_status: int | None = None

    def to_json(self) -> dict[str, object]:
        """Return it as JSON."""
        return {"reset": self.reset, "exit-status": self.exit_status}

    @classmethod
    def from_json(cls, value: object) -> GuestWishes | None:
        """Undo `to_json`; None if `value`, which a peer sent, is none."""
        if not isinstance(value, dict) or set(value) != {"reset", "exit-status"}:
            return None
        reset, status = value["reset"], value["exit-status"]
        if not isinstance(reset, bool) or not (status is None or (type(status) is int and 0 <= status <= 255)):
            return None
        return cls(reset, status)


@final
class GuestBells:
    """Rung by devices on vCPU threads, answered on the loop."""

    def __init__(self) -> None:
        self.bell: Final = make_doorbell()
        self.wants_reset = False
        self.exit_status: int | None = None

    def request_reset(self) -> None:
        """The guest pulls the reset line."""
        self.wants_reset = True
        self.bell.ring()

    def request_exit(self, status: int) -> None:
        """The guest writes an exit status to the debug-exit port."""
        self.exit_status = status
        self.bell.ring()

    def pending(self) -> GuestWishes:
        """Return what has been asked for and not been answered. Every vCPU is out."""
        return GuestWishes(self.wants_reset, self.exit_status)

    def take_over(self, wishes: GuestWishes) -> None:
        """Ask for what the guest asked a predecessor for; without a wish, have the listener look again."""
        self.wants_reset = self.wants_reset or wishes.reset
        if wishes.exit_status is not None:
            self.exit_status = wishes.exit_status
        self.bell.ring()

    def forget(self) -> None:
        """Have nothing asked for: another guest is put in the place of the one that did. Every vCPU is out."""
        self.wants_reset = False
        self.exit_status = None

    def request_power_off(self) -> None:
        """The guest turns the power off."""
        self.request_exit(0)

    def close(self) -> None:
        """Close the bell."""
        self.bell.close()


@final
class GuestRequests:
    """The resident task that answers."""

    def __init__(self, run: Run) -> None:
        self._run = run

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer until cancelled; while the guest is paused for a live update, or is another process's, nothing."""
        bells = self._run.machine.bells
        host = self._run.machine.made.host
        task_status.started()
        while True:
            await bells.bell.wait_rung()
            async with self._run.control:
                if not self._run.here:
                    continue
                if bells.exit_status is not None:
                    await self._run.gang.stop()
                    host.ending.guest_exits(bells.exit_status)
                elif bells.wants_reset:
                    bells.wants_reset = False
                    if self._run.machine.made.definition.options.reboot_action == "shutdown":
                        await self._run.gang.stop()
                        host.ending.end("guest-reset")
                    else:
                        with suppress(VmmError):  # which has been told
                            await self._run.reset_because("guest-reset")
