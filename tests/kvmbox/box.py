"""The box: runs one command on a machine whose KVM can boot stock Linux guests, made out of nothing but this one.

Some machines have a /dev/kvm that cannot boot them (a software KVM inside a cloud machine), or none. The box is QEMU
with its TCG emulator and an emulated AMD processor with SVM; it boots the distribution's kernel with this machine's
file tree as its root, by virtiofs, loads kvm-amd there and runs the command as root of the box in the same directory.
So /dev/kvm in it is the mainline kernel's, with every exit, nested page table and interrupt path of the real one, at
roughly a twentieth of the speed. There is no network but the loopback.

What the command writes is written on this machine, with the rights of the caller; /run, /dev and /tmp's replacement
(`TMPDIR`) are the box's own. Root is not needed: virtiofsd then runs in a user namespace where the caller is root.

    python -m tests.kvmbox.box [-m MIB] [-c CPUS] [-t SECONDS] -- COMMAND [ARGUMENT ...]

The command's output comes out as it is written, both streams in one. The exit status is the command's; 124 if it took
too long, 125 if the box itself failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import attrs

from tests.kvmbox.cpio import Archive
from tests.kvmbox.stock_linux import KernelUnavailable, StockLinux, static_busybox

if TYPE_CHECKING:
    from collections.abc import Sequence

IN_THE_BOX: Final = "TRIO_VMM_BOX"
"""Environment variable that is 1 in the box."""

TIMED_OUT: Final = 124
BOX_FAILED: Final = 125

_VIRTIOFSD: Final = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")
_PASSED_ON: Final = ("PATH", "HOME", "LANG", "VIRTUAL_ENV", "XDG_CACHE_HOME")
_PASSED_ON_PREFIXES: Final = ("TRIO_VMM_", "VMM_", "PYTEST_", "PYTHON")

_HOW_TO_INSTALL: Final = "scripts/setup.sh installs what the tests need"

# Process 1 of the box, in busybox's shell. It makes this machine's tree its root as an init does, not by chroot, since
# a process in a chroot may not open user namespaces.
_INIT: Final = """\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
for module in {modules}; do /bin/busybox insmod "/modules/$module.ko"; done
/bin/busybox mount -t virtiofs tree /tree || /bin/busybox poweroff -f
/bin/busybox mount -t proc proc /tree/proc
/bin/busybox mount -t sysfs sys /tree/sys
/bin/busybox mount -t devtmpfs dev /tree/dev
/bin/busybox mount -t tmpfs run /tree/run
/bin/busybox cp /bin/busybox /bin/steady-kvm /main /command /tree/run
exec /bin/busybox switch_root /tree /run/busybox sh /run/main
"""

_MAIN: Final = """\
b=/run/busybox
$b mkdir -p /dev/shm /dev/pts /run/tmp
$b mount -t tmpfs shm /dev/shm
$b mount -t devpts pts /dev/pts
$b ln -s /proc/self/fd /dev/fd
$b ifconfig lo 127.0.0.1 up
for port in /sys/class/virtio-ports/*; do
  read -r name <"$port/name"
  case $name in output) output=/dev/${port##*/} ;; status) status=/dev/${port##*/} ;; esac
done
{ /run/steady-kvm; $b sh /run/command </dev/null; echo $? >"$status"; } 2>&1 | $b cat >"$output"
$b sync
$b poweroff -f
"""


class BoxFailed(Exception):
    """The box could not be started, or ended before the command did."""


class BoxBroke(BoxFailed):
    """The box ended before the command did: its kernel died, which under emulation happens now and then."""


@final
@attrs.frozen
class Box:
    """The size of a box, and how long a command may take in it."""

    memory: int = 3072
    """MiB, those of the guests in it included."""
    cpus: int = 2
    limit: float = 3600
    """Seconds, the box's own start included."""

    def run(self, command: Sequence[str], directory: Path) -> int:
        """Run `command` in `directory` and return its exit status, or `TIMED_OUT`. Blocks; output goes to ours.

        Raises:
            BoxFailed: a program is missing.
            BoxBroke: the box ended before the command did.
            KernelUnavailable: the box's kernel could not be had.
        """
        qemu = _program("qemu-system-x86_64")
        with tempfile.TemporaryDirectory(prefix="trio-vmm-box.") as name:
            job = Path(name)
            (job / "initramfs").write_bytes(_initramfs(StockLinux.cached(), command, directory))
            file_server = _start_file_server(job)
            try:
                return self._boot(qemu, job)
            finally:
                file_server.kill()
                file_server.wait()

    def _boot(self, qemu: str, job: Path) -> int:
        ours, theirs = socket.socketpair()
        arguments = [
            *(qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max", "-smp", str(self.cpus)),
            *("-m", str(self.memory), "-numa", "node,memdev=ram"),
            *("-object", f"memory-backend-memfd,id=ram,size={self.memory}M,share=on"),
            *("-chardev", f"socket,id=tree,path={job}/tree"),
            *("-device", "vhost-user-fs-pci,queue-size=1024,chardev=tree,tag=tree"),
            *("-device", "virtio-serial-pci"),
            # Not QEMU's stdio: it takes the end of its input for the end of the connection, and holds the output back.
            *("-chardev", f"socket,id=output,fd={theirs.fileno()}"),
            *("-device", "virtserialport,chardev=output,name=output"),
            *("-chardev", f"file,id=status,path={job}/status", "-device", "virtserialport,chardev=status,name=status"),
            *("-serial", f"file:{job}/console"),
            *("-kernel", str(StockLinux.cached().vmlinuz), "-initrd", str(job / "initramfs")),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr"),
        ]
        with ours, subprocess.Popen(arguments, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]) as machine:
            theirs.close()
            try:
                if not _copy_to_end(ours, sys.stdout.fileno(), self.limit):
                    print(f"box: the command did not end within {self.limit:g} s", file=sys.stderr)
                    return TIMED_OUT
            finally:
                machine.kill()
        status = (job / "status").read_text().strip() if (job / "status").exists() else ""
        if not status:
            said = "".join(f"\n  | {line}" for line in _last_lines(job / "console") + _last_lines(job / "tree.log"))
            raise BoxBroke(f"the box ended before the command did; its kernel and its file server said last:{said}")
        return int(status)


def _initramfs(linux: StockLinux, command: Sequence[str], directory: Path) -> bytes:
    made = Archive()
    for path in ("bin", "dev", "modules", "proc", "tree"):
        made.add_directory(path)
    made.add_character_device("dev/console", 5, 1)
    made.add_file("bin/busybox", static_busybox().read_bytes(), 0o755)
    made.add_file("bin/steady-kvm", static_program(Path(__file__).with_name("steady_kvm.c")), 0o755)
    modules = linux.modules_in_order(["virtio_pci", "virtiofs", "virtio_console", "kvm-amd"])
    for name, content in modules:
        made.add_file(f"modules/{name}.ko", content)
    made.add_file("init", _INIT.format(modules=" ".join(name for name, _ in modules)).encode(), 0o755)
    made.add_file("main", _MAIN.encode())
    made.add_file("command", command_script(command, directory).encode())
    return made.to_bytes()


def static_program(source: Path) -> bytes:
    """The C program `source`, linked statically."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory, "program")
        subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", program, source], check=True)
        return program.read_bytes()


def command_script(command: Sequence[str], directory: Path) -> str:
    """What the box's shell runs: the environment that is passed on, then `command` in `directory`."""
    variables = {
        name: value for name, value in os.environ.items() if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    variables |= {IN_THE_BOX: "1", "TMPDIR": "/run/tmp"}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items())]
    return "\n".join([*lines, f"cd {shlex.quote(str(directory))} || exit", f"exec {shlex.join(command)}\n"])


