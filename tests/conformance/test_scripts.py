"""The scripts that record golden files and releases."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest

from tests.conformance import fingerprints
from tests.conformance.fingerprints import GOLDEN
from vmm import __version__
from vmm.phases.section_kinds import section_kinds

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, GOLDEN.parent.parent / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.kvm
def test_a_release_is_frozen_once_unless_it_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    freeze: Any = script("freeze_release")
    monkeypatch.setattr(freeze, "RELEASED", tmp_path)
    assert freeze.main([]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name == __version__
    written = {path.name for path in folder.iterdir()}
    assert written == {path.name for path in (GOLDEN / "released" / "0.1.0").iterdir()}
    (folder / "sections.json").write_text("stale")
    assert freeze.main([]) == 1
    assert (folder / "sections.json").read_text() == "stale"
    assert freeze.main(["--again"]) == 0
    assert (folder / "sections.json").read_text() != "stale"
    assert freeze.main(["--over"]) == 2
    assert capsys.readouterr().err == (
        f"freeze_release: {__version__} is frozen already, and what a release wrote never changes: raise the version "
        "in pyproject.toml, or use --again if this one has not been published\n"
        "usage: freeze_release.py [--again]\n"
    )


def test_golden_files_are_written_for_what_is_new_and_for_nothing_that_was_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    golden: Any = script("golden_state")
    monkeypatch.setattr(golden, "RECORD", tmp_path / "record")
    monkeypatch.setattr(golden, "FOLDER", tmp_path / "state")
    monkeypatch.setattr(fingerprints, "RELEASED", tmp_path / "released")
    record = golden.recorded()
    monkeypatch.setattr(golden, "recorded", dict)
    assert golden.main() == 0
    # Those of older versions are kept, and cannot be made again.
    assert {path.name for path in (tmp_path / "state").iterdir()} == {
        f"{kind.name}-{kind.version}.json" for kind in section_kinds().values()
    }
    uart = (tmp_path / "state" / "uart16550-1.json").read_bytes()

    # Another fingerprint than the present class's: written anew, as long as nobody has released it.
    other = {**record, "uart16550": {"1": [".other: bytes"]}}
    monkeypatch.setattr(golden, "recorded", lambda: other)
    (tmp_path / "state" / "uart16550-1.json").write_text("stale")
    assert golden.main() == 0
    assert (tmp_path / "state" / "uart16550-1.json").read_bytes() == uart

    (tmp_path / "released" / "9.9.9").mkdir(parents=True)
    (tmp_path / "released" / "9.9.9" / "sections.json").write_text('{"uart16550": 1}')
    (tmp_path / "state" / "uart16550-1.json").write_text("stale")
    capsys.readouterr()
    assert golden.main() == 1
    assert (tmp_path / "state" / "uart16550-1.json").read_text() == "stale"
    said = capsys.readouterr()
    assert said.out == ""
    complaint = "uart16550: what it declares has changed, and its version, 1, has not:\n  - .other: bytes\n"
    assert said.err.startswith(complaint)
    assert said.err.endswith("\nIt was: release 9.9.9 has it.\n")
