"""What of a machine without KVM travels beside its devices: the clock, and the interrupt lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, final

import attrs

from vmm.hw.codec import Codecs
from vmm.hw.state import I64, Integer, Schema
from vmm.qtest.clock import LAST

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vmm.hw.irq import IrqLines
    from vmm.qtest.clock import VirtualClock

LINES: Final = 24
"""Lines of the IOAPIC, which are all that there are."""


@attrs.define(kw_only=True)
class QtestState:
    """Everything that KVM would keep."""

    SCHEMA: ClassVar[Schema] = Schema("qtest", version=1, accepts=1)

    epoch_ns: I64 = 0  # Unix time at which the clock was 0
    now_ns: Annotated[int, Integer(0, LAST)] = 0
    high: Annotated[int, Integer(0, (1 << LINES) - 1)] = 0  # bit N: line N is high


@final
class QtestSection:
    """The section of the accelerator."""

    def __init__(self, clock: VirtualClock, lines: IrqLines) -> None:
        self._clock: Final = clock
        self._lines: Final = lines
        self._codecs: Final = Codecs()

    def save(self) -> Mapping[str, Any]:
        """Return the state."""
        state = QtestState(epoch_ns=self._clock.epoch_ns, now_ns=self._clock.now_ns, high=self._lines.high())
        return self._codecs.of(QtestState).dump(state)

    def load(self, version: int, section: Mapping[str, Any]) -> Callable[[], None]:
        """Check a hostile section and return what puts it in force. Raises `StateRejected`."""
        state = self._codecs.of(QtestState).load(section, version)

        def apply() -> None:
            self._clock.epoch_ns, self._clock.now_ns = state.epoch_ns, state.now_ns
            self._lines.put(state.high)

        return apply
