"""What a guest can ask of the machine it runs on: a reset, and the end of the VMM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import trio

from vmm.hw.doorbell import make_doorbell

if TYPE_CHECKING:
    from vmm.phases.running import Run


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
        """Answer until cancelled."""
        bells = self._run.machine.bells
        host = self._run.machine.made.host
        task_status.started()
        while True:
            await bells.bell.wait_rung()
            if bells.exit_status is not None:
                await self._run.gang.stop()
                host.ending.guest_exits(bells.exit_status)
            elif bells.wants_reset:
                bells.wants_reset = False
                if self._run.machine.made.definition.options.reboot_action == "shutdown":
                    await self._run.gang.stop()
                    host.ending.end("guest-reset")
                else:
                    await self._run.reset_because("guest-reset")
