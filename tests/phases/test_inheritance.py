"""What a predecessor sent, and what of it this host has otherwise."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from vmm import host_sockets
from vmm.errors import DescriptorMissing
from vmm.phases.host import Inheritance

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")

NAME = "chardev/x/listener"


def replaced(fd: int, path: str) -> Inheritance:
    """Return an inheritance of which a chardev's listener is replaced here."""
    inheritance = Inheritance()
    inheritance.add({NAME: fd})
    inheritance.open_here(frozenset({"chardev/x"}), {NAME: path})
    return inheritance


def opened() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


@pytest.mark.parametrize("name", ["object/x", "object/x/file"])
def test_a_resource_of_this_host_is_opened_by_its_own_names(name: str) -> None:
    inheritance = Inheritance()
    inheritance.open_here(frozenset({"object/x"}), {})
    os.close(inheritance.obtain(name, opened))


@pytest.mark.parametrize("name", ["object", "object/y/file", "object/xy/file", "object/x/y/file"])
def test_nothing_else_is_opened_of_this_host(name: str) -> None:
    inheritance = Inheritance()
    inheritance.open_here(frozenset({"object/x"}), {})
    with pytest.raises(DescriptorMissing):
        inheritance.obtain(name, opened)


def test_the_file_of_a_replaced_listener_is_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "old")
    complaints: list[str] = []
    with closing(replaced(host_sockets.listen_unix(path).detach(), path)) as inheritance:
        inheritance.retire_replaced(complaints.append)
    assert (complaints, os.path.lexists(path)) == ([], False)


@pytest.mark.parametrize(
    ("kind", "path", "reason"),
    [
        ("pipe", "/there", "Socket operation on non-socket"),
        ("socket", "/\ud800", "surrogates not allowed"),
    ],
)
def test_a_replaced_listener_that_is_none_is_complained_of(kind: str, path: str, reason: str) -> None:
    complaints: list[str] = []
    if kind == "pipe":
        fd, other = os.pipe()
        os.close(other)
    else:
        fd = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()
    with closing(replaced(fd, path)) as inheritance:
        inheritance.retire_replaced(complaints.append)
    (said,) = complaints
    assert said.startswith(f"The socket {path!r} of a chardev that was replaced is left where it is: ")
    assert reason in said


def test_a_socket_stays_if_there_are_no_descriptors_left(tmp_path: Path) -> None:
    path = str(tmp_path / "old")
    complaints: list[str] = []
    with closing(replaced(host_sockets.listen_unix(path).detach(), path)) as inheritance:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            inheritance.retire_replaced(complaints.append)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    # Dead, and the next starter replaces it; nothing for the operator to do.
    assert complaints == []
    assert os.path.lexists(path)
