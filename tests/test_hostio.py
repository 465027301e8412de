"""Files and memfds of the host: real ones."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from vmm import host_fds, host_sockets, hostio, terminals
from vmm.errors import HostFileRefused

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


pytestmark = pytest.mark.usefixtures("no_leaks")


# --- memory -----------------------------------------------------------------------------------------------


def test_ram_has_its_size_for_good() -> None:
    fd = hostio.create_ram(1 << 20, "ram")
    assert os.fstat(fd).st_size == 1 << 20
    assert not os.get_inheritable(fd)
    for size in (0, 2 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


@pytest.mark.parametrize("size", [1 << 63, 1 << 70])
def test_more_ram_than_can_be_is_refused(size: int) -> None:
    with pytest.raises(HostFileRefused) as caught:
        hostio.create_ram(size, "ram")
    assert str(caught.value) == f"Cannot reserve {size} bytes of memory as memfd:ram: File too large"


# --- files ------------------------------------------------------------------------------------------------


def test_an_input_file_is_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(b"bzImage")
    fd = hostio.open_input_file(str(tmp_path / "kernel"))
    assert os.read(fd, 100) == b"bzImage"
    assert not os.get_inheritable(fd)
    os.close(fd)
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (
        (tmp_path, "a directory"),
        (tmp_path / "pipe", "a pipe"),
        (Path("/dev/null"), "a character device"),
    ):
        with pytest.raises(HostFileRefused) as caught:
            hostio.open_input_file(str(path))
        assert str(caught.value) == f"Cannot read {path}: it is {kind}, not a regular file"


def test_a_missing_input_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostFileRefused) as caught:
        hostio.open_input_file(f"{tmp_path}/none")
    assert str(caught.value) == f"Cannot read {tmp_path}/none: No such file or directory"
    with pytest.raises(HostFileRefused, match="a path has no NUL"):
        hostio.open_input_file("a\0b")


@pytest.mark.parametrize(("append", "expected"), [(True, b"old new"), (False, b" new")])
def test_an_output_file_is_emptied_or_appended_to(tmp_path: Path, append: bool, expected: bytes) -> None:
    (tmp_path / "log").write_bytes(b"old")
    fd = hostio.open_output_file(str(tmp_path / "log"), append)
    os.write(fd, b" new")
    os.close(fd)
    assert (tmp_path / "log").read_bytes() == expected


def test_a_pipe_without_a_reader_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(HostFileRefused) as caught:
        hostio.open_output_file(f"{tmp_path}/pipe", append=False)
    assert str(caught.value) == f"Cannot write {tmp_path}/pipe: No such device or address"


def test_a_secret_is_a_file_that_its_owner_alone_has_access_to(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("open sesame")
    for mode in (0o640, 0o604, 0o610, 0o620):
        secret.chmod(mode)
        with pytest.raises(HostFileRefused) as caught:
            hostio.open_secret_file(str(secret))
        text = f"its mode is {mode:04o}, so others than its owner have access; use chmod 600"
        assert str(caught.value) == f"Cannot take a secret from {secret}: {text}"
    for mode in (0o600, 0o400):
        secret.chmod(mode)
        with open(hostio.open_secret_file(str(secret))) as file:
            assert file.read() == "open sesame"
    with pytest.raises(HostFileRefused, match="it is a directory, not a regular file"):
        hostio.open_secret_file(str(tmp_path))


@needs_root
def test_a_secret_of_another_user_is_none(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("open sesame")
    secret.chmod(0o600)
    os.chown(secret, 1001, -1)
    with pytest.raises(HostFileRefused) as caught:
        hostio.open_secret_file(str(secret))
    reason = "it belongs to uid 1001, neither to uid 0 nor to root"
    assert str(caught.value) == f"Cannot take a secret from {secret}: {reason}"


# --- descriptors ------------------------------------------------------------------------------------------


def test_a_closed_descriptor_is_not_duplicated() -> None:
    with pytest.raises(HostFileRefused, match=r"^Cannot duplicate descriptor 9999: Bad file descriptor$"):
        hostio.dup(9999)


def test_kinds_of_descriptors_are_told_apart(tmp_path: Path) -> None:
    path = f"{tmp_path}/socket"
    master, name = terminals.open_pty()
    slave = os.open(name, os.O_RDWR | os.O_NOCTTY)
    file = hostio.open_output_file(f"{tmp_path}/file", append=False)
    source, sink = os.pipe()
    with (
        host_sockets.listen_unix(path) as listener,
        host_sockets.connect_unix(path) as client,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as tcp,
        socket.create_connection(tcp.getsockname()[:2]) as tcp_client,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
    ):
        expected = {
            "a pty master": master,
            "a terminal": slave,
            "a regular file": file,
            "a pipe": source,
            "a listening unix socket": listener.fileno(),
            "a connected unix socket": client.fileno(),
            "a listening tcp socket": tcp.fileno(),
            "a connected tcp socket": tcp_client.fileno(),
            "a socket of another family": udp.fileno(),
            "not open": 9999,
        }
        assert {kind: host_fds.descriptor_kind(fd) for kind, fd in expected.items()} == {
            kind: kind for kind in expected
        }
    for fd in (master, slave, file, source, sink):
        os.close(fd)


# --- late imports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(24, "x"), ImportError("Too many open files")])
def test_an_import_that_the_host_does_not_let_be_made_is_refused(error: Exception) -> None:
    with pytest.raises(HostFileRefused) as caught, hostio.importing("vmm.late"):
        raise error
    assert str(caught.value) == "Cannot import vmm.late: Too many open files"
