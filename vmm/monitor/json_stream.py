"""The requests of a client, found in its bytes.

A message ends where its brackets balance, or with its token if it has none; no newline is needed. Most messages are one
JSON object that arrives whole: Python's json finds their end and their value in one go. The rest is scanned token by
token, across as many inputs as it takes, each byte once.

After a fault the stream finds its feet again, with one fault for one bad message:

- wrong syntax: the message is taken to the balance of its brackets, then judged as a whole;
- a byte that can't be in any message (a control character, FE, FF): whatever was under way ends there;
- a character that begins no token, or a limit exceeded: the rest of the message is passed over, to the balance of its
  brackets, to the next control character, FE or FF, or (unless it was a limit) to the end of the line.

Then all is passed over in silence to the next opening bracket or the end of the line.
"""

from __future__ import annotations

import re
from typing import Final, final

import attrs

from vmm.monitor.json_text import Malformed, agrees, decode_prefix, nests_within, parse


@final
@attrs.define
class Message:
    """One JSON value, of any kind."""

    value: object


@final
@attrs.define
class Fault:
    """One bad message. `reason` is the whole sentence."""

    reason: str


@final
@attrs.frozen
class Limits:
    """What one message may take up. The bytes include white space inside the message."""

    size: int = 64 << 20
    tokens: int = 2 << 20
    depth: int = 1024


@final
@attrs.frozen
class StreamState:
    """A stream at rest, for another process to go on with (`JsonStream.save`)."""

    unparsed: bytes = b""
    skipping: str = "no"
    quote: int = 0
    braces: int = 0
    brackets: int = 0


