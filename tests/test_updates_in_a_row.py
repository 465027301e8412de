"""One guest goes from process to process, and the last of them holds no more than the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.updates import machine

if TYPE_CHECKING:
    from pathlib import Path

UPDATES = 12


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # each successor is to live on
def test_no_process_of_a_row_holds_more_than_the_one_before(tmp_path: Path) -> None:
    with machine(tmp_path, "row") as guest:
        guest.update()  # the first process was started by hand, and has other modules
        first = guest.holds()
        for _ in range(UPDATES):
            guest.update()
        last = guest.holds()
        guest.require_intact()
    # A process that has just taken the guest still has one or two things to let go of. A leak is one an update.
    assert last["descriptors"] < first["descriptors"] + UPDATES / 2
    assert last["threads"] < first["threads"] + UPDATES / 2
    # 64 KiB an update; bench looks at a thousand in a row, where a page would show.
    assert last["private_mib"] < first["private_mib"] + UPDATES / 16
