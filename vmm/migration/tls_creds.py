"""Certificates and keys for TLS: the back end of a `tls-creds-x509` object.

All is read when the object is made, and OpenSSL has it from then on. With `sanity-check` the own certificate is tried
at once, in a handshake in memory with itself: whether the CA at hand has signed it, for this purpose, and for today.

Source: QEMU docs/system/tls.rst (the files of a directory), crypto/tlscredsx509.c.
"""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING, Final, Literal, final

import attrs

from vmm.backends.held import Held
from vmm.errors import OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping

Endpoint = Literal["client", "server"]

CA_CERT: Final = "ca-cert.pem"
CA_CRL: Final = "ca-crl.pem"
_FILE_LIMIT: Final = 1 << 20  # bytes of one file


@final
@attrs.frozen
class TlsFiles:
    """The files of one object, opened: descriptors, which stay the caller's."""

    folder: str
    ca: int
    cert: int | None = None
    key: int | None = None
    crl: int | None = None


@final
class TlsCredentials(Held):
    """What one side of a TLS connection has, and what it wants of the other."""

    def __init__(self, name: str, endpoint: Endpoint, context: ssl.SSLContext, *, verify_peer: bool) -> None:
        self.name = name
        self.endpoint = endpoint
        self.context = context
        self.verify_peer = verify_peer

    def close(self) -> None:
        """Do nothing: nothing is open."""


def load_credentials(
    name: str, endpoint: Endpoint, files: TlsFiles, *, verify_peer: bool, sanity_check: bool
) -> TlsCredentials:
    """Read the files of a `tls-creds-x509` object.

    Args:
        endpoint: what this side will be: the client is the source of a migration, the server its destination.
        verify_peer: of a client, whether the server must have a certificate of the CA, with the name that was connected
            to; of a server, whether clients must have a certificate of the CA.
        sanity_check: whether the own certificate is tried.

    Raises:
        OptionInvalid: a file holds something else than it should.
    """
    context = _context(endpoint, verify=verify_peer)
    _load_ca(context, name, files)
    if files.cert is not None and files.key is not None:
        _load_own(context, name, endpoint, files)
    if sanity_check:
        _check_ca(context, name, files)
        if files.cert is not None:
            _try_own(name, endpoint, files)
    return TlsCredentials(name, endpoint, context, verify_peer=verify_peer)


def _context(endpoint: Endpoint, *, verify: bool, hostname: bool = True) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if endpoint == "client" else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if endpoint == "client":
        context.check_hostname = verify and hostname
    else:
        context.num_tickets = 0  # no connection is ever resumed
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    return context


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _invalid(name: str, files: TlsFiles, file: str, wanted: str, error: Exception) -> OptionInvalid:
    reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else str(error)
    return OptionInvalid(
        option=f"tls-creds-x509 {name}: {file}",
        value=os.path.join(files.folder, file),
        wanted=f"{wanted} ({reason.lower().replace('_', ' ')})",
    )


def _load_ca(context: ssl.SSLContext, name: str, files: TlsFiles) -> None:
    try:
        context.load_verify_locations(cadata=os.pread(files.ca, _FILE_LIMIT, 0).decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise _invalid(name, files, CA_CERT, "a certificate of a CA, in PEM", error) from error
    if files.crl is None:
        return
    try:
        context.load_verify_locations(cafile=_path(files.crl))
    except ssl.SSLError as error:
        raise _invalid(name, files, CA_CRL, "a list of revoked certificates, in PEM", error) from error
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load_own(context: ssl.SSLContext, name: str, endpoint: Endpoint, files: TlsFiles) -> None:
    assert files.cert is not None
    assert files.key is not None
    try:
        # The password is asked for where the key has one. Nobody is here to type it.
        context.load_cert_chain(_path(files.cert), _path(files.key), password="")
    except (ssl.SSLError, ValueError) as error:
        wanted = f"a certificate in PEM, to the key in {endpoint}-key.pem, which has no passphrase"
        raise _invalid(name, files, f"{endpoint}-cert.pem", wanted, error) from error


def _check_ca(context: ssl.SSLContext, name: str, files: TlsFiles) -> None:
    if not context.get_ca_certs():
        error = ValueError("it is of no CA")
        raise _invalid(name, files, CA_CERT, "a certificate of a CA", error)


def _try_own(name: str, endpoint: Endpoint, files: TlsFiles) -> None:
    """Shake hands with itself, so that OpenSSL checks the certificate as the peer will."""
    server, client = _context("server", verify=endpoint == "client"), _context("client", verify=endpoint == "server")
    client.check_hostname = False
    for context in (server, client):
        _load_ca(context, name, files)
        _load_own(context, name, endpoint, files)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True))
    try:
        for end in ends * 3:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLCertVerificationError as error:
        wanted = f"a certificate that {CA_CERT} beside it accepts of a {endpoint}"
        reason = ValueError(error.verify_message)
        raise _invalid(name, files, f"{endpoint}-cert.pem", wanted, reason) from error


def wanted_files(endpoint: Endpoint) -> Mapping[str, str]:
    """Return the file names of an object, by the member of `TlsFiles`."""
    return {"ca": CA_CERT, "cert": f"{endpoint}-cert.pem", "key": f"{endpoint}-key.pem", "crl": CA_CRL}
