"""Who may open a websocket: the HTTP request that asks for one, judged before any of it reaches the websocket library.

Every process of this machine can connect to a loopback port, and so can every web page that a user of it looks at, in
that user's name. Hence, in this order:

- `Host` must name the very port: a page that reached it by a name of its own (DNS rebinding) is refused;
- `Origin`, which browsers send and pages can't forge, must be absent or that of the port itself;
- with a token, the client must know it: ``Authorization: Bearer TOKEN``, or, since a page can't set headers, the
  subprotocol ``bearer.TOKEN`` beside ``qmp``.

The library is then given a request written anew from what was judged, so the two can't read it differently.

Source: RFC 9112 (HTTP/1.1), RFC 6455 section 4.2.1 (the opening handshake), RFC 6750 section 2.1 (bearer tokens).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from typing import TYPE_CHECKING, ClassVar, Final, final

import attrs
import h11
import trio

from vmm.errors import OptionInvalid, VmmError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SUBPROTOCOL: Final = "qmp"
BEARER: Final = "bearer."
"""Begins the subprotocol that is no protocol but the client's token."""

MAX_HEAD: Final = 16 << 10
"""Bytes of a request, with the cookies that a browser adds of other ports' pages."""

_TOKEN: Final = re.compile(rb"[A-Za-z0-9._~+-]{16,256}")
"""What may stand both in a header (RFC 6750) and in a subprotocol (a token of RFC 9110)."""

_VERSION: Final = "13"
_REASONS: Final[Mapping[int, str]] = {
    400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 408: "Request Timeout",
    426: "Upgrade Required", 503: "Service Unavailable",
}  # fmt: skip


