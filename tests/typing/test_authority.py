"""Runs mypy on `authority.py`: each misuse of a token in it must be a type error, and nothing else in it may be one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
AUTHORITY = Path(__file__).with_name("authority.py")


def mypy(*arguments: str) -> tuple[int, str]:
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--no-error-summary",
        "--no-color-output",
        "--no-pretty",
        "--follow-imports=silent",
    ]
    command += ["--strict", "--warn-unused-ignores", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def misuses(text: str) -> set[int]:
    return {number for number, line in enumerate(text.splitlines(), 1) if re.search(r"# type: ignore\[", line)}


def test_every_misuse_is_a_type_error() -> None:
    status, output = mypy(str(AUTHORITY))
    assert output == ""
    assert status == 0


def test_the_check_would_notice_a_misuse_that_a_type_checker_lets_pass(tmp_path: Path) -> None:
    text = AUTHORITY.read_text()
    right = text.replace('may.end("host-qmp-quit")  # type', "may.view(object)  # type")
    assert right != text
    changed = tmp_path / "authority.py"
    changed.write_text(right)
    status, output = mypy(str(changed))
    assert status == 1
    assert re.fullmatch(r'.*authority\.py:\d+: error: Unused "type: ignore" comment  \[unused-ignore\]\n', output), (
        output
    )


def test_the_misuses_are_many_and_each_names_its_error() -> None:
    text = AUTHORITY.read_text()
    assert len(misuses(text)) >= 40
    assert "type: ignore\n" not in text


@pytest.mark.parametrize("option", ["strict", "warn_unreachable"])
def test_the_project_is_checked_as_strictly(option: str) -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings[option] is True
    assert "tests" in settings["files"], "authority.py is under the project's own check too"
