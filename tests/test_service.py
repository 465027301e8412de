"""What a service manager is told, and that nothing depends on it."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from vmm.service import NO_MANAGER, ServiceManager

if TYPE_CHECKING:
    from pathlib import Path


def test_the_main_process_is_told_at_a_path(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        ServiceManager.of({"NOTIFY_SOCKET": path}).main_process_is(12)
        assert manager.recv(100) == b"MAINPID=12\n"


def test_the_main_process_is_told_at_an_abstract_name() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0trio-vmm-test-notify")
        ServiceManager.named("@trio-vmm-test-notify").main_process_is(12)
        assert manager.recv(100) == b"MAINPID=12\n"


@pytest.mark.parametrize("address", ["", None, 7, "relative", "/" + "x" * 107, "vsock:2:9"])
def test_what_is_no_address_is_no_manager(address: object) -> None:
    manager = ServiceManager.named(address)
    assert manager == NO_MANAGER
    manager.main_process_is(12)


def test_a_manager_that_does_not_listen_stops_nothing(tmp_path: Path) -> None:
    ServiceManager.named(str(tmp_path / "nobody")).main_process_is(12)
    ServiceManager.named("/a\0b").main_process_is(12)