@final
class UpgradeRefused(VmmError):
    """A client that gets no websocket. `reason` is the whole sentence, which the client is told."""

    text: ClassVar[str] = "{reason}"
    status: int
    reason: str

    def response(self) -> bytes:
        """Return the HTTP response."""
        body = f"{self.reason}\n".encode()
        extra = {401: "WWW-Authenticate: Bearer\r\n", 426: "Upgrade: websocket\r\n"}.get(self.status, "")
        head = (
            f"HTTP/1.1 {self.status} {_REASONS[self.status]}\r\n"
            "Content-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"
            f"{extra}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + body


def check_token(content: bytes, path: str) -> bytes:
    """Return the token in the `content` of the file at `path`: without the white space around it.

    Raises:
        OptionInvalid: it is no token. The text does not say what it is.
    """
    token = content.strip()
    if not _TOKEN.fullmatch(token):
        wanted = "a file with a token of 16 to 256 letters, digits and characters -._~+ and nothing else"
        raise OptionInvalid(option="token-file", value=path, wanted=wanted)
    return token


@final
@attrs.frozen
class Upgrade:
    """A request that was admitted."""

    request: bytes
    """For the websocket library."""
    subprotocol: str | None
    """To be selected."""


@final
class Headers:
    """The fields of one request, by lower-case name."""

    def __init__(self, fields: Iterable[tuple[bytes, bytes]]) -> None:
        self._fields: dict[str, list[str]] = {}
        for name, value in fields:
            # Of what is not ASCII nothing is admitted where it counts; elsewhere (cookies) it does not matter.
            self._fields.setdefault(name.decode("ascii").lower(), []).append(value.decode("ascii", "replace"))

    def one(self, name: str) -> str | None:
        """Return the field's value, None if it is absent. Raises `UpgradeRefused` if there are several."""
        values = self._fields.get(name, [])
        if len(values) > 1:
            raise UpgradeRefused(status=400, reason=f"The request has {len(values)} fields {name}; one is the most")
        return values[0] if values else None

    def listed(self, name: str) -> list[str]:
        """Return the elements of a field that is a list, over all its lines."""
        return [part for value in self._fields.get(name, []) for part in (p.strip() for p in value.split(",")) if part]


@final
@attrs.frozen
class Door:
    """The port of one monitor, and who may enter there."""

    host: str
    """127.0.0.1 or ::1."""
    port: int
    token: bytes | None = attrs.field(default=None, repr=False)

    @property
    def authority(self) -> str:
        """Address and port as a URL has them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def judge(self, request: h11.Request) -> Upgrade:
        """Admit `request`. Raises `UpgradeRefused`."""
        headers = Headers(request.headers)
        host = self._check_host(headers)
        self._check_origin(headers, host)
        offered = headers.listed("sec-websocket-protocol")
        self._check_token(headers, offered)
        if request.target != b"/":
            shown = request.target[:80].decode("ascii", "replace")
            raise UpgradeRefused(status=404, reason=f"There is nothing at {shown}; the monitor is at /")
        key = _check_upgrade(request, headers)
        if offered and SUBPROTOCOL not in offered:
            raise UpgradeRefused(status=400, reason="None of the subprotocols offered is 'qmp', the one spoken here")
        return self._admitted(key, SUBPROTOCOL if offered else None)

    def _check_host(self, headers: Headers) -> str:
        host = (headers.one("host") or "").lower()
        names = [self.authority, f"localhost:{self.port}"]
        if self.port == 80:
            names += [name.removesuffix(":80") for name in names]
        if host not in names:
            reason = f"Host is {_shown(host)}, and this is {names[0]} (or {names[1]})"
            raise UpgradeRefused(status=403, reason=reason)
        return host

    def _check_origin(self, headers: Headers, host: str) -> None:
        origin = headers.one("origin")
        if origin is not None and origin.lower() != f"http://{host}":
            reason = f"Origin is {_shown(origin)}, and only pages of http://{host} may connect"
            raise UpgradeRefused(status=403, reason=reason)

    def _check_token(self, headers: Headers, offered: list[str]) -> None:
        if self.token is None:
            return
        authorization = headers.one("authorization")
        if authorization is not None:
            scheme, _, given = authorization.partition(" ")
            if scheme.lower() != "bearer":
                raise UpgradeRefused(status=401, reason="Authorization must be of the scheme Bearer")
        else:
            tokens = [part for part in offered if part.startswith(BEARER)]
            if len(tokens) != 1:
                how = "'Authorization: Bearer TOKEN', or the subprotocols 'qmp, bearer.TOKEN'"
                raise UpgradeRefused(status=401, reason=f"This monitor asks for a token: send {how}")
            given = tokens[0].removeprefix(BEARER)
        if not hmac.compare_digest(given.strip().encode(), self.token):
            raise UpgradeRefused(status=401, reason="The token is not the one of this monitor")

    def _admitted(self, key: str, subprotocol: str | None) -> Upgrade:
        fields = {
            "Host": self.authority, "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": key,
            "Sec-WebSocket-Version": _VERSION,
        }  # fmt: skip
        if subprotocol is not None:
            fields["Sec-WebSocket-Protocol"] = subprotocol
        lines = ["GET / HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        return Upgrade("\r\n".join(lines).encode(), subprotocol)


def _check_upgrade(request: h11.Request, headers: Headers) -> str:
    """Return the key of a request for a websocket."""
    wants = "websocket" in (part.lower() for part in headers.listed("upgrade"))
    connection = [part.lower() for part in headers.listed("connection")]
    if request.method != b"GET" or not wants or "upgrade" not in connection:
        raise UpgradeRefused(status=426, reason="Only a websocket is here: GET it, with 'Upgrade: websocket'")
    if headers.one("content-length") not in (None, "0") or headers.one("transfer-encoding") is not None:
        raise UpgradeRefused(status=400, reason="A request for a websocket has no content")
    if headers.one("sec-websocket-version") != _VERSION:
        raise UpgradeRefused(status=400, reason=f"Sec-WebSocket-Version must be {_VERSION}")
    key = headers.one("sec-websocket-key") or ""
    try:
        nonce = base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError):
        nonce = b""
    if len(nonce) != 16:
        raise UpgradeRefused(status=400, reason="Sec-WebSocket-Key must be the base64 of 16 bytes")
    return key


def _shown(value: str) -> str:
    return repr(value[:80]) if value else "empty"


async def read_upgrade(stream: trio.abc.ReceiveStream, door: Door) -> Upgrade | None:
    """Read the request of a client and judge it; None if it hung up before it had said all.

    Raises:
        UpgradeRefused: it is refused, or what it sent is no HTTP request.
        trio.BrokenResourceError: the client is gone.
    """
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    try:
        while (event := connection.next_event()) is h11.NEED_DATA:
            data = await stream.receive_some(MAX_HEAD)
            if not data:
                return None
            connection.receive_data(bytes(data))
    except h11.RemoteProtocolError as error:
        raise UpgradeRefused(status=400, reason=f"This is no HTTP request: {error}") from error
    assert isinstance(event, h11.Request), "the first event of a client that did not hang up"
    upgrade = door.judge(event)
    if connection.trailing_data[0]:
        raise UpgradeRefused(status=400, reason="Data came behind the request, before it was answered")
    return upgrade
