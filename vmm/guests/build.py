"""Compile the built-in guests beside their sources.

Run by `setup.py` when the package is built, and by hand after a change: `python vmm/guests/build.py`. It imports
nothing of the package, because neither the package nor what it needs is installed at that time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

GUESTS = ("heartbeat", "deadline", "chatter", "dirtier")
SOURCES = Path(__file__).resolve().parent

# No floating point and no vector registers: the guests never switch them on, and interrupt handlers do not save them.
FLAGS = (
    *("-m32", "-march=i686", "-O2", "-ffreestanding", "-fno-strict-aliasing", "-fno-pic", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-fno-tree-loop-distribute-patterns"),
    *("-mgeneral-regs-only", "-mno-sse", "-mno-mmx", "-mno-80387"),
    *("-Wall", "-Wextra", "-Wno-unused-function"),
    *("-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,noexecstack"),
)


class GuestNotBuilt(Exception):
    """A guest could not be compiled; the text is one sentence, with the compiler's words behind it."""


def build(name: str, directory: Path, compiler: str = "gcc") -> Path:
    """Compile guest `name` to `directory`/`name`.elf and return that path.

    The file is replaced in one step, so that a machine that is being started finds the old one or the new one.

    Raises:
        GuestNotBuilt: there is no compiler, or it refused.
    """
    target = directory / f"{name}.elf"
    handle, scratch = tempfile.mkstemp(prefix=f".{name}-", suffix=".elf", dir=directory)
    os.close(handle)
    command = [compiler, *FLAGS, f"-Wl,-T,{SOURCES / 'guest.ld'}", "-o", scratch, str(SOURCES / f"{name}.c")]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    except FileNotFoundError as error:
        raise GuestNotBuilt(
            f"Cannot build guest {name}: there is no {compiler} in PATH; install gcc with 32-bit x86 code generation"
        ) from error
    except subprocess.CalledProcessError as error:
        raise GuestNotBuilt(f"Cannot build guest {name}: {compiler} refused it:\n{error.stderr.rstrip()}") from error
    finally:
        Path(scratch).unlink(missing_ok=True)
    return target


def main(arguments: list[str]) -> int:
    """Build every guest into the directory given, or beside the sources."""
    directory = Path(arguments[0]) if arguments else SOURCES
    try:
        for name in GUESTS:
            print(build(name, directory))
    except GuestNotBuilt as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
