"""What goes over of a monitor's connected clients, beside their descriptors: the section `monitor/NAME`."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, final

import attrs

from vmm.errors import StateRejected
from vmm.hw.state import Integer, Items, Octets, Schema
from vmm.monitor.belongings import SessionState
from vmm.monitor.json_stream import Fault, Message, StreamState
from vmm.monitor.json_text import Malformed, encode, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.monitor.belongings import Belongings

MOST_SESSIONS: Final = 512
"""Of one monitor."""

MOST_BYTES: Final = 8 << 20
"""Which clients of one monitor together may have unparsed, waiting and unsent, for them to be taken along."""

_SECTION: Final = 16 << 20
_MOST_NAMES: Final = 2048
_MOST_NAME: Final = 4096

Bytes = Annotated[bytes, Octets(_SECTION)]
"""As much as a section may have in all: what the pause itself adds goes along with what was there before."""

Serial = Annotated[int, Integer(1, 0xFFFF_FFFF)]
Balance = Annotated[int, Integer(-(1 << 31), (1 << 31) - 1)]


class Skipping(enum.Enum):
    """What a stream of requests is passing over, after a fault in it."""

    NO = "no"
    LINE = "line"
    BALANCE = "balance"
    BLANK = "blank"


class Quote(enum.Enum):
    """In which quotes it is."""

    NONE = 0
    DOUBLE = 0x22
    SINGLE = 0x27


@final
@attrs.frozen(kw_only=True)
class NamedState:
    """A descriptor that a client has named by `getfd`."""

    name: Annotated[bytes, Octets(_MOST_NAME)]
    serial: Serial


@final
@attrs.frozen(kw_only=True)
class ClientState:
    """One client. Its socket and its descriptors travel as `session-NUMBER` and `session-NUMBER.fd-SERIAL`."""

    number: Serial
    negotiated: bool
    oob: bool
    unparsed: Bytes
    skipping: Skipping
    quote: Quote
    braces: Balance
    brackets: Balance
    waiting: Bytes
    """The requests that were read and not begun: a JSON array of {"message": VALUE} and {"fault": SENTENCE}."""
    unsent: Bytes
    named: Annotated[tuple[NamedState, ...], Items(_MOST_NAMES)]
    unclaimed: Annotated[tuple[Serial, ...], Items(16)]

    @property
    def socket(self) -> str:
        """The last part of its descriptor's name."""
        return f"session-{self.number}"

    @property
    def size(self) -> int:
        """In bytes, nearly all of it."""
        return len(self.unparsed) + len(self.waiting) + len(self.unsent)

    @property
    def descriptors(self) -> list[str]:
        """The last parts of the names of all its descriptors."""
        serials = (*(named.serial for named in self.named), *self.unclaimed)
        return [self.socket, *(f"{self.socket}.fd-{serial}" for serial in serials)]

    def faults(self) -> list[str]:
        """Say what of it, field by field as it should be, does not go together."""
        found = []
        if self.oob and not self.negotiated:
            found.append(f"{self.socket} has oob, and has negotiated nothing")
        if len({item.name for item in self.named}) < len(self.named):
            found.append(f"{self.socket} has two descriptors of one name")
        for item in self.named:
            try:
                item.name.decode()
            except UnicodeDecodeError:
                found.append(f"{self.socket} has a descriptor whose name {item.name[:40]!r} is no UTF-8")
        return found

    def to_session(self, where: str) -> SessionState:
        """Return what a session goes on with. Raises `StateRejected`."""
        stream = StreamState(
            unparsed=self.unparsed,
            skipping=self.skipping.value,
            quote=self.quote.value,
            braces=self.braces,
            brackets=self.brackets,
        )
        return SessionState(
            negotiated=self.negotiated,
            oob=self.oob,
            stream=stream,
            waiting=self._requests(where),
            unsent=self.unsent,
        )

    def _requests(self, where: str) -> tuple[Message | Fault, ...]:
        try:
            items = parse(self.waiting)
        except Malformed as error:
            raise StateRejected(section=where, faults=(f"{self.socket}.waiting: {error.reason}",)) from error
        found: list[Message | Fault] = []
        for item in items if isinstance(items, list) else [None]:
            match item:
                case {"message": value, **rest} if not rest:
                    found.append(Message(value))
                case {"fault": str() as reason, **rest} if not rest:
                    found.append(Fault(reason))
                case _:
                    fault = f"{self.socket}.waiting is no array of messages and faults"
                    raise StateRejected(section=where, faults=(fault,))
        return tuple(found)


@final
@attrs.frozen(kw_only=True)
class MonitorState:
    """A monitor's clients."""

    SCHEMA: ClassVar[Schema] = Schema("monitor", version=1, accepts=1)

    grant: Annotated[bytes, Octets(64)]
    """Name of what they may be lent: on a monitor that would lend another, they are not taken in."""
    sessions: Annotated[tuple[ClientState, ...], Items(MOST_SESSIONS)]


def client_state(number: int, state: SessionState, belongings: Belongings) -> ClientState:
    """Put into words what a session has saved, and what descriptors its client has."""
    words = [{"message": item.value} if isinstance(item, Message) else {"fault": item.reason} for item in state.waiting]
    return ClientState(
        number=number,
        negotiated=state.negotiated,
        oob=state.oob,
        unparsed=state.stream.unparsed,
        skipping=Skipping(state.stream.skipping),
        quote=Quote(state.stream.quote),
        braces=state.stream.braces,
        brackets=state.stream.brackets,
        waiting=encode(words).encode(),
        unsent=state.unsent,
        named=tuple(NamedState(name=name.encode(), serial=serial) for name, serial in belongings.names.items()),
        unclaimed=belongings.unclaimed,
    )


def too_much(clients: Sequence[ClientState]) -> str:
    """Say what clients of one monitor have that is more than goes along; empty if nothing is."""
    names = [item.name for client in clients for item in client.named]
    longest = max((len(name) for name in names), default=0)
    for size, most, what in (
        (len(clients), MOST_SESSIONS, "clients"),
        (sum(client.size for client in clients), MOST_BYTES, "bytes that were not read, by it or by its clients"),
        (len(names), _MOST_NAMES, "descriptors"),
        (longest, _MOST_NAME, "bytes in the name of a descriptor"),
    ):
        if size > most:
            return f"{size} {what}, of which {most}"
    return ""
