"""What is held for whoever uses it, and does nothing by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod

import trio


class Held(ABC):
    """Something of the host's that is open until the task that serves it is cancelled, or `close` is called."""

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold it until cancelled, then let go of it."""
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            self.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of it. For whoever does not serve it."""