_SPACE: Final = re.compile(rb"[ \t\r\n]++")
_NUMBER: Final = re.compile(rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?")
_DIGITS: Final = re.compile(rb"[-+.0-9eE]++")
_WORD: Final = re.compile(rb"[a-z]++")
_IN_DOUBLE: Final = re.compile(rb'[^"\\\x00-\x1f\xfe\xff]*+(?:\\[\x20-\xfd][^"\\\x00-\x1f\xfe\xff]*+)*+')
_IN_SINGLE: Final = re.compile(rb"[^'\\\x00-\x1f\xfe\xff]*+(?:\\[\x20-\xfd][^'\\\x00-\x1f\xfe\xff]*+)*+")
_BLANK: Final = re.compile(rb"[^\n{\[]++")
_NO_BRACKET: Final = re.compile(rb"[^\x00-\x08\x0b\x0c\x0e-\x1f\n\xfe\xff{}\[\]\"']++")

_DOUBLE: Final = 0x22
_SINGLE: Final = 0x27
_BACKSLASH: Final = 0x5C
_NEWLINE: Final = 0x0A
_RESETS: Final = frozenset((*range(0x20), 0xFE, 0xFF)) - frozenset(b" \t\r\n")


def _run(first: int) -> re.Pattern[bytes] | None:
    """Return what a token that begins with the byte `first` goes on with; None for white space, marks and strays."""
    if first == _DOUBLE:
        return _IN_DOUBLE
    if first == _SINGLE:
        return _IN_SINGLE
    if first in b"-0123456789":
        return _DIGITS
    return _WORD if first in b"abcdefghijklmnopqrstuvwxyz" else None


@final
class JsonStream:
    """A parser of one client's input. Feed it in order; it keeps what is incomplete."""

    def __init__(self, limits: Limits | None = None, state: StreamState | None = None) -> None:
        state = state or StreamState()
        self._limits: Final = limits or Limits()
        self._buffer = bytearray()  # the message under way, or what is not scanned yet
        self._position = 0  # what lies before it in the buffer is scanned
        self._token = -1  # where in the buffer the token under way began, or -1
        self._tokens = 0
        self._braces = state.braces
        self._brackets = state.brackets
        self._quote = state.quote  # of the string that is passed over, or 0
        self._skipping = state.skipping  # no, blank, line or balance
        self._out: list[Message | Fault] = []
        if state.unparsed:
            self._buffer += state.unparsed
            self._scan()

    def save(self) -> StreamState:
        """Return what is under way, so that `JsonStream(limits, state)` goes on with it."""
        unparsed = bytes(self._buffer)
        if self._skipping == "no":
            return StreamState(unparsed)  # which is scanned again, so the brackets are counted again
        return StreamState(unparsed, self._skipping, self._quote, self._braces, self._brackets)

    def feed(self, data: bytes) -> list[Message | Fault]:
        """Take the next input and return what it completes, in order."""
        if not self._buffer and self._skipping == "no":
            data = self._feed_whole(data)
        if data:
            self._buffer += data
            self._scan()
        out, self._out = self._out, []
        return out

    def feed_frame(self, data: bytes) -> Message | Fault:
        """Take an input that is one message, as the frames of a websocket are; anything else is one fault.

        The next input begins anew, whatever this one was.
        """
        out = self.feed(data)
        if self._skipping == "no" and self._token >= 0 and self._buffer[self._token] not in (_DOUBLE, _SINGLE):
            out += self.feed(b"\n")  # a number or a word, which the end of the frame ends
        if self._skipping == "no" and self._buffer:
            out.append(Fault("Malformed JSON: the frame ends inside the message"))
        self._begin_anew("no", len(self._buffer))
        if len(out) == 1 or (out and isinstance(out[0], Fault)):
            return out[0]
        return Fault(f"A frame must hold one message, and this one holds {'more' if out else 'none'}")

    def _feed_whole(self, data: bytes) -> bytes:
        """Take off the whole objects at the front of `data`; return the rest."""
        limits = self._limits
        # Each token takes at least a byte, so what is this small keeps the limits.
        if len(data) > min(limits.size, limits.tokens) or not agrees(data):
            return data
        deep = data.count(b"{") + data.count(b"[") > limits.depth
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return data
        position = 0
        while True:
            first = text[position : position + 1]
            if first == "{":
                found = decode_prefix(text, position)
                if found is None or (deep and not nests_within(found[0], limits.depth)):
                    break
                value, position = found
                self._out.append(Message(value))
            elif first and first in " \t\r\n":
                position += 1
            else:
                break
        return text[position:].encode() if position else data

    # --- token by token -----------------------------------------------------------------------------------

    def _scan(self) -> None:
        buffer = self._buffer
        while self._position < len(buffer):
            if self._skipping != "no":
                if not self._skip():
                    break
            elif self._token < 0:
                self._begin()
            elif not self._go_on():
                break
        if self._skipping == "no" and len(buffer) > self._limits.size:
            self._exceeded("size", self._limits.size, "bytes")

    def _begin(self) -> None:
        """Begin a token, or take white space or a mark."""
        buffer = self._buffer
        byte = buffer[self._position]
        if _run(byte):
            self._token = self._position
            self._position += 1
            if self._position == len(buffer):
                return
            self._go_on()
        elif byte in b"{}[]:,":
            self._braces += (byte == 0x7B) - (byte == 0x7D)
            self._brackets += (byte == 0x5B) - (byte == 0x5D)
            self._position += 1
            self._end_token()
        elif space := _SPACE.match(buffer, self._position):
            self._position = space.end()
            if not self._tokens:  # between messages
                self._drop(self._position)
        else:
            self._stray(self._position, byte in _RESETS)

    def _go_on(self) -> bool:
        """Go on with the token under way, as far as the buffer reaches; tell whether that was its end."""
        buffer = self._buffer
        first = buffer[self._token]
        run = _run(first)
        assert run, "only what has a run is begun"
        if more := run.match(buffer, self._position):
            self._position = more.end()
        if self._position == len(buffer):
            return False
        byte = buffer[self._position]
        if run is _IN_DOUBLE or run is _IN_SINGLE:
            if byte == first:
                self._position += 1
                self._end_token()
            elif byte == _BACKSLASH and self._position + 1 == len(buffer):
                return False
            else:  # a control character, FE or FF, perhaps behind a backslash
                self._stray(self._position + (byte == _BACKSLASH), True)
        elif run is _DIGITS and not _NUMBER.fullmatch(buffer, self._token, self._position):
            self._stray(self._token, False)
        else:
            self._end_token()
        return True

    def _end_token(self) -> None:
        """Count the token that ends at the position, and the message if it ends there too."""
        limits = self._limits
        self._token = -1
        self._tokens += 1
        if self._position > limits.size:
            self._exceeded("size", limits.size, "bytes")
        elif self._tokens > limits.tokens:
            self._exceeded("token count", limits.tokens, "tokens")
        elif self._braces + self._brackets > limits.depth:
            self._exceeded("nesting depth", limits.depth, "open brackets")
        elif self._balanced():
            message = self._buffer[: self._position]
            try:
                self._out.append(Message(parse(message)))
                self._begin_anew("no", self._position)
            except Malformed as error:
                self._out.append(Fault(error.reason))
                self._begin_anew("blank", self._position)

    def _balanced(self) -> bool:
        return min(self._braces, self._brackets) < 0 or self._braces == self._brackets == 0

    def _drop(self, count: int) -> None:
        del self._buffer[:count]
        self._position = 0

    def _begin_anew(self, skipping: str, count: int) -> None:
        """Forget the message under way, and the first `count` bytes of the buffer."""
        self._drop(count)
        self._token = -1
        self._tokens = self._braces = self._brackets = self._quote = 0
        self._skipping = skipping

    # --- after a fault ------------------------------------------------------------------------------------

    def _stray(self, at: int, resets: bool) -> None:
        """Report the byte `at` in the buffer, which no token can have there."""
        bad = bytes(self._buffer[at : at + 1])
        where = "stands raw in a string" if self._token >= 0 and resets else "begins no JSON value"
        if self._token >= 0 and not resets:
            bad = bytes(self._buffer[self._token : self._position])[:40]
            where = "is no JSON number"
        shown = repr(bad)[1:] if resets else repr(bad.decode(errors="replace"))
        self._out.append(Fault(f"Malformed JSON at byte {at} of the message: {shown} {where}"))
        if resets:
            self._begin_anew("blank", at + 1)
        else:
            self._pass_over("line")

    def _exceeded(self, what: str, limit: int, unit: str) -> None:
        self._out.append(Fault(f"Malformed JSON: the message exceeds the {what} limit of {limit} {unit}"))
        quote = self._buffer[self._token] if self._token >= 0 else 0
        self._pass_over("balance", quote if quote in (_DOUBLE, _SINGLE) else 0)

    def _pass_over(self, how: str, quote: int = 0) -> None:
        braces, brackets = self._braces, self._brackets
        self._begin_anew("blank" if self._balanced() and not quote else how, self._position)
        self._braces, self._brackets, self._quote = braces, brackets, quote

    def _skip(self) -> bool:
        """Pass over a piece of a message that was reported already, and forget it; tell whether there is more to do."""
        buffer = self._buffer
        if self._skipping == "blank":
            blank = _BLANK.match(buffer)
            self._drop(blank.end() if blank else 0)
            if buffer:
                self._begin_anew("no", int(buffer[0] == _NEWLINE))
            return True
        run = _IN_DOUBLE if self._quote == _DOUBLE else _IN_SINGLE if self._quote == _SINGLE else _NO_BRACKET
        if more := run.match(buffer):
            self._drop(more.end())
        if not buffer:
            return False
        byte = buffer[0]
        if byte == _NEWLINE and self._skipping == "line":
            self._begin_anew("no", 1)
        elif byte in _RESETS:
            self._begin_anew("blank", 1)
        elif self._quote:
            if byte == _BACKSLASH and len(buffer) == 1:
                return False  # what it escapes comes with the next input
            if byte == self._quote:
                self._quote = 0
            self._drop(1)
        else:
            if byte in (_DOUBLE, _SINGLE):
                self._quote = byte
            self._braces += (byte == 0x7B) - (byte == 0x7D)
            self._brackets += (byte == 0x5B) - (byte == 0x5D)
            self._drop(1)
        if self._skipping in ("line", "balance") and self._balanced() and not self._quote:
            self._begin_anew("blank", 0)
        return True
