"""One guest goes from process to process, and the last of them hold no more than the first."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.updates import machine

UPDATES = 12
LOOKS = 4
"""Processes at either end of the row that are looked at. A process that has just taken the guest may still have one or
two things to let go of; the one of these that holds least has let go of them. A leak grows in each process of a row."""


def anonymous_kib(pid: int) -> int:
    """Return the memory of a process that no file is behind: its heap and stacks.

    Unlike what is private of it, this leaves out the pages of the guest's RAM that are mapped so far, which depend on
    how far the guest has come, and the program's own files, which another process may or may not have mapped too.

    Source: Linux Documentation/filesystems/proc.rst, smaps_rollup.
    """
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in rollup if line.startswith("Anonymous:"))


@pytest.mark.kvm
@pytest.mark.long
@pytest.mark.usefixtures("no_leaks")
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # each successor is to live on
def test_no_process_of_a_row_holds_more_than_the_one_before(tmp_path: Path) -> None:
    held = []
    with machine(tmp_path, "row") as guest:  # the process started by hand is not counted: it has other modules
        for _ in range(UPDATES):
            guest.update()
            held.append({**guest.holds(), "anonymous": anonymous_kib(guest.pid)})
        guest.require_intact()
    first, last = (
        {name: min(each[name] for each in part) for name in held[0]} for part in (held[:LOOKS], held[-LOOKS:])
    )
    assert last["descriptors"] < first["descriptors"] + UPDATES / 4
    assert last["threads"] < first["threads"] + UPDATES / 4
    # 32 KiB an update, where 64 is how much the processes of a row differ; bench looks at a thousand of them.
    assert last["anonymous"] < first["anonymous"] + (UPDATES - LOOKS) * 32
