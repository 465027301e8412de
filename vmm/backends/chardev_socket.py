"""A chardev that is one end of a stream socket: of a server, which takes one client after another, or a client.

The sockets are unix or TCP ones. What differs: a TCP peer has no user, and its last word may mean that it has left, or
that it reads on: nothing tells until something is written to it.
"""

from __future__ import annotations

import os
import select
import socket
from typing import TYPE_CHECKING, ClassVar, Final, final

from vmm import host_fds, host_sockets, host_tcp
from vmm.backends.chardev import READ_LIMIT, Chardev
from vmm.backends.chardev_state import BUFFER_LIMIT
from vmm.backends.chardev_watch import poll
from vmm.errors import DescriptorsUnclaimed, HostFileRefused, PeerRefused

if TYPE_CHECKING:
    from vmm.backends.chardev import Complain
    from vmm.backends.chardev_options import ChardevKind

CLIENT: Final = "client-"
"""Clients are numbered, so that a successor can tell from the names that one has left and another has come."""
FIRST_CLIENT: Final = f"{CLIENT}1"
UNIX_CLIENT: Final = "a connected unix socket"
UNIX_LISTENER: Final = "a listening unix socket"
"""In the words of `host_fds.descriptor_kind`."""


@final
class SocketChardev(Chardev):
    """A stream socket. While nobody is connected output is dropped.

    A client that shuts down its sending side is still written to; over TCP until the next one comes, since it may have
    left. When one hangs up, the guest takes what it had sent, however long that lasts. But the next one does not wait
    for the guest: if there is one, at most `BUFFER_LIMIT` bytes are kept for it, and the rest dropped.
    """

    kind: ClassVar[ChardevKind] = "socket"

    def __init__(
        self,
        label: str,
        where: str,
        path: str | None,
        complain: Complain,
        *,
        listener: socket.socket | None = None,
        client: int | None = None,
        serial: int = 1,
        clients_are: tuple[str, ...] = (UNIX_CLIENT,),
        inherited: bool = False,
    ) -> None:
        """Own `listener` (of a server) and `client` (if one is connected), the `serial`th one. They do not block.

        `where` is what texts call it. `path` is the listener's to remove at the end; None if it has none, or was open
        already. A later client's descriptor, from a predecessor, must be one of `clients_are`.
        """
        super().__init__(label, complain, inherited=inherited)
        self._path = path
        self._where = where
        self._listener = listener
        self._client: int | None = None
        self._clients_are: Final = clients_are
        self._serial = serial if client is not None else serial - 1
        self._tcp_ends: tuple[str, str] | None = None
        """Of a client's TCP connection: the own end and the other."""
        self._client_is_silent = False
        self._client_has_left = False
        """It has hung up, and the guest has not taken yet what it had sent."""
        self._cannot_accept = False
        if listener is not None:
            self._watch.add(listener.fileno())
        if client is not None:
            self._take(client)
        if not inherited:
            self._open_output()

    @property
    def filename(self) -> str:
        server = ",server=on" if self._listener is not None else ""
        if self._client is None or self._client_has_left:
            return f"disconnected:{self._where}{server}"
        if self._tcp_ends is not None:
            own, other = self._tcp_ends
            return f"tcp:{own}{server} <-> {other}"
        return f"{self._where}{server}"

    @property
    def is_tcp(self) -> bool:
        """Whether its clients, or its only one, come by TCP."""
        return self._tcp_ends is not None or (self._listener is not None and host_tcp.is_tcp(self._listener))

    @property
    def open_to_others(self) -> str | None:
        """Where other machines can connect to the listener, if they can; for texts."""
        if self._listener is None or not host_tcp.is_tcp(self._listener) or host_tcp.on_loopback(self._listener):
            return None
        return host_tcp.local_name(self._listener)

    def descriptors(self) -> dict[str, int]:
        found = {}
        if self._listener is not None:
            found["listener"] = self._listener.fileno()
        if self._client is not None:
            found[f"{CLIENT}{self._serial}"] = self._client
        return found

    def own(self) -> None:
        super().own()
        if self._listener is not None:
            host_sockets.sign_listener(self._listener)

    def surrender_client(self) -> int | None:
        """Give the connected client away: its descriptor is the caller's from here on. None if there is no client."""
        client, self._client = self._client, None
        if client is not None:
            self._watch.remove(client)
            self.surrendered = self._listener is None
        return client

    def _open_output(self) -> None:
        if self._client is None:
            self._output.drop()
        else:
            self._output.keep()

    def _exchange(self, new: dict[str, int], gone: frozenset[str]) -> None:
        if self._client is not None and f"{CLIENT}{self._serial}" in gone:
            self._close_client()
        try:
            for name in sorted(new):
                serial = serial_of(name)
                if serial is None or self._client is not None:
                    raise DescriptorsUnclaimed(names=(f"chardev/{self.label}/{name}",))
                host_fds.require_kind(new[name], f"chardev/{self.label}/{name}", *self._clients_are)
                self._serial = serial
                self._take(new.pop(name))
        finally:
            for fd in new.values():
                os.close(fd)

    def _step(self) -> bool:
        if self._client is None:
            fed = self._feed()
            return self._accept() or fed
        wrote = self._write_some()
        return self._read_some() or wrote

    def _accept(self) -> bool:
        if self._listener is None:
            return False
        try:
            client = host_sockets.accept(self._listener, self._path or self._where)
        except PeerRefused as error:
            self._complain(f"Chardev {self.label!r}: {error}")
            return True
        except HostFileRefused as error:
            # Tried again when another client comes, or at any other event: not at once, which could go on for ever.
            if not self._cannot_accept:
                self._complain(f"Chardev {self.label!r}: {error}")
            self._cannot_accept = True
            return False
        if client is None:
            return False
        self._cannot_accept = False
        self._serial += 1
        self._take(client)
        self._output.keep()
        return True

    def _take(self, client: int) -> None:
        self._client = client
        self._watch.add(client)
        sock = socket.socket(fileno=client)
        if host_tcp.is_tcp(sock):
            self._tcp_ends = host_tcp.local_name(sock), host_tcp.peer_name(sock)
        sock.detach()

    def _write_some(self) -> bool:
        return self._client is not None and self._write_to(self._client)

    def _write_failed(self, error: OSError) -> None:
        if self._client is not None and poll(self._client) & (select.POLLHUP | select.POLLERR):
            self._hang_up(self._client)
        else:
            self._drop_held()  # it reads no more, and may still write

    def _read_some(self) -> bool:
        client = self._client
        fed = self._feed()
        if client is None or fed:
            return fed
        if not self._input and not self._client_is_silent:
            room = self._room()
            if room > 0:
                try:
                    data = os.read(client, min(room, READ_LIMIT))
                except BlockingIOError:
                    return False
                except OSError:  # ECONNRESET: it hung up on output that it had not read
                    data = b""
                if data:
                    self._input += data
                    return self._feed()
                self._client_is_silent = True
        # Input is not wanted, or over. A hang-up would show in a read; without one, it must be asked for.
        said_all = self._client_is_silent and self._tcp_ends is not None
        if poll(client) & (select.POLLHUP | select.POLLERR) or (said_all and self._another_waits()):
            return self._hang_up(client)
        return False

    def _another_waits(self) -> bool:
        return self._listener is not None and bool(poll(self._listener.fileno()) & select.POLLIN)

    def _hang_up(self, client: int) -> bool:
        """Part from a client that has left: at once if it had said all, or another one waits. Say if anything changed.

        In the second case its last words are read now.
        """
        before, self._client_has_left = self._client_has_left, True
        if self._output.drop() and self._frontend is not None:
            self._frontend.drained()
        if not self._client_is_silent and not self._another_waits():
            return not before
        lost = False
        while not self._client_is_silent and not lost:
            try:
                data = os.read(client, BUFFER_LIMIT)
            except OSError:
                break
            space = BUFFER_LIMIT - len(self._input)
            self._input += data[:space]
            lost = len(data) > space
            self._client_is_silent = not data
        if lost:
            self._complain(f"Chardev {self.label!r}: a client left more than {BUFFER_LIMIT} bytes; the rest is dropped")
        self._close_client()
        return True

    def _close_client(self) -> None:
        if self._client is not None:
            self._watch.remove(self._client)
            os.close(self._client)
            self._client = None
            self._tcp_ends = None
            self._client_is_silent = False
            self._client_has_left = False

    def _release(self, *, owner: bool) -> None:
        self._close_client()
        if self._listener is not None:
            self._watch.remove(self._listener.fileno())
            if owner and self._path is not None:
                host_sockets.unlink_own(self._path, self._listener)
            self._listener.close()


def serial_of(name: str) -> int | None:
    """Return the number of the client whose descriptor is called `name`; None if that is no client's name."""
    number = name.removeprefix(CLIENT)
    return int(number) if number != name and number.isascii() and number.isdigit() and len(number) < 16 else None
