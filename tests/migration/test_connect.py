"""Addresses that the host does not have."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vmm import hostio
from vmm.errors import HostFileRefused
from vmm.migration.address import InetAddress
from vmm.migration.connect import connect, listen

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.parametrize("host", ["a" * 64, "a..b", "☃"])
async def test_what_is_no_hosts_name_is_refused_as_an_address(host: str) -> None:
    with pytest.raises(HostFileRefused) as caught:
        await connect(InetAddress(host, "1"), within=10)
    assert str(caught.value).startswith(f"Cannot connect to {host} port 1: it has no host's name (")
    with pytest.raises(HostFileRefused) as caught:
        await listen(InetAddress(host, "0"))
    assert str(caught.value).startswith(f"Cannot listen on {host} port 0: it has no host's name (")


def test_an_offset_that_no_file_can_have_is_refused_and_nothing_stays_open(tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    (tmp_path / "state").write_bytes(b"x")
    # What is too much depends on the file system; this is nowhere possible.
    with pytest.raises(HostFileRefused) as caught:
        hostio.open_saved_state(path, -1)
    assert str(caught.value) == f"Cannot read {path}: no file there can have -1 bytes"
    with pytest.raises(HostFileRefused) as caught:
        hostio.open_state_file(path, -1)
    assert str(caught.value) == f"Cannot write {path}: no file there can have -1 bytes"
    assert (tmp_path / "state").read_bytes() == b"x"
    with pytest.raises(HostFileRefused):
        hostio.open_state_file(f"{path}2", -1)
    assert os.listdir(tmp_path) == ["state"]
