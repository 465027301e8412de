"""The tests' Linux guest: an initramfs made of a static busybox and one shell script, and how its console is read.

What runs in the guest is the caller's script, as process 1's child, with the serial console as input and output. When
the script ends the guest resets itself through the keyboard controller (the command line says `reboot=k`), which a
monitor shows as a shutdown with reason guest-reset, and which ends a VMM that was told not to reboot.
"""

from __future__ import annotations

import hashlib
import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from tests.kvmbox.box import IN_THE_BOX
from tests.kvmbox.cpio import Archive
from tests.kvmbox.stock_linux import static_busybox

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from tests.kvmbox.stock_linux import StockLinux

READY: Final = "guest: ready"
"""The line that a guest prints when its script is about to start."""

SHELL: Final = "exec /bin/busybox setsid /bin/busybox cttyhack /bin/busybox sh\n"
"""A script: an interactive shell on the serial console."""

COUNTER: Final = """\
n=0
while :; do
  n=$((n + 1))
  echo "count $n"
  usleep {microseconds}
done
"""
"""A script: prints `count 1`, `count 2` and so on, `microseconds` apart, for ever. To be filled in by `format`.

The number is kept in the shell's memory: a guest that went on after a hand-over neither repeats nor leaves one out.
"""

_INIT: Final = """\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
export PATH=/bin HOME=/ TERM=linux
exec </dev/{console} >/dev/{console} 2>&1
stty -onlcr
for module in {modules}; do insmod "/modules/$module.ko" || echo "guest: no $module"; done
echo "{ready}"
sh /script
status=$?
# A shell that led the console's session hung the console up by its end.
exec </dev/{console} >/dev/{console} 2>&1
echo "guest: script ended with status $status"
reboot -f
"""


def command_line(*more: str, console: str = "ttyS0", quiet: bool = True) -> str:
    """The kernel command line of a test guest, with `more` at its end.

    A guest in the box takes seconds for each page of messages, so `quiet` leaves only what the script prints. The
    rest saves boot time that no test is about: no mitigations, no address randomisation, no timer check.
    """
    words = [f"console={console}", "reboot=k", "panic=-1", "mitigations=off", "nokaslr", "no_timer_check"]
    words += ["quiet", "loglevel=3"] if quiet else ["earlyprintk=serial,ttyS0"]
    # A probe of a mouse port that the guest would wait half a second for.
    words += ["i8042.noaux"]
    if os.environ.get(IN_THE_BOX) == "1":
        # XSETBV does not leave the guest there (QEMU 7.2's TCG), so KVM never learns which state there is to keep: the
        # guest finds sizes that contradict each other, and says so at length.
        words += ["noxsave"]
    return " ".join([*words, *more])


def archive(
    script: str,
    linux: StockLinux,
    modules: Iterable[str] = (),
    console: str = "ttyS0",
    programs: Mapping[str, bytes] = MappingProxyType({}),
) -> bytes:
    """The initramfs that loads `modules` of `linux`, with what they depend on, and runs `script` with busybox's shell.

    Busybox is its own `/bin`: every applet is a command, and so are `programs`, which must need no library. The same
    arguments give the same bytes.
    """
    made = Archive()
    for directory in ("bin", "dev", "modules", "proc", "sys", "tmp"):
        made.add_directory(directory)
    # The kernel opens it for /init before devtmpfs is there.
    made.add_character_device("dev/console", 5, 1)
    made.add_file("bin/busybox", static_busybox().read_bytes(), 0o755)
    made.add_link("bin/sh", "busybox")
    for name, content in programs.items():
        made.add_file(f"bin/{name}", content, 0o755)
    loaded = linux.modules_in_order(modules)
    for name, content in loaded:
        made.add_file(f"modules/{name}.ko", content)
    init = _INIT.format(console=console, modules=" ".join(name for name, _ in loaded), ready=READY)
    made.add_file("init", init.encode(), 0o755)
    made.add_file("script", script.encode())
    return made.to_bytes()


def write_archive(directory: Path, content: bytes) -> Path:
    """Write `content` into `directory` under a name made of its digest, unless it is there already."""
    path = directory / f"initramfs-{hashlib.sha256(content).hexdigest()[:16]}.cpio"
    if not path.exists():
        path.write_bytes(content)
    return path
