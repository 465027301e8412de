from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vmm.phases.start import Start
from vmm.recipe import Recipe


def test_a_complaint_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start = Start(Recipe("a test", ()))
    full = Path("/dev/full").open("w")  # noqa: SIM115 - its close fails
    monkeypatch.setattr(sys, "stderr", full)
    start.complain("no room for this")
    with pytest.raises(OSError, match="No space left"):
        full.close()
    start.complain("nor for this: the stream is closed")
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        start.complain("but for this")
    assert (tmp_path / "log").read_text() == "trio-vmm: but for this\n"
