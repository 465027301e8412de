"""What the tests of back ends share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.backends.chardev_kit import Complaints, Frontend

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def nothing_is_left(no_leaks: None) -> None:
    """No test of a back end leaves a descriptor, a thread or a process."""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "serial.sock")


@pytest.fixture
def complain() -> Complaints:
    return Complaints()


@pytest.fixture
def frontend() -> Frontend:
    return Frontend()
