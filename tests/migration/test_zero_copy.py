"""Sends without a copy: what sockets can, and what the kernel tells of them."""

from __future__ import annotations

import os
import socket

import pytest

from vmm.errors import MigrationRefused
from vmm.hw.doorbell import Doorbell
from vmm.migration.pump import Bulk
from vmm.migration.zero_copy import ZeroCopy

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_a_socket_that_is_not_of_tcp_cannot() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(MigrationRefused) as caught:
        ZeroCopy(Bulk(ours.fileno(), peer=True))
    assert str(caught.value) == (
        "migrate: zero-copy-send is for tcp: without TLS (Operation not supported); turn it off"
    )


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_all_is_sent_and_settled(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        near = socket.create_connection(listener.getsockname()[:2])
        far, _ = listener.accept()
    pieces = [memoryview(os.urandom(5000)) for _ in range(20)]
    with near, far, open(os.eventfd(0), "rb", buffering=0) as quiet:
        near.setblocking(False)
        bulk = Bulk(near.fileno(), peer=True).heed(Doorbell(quiet.fileno()))
        sends = ZeroCopy(bulk)
        for _ in range(2):
            sends.send(pieces)
            assert far.recv(100_000, socket.MSG_WAITALL) == b"".join(pieces)
            sends.settle()
        # The loopback copies, and says so once for each time that is asked.
        assert sends.missed == 2
        sends.settle()
        assert sends.missed == 2
        assert bulk.bytes == 200_000
        sends.close()
