"""One small state stream with something of everything, for the tests of the format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmm.migration.stream import StreamReader, StreamWriter
from vmm.migration.stream_records import Section

if TYPE_CHECKING:
    from typing import Any

    from vmm.migration.stream_records import Record

MACHINE: Final = "sample-vm"
DIGEST: Final = bytes(range(32))
COMMANDS: Final[tuple[dict[str, Any], ...]] = (
    {"execute": "machine-set", "arguments": {"type": "microvm", "memory": 16777216, "smp": {"cpus": 1}}},
    {"execute": "finish-machine-init"},
)
SECTIONS: Final[dict[str, tuple[int, dict[str, Any]]]] = {
    "cpu0": (1, {"regs": bytes(range(24)), "xsave": b"", "tsc-offset": -(1 << 63), "mp-state": (1 << 64) - 1}),
    "uart0": (3, {"lcr": 3, "fifo": [b"ab", b"", b"c"], "line": {"level": True, "name": "tty\u00e9", "since": None}}),
    "empty": (0, {}),
}
EXTENTS: Final = ((0, 0xA0000), (0x100000, 0xF00000))


SAMPLE_SECTIONS: Final = tuple(Section(name, version, state) for name, (version, state) in SECTIONS.items())


def writer_of_sample() -> StreamWriter:
    """Write the sample, all but its end."""
    writer = StreamWriter(MACHINE, DIGEST)
    writer.recipe(COMMANDS)
    for name, (version, state) in SECTIONS.items():
        writer.section(name, version, state)
    writer.ram_extents(EXTENTS)
    return writer


def build() -> bytes:
    """Return the whole sample."""
    return b"".join(writer_of_sample().finish())


def read(data: bytes, piece: int | None = None) -> list[Record]:
    """Read a whole stream, in pieces of `piece` bytes."""
    reader = StreamReader()
    step = piece or len(data) or 1
    records: list[Record] = []
    for start in range(0, len(data), step):
        records += reader.feed(data[start : start + step])
    reader.close()
    return records
