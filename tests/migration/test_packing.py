"""Pages that are packed, and what was made to look like it."""

from __future__ import annotations

import os
import sys
import zlib

import pytest
import zstandard

from vmm.errors import StreamCorrupt, Unsupported
from vmm.migration.packing import Packing, packing

PAGES = os.urandom(4096) + bytes(4096) + b"abcd" * 1024


@pytest.fixture(params=["zlib", "zstd"])
def method(request: pytest.FixtureRequest) -> Packing:
    found = packing(request.param)
    assert found is not None
    return found


def test_what_was_packed_is_unpacked(method: Packing) -> None:
    packed = method.pack(PAGES)
    assert len(packed) < len(PAGES)
    assert method.unpack(packed, len(PAGES)) == PAGES
    assert method.unpack(memoryview(packed), len(PAGES)) == PAGES


def test_there_is_a_method_of_each_name() -> None:
    assert packing("none") is None
    for name, number, most in (("zlib", 1, 9), ("zstd", 2, 20)):
        found = packing(name, {f"multifd-{name}-level": most})
        assert found is not None
        assert found.method == number
        least = packing(name, {f"multifd-{name}-level": 1})
        assert least is not None
        assert least.unpack(found.pack(PAGES), len(PAGES)) == PAGES


@pytest.mark.parametrize("size", [0, len(PAGES) - 1, len(PAGES) + 1, 1 << 20])
def test_what_has_another_size_is_refused(method: Packing, size: int) -> None:
    name = "zlib" if method.method == 1 else "zstd"
    with pytest.raises(StreamCorrupt) as caught:
        method.unpack(method.pack(PAGES), size)
    assert str(caught.value) == (f"State stream: pages that are packed with {name} are not {size} bytes, or damaged")


def test_what_is_damaged_is_refused(method: Packing) -> None:
    packed = method.pack(PAGES)
    for bad in (b"", packed[:-1], packed[: len(packed) // 2], b"\xff" * 40, os.urandom(100)):
        with pytest.raises(StreamCorrupt):
            method.unpack(bad, len(PAGES))


def test_what_would_become_huge_is_not_unpacked(method: Packing) -> None:
    huge = bytes(1 << 26)
    bomb = zlib.compress(huge) if method.method == 1 else zstandard.compress(huge)
    with pytest.raises(StreamCorrupt):
        method.unpack(bomb, 4096)


def test_a_window_of_zstd_that_is_too_large_is_refused() -> None:
    method = packing("zstd")
    assert method is not None
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=27, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    bad = packer.compress(PAGES) + packer.flush()
    with pytest.raises(StreamCorrupt):
        method.unpack(bad, len(PAGES))


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(Unsupported) as caught:
        packing("zstd")
    assert str(caught.value) == (
        "Migration parameter multifd-compression 'zstd' is not supported here; "
        "install the Python package zstandard, or use zlib"
    )
