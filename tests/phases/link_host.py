"""A TCP connection over a network that can be cut: run as a process in a network namespace of its own.

Both ends belong to whoever asked, and stay in that namespace. Cut, the network drops what is sent, and nobody is told.
"""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, final

import attrs

from tests.phases.namespace import Namespace, answer_lines, begin, namespace, set_flags

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_FLAGS: Final = {"mend": 0x49, "cut": 0x48}  # IFF_UP | IFF_LOOPBACK | IFF_RUNNING, linux/if.h


def _do(line: str) -> str:
    set_flags("lo", _FLAGS[line])
    return "done"


def main() -> None:
    """Make the connection and send both of its ends; then do what lines say."""
    _do("mend")
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        other, _ = listener.accept()
        with other:
            asked = begin(one.fileno(), other.fileno())
    answer_lines(asked, _do)


@final
@attrs.frozen(eq=False)
class Link:
    """The connection, and the network that it goes over."""

    ends: tuple[socket.socket, socket.socket]
    _host: Namespace

    async def cut(self) -> None:
        """Drop everything from now on."""
        assert await self._host.ask("cut") == "done"

    async def mend(self) -> None:
        """Let everything through again."""
        assert await self._host.ask("mend") == "done"


@asynccontextmanager
async def link() -> AsyncGenerator[Link, None]:
    """Run the process; skip the test where this host does not let us have a namespace."""
    async with namespace("tests.phases.link_host") as host:
        one, other = (socket.socket(fileno=fd) for fd in host.descriptors)
        with one, other:
            yield Link((one, other), host)


if __name__ == "__main__":
    main()
