"""Credentials for TLS: objects of this process, and which of them a migration uses."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm import hostio
from vmm.errors import BackendNotFound, HostFileRefused, MigrationRefused
from vmm.migration.address import InetAddress, UnixAddress, VsockAddress
from vmm.migration.tls import secure
from vmm.migration.tls_creds import TlsFiles, load_credentials, wanted_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.capabilities import MayAdoptDescriptor, MayOpenHostFile
    from vmm.migration.address import ChannelAddress
    from vmm.migration.connection import Connection
    from vmm.migration.tls_creds import Endpoint, TlsCredentials
    from vmm.phases.commands_objects import TlsCredsX509
    from vmm.phases.stores import BootStores

_NO_SOCKET: Final = "{command}: TLS is for sockets, and this channel is {what}; unset migration parameter tls-creds"
_SIDES: Final[Mapping[Endpoint, str]] = {"client": "source", "server": "destination"}


def open_credentials(host: MayOpenHostFile | MayAdoptDescriptor, args: TlsCredsX509) -> TlsCredentials:
    """Read the files of the object.

    Raises:
        HostFileRefused: one that is needed is not there, or others than its owner have access to the key.
        OptionInvalid: one holds something else than it should.
    """
    with ExitStack() as stack:
        found: dict[str, int] = {}
        for member, file in wanted_files(args.endpoint).items():
            path = os.path.join(args.dir, file)
            if _may_be_missing(args, member) and not os.path.lexists(path):
                continue
            opener = hostio.open_secret_file if member == "key" else hostio.open_input_file
            found[member] = host.obtain(f"object/{args.id}/{file}", partial(opener, path))
            stack.callback(os.close, found[member])
        alone = {"cert", "key"} & found.keys()
        if len(alone) == 1:
            missing = os.path.join(args.dir, wanted_files(args.endpoint)[({"cert", "key"} - alone).pop()])
            raise HostFileRefused(action="read", path=missing, reason=f"it is not there, and its {alone.pop()} is")
        files = TlsFiles(args.dir, **found)
        return load_credentials(
            args.id, args.endpoint, files, verify_peer=args.verify_peer, sanity_check=args.sanity_check
        )


def _may_be_missing(args: TlsCredsX509, member: str) -> bool:
    return member == "crl" or (args.endpoint == "client" and member in ("cert", "key"))


@final
@attrs.frozen
class Tls:
    """What a channel is made secure with."""

    creds: TlsCredentials
    hostname: str | None = None
    """Of a client, what the server's certificate must be for; None where it is not looked at."""

    async def secure(self, connection: Connection, peer: str, *, within: float) -> Connection:
        """Shake hands over `connection`, which is taken over, and return what is secure. As `vmm.migration.tls.secure`.

        Raises:
            TlsFailed: there is no TLS with this peer.
            MigrationRefused: it is no socket.
        """
        if not connection.two_way:
            connection.close()
            command = "migrate" if peer == "destination" else "migrate-incoming"
            raise MigrationRefused(reason=_NO_SOCKET.format(command=command, what="a pipe or a file"))
        return await secure(connection.release(), self.creds, peer, hostname=self.hostname, within=within)


def credentials(stores: BootStores, parameters: Mapping[str, Any], endpoint: Endpoint) -> TlsCredentials | None:
    """Return those that parameter `tls-creds` names; None without it.

    Raises:
        BackendNotFound: there is no such object.
        MigrationRefused: it is for the other side.
    """
    name = parameters["tls-creds"]
    if not name:
        return None
    if name not in stores.tls:
        known = ", ".join(sorted(stores.tls)) or "none"
        raise BackendNotFound(what="TLS credentials", name=name, known=f"; there are: {known}")
    creds = stores.tls[name][0]
    if creds.endpoint != endpoint:
        raise MigrationRefused(
            reason=f"Migration parameter tls-creds: {name!r} has endpoint={creds.endpoint}, and the {_SIDES[endpoint]} "
            f"of a migration is the {endpoint}; use an object with endpoint={endpoint}"
        )
    return creds


def of_source(stores: BootStores, parameters: Mapping[str, Any], address: ChannelAddress) -> Tls | None:
    """Return what a source's channel to `address` is made secure with; None where it is not.

    Raises:
        BackendNotFound, MigrationRefused: as `credentials`; or it cannot be made secure.
    """
    creds = credentials(stores, parameters, "client")
    if creds is None:
        return None
    require_peer(address, "migrate")
    if not creds.verify_peer:
        return Tls(creds)
    hostname = parameters["tls-hostname"]
    if not hostname and isinstance(address, InetAddress):
        hostname = address.host or "localhost"
    if not hostname:
        raise MigrationRefused(
            reason="migrate: such an address has no host's name that the destination's certificate could be for; set "
            "migration parameter tls-hostname"
        )
    return Tls(creds, hostname)


def of_destination(stores: BootStores, parameters: Mapping[str, Any]) -> Tls | None:
    """Return what a destination's channels are made secure with; None where they are not. Raises as `credentials`."""
    creds = credentials(stores, parameters, "server")
    return Tls(creds) if creds is not None else None


def require_peer(address: ChannelAddress, command: str) -> None:
    """Raise `MigrationRefused` if nobody is behind `address` to shake hands with."""
    if isinstance(address, InetAddress | UnixAddress | VsockAddress):
        return
    what = getattr(address, "what", "")
    if what:
        raise MigrationRefused(reason=_NO_SOCKET.format(command=command, what=what))
