"""The options of chardevs are QAPI's."""

from __future__ import annotations

import pytest

from vmm.backends.chardev_options import (
    ChardevBackend,
    ChardevFile,
    ChardevFileWrapper,
    ChardevNullWrapper,
    ChardevPtyWrapper,
    ChardevSocket,
    ChardevSocketWrapper,
    ChardevStdio,
    ChardevStdioWrapper,
    UnixSocketAddress,
    UnixSocketAddressWrapper,
)
from vmm.errors import InvalidArguments
from vmm.monitor.arguments import structure

UNIX = {"type": "unix", "data": {"path": "/run/serial0"}}
ADDRESS = UnixSocketAddressWrapper(UnixSocketAddress("/run/serial0"))


@pytest.mark.parametrize(
    ("wire", "backend"),
    [
        ({"type": "null", "data": {}}, ChardevNullWrapper()),
        ({"type": "pty", "data": {}}, ChardevPtyWrapper()),
        ({"type": "file", "data": {"out": "log"}}, ChardevFileWrapper(ChardevFile("log"))),
        ({"type": "file", "data": {"out": "log", "append": True}}, ChardevFileWrapper(ChardevFile("log", append=True))),
        ({"type": "stdio", "data": {}}, ChardevStdioWrapper()),
        ({"type": "stdio", "data": {"signal": True}}, ChardevStdioWrapper(ChardevStdio(signal=True))),
        ({"type": "socket", "data": {"addr": UNIX}}, ChardevSocketWrapper(ChardevSocket(ADDRESS))),
        (
            {"type": "socket", "data": {"addr": UNIX, "server": False, "wait": True}},
            ChardevSocketWrapper(ChardevSocket(ADDRESS, server=False, wait=True)),
        ),
    ],
)
def test_backends_are_read_as_clients_write_them(wire: dict[str, object], backend: ChardevBackend) -> None:
    assert structure(ChardevBackend, wire, "chardev-add") == backend


@pytest.mark.parametrize(
    "wire",
    [
        {"type": "spicevmc", "data": {"type": "vdagent"}},
        {"type": "file", "data": {}},
        {"type": "null", "data": {"logfile": "x"}},
        {"type": "socket", "data": {"addr": {"type": "vsock", "data": {"cid": "3", "port": "1"}}}},
    ],
)
def test_what_is_not_offered_is_refused(wire: dict[str, object]) -> None:
    with pytest.raises(InvalidArguments):
        structure(ChardevBackend, wire, "chardev-add")
