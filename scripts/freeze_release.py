#!/usr/bin/env python3
"""Has the program as it is write what a release leaves behind, for every later one to read: a recipe, a saved guest, a
live update word by word. Into tests/golden/released/VERSION, where VERSION is that of pyproject.toml. Needs /dev/kvm.

    .venv/bin/python scripts/freeze_release.py           # at a release
    .venv/bin/python scripts/freeze_release.py --again   # anew, as long as VERSION has not been published
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.conformance.fingerprints import RELEASED
from tests.conformance.release import record
from vmm import __version__


def main(arguments: list[str]) -> int:
    """The command line."""
    if arguments not in ([], ["--again"]):
        print("usage: freeze_release.py [--again]", file=sys.stderr)
        return 2
    folder = RELEASED / __version__
    if folder.exists() and not arguments:
        print(
            f"freeze_release: {__version__} is frozen already, and what a release wrote never changes: raise the "
            "version in pyproject.toml, or use --again if this one has not been published",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory(prefix="vmm.") as scratch:
        written = trio.run(partial(record, Path(scratch)))
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, content in written.items():
        (folder / name).write_bytes(content)
    size = sum(map(len, written.values()))
    print(f"freeze_release: {folder}: {len(written)} files, {size >> 10} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
