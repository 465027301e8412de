"""Small guests for demonstrations, tests and benchmarks, built from the C sources beside this file.

`heartbeat` ticks on the PIT and checks its memory, `deadline` ticks on the TSC-deadline timer, `chatter` prints,
`dirtier` writes memory at a set rate. They run on any KVM, need no disk and no kernel, and leave what they saw in RAM
for `vmm.guests.heartbeat` and `vmm.guests.dirtier` to read.
"""

from __future__ import annotations

from pathlib import Path

from vmm.errors import BootError

GUESTS = ("heartbeat", "deadline", "chatter", "dirtier")


def guest_path(name: str) -> Path:
    """Return the path of built-in guest `name`.

    Raises:
        BootError: there is no such guest, or it has not been built.
    """
    if name not in GUESTS:
        raise BootError(image=f"built-in guest {name!r}", reason=f"there are {', '.join(GUESTS)}")
    path = Path(__file__).with_name(f"{name}.elf")
    if not path.is_file():
        build = path.with_name("build.py")
        raise BootError(image=f"built-in guest {name!r}", reason=f"{path} is missing; run python {build}")
    return path
