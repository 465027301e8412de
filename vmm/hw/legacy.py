"""Two one-byte ports of a PC that guests use without asking whether they are there.

Source: IBM PC/AT Technical Reference (port 0x80: diagnostics); IBM PS/2 Hardware Interface Technical Reference, System
Control Port A (port 0x92).

Ports that are left unclaimed on purpose, since all ones is the answer that says "absent": 0xCF8 to 0xCFF (PCI
configuration), 0x2E8, 0x2F8, 0x3E8 (further UARTs), 0x3C0 to 0x3DF (VGA). The PICs, the PIT and its gate at
port 0x61 (KVM_PIT_SPEAKER_DUMMY) are KVM's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, ClassVar, Final, final

import attrs

from vmm.hw.board import POST_PORT, SYSTEM_CONTROL_A
from vmm.hw.state import U8, Integer, Schema, host_only

_FAST_RESET: Final = 0x01
_FAST_A20: Final = 0x02


@attrs.define(kw_only=True)
class PostCodeState:
    """The last diagnostic code."""

    SCHEMA: ClassVar[Schema] = Schema("post-code", version=1, accepts=1)

    code: U8 = 0


@final
@attrs.define(eq=False, repr=False, kw_only=True)
class PostCode:
    """Port 0x80: firmware writes its progress there, and Linux anything, to pass a microsecond. Reads back."""

    name: str = attrs.field(metadata=host_only("configuration: of the board"), default="post-code")
    addresses: tuple[range, ...] = attrs.field(metadata=host_only("configuration: of the board"), default=(POST_PORT,))
    widest: int = attrs.field(metadata=host_only("configuration: an 8-bit ISA device"), default=1, init=False)
    lock: threading.Lock = attrs.field(
        metadata=host_only("orders this process's threads"), factory=threading.Lock, init=False
    )
    state: PostCodeState = attrs.Factory(PostCodeState)

    def read(self, offset: int, size: int) -> int:
        """Return the last code."""
        return self.state.code

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep a code."""
        self.state.code = value

    def reset(self) -> None:
        """Go to the power-on state."""
        with self.lock:
            self.state = PostCodeState()

    def after_load(self) -> None:
        """Do nothing: nothing follows from the state, and there is no interrupt."""


@attrs.define(kw_only=True)
class SystemControlState:
    """The two bits of port 0x92 that can be written."""

    SCHEMA: ClassVar[Schema] = Schema("system-control-a", version=1, accepts=1)

    control: Annotated[int, Integer(0, 0x03)] = _FAST_A20


@final
@attrs.define(eq=False, repr=False, kw_only=True)
class SystemControlA:
    """Port 0x92: the fast A20 gate, which has no effect (A20 is always on), and the fast reset line.

    `request_reset` is called on a vCPU thread under `lock`: it rings, and never blocks.
    """

    request_reset: Callable[[], object] = attrs.field(metadata=host_only("the machine's reset, in this process"))
    name: str = attrs.field(metadata=host_only("configuration: of the board"), default="system-control-a")
    addresses: tuple[range, ...] = attrs.field(
        metadata=host_only("configuration: of the board"), default=(SYSTEM_CONTROL_A,)
    )
    widest: int = attrs.field(metadata=host_only("configuration: an 8-bit ISA device"), default=1, init=False)
    lock: threading.Lock = attrs.field(
        metadata=host_only("orders this process's threads"), factory=threading.Lock, init=False
    )
    state: SystemControlState = attrs.Factory(SystemControlState)

    def read(self, offset: int, size: int) -> int:
        """Return the two bits."""
        return self.state.control

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep the two bits; the reset line acts when its bit goes from 0 to 1."""
        rising = value & ~self.state.control & _FAST_RESET
        self.state.control = value & (_FAST_RESET | _FAST_A20)
        if rising:
            self.request_reset()

    def reset(self) -> None:
        """Go to the power-on state."""
        with self.lock:
            self.state = SystemControlState()

    def after_load(self) -> None:
        """Do nothing: nothing follows from the state, and there is no interrupt."""
