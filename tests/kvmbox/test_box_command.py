"""The parts of the box that need no box."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.kvmbox import box
from tests.kvmbox.__main__ import run
from tests.kvmbox.host import boots_stock_linux

if TYPE_CHECKING:
    from pathlib import Path


def test_the_command_runs_in_its_directory_with_its_words_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMM_WORD", "it's one")
    directory = tmp_path / "a directory"
    directory.mkdir()
    script = box.command_script(["sh", "-c", 'pwd; echo "$1" "$VMM_WORD" $TRIO_VMM_BOX', "sh", "two  words"], directory)
    ran = subprocess.run(["sh"], input=script, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [str(directory), "two  words it's one 1"]


def test_a_missing_program_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(box.BoxFailed) as caught:
        box.Box().run(["true"], tmp_path)
    assert str(caught.value) == (
        "there is no qemu-system-x86_64 on this machine: scripts/setup.sh installs what the tests need"
    )


@pytest.mark.parametrize("deaths", [0, 1, 2])
def test_a_box_whose_kernel_dies_is_tried_once_more(
    deaths: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[int] = []

    def dies(self: box.Box, command: list[str], directory: Path) -> int:
        ran.append(len(ran))
        if len(ran) <= deaths:
            raise box.BoxBroke("the box ended")
        return 7

    monkeypatch.setattr(box.Box, "run", dies)
    if deaths == 2:
        with pytest.raises(box.BoxBroke):
            run(box.Box(), ["true"], tmp_path)
    else:
        assert run(box.Box(), ["true"], tmp_path) == 7
    assert len(ran) == min(deaths + 1, 2)
    said = "kvmbox: the box ended\nkvmbox: once more from the beginning\n"
    assert capsys.readouterr().err == (said if deaths else "")


@pytest.mark.parametrize(("value", "answer"), [("1", True), ("0", False)])
def test_the_environment_decides_where_stock_guests_run(
    monkeypatch: pytest.MonkeyPatch, value: str, answer: bool
) -> None:
    monkeypatch.setenv(box.IN_THE_BOX, value)
    assert boots_stock_linux() is answer
