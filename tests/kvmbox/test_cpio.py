from __future__ import annotations

import pytest

from tests.kvmbox.cpio import Archive


def headers(archive: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Mode, content and device of each entry, read back the way that the kernel reads them."""
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        numbers = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, device, name_size = numbers[1], numbers[6], (numbers[9], numbers[10]), numbers[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        content_at = at + 110 + name_size + 3 & ~3
        if name == "TRAILER!!!":
            assert not archive[content_at:].strip(b"\0")
            return found
        found[name] = (mode, archive[content_at : content_at + size], device)
        at = content_at + size + 3 & ~3


def test_an_archive_reads_back_as_what_was_put_in() -> None:
    archive = Archive()
    archive.add_directory("bin")
    archive.add_file("bin/tool", b"odd", 0o755)
    archive.add_link("bin/sh", "tool")
    archive.add_character_device("console", 5, 1)
    assert headers(archive.to_bytes()) == {
        "bin": (0o040755, b"", (0, 0)),
        "bin/tool": (0o100755, b"odd", (0, 0)),
        "bin/sh": (0o120777, b"tool", (0, 0)),
        "console": (0o020600, b"", (5, 1)),
    }


def test_an_archive_is_padded_to_whole_sectors() -> None:
    assert len(Archive().to_bytes()) % 512 == 0


def test_a_path_comes_once_relative_and_after_its_directory() -> None:
    archive = Archive()
    archive.add_file("init", b"")
    with pytest.raises(ValueError, match="'init' is absolute or in the archive already"):
        archive.add_file("init", b"")
    with pytest.raises(ValueError, match="'/init' is absolute or in the archive already"):
        archive.add_file("/init", b"")
    with pytest.raises(ValueError, match="'bin/sh' comes before its directory 'bin'"):
        archive.add_link("bin/sh", "busybox")
