"""What takes hostile input: each target says whether it was taken or refused, and lets nothing else pass."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Self

import trio

from tests.fuzz.mutation import repaired
from vmm.cli_stream import describe, differences, to_json
from vmm.cpr.channel import CprChannel
from vmm.errors import CprError, HostFileRefused, MalformedRequest, StateRejected, StreamCorrupt
from vmm.hostio import create_ram
from vmm.hw.codec import Codecs
from vmm.kvm.memory import GuestMemory
from vmm.migration.connection import Connection
from vmm.migration.inflow import Inflow
from vmm.migration.ram import RamWriter
from vmm.migration.ram_records import RamContent, RamExtents
from vmm.migration.stream import StreamReader
from vmm.migration.stream_file import read_stream_file
from vmm.migration.stream_records import Section
from vmm.monitor.json_stream import Fault, JsonStream, Limits, Message
from vmm.monitor.requests import read_request
from vmm.phases.board import STATES

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from types import TracebackType

    from vmm.migration.stream_records import Record

CORPUS: Final = Path(__file__).parent / "corpus"
SLOW: Final = 5.0
"""Seconds in which any input must have been dealt with, on the slowest of hosts."""


def corpus_of(target: str) -> list[bytes]:
    """Return the inputs that a target's are made of."""
    found = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
    assert found, f"no corpus for {target}"
    return found


class TooSlow(Exception):
    """An input has taken too long."""


class Target:
    """Counts, and keeps the time."""

    refusals: ClassVar[tuple[type[Exception], ...]] = ()
    """What an input may be refused by."""

    def __init__(self) -> None:
        self.taken = 0
        self.refused = 0
        self.stack: Final = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stack.close()

    def take(self, data: bytes, pieces: Sequence[bytes]) -> None:
        """Deal with one input, whole in `data`, and as it comes in `pieces`."""
        with in_time():
            try:
                self.deal_with(data, pieces)
            except self.refusals:
                self.refused += 1
            else:
                self.taken += 1

    def repair(self, data: bytes) -> bytes:
        """Make the checksums in `data` right, so that what is behind them is reached."""
        return repaired(data)

    def deal_with(self, data: bytes, pieces: Sequence[bytes]) -> None:
        """Raise one of `refusals`, or nothing."""
        raise NotImplementedError


