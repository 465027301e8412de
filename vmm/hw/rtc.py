"""A PC's clock with its battery-backed memory: an MC146818 at an index and a data port.

Source: Motorola MC146818A data sheet (address map, registers A to D, update cycle); IBM PC/AT Technical Reference,
real-time clock (the century at 0x32, bit 7 of the index port masks NMIs: kept nowhere, it has no effect).

The clock is the host's UTC clock plus an offset in whole seconds, which is what the guest changes when it sets the
time, and what travels. The divider and the rate in register A, and the square wave, have no effect: the clock always
goes, unless SET of register B halts it.

Not modelled: the three interrupts. Their enable bits can be written and read, register C is always 0, and the
interrupt line is never raised; a guest that waits for a tick polls UIP. The alarm registers are memory. The day of the
week follows from the date, and daylight saving (DSE) is not applied.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Annotated, ClassVar, Final, final

import attrs

from vmm.hw.board import RTC_PORTS
from vmm.hw.state import U8, Integer, Octets, Schema, host_only

_INDEX: Final = 0

# Memory addresses.
_SECONDS: Final = 0x00
_MINUTES: Final = 0x02
_HOURS: Final = 0x04
_WEEKDAY: Final = 0x06
_DAY: Final = 0x07
_MONTH: Final = 0x08
_YEAR: Final = 0x09
_A: Final = 0x0A
_B: Final = 0x0B
_C: Final = 0x0C
_D: Final = 0x0D
_CENTURY: Final = 0x32
_TIME: Final = (_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, _CENTURY)
_SIZE: Final = 128

_A_UIP: Final = 0x80
_A_INITIAL: Final = 0x26  # 32.768 kHz time base, 1.024 kHz rate
_B_SET: Final = 0x80
_B_SQUARE_WAVE: Final = 0x08
_B_INTERRUPTS: Final = 0x70
_B_BINARY: Final = 0x04
_B_24_HOURS: Final = 0x02
_D_VALID: Final = 0x80
_PM: Final = 0x80

_SECOND: Final = 1_000_000_000  # ns
# With a 32.768 kHz time base UIP is set 244 µs ahead of an update, which takes 1984 µs; it shows when it is over.
_UPDATE: Final = 244_000 + 1_984_000  # ns

_YEAR_LAST: Final = 9999  # two digits of century
_EVER: Final = (_YEAR_LAST + 1) * 366 * 86400  # s; more than any two times are apart


@attrs.define(kw_only=True)
class RtcState:
    """Everything that the guest can observe of the clock, but the time of day of the host."""

    SCHEMA: ClassVar[Schema] = Schema("mc146818", version=1, accepts=1)

    index: Annotated[int, Integer(0, _SIZE - 1)] = 0
    offset: Annotated[int, Integer(-_EVER, _EVER)] = 0  # s, guest's clock minus the host's UTC
    a: Annotated[int, Integer(0, 0x7F)] = _A_INITIAL  # without UIP
    b: U8 = _B_24_HOURS
    memory: Annotated[bytes, Octets(_SIZE, _SIZE)] = bytes(_SIZE)
    """By address. The registers of time are in use while SET halts the clock; A to D never are."""


@final
@attrs.define(eq=False, repr=False, kw_only=True)
class Rtc:
    """The clock. Its battery keeps the time and the memory over a `reset`."""

    name: str = attrs.field(metadata=host_only("configuration: of the board"), default="rtc")
    addresses: tuple[range, ...] = attrs.field(metadata=host_only("configuration: of the board"), default=(RTC_PORTS,))
    now_ns: Callable[[], int] = attrs.field(
        metadata=host_only("this host's clock, ns of Unix time"), default=time.time_ns
    )
    widest: int = attrs.field(metadata=host_only("configuration: an 8-bit ISA device"), default=1, init=False)
    lock: threading.Lock = attrs.field(
        metadata=host_only("orders this process's threads"), factory=threading.Lock, init=False
    )
    state: RtcState = attrs.Factory(RtcState)

    def read(self, offset: int, size: int) -> int:
        """Read the addressed register. The index port can't be read: all ones."""
        if offset == _INDEX:
            return 0xFF
        state = self.state
        address = state.index
        if address in _TIME:
            return state.memory[address] if state.b & _B_SET else self._time_registers()[address]
        if address == _A:
            return state.a | (_A_UIP if self._is_updating() else 0)
        if address == _B:
            return state.b
        if address == _C:
            return 0
        if address == _D:
            return _D_VALID
        return state.memory[address]

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the index, or the addressed register."""
        state = self.state
        address = state.index
        if offset == _INDEX:
            state.index = value & _SIZE - 1
        elif address == _A:
            state.a = value & ~_A_UIP
        elif address == _B:
            self._write_b(value)
        elif address in (_C, _D):
            pass  # read-only
        elif address in _TIME and not state.b & _B_SET:
            self._hold_time()
            self._store(address, value)
            self._set_time()
        else:
            self._store(address, value)

    def reset(self) -> None:
        """Do what the RESET pin does: disable the interrupts and the square wave. Time and memory stay."""
        with self.lock:
            self.state.b &= ~(_B_INTERRUPTS | _B_SQUARE_WAVE)
            self.state.index = 0

    def after_load(self) -> None:
        """Do nothing: the time follows from the offset, and there is no interrupt."""

    def _write_b(self, value: int) -> None:
        state = self.state
        if value & ~state.b & _B_SET:
            self._hold_time()
            state.b = value
        elif state.b & ~value & _B_SET:
            # The mode that the registers were written in is the one in force now: it may come with the same write.
            state.b = value
            self._set_time()
        else:
            state.b = value

    def _store(self, address: int, value: int) -> None:
        memory = bytearray(self.state.memory)
        memory[address] = value
        self.state.memory = bytes(memory)

    def _is_updating(self) -> bool:
        return not self.state.b & _B_SET and self.now_ns() % _SECOND >= _SECOND - _UPDATE

    def _hold_time(self) -> None:
        """Put the present time into the registers."""
        memory = bytearray(self.state.memory)
        for address, value in self._time_registers().items():
            memory[address] = value
        self.state.memory = bytes(memory)

    def _time_registers(self) -> dict[int, int]:
        """Return the present time as register contents by address, in the mode of register B."""
        now = self.now_ns() // _SECOND + self.state.offset
        year, month, day, hour, minute, second, weekday = time.gmtime(_bounded(now))[:7]
        encode = self._encode
        return {
            _SECONDS: encode(second),
            _MINUTES: encode(minute),
            _HOURS: self._encode_hour(hour),
            _WEEKDAY: encode((weekday + 1) % 7 + 1),  # Sunday is 1 in the chip, Monday 0 in Python
            _DAY: encode(day),
            _MONTH: encode(month),
            _YEAR: encode(year % 100),
            _CENTURY: encode(year // 100),
        }

    def _set_time(self) -> None:
        """Make the registers' contents the present time; what is out of its range carries over into the next."""
        from calendar import timegm  # 1.5 ms, for the few guests that set the time

        memory = self.state.memory
        decode = self._decode
        year = min(max(decode(memory[_CENTURY]) * 100 + decode(memory[_YEAR]), 1), _YEAR_LAST)
        month = min(max(decode(memory[_MONTH]), 1), 12)
        date = (year, month, decode(memory[_DAY]))
        wanted = timegm((*date, self._decode_hour(memory[_HOURS]), decode(memory[_MINUTES]), decode(memory[_SECONDS])))
        self.state.offset = _bounded(wanted) - self.now_ns() // _SECOND

    def _encode(self, value: int) -> int:
        return value if self.state.b & _B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.state.b & _B_BINARY else (value >> 4) * 10 + (value & 0x0F)

    def _encode_hour(self, hour: int) -> int:
        if self.state.b & _B_24_HOURS:
            return self._encode(hour)
        return self._encode((hour + 11) % 12 + 1) | (_PM if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self.state.b & _B_24_HOURS:
            return self._decode(value)
        return self._decode(value & ~_PM) % 12 + (12 if value & _PM else 0)


_FIRST: Final = -62_135_596_800  # 0001-01-01 00:00:00
_LAST: Final = 253_402_300_799  # 9999-12-31 23:59:59


def _bounded(seconds: int) -> int:
    """Keep a Unix time within the years that two digits of century and two of year can show."""
    return min(max(seconds, _FIRST), _LAST)
