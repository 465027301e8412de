"""TLS beside a channel: the engine has one end of a pair of sockets, and a relay between the other one and the network.

So whoever moves the guest knows nothing of TLS. The handshake comes first, with a limit, and is the caller's error if
it fails. What the relay is told later (TLS 1.3 lets a client begin before its certificate has been looked at) it keeps,
and closes the channel: `Connection.blame` says it.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Final, final

import trio

from vmm import host_sockets
from vmm.errors import MigrationPeerGone, OptionInvalid, TlsFailed
from vmm.migration.connection import Connection
from vmm.migration.pump import in_thread
from vmm.migration.silence import silence
from vmm.migration.tls_relay import Closed, Relay
from vmm.migration.words import Word, written

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.errors import VmmError
    from vmm.migration.tls_creds import Endpoint, TlsCredentials

_LINGERING: Final = 10.0
"""Seconds for what is under way to be passed on once the channel is closed."""

_OUTCOMES: Final[Mapping[Endpoint, str]] = {
    "client": "the guest goes on in the source",
    "server": "the guest stays there",
}
"""What the peer's silence leads to."""

_HOSTNAME_MISMATCH: Final = (62, 64)
_EXPIRED: Final = (9, 10)
"""Numbers of verification's results. Source: OpenSSL, x509_vfy.h"""

_NOT_TLS: Final = (
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "HTTPS_PROXY_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
    "BAD_RECORD_TYPE",
)
"""What OpenSSL makes of bytes that are no TLS."""

_REFUSES_OURS: Final = (
    "UNKNOWN_CA",
    "BAD_CERTIFICATE",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_UNKNOWN",
)


async def secure(
    sock: trio.socket.SocketType, creds: TlsCredentials, peer: str, *, hostname: str | None = None, within: float
) -> Connection:
    """Shake hands over `sock`, which is taken over, and return the channel; its attendant is the relay.

    Args:
        peer: what texts call the other side.
        hostname: of a client, the name or address that the server's certificate must have.
        within: seconds for the handshake.

    Raises:
        TlsFailed: there is no TLS with this peer; the socket is closed.
    """
    try:
        attendant = _Attendant(sock, creds, peer, hostname)
        with trio.move_on_after(within) as patience:
            await attendant.shake_hands()
        if patience.cancelled_caught:
            what = f"it did not finish the handshake within {within:g} s"
            raise attendant.failed(what, "set tls-creds there too, or unset it here")
        ours, theirs = host_sockets.connected_pair()
    except BaseException:
        sock.close()
        raise
    for end in (ours, theirs):
        end.setblocking(False)
    attendant.relay.inner = theirs
    return Connection(trio.socket.from_stdlib_socket(ours), attendant=attendant)


@final
class _Attendant:
    """The relay's task."""

    name = "tls relay"

    def __init__(self, sock: trio.socket.SocketType, creds: TlsCredentials, peer: str, hostname: str | None) -> None:
        self._sock = sock
        self._creds = creds
        self._peer = peer
        self._limit = trio.CancelScope()
        self._failure: VmmError | None = None
        server = creds.endpoint == "server"
        to_plain = written(Word("refused", "it takes TLS alone; set migration parameter tls-creds")) if server else b""
        try:
            self.relay = Relay(sock, creds.context, server=server, hostname=hostname, to_plain=to_plain)
        except ValueError as error:  # a name is encoded as for the DNS
            wanted = f"a host's name or address ({error})"
            raise OptionInvalid(option="Migration parameter tls-hostname", value=hostname, wanted=wanted) from error

    async def shake_hands(self) -> None:
        """Do so. Raises `TlsFailed`."""
        try:
            await in_thread(self.relay.shake_hands)
        except Closed as closed:
            raise self._explained(closed) from closed.reason

    async def attend(self) -> None:
        """Pass on what comes, both ways, until both have ended."""
        try:
            with self._limit:
                await in_thread(self.relay.run, trio.CapacityLimiter(1))
        except Closed as closed:
            if isinstance(closed.reason, ssl.SSLError):
                self._failure = self._explained(closed)
            elif what := silence(closed.reason):
                self._failure = MigrationPeerGone(peer=self._peer, what=what, outcome=_OUTCOMES[self._creds.endpoint])
        finally:
            # What makes the engine find an end comes last: then it is known why.
            self.relay.close()
            self._sock.close()

    async def blame(self) -> VmmError | None:
        """Return what TLS has against this peer."""
        await trio.lowlevel.checkpoint()
        return self._failure

    async def finish(self, sock: trio.socket.SocketType, *, sent: bool) -> None:
        """Do nothing: a socket's peer is heard, by words."""

    def end(self, *, gently: bool) -> None:
        """End it, or give it some time, also where the machine ends meanwhile: what was said last says whose it is."""
        self._limit.shield = gently
        self._limit.deadline = trio.current_time() + _LINGERING if gently else -float("inf")

    def failed(self, what: str, instead: str) -> TlsFailed:
        """Return the error."""
        return TlsFailed(peer=self._peer, what=what, instead=instead)

    def _explained(self, closed: Closed) -> TlsFailed:
        error = closed.reason
        if not isinstance(error, ssl.SSLError):
            what = "it hung up in the middle of the handshake"
            return self.failed(what, "its own error says why; one that has no tls-creds does that too")
        if isinstance(error, ssl.SSLCertVerificationError):
            return self._not_accepted(error)
        reason = error.reason or str(error)
        if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
            instead = "put client-cert.pem and client-key.pem where its credentials are, or set verify-peer=off here"
            return self.failed("it sent no certificate", instead)
        if "CERTIFICATE_REQUIRED" in reason or (reason.endswith("HANDSHAKE_FAILURE") and "ALERT" in reason):
            instead = f"put client-cert.pem and client-key.pem into the dir of {self._creds.name!r}"
            return self.failed("it wants a certificate of this side", instead)
        if "ALERT" in reason and reason.partition("ALERT_")[2] in _REFUSES_OURS:
            what = f"it does not accept the certificate of this side ({_words(reason)})"
            instead = f"have {self._creds.endpoint}-cert.pem of {self._creds.name!r} signed by the CA that it knows"
            return self.failed(what, instead)
        if reason in _NOT_TLS:
            return self.failed("it does not speak TLS", "set tls-creds there too, or unset it here")
        return self.failed(f"it broke ({_words(reason)})", "both sides need TLS 1.2 or later, and what they send whole")

    def _not_accepted(self, error: ssl.SSLCertVerificationError) -> TlsFailed:
        code = error.verify_code
        if code in _HOSTNAME_MISMATCH:
            instead = "set tls-hostname to a name that is in it, or connect to one"
        elif code in _EXPIRED:
            instead = "renew it, or set the clock right"
        else:
            instead = f"have it signed by the CA in ca-cert.pem of {self._creds.name!r}"
        return self.failed(f"its certificate is not accepted ({error.verify_message.rstrip('.')})", instead)


def _words(reason: str) -> str:
    return reason.lower().replace("_", " ")