@contextlib.contextmanager
def in_time() -> Generator[None, None, None]:
    """Raise `TooSlow` out of what takes longer than it may."""

    def ring(_number: int, _frame: object) -> None:
        raise TooSlow(f"an input took more than {SLOW:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SLOW)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class StreamHeader(Target):
    """The head of a state stream, and its frame: no machine is needed to read them."""

    refusals = (StreamCorrupt,)

    def deal_with(self, data: bytes, pieces: Sequence[bytes]) -> None:
        """Read it in pieces."""
        reader = StreamReader()
        for piece in pieces:
            reader.feed(piece)
            while reader.content:
                if not reader.take_content():
                    break
                reader.feed(b"")
        reader.close()


class DeviceSections(Target):
    """The sections of the board's devices: read from a stream, then checked against what the devices declare."""

    refusals = (StreamCorrupt, StateRejected)

    def __init__(self) -> None:
        super().__init__()
        self._codecs: Final = Codecs()
        self._kinds: Final = {kind.SCHEMA.name: kind for kind in STATES}

    def deal_with(self, data: bytes, pieces: Sequence[bytes]) -> None:
        """Read it, and check each section that a device has."""
        reader = StreamReader()
        records = [record for piece in pieces for record in reader.feed(piece)]
        for record in records:
            if isinstance(record, Section) and record.name in self._kinds:
                kind = self._kinds[record.name]
                state = self._codecs.of(kind).load(dict(record.state), record.version, record.name)
                # What was accepted is a state: it can be written, and is read again as the same.
                again = self._codecs.of(kind).load(self._codecs.of(kind).dump(state))
                assert again == state
        reader.close()


RAM: Final = 1 << 20
"""Bytes of the machine that the RAM of a stream is for."""


class RamPart(Target):
    """Extents, content and pages of RAM, as they are put into a guest's memory."""

    refusals = (StreamCorrupt, HostFileRefused)

    def __init__(self) -> None:
        super().__init__()
        self._memory = self.stack.enter_context(closing(GuestMemory.from_memfd(create_ram(RAM, "fuzz"), RAM)))
        self._fd = os.memfd_create("stream", os.MFD_CLOEXEC)
        self.stack.callback(os.close, self._fd)

    def deal_with(self, data: bytes, pieces: Sequence[bytes]) -> None:
        """Load it as a file."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)
        trio.run(self._load)
        # What is taken in is whole; so whoever shows it finds nothing wrong with it either.
        os.lseek(self._fd, 0, os.SEEK_SET)
        read_stream_file(self._fd)

    async def _load(self) -> None:
        file = os.dup(self._fd)
        os.lseek(file, 0, os.SEEK_SET)
        writer = RamWriter(self._memory, self._memory)  # type: ignore[arg-type]  # a token would lead to just this

        def take(record: Record) -> bool:
            if isinstance(record, RamExtents):
                writer.list_extents(record)
            elif isinstance(record, RamContent):
                writer.store(record)
            return False

        with closing(Inflow(Connection(file))) as flow:
            await flow.read(take, writer)
        writer.require_complete()


class SavedFile(Target):
    """A file in which a guest was saved, its RAM at fixed places or in the stream, as it is shown to people."""

    refusals = (StreamCorrupt, HostFileRefused)

    def __init__(self) -> None:
        super().__init__()
        self._fd = os.memfd_create("file", os.MFD_CLOEXEC)
        self.stack.callback(os.close, self._fd)

    def deal_with(self, data: bytes, pieces: Sequence[bytes]) -> None:
        """Show it."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        found = read_stream_file(self._fd)
        assert list(describe(found))
        json.dumps(to_json(found))
        assert not list(differences(found, found))


class CprMessages(Target):
    """What comes on a CPR channel, before and after its hello."""

    refusals = (CprError,)

    def deal_with(self, data: bytes, pieces: Sequence[bytes]) -> None:
        """Receive until it ends, which it does by an error."""
        trio.run(self._receive, pieces)

    async def _receive(self, pieces: Sequence[bytes]) -> None:
        ours, theirs = socket.socketpair()
        with (
            closing(theirs),
            closing(CprChannel(trio.socket.from_stdlib_socket(ours), side="destination", peer="source")) as channel,
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_send, theirs, pieces)
                error: CprError | None = None
                try:
                    while True:
                        message = await channel.receive("hello", "machine", "ready", "paused", "loaded", "running")
                        message.close()
                except CprError as found:
                    error = found
                nursery.cancel_scope.cancel()
        raise error


async def _send(sock: socket.socket, pieces: Sequence[bytes]) -> None:
    sock.setblocking(False)
    other = trio.socket.from_stdlib_socket(sock.dup())
    with contextlib.suppress(OSError), other:
        for piece in pieces:
            left = memoryview(piece)
            while left:
                left = left[await other.send(left) :]
        other.shutdown(socket.SHUT_WR)
        await trio.sleep_forever()


class QmpRequests(Target):
    """A client's bytes: requests and faults come out, the same ones whatever the pieces are."""

    refusals = (MalformedRequest,)
    _LIMITS: ClassVar = Limits(size=1 << 16, tokens=1 << 12, depth=64)

    def deal_with(self, data: bytes, pieces: Sequence[bytes]) -> None:
        """Find the requests, twice."""
        at_once = self._found([data])
        in_pieces = self._found(pieces)
        assert at_once == in_pieces, f"{at_once} is found at once, {in_pieces} in pieces"
        for item in at_once:
            if isinstance(item, Message):
                read_request(item.value, oob=True)
            else:
                assert item.reason.startswith("Malformed JSON")

    def _found(self, pieces: Sequence[bytes]) -> list[Message | Fault]:
        stream = JsonStream(self._LIMITS)
        return [item for piece in pieces for item in stream.feed(piece)]


TARGETS: Final[dict[str, Callable[[], Target]]] = {
    "stream-header": StreamHeader,
    "device-section": DeviceSections,
    "ram": RamPart,
    "saved-file": SavedFile,
    "cpr-channel": CprMessages,
    "qmp": QmpRequests,
}
