"""Runs the tests with stock Linux guests in the box, all of them in one box, if this machine can't run them itself.

    python -m tests.kvmbox [PYTEST-ARGUMENT ...]

The exit status is pytest's; see `tests.kvmbox.box` for those of the box itself. No test is skipped for want of a box.
"""

from __future__ import annotations

import compileall
import sys
from pathlib import Path

from tests.kvmbox.box import BOX_FAILED, Box, BoxBroke, BoxFailed
from tests.kvmbox.host import boots_stock_linux
from tests.kvmbox.stock_linux import KernelUnavailable, StockLinux

# Plugins take seconds to import at the box's speed, and nothing here uses these; the box keeps no cache of failures.
_WITHOUT = ("hypothesispytest", "xdist", "xdist.looponfail", "cacheprovider")
_PYTEST = ("-m", "pytest", "-m", "kvmbox", *(f"-pno:{plugin}" for plugin in _WITHOUT), "--durations=10")


def run(box: Box, command: list[str], root: Path) -> int:
    """Run `command` in `box`; once more, which is said, if the kernel there died under it."""
    try:
        return box.run(command, root)
    except BoxBroke as error:
        print(f"kvmbox: {error}\nkvmbox: once more from the beginning", file=sys.stderr, flush=True)
        return box.run(command, root)


def main(arguments: list[str]) -> int:
    """The command line."""
    if boots_stock_linux() and not arguments:
        print("kvmbox: this machine's KVM boots stock Linux guests, so the other tests' run had these in it")
        return 0
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, *_PYTEST, *(arguments or ["tests/kvmbox"])]
    try:
        linux = StockLinux.cached()
        # Unpacked and compiled here, since the box would take twenty times as long, and compile at each start.
        print(f"kvmbox: starting the box; its guests are Linux {linux.release}, {linux.vmlinux}", flush=True)
        for package in ("vmm", "tests"):
            compileall.compile_dir(root / package, quiet=1)
        return run(Box(), command, root)
    except (BoxFailed, KernelUnavailable) as error:
        print(f"kvmbox: {error}", file=sys.stderr)
        return BOX_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
