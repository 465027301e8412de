"""When a guest that writes faster than it is copied is slowed down, and by how much.

Source: QEMU migration/ram.c (migration_trigger_throttle, mig_throttle_guest_down).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PATIENCE: Final = 2
"""Passes in which too much was written, before anything is done about it."""
_MIB: Final = 1 << 20


@final
class Convergence:
    """Decides after each pass of one migration. Called by one thread.

    With `auto-converge` the guest is slowed down step by step, as long as it writes more than
    `throttle-trigger-threshold` percent of what is sent. With `dirty-limit` it is slowed down, from the same moment on,
    to the share of the time in which it would have written `vcpu-dirty-limit` for each vCPU: by what all of them
    together wrote in the last passes, since it is not known which of them wrote what. It is looked at again when they
    have taken `x-vcpu-dirty-limit-period`.

    Args:
        parameters: QEMU's migration parameters, looked at after each pass.
        vcpus: how many there are.
        throttle: takes the share of the time, in percent, in which the guest shall not run.
    """

    def __init__(
        self, mode: str | None, parameters: Mapping[str, Any], vcpus: int, throttle: Callable[[int], None]
    ) -> None:
        """`mode`: "auto-converge", "dirty-limit", or None for neither."""
        self._mode: Final = mode
        self._parameters: Final = parameters
        self._vcpus: Final = vcpus
        self._throttle: Final = throttle
        self._strikes = 0
        self._dirtied = 0
        self._seconds = 0.0
        self.percent = 0
        """What was given to `throttle` last."""

    def after_pass(self, sent_bytes: int, dirtied_bytes: int, seconds: float) -> None:
        """Take the figures of a pass: what was sent, what was written meanwhile, how long it took."""
        if self._mode is None:
            return
        self._dirtied += dirtied_bytes
        self._seconds += seconds
        bearable = sent_bytes * int(self._parameters["throttle-trigger-threshold"]) / 100
        if self._mode == "dirty-limit" and self.percent:
            if self._seconds * 1000 >= int(self._parameters["x-vcpu-dirty-limit-period"]):
                self._limit()
        elif dirtied_bytes > bearable:
            self._strikes += 1
            if self._strikes >= _PATIENCE:
                self._strikes = 0
                if self._mode == "dirty-limit":
                    self._limit()
                else:
                    self._slow_down(bearable / dirtied_bytes)
        else:
            self._dirtied, self._seconds = 0, 0.0

    def _slow_down(self, ideal: float) -> None:
        """Take the next step; `ideal` is the part of the present rate of writing that would be bearable."""
        first, step, last = (
            int(self._parameters[name])
            for name in ("cpu-throttle-initial", "cpu-throttle-increment", "max-cpu-throttle")
        )
        if not self.percent:
            self._set(min(first, last))
            return
        if self._parameters["cpu-throttle-tailslow"]:
            # No more than is needed, as far as the guest writes in proportion to its time.
            runs = 100 - self.percent
            step = min(step, round(runs - runs * ideal))
        self._set(min(self.percent + step, last))

    def _limit(self) -> None:
        """Make of the rate of writing since the last look the one that is allowed."""
        rate = self._dirtied / self._seconds
        self._dirtied, self._seconds = 0, 0.0
        allowed = int(self._parameters["vcpu-dirty-limit"]) * self._vcpus * _MIB
        runs = (100 - self.percent) * (allowed / rate if rate else 100)
        self._set(max(0, min(round(100 - runs), int(self._parameters["max-cpu-throttle"]))))

    def _set(self, percent: int) -> None:
        if percent != self.percent:
            self.percent = percent
            self._throttle(percent)