def _start_file_server(job: Path) -> subprocess.Popen[bytes]:
    """Start virtiofsd for the whole tree, on socket `job`/tree."""
    server = next((path for path in _VIRTIOFSD if os.access(path, os.X_OK)), None)
    if server is None:
        raise BoxFailed(f"no virtiofsd in {', '.join(_VIRTIOFSD)}: {_HOW_TO_INSTALL}")
    # Debian 12 has the server that is part of QEMU, in C; later ones have the one in Rust. Only that in Rust can do
    # without a sandbox, and that in C wants root to make one: a user namespace's root will do.
    usage = subprocess.run([server, "--help"], capture_output=True, check=False).stdout
    if b"--shared-dir" in usage:
        command = [server, "--shared-dir=/", "--cache=always", "--sandbox=none"]
    else:
        command = [server, "-o", "source=/", "-o", "cache=always", "-o", "sandbox=chroot"]
        if os.geteuid() != 0:
            command = [_program("unshare"), "--user", "--map-root-user", *command]
    # Listening before the server runs: the machine can connect at once and be answered later.
    with socket.socket(socket.AF_UNIX) as listener, (job / "tree.log").open("wb") as log:
        listener.bind(str(job / "tree"))
        listener.listen()
        descriptor = listener.fileno()
        return subprocess.Popen(
            [*command, f"--fd={descriptor}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[descriptor]
        )


def _copy_to_end(source: socket.socket, target: int, limit: float) -> bool:
    """Write to descriptor `target` what comes from `source`. Whether its end came within `limit` seconds."""
    deadline = time.monotonic() + limit
    while (left := deadline - time.monotonic()) > 0:
        source.settimeout(left)
        try:
            data = source.recv(65536)
        except TimeoutError:
            break
        if not data:
            return True
        while data:
            data = data[os.write(target, data) :]
    return False


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise BoxFailed(f"there is no {name} on this machine: {_HOW_TO_INSTALL}")
    return found


def _last_lines(path: Path, count: int = 60) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-count:] if path.exists() else []


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="box", description="Run a command where KVM boots stock Linux guests.")
    parser.add_argument("-m", dest="memory", type=int, default=Box().memory, help="MiB of memory")
    parser.add_argument("-c", dest="cpus", type=int, default=Box().cpus, help="processors")
    parser.add_argument("-t", dest="limit", type=float, default=Box().limit, help="seconds until the command is ended")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    try:
        return Box(options.memory, options.cpus, options.limit).run(options.command, Path.cwd())
    except (BoxFailed, KernelUnavailable) as error:
        print(f"box: {error}", file=sys.stderr)
        return BOX_FAILED


if __name__ == "__main__":
    sys.exit(main())
