"""Files, sockets, memfds and terminals of the host: real ones."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cpr.peer import no_descriptor_left
from vmm import hostio, terminals
from vmm.errors import DescriptorWrongKind, HostFileRefused, PeerRefused, SocketInUse

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        with hostio.listen_unix(path):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    finally:
        os.umask(before)


def test_listening_leaves_the_socket_file_and_nothing_else(path: str) -> None:
    with hostio.listen_unix(path) as listener:
        assert os.listdir(os.path.dirname(path)) == ["serial.sock"]
        assert not listener.get_inheritable()
        assert not listener.getblocking()


def test_a_live_socket_is_refused_and_lives_on(path: str) -> None:
    with hostio.listen_unix(path) as listener:
        with pytest.raises(SocketInUse) as caught:
            hostio.listen_unix(path)
        assert str(caught.value) == (
            f"Cannot listen on {path}: another process answers there; stop it or choose another path"
        )
        assert hostio.unlink_own(path, listener)


def test_a_socket_with_a_full_backlog_is_live(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(path)
        listener.listen(0)
        waiting.connect(path)
        with pytest.raises(SocketInUse):
            hostio.listen_unix(path)


def test_a_datagram_socket_is_live(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(path)
        with pytest.raises(SocketInUse):
            hostio.listen_unix(path)


def test_a_dead_socket_is_replaced(path: str) -> None:
    dead_socket(path)
    with hostio.listen_unix(path), hostio.connect_unix(path):
        assert os.listdir(os.path.dirname(path)) == ["serial.sock"]


def test_a_file_is_not_replaced(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(HostFileRefused) as caught:
        hostio.listen_unix(path)
    assert str(caught.value) == f"Cannot listen on {path}: it is a regular file, not a socket, and was left alone"
    assert Path(path).read_text() == "precious"
    assert os.listdir(os.path.dirname(path)) == ["serial.sock"]


def test_a_symbolic_link_to_a_dead_socket_is_not_replaced(path: str) -> None:
    dead_socket(path + ".real")
    os.symlink(path + ".real", path)
    with pytest.raises(HostFileRefused, match=r"it is a symbolic link, not a socket, and was left alone$"):
        hostio.listen_unix(path)
    assert os.path.islink(path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    path = f"{tmp_path}/none/serial.sock"
    with pytest.raises(HostFileRefused) as caught:
        hostio.listen_unix(path)
    assert str(caught.value) == f"Cannot listen on {path}: No such file or directory"


def test_a_path_that_is_too_long_is_refused_with_the_limit() -> None:
    path = "/tmp/" + "x" * 103
    for act in (hostio.listen_unix, hostio.connect_unix):
        with pytest.raises(HostFileRefused, match=r"a socket path has at most 107 bytes, and this one has 108$"):
            act(path)


def test_the_longest_path_can_be_listened_on(tmp_path: Path) -> None:
    path = f"{tmp_path}/"
    path += "x" * (hostio.MAX_SOCKET_PATH - len(path))
    with hostio.listen_unix(path) as listener:
        assert hostio.unlink_own(path, listener)


@pytest.mark.parametrize("path", ["", "\0abstract", "a\0b"])
def test_names_that_are_no_paths_are_refused(path: str) -> None:
    with pytest.raises(HostFileRefused, match="a socket path is not empty and has no NUL"):
        hostio.listen_unix(path)


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
                won.append(hostio.listen_unix(path))
            except SocketInUse as error:
                lost.append(error)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 7)
        assert hostio.unlink_own(path, won[0]), "the path leads to the winner"
        won[0].close()
        assert os.listdir(os.path.dirname(path)) == []


def test_a_starter_that_was_killed_keeps_nobody_out(path: str) -> None:
    leftover = os.path.join(os.path.dirname(path), ".serial.sock.trio-vmm-start")
    Path(leftover).touch()
    with hostio.listen_unix(path):
        assert not os.path.exists(leftover)


# --- removing a socket file -------------------------------------------------------------------------------


def test_a_socket_file_that_leads_elsewhere_is_not_removed(path: str) -> None:
    with hostio.listen_unix(path) as first:
        os.unlink(path)
        with hostio.listen_unix(path) as second:
            assert not hostio.unlink_own(path, first)
            assert os.path.exists(path)
            assert hostio.unlink_own(path, second)
            assert not os.path.exists(path)


def test_a_file_in_place_of_the_socket_is_not_removed(path: str) -> None:
    with hostio.listen_unix(path) as listener:
        os.unlink(path)
        assert not hostio.unlink_own(path, listener)
        Path(path).touch()
        assert not hostio.unlink_own(path, listener)
        assert os.path.exists(path)


def test_waiting_clients_do_not_keep_a_socket_file_from_being_removed(path: str) -> None:
    with hostio.listen_unix(path) as listener:
        waiting = [hostio.connect_unix(path) for _ in range(17)]
        with pytest.raises(HostFileRefused) as caught:
            hostio.connect_unix(path)
        assert str(caught.value) == f"Cannot connect to {path}: too many clients wait there"
        assert hostio.unlink_own(path, listener)
        for client in waiting:
            client.close()


def test_an_inherited_listener_finds_its_socket_file(path: str) -> None:
    with hostio.listen_unix(path) as listener:
        copy = hostio.dup(listener.fileno())
    with hostio.adopt_listener(copy, "listener", "a listening unix socket") as adopted:
        assert hostio.unlink_own(path, adopted)


def test_what_does_not_listen_is_not_adopted_and_stays_open() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(DescriptorWrongKind) as caught:
            hostio.adopt_listener(ours.fileno(), "chardev/serial0/listener", "a listening unix socket")
        assert str(caught.value) == (
            "Descriptor 'chardev/serial0/listener' is a connected unix socket, not a listening unix socket"
        )
        ours.send(b"open")


def test_a_connection_inherited_at_the_start_is_not_passed_on() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.set_inheritable(True)
        assert hostio.adopt_connection(ours.fileno()) == ours.fileno()
        assert not ours.get_inheritable()


# --- peers ------------------------------------------------------------------------------------------------


def test_connecting_where_nobody_listens_says_so(path: str) -> None:
    dead_socket(path)
    with pytest.raises(HostFileRefused) as caught:
        hostio.connect_unix(path)
    assert str(caught.value) == f"Cannot connect to {path}: Connection refused"


def test_nobody_waiting_is_nobody_accepted(path: str) -> None:
    with hostio.listen_unix(path) as listener:
        assert hostio.accept(listener, path) is None


def test_a_peer_of_our_own_is_admitted(path: str) -> None:
    with hostio.listen_unix(path) as listener, hostio.connect_unix(path) as client:
        fd = hostio.accept(listener, path)
        assert fd is not None
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        os.close(fd)
        assert hostio.peer_credentials(client) == (os.getpid(), os.geteuid(), os.getegid())


@needs_root
def test_a_peer_of_another_user_is_hung_up_on(path: str) -> None:
    with hostio.listen_unix(path) as listener:
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
            hostio.accept(listener, path)
        assert str(caught.value) == f"Peer of {path} has uid 65534; only uid 0 and root are admitted"
        out, _ = child.communicate()
        assert out == b"b''\n"


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


def test_a_closed_descriptor_is_not_duplicated() -> None:
    with pytest.raises(HostFileRefused, match=r"^Cannot duplicate descriptor 9999: Bad file descriptor$"):
        hostio.dup(9999)


def test_kinds_of_descriptors_are_told_apart(path: str, tmp_path: Path) -> None:
    master, name = terminals.open_pty()
    slave = os.open(name, os.O_RDWR | os.O_NOCTTY)
    file = hostio.open_output_file(f"{tmp_path}/file", append=False)
    source, sink = os.pipe()
    with (
        hostio.listen_unix(path) as listener,
        hostio.connect_unix(path) as client,
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
        assert {kind: hostio.descriptor_kind(fd) for kind, fd in expected.items()} == {kind: kind for kind in expected}
    for fd in (master, slave, file, source, sink):
        os.close(fd)


# --- terminals --------------------------------------------------------------------------------------------


def test_a_pty_is_raw_and_polls_as_hung_up_until_it_is_opened() -> None:
    master, name = terminals.open_pty()
    assert hostio.pty_slave_name(master) == name
    assert not os.get_blocking(master)
    with pytest.raises(OSError, match="Input/output error"):
        os.read(master, 1)
    slave = os.open(name, os.O_RDWR | os.O_NOCTTY)
    assert not termios.tcgetattr(slave)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
    os.write(master, b"\n")
    assert os.read(slave, 10) == b"\n"
    os.close(slave)
    os.close(master)


@pytest.fixture
def terminal() -> Iterator[int]:
    """A terminal in the state in which a shell leaves it."""
    master, slave = os.openpty()
    yield slave
    os.close(slave)
    os.close(master)


@pytest.mark.parametrize("signals", [False, True])
def test_a_raw_terminal_is_put_back_as_it_was(terminal: int, signals: bool) -> None:
    before = termios.tcgetattr(terminal)
    with terminals.raw_terminal(terminal, signals=signals) as raw:
        now = termios.tcgetattr(terminal)
        assert not now[3] & (termios.ECHO | termios.ICANON)
        assert bool(now[3] & termios.ISIG) is signals
        assert now[1] & termios.OPOST, "messages of others keep their line ends"
        assert len(raw.original) == terminals.TERMINAL_SETTINGS_SIZE
    assert termios.tcgetattr(terminal) == before


def test_a_successor_puts_a_terminal_back(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    ours = terminals.raw_terminal(terminal)
    ours.leave()
    ours.restore()
    assert termios.tcgetattr(terminal) != before
    terminals.RawTerminal(terminal, ours.original).restore()
    assert termios.tcgetattr(terminal) == before


def test_a_terminal_that_is_gone_is_none_to_restore() -> None:
    master, slave = os.openpty()
    raw = terminals.raw_terminal(slave)
    os.close(master)
    raw.restore()
    os.close(slave)


def test_what_is_no_terminal_is_not_made_raw() -> None:
    source, sink = os.pipe()
    with pytest.raises(HostFileRefused) as caught:
        terminals.raw_terminal(source)
    assert str(caught.value) == (f"Cannot use as a terminal descriptor {source}: Inappropriate ioctl for device")
    os.close(source)
    os.close(sink)


def test_settings_that_are_none_are_refused(terminal: int) -> None:
    with pytest.raises(ValueError, match="3 bytes are no terminal settings, which have 56"):
        terminals.RawTerminal(terminal, b"abc")


def test_a_terminal_is_restored_when_the_interpreter_exits(terminal: int) -> None:
    before = termios.tcgetattr(terminal)
    script = "import os\nfrom vmm import terminals\nraw = terminals.raw_terminal(0)\nprint('raw')"
    child = subprocess.run(
        [sys.executable, "-c", script],
        stdin=terminal,
        stdout=subprocess.PIPE,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert child.stdout == b"raw\n"
    assert termios.tcgetattr(terminal) == before


def test_restoring_a_terminal_leaves_the_signal_mask_alone(terminal: int) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    terminals.raw_terminal(terminal).restore()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_private_terminal_does_not_make_the_shared_one_nonblocking(terminal: int) -> None:
    private = terminals.open_private(terminal)
    assert not os.get_blocking(private)
    assert os.get_blocking(terminal)
    assert not os.get_inheritable(private)
    os.close(private)


def test_a_private_pipe_does_not_make_the_shared_one_nonblocking() -> None:
    source, sink = os.pipe()
    private = terminals.open_private(sink)
    assert not os.get_blocking(private)
    assert os.get_blocking(sink)
    os.write(private, b"hello")
    assert os.read(source, 10) == b"hello"
    os.close(source)
    for fd in (private, terminals.open_private(sink)):  # the second: nobody reads, so it can't be opened again
        os.close(fd)
    os.close(sink)


def test_a_private_file_keeps_the_position(tmp_path: Path) -> None:
    shared = hostio.open_output_file(f"{tmp_path}/log", append=False)
    os.write(shared, b"one")
    private = terminals.open_private(shared)
    os.write(private, b"two")
    assert (tmp_path / "log").read_bytes() == b"onetwo"
    os.close(private)
    os.close(shared)


# --- tcp, of this machine alone ----------------------------------------------------------------------------


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


# --- late imports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(24, "x"), ImportError("Too many open files")])
def test_an_import_that_the_host_does_not_let_be_made_is_refused(error: Exception) -> None:
    with pytest.raises(HostFileRefused) as caught, hostio.importing("vmm.late"):
        raise error
    assert str(caught.value) == "Cannot import vmm.late: Too many open files"


def test_without_a_descriptor_left_a_socket_file_stays_and_the_next_starter_replaces_it(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with hostio.listen_unix(path) as listener, no_descriptor_left():
        assert not hostio.unlink_own(path, listener)
    with hostio.listen_unix(path) as listener:
        assert hostio.unlink_own(path, listener)
