"""Unix sockets of the host, and who is at their other end: real ones."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.cpr.peer import no_descriptor_left
from vmm import host_sockets, hostio
from vmm.errors import DescriptorWrongKind, HostFileRefused, PeerRefused, SocketInUse

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "serial.sock")


def dead_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()


# --- listening --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_socket_is_its_owners_alone_whatever_the_umask(path: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        with host_sockets.listen_unix(path):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    finally:
        os.umask(before)


def test_listening_leaves_the_socket_file_and_nothing_else(path: str) -> None:
    with host_sockets.listen_unix(path) as listener:
        assert os.listdir(os.path.dirname(path)) == ["serial.sock"]
        assert not listener.get_inheritable()
        assert not listener.getblocking()


def test_a_live_socket_is_refused_and_lives_on(path: str) -> None:
    with host_sockets.listen_unix(path) as listener:
        with pytest.raises(SocketInUse) as caught:
            host_sockets.listen_unix(path)
        assert str(caught.value) == (
            f"Cannot listen on {path}: another process answers there; stop it or choose another path"
        )
        assert host_sockets.unlink_own(path, listener)


def test_a_socket_with_a_full_backlog_is_live(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(path)
        listener.listen(0)
        waiting.connect(path)
        with pytest.raises(SocketInUse):
            host_sockets.listen_unix(path)


def test_a_datagram_socket_is_live(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(path)
        with pytest.raises(SocketInUse):
            host_sockets.listen_unix(path)


def test_a_dead_socket_is_replaced(path: str) -> None:
    dead_socket(path)
    with host_sockets.listen_unix(path), host_sockets.connect_unix(path):
        assert os.listdir(os.path.dirname(path)) == ["serial.sock"]


def test_a_file_is_not_replaced(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(HostFileRefused) as caught:
        host_sockets.listen_unix(path)
    assert str(caught.value) == f"Cannot listen on {path}: it is a regular file, not a socket, and was left alone"
    assert Path(path).read_text() == "precious"
    assert os.listdir(os.path.dirname(path)) == ["serial.sock"]


def test_a_symbolic_link_to_a_dead_socket_is_not_replaced(path: str) -> None:
    dead_socket(path + ".real")
    os.symlink(path + ".real", path)
    with pytest.raises(HostFileRefused, match=r"it is a symbolic link, not a socket, and was left alone$"):
        host_sockets.listen_unix(path)
    assert os.path.islink(path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    path = f"{tmp_path}/none/serial.sock"
    with pytest.raises(HostFileRefused) as caught:
        host_sockets.listen_unix(path)
    assert str(caught.value) == f"Cannot listen on {path}: No such file or directory"


def test_a_path_that_is_too_long_is_refused_with_the_limit() -> None:
    path = "/tmp/" + "x" * 103
    for act in (host_sockets.listen_unix, host_sockets.connect_unix):
        with pytest.raises(HostFileRefused, match=r"a socket path has at most 107 bytes, and this one has 108$"):
            act(path)


def test_the_longest_path_can_be_listened_on(tmp_path: Path) -> None:
    path = f"{tmp_path}/"
    path += "x" * (host_sockets.MAX_SOCKET_PATH - len(path))
    with host_sockets.listen_unix(path) as listener:
        assert host_sockets.unlink_own(path, listener)


@pytest.mark.parametrize("path", ["", "\0abstract", "a\0b"])
def test_names_that_are_no_paths_are_refused(path: str) -> None:
    with pytest.raises(HostFileRefused, match="a socket path is not empty and has no NUL"):
        host_sockets.listen_unix(path)


def test_of_many_starters_on_a_dead_socket_one_wins(path: str) -> None:
    for _ in range(20):
        dead_socket(path)
        won: list[socket.socket] = []
        lost: list[SocketInUse] = []
        gate = threading.Barrier(8)

        def start(
            gate: threading.Barrier = gate, won: list[socket.socket] = won, lost: list[SocketInUse] = lost
        ) -> None:
            gate.wait()
            try:
                won.append(host_sockets.listen_unix(path))
            except SocketInUse as error:
                lost.append(error)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 7)
        assert host_sockets.unlink_own(path, won[0]), "the path leads to the winner"
        won[0].close()
        assert os.listdir(os.path.dirname(path)) == []


def test_a_starter_that_was_killed_keeps_nobody_out(path: str) -> None:
    leftover = os.path.join(os.path.dirname(path), ".serial.sock.trio-vmm-start")
    Path(leftover).touch()
    with host_sockets.listen_unix(path):
        assert not os.path.exists(leftover)


# --- removing a socket file -------------------------------------------------------------------------------


def test_a_socket_file_that_leads_elsewhere_is_not_removed(path: str) -> None:
    with host_sockets.listen_unix(path) as first:
        os.unlink(path)
        with host_sockets.listen_unix(path) as second:
            assert not host_sockets.unlink_own(path, first)
            assert os.path.exists(path)
            assert host_sockets.unlink_own(path, second)
            assert not os.path.exists(path)


def test_a_file_in_place_of_the_socket_is_not_removed(path: str) -> None:
    with host_sockets.listen_unix(path) as listener:
        os.unlink(path)
        assert not host_sockets.unlink_own(path, listener)
        Path(path).touch()
        assert not host_sockets.unlink_own(path, listener)
        assert os.path.exists(path)


def test_waiting_clients_do_not_keep_a_socket_file_from_being_removed(path: str) -> None:
    with host_sockets.listen_unix(path) as listener:
        waiting = [host_sockets.connect_unix(path) for _ in range(17)]
        with pytest.raises(HostFileRefused) as caught:
            host_sockets.connect_unix(path)
        assert str(caught.value) == f"Cannot connect to {path}: too many clients wait there"
        assert host_sockets.unlink_own(path, listener)
        for client in waiting:
            client.close()


def test_an_inherited_listener_finds_its_socket_file(path: str) -> None:
    with host_sockets.listen_unix(path) as listener:
        copy = hostio.dup(listener.fileno())
    with host_sockets.adopt_listener(copy, "listener", "a listening unix socket") as adopted:
        assert host_sockets.unlink_own(path, adopted)


def test_what_does_not_listen_is_not_adopted_and_stays_open() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(DescriptorWrongKind) as caught:
            host_sockets.adopt_listener(ours.fileno(), "chardev/serial0/listener", "a listening unix socket")
        assert str(caught.value) == (
            "Descriptor 'chardev/serial0/listener' is a connected unix socket, not a listening unix socket"
        )
        ours.send(b"open")


def test_a_connection_inherited_at_the_start_is_not_passed_on() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.set_inheritable(True)
        assert host_sockets.adopt_connection(ours.fileno()) == ours.fileno()
        assert not ours.get_inheritable()


# --- peers ------------------------------------------------------------------------------------------------


def test_connecting_where_nobody_listens_says_so(path: str) -> None:
    dead_socket(path)
    with pytest.raises(HostFileRefused) as caught:
        host_sockets.connect_unix(path)
    assert str(caught.value) == f"Cannot connect to {path}: Connection refused"


def test_nobody_waiting_is_nobody_accepted(path: str) -> None:
    with host_sockets.listen_unix(path) as listener:
        assert host_sockets.accept(listener, path) is None


def test_a_peer_of_our_own_is_admitted(path: str) -> None:
    with host_sockets.listen_unix(path) as listener, host_sockets.connect_unix(path) as client:
        fd = host_sockets.accept(listener, path)
        assert fd is not None
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        os.close(fd)
        assert host_sockets.peer_credentials(client) == (os.getpid(), os.geteuid(), os.getegid())


@needs_root
def test_a_peer_of_another_user_is_hung_up_on(path: str) -> None:
    with host_sockets.listen_unix(path) as listener:
        os.chmod(path, 0o666)
        os.chmod(os.path.dirname(path), 0o755)
        script = (
            "import os, socket, sys\n"
            f"sock = socket.socket(socket.AF_UNIX); os.chdir({os.path.dirname(path)!r}); os.setuid(65534)\n"
            "sock.connect('serial.sock'); print(repr(sock.recv(1)))"
        )
        child = subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE)
        listener.settimeout(60)
        with pytest.raises(PeerRefused) as caught:
            host_sockets.accept(listener, path)
        assert str(caught.value) == f"Peer of {path} has uid 65534; only uid 0 and root are admitted"
        out, _ = child.communicate()
        assert out == b"b''\n"


def test_without_a_descriptor_left_a_socket_file_stays_and_the_next_starter_replaces_it(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with host_sockets.listen_unix(path) as listener, no_descriptor_left():
        assert not host_sockets.unlink_own(path, listener)
    with host_sockets.listen_unix(path) as listener:
        assert host_sockets.unlink_own(path, listener)
