from __future__ import annotations

import gzip
import lzma
import struct
from typing import TYPE_CHECKING

import pytest

from tests.kvmbox.guest import archive
from tests.kvmbox.stock_linux import KernelUnavailable, StockLinux, extract_vmlinux, pvh_entry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOTES_AT = 0x100


def elf(*notes: bytes) -> bytes:
    """An ELF file with nothing in it but `notes`."""
    body = b"".join(notes)
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack("<HHIQQQIHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1)
    program = struct.pack("<IIQQQQQQ", 4, 4, NOTES_AT, 0, 0, len(body), len(body), 4)
    return (header.ljust(64, b"\0") + program).ljust(NOTES_AT, b"\0") + body


def note(owner: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<III", len(owner), len(value), kind) + owner.ljust(len(owner) + 3 & ~3, b"\0") + value


def bzimage(payload: bytes) -> bytes:
    """A bzImage with one sector of setup code and `payload` 16 bytes into its protected-mode part."""
    image = bytearray(1024 + 16) + payload + bytes(8)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x20F)
    struct.pack_into("<II", image, 0x248, 16, len(payload))
    return bytes(image)


def with_size(compress: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: compress(data) + struct.pack("<I", len(data))


@pytest.mark.parametrize("compress", [gzip.compress, with_size(lzma.compress)], ids=["gzip", "xz"])
def test_the_elf_file_comes_out_of_a_bzimage(compress: Callable[[bytes], bytes]) -> None:
    kernel = elf(note(b"GNU\0", 3, b"build"))
    assert extract_vmlinux(bzimage(compress(kernel))) == kernel


def test_what_is_no_bzimage_is_refused() -> None:
    with pytest.raises(KernelUnavailable, match=r"^the kernel image is no bzImage of boot protocol 2\.08 or later$"):
        extract_vmlinux(bytes(4096))


def test_an_unknown_compression_is_refused_by_its_magic() -> None:
    with pytest.raises(KernelUnavailable) as caught:
        extract_vmlinux(bzimage(b"\x02\x21\x4c\x18 lz4, of old"))
    assert str(caught.value) == "cannot unpack what starts with 02 21 4c 18 20 6c: only gzip, xz and zstd are known"


def test_a_payload_of_another_size_is_refused() -> None:
    kernel = elf()
    with pytest.raises(KernelUnavailable) as caught:
        extract_vmlinux(bzimage(lzma.compress(kernel) + struct.pack("<I", 7)))
    assert str(caught.value) == f"the kernel's payload unpacks to {len(kernel)} bytes, not to an ELF file of 7"


def test_the_pvh_entry_is_found_among_other_notes() -> None:
    others = (note(b"GNU\0", 18, b"\1\0\0\0"), note(b"Xen\0", 6, b"linux\0\0\0"))
    assert pvh_entry(elf(*others, note(b"Xen\0", 18, struct.pack("<I", 0x1000A30)))) == 0x1000A30
    assert pvh_entry(elf(*others)) is None


def fake_kernel(directory: Path) -> StockLinux:
    modules = directory / "modules"
    modules.mkdir()
    (modules / "bus.ko").write_bytes(b"\x7fELF bus\0depends=\0name=bus\0")
    (modules / "disk-drive.ko.xz").write_bytes(lzma.compress(b"\x7fELF disk\0depends=bus,core\0name=disk_drive\0"))
    (directory / "modules.txt").write_text("bus bus.ko\ncore built-in\ndisk_drive disk-drive.ko.xz\n")
    (directory / "release").write_text("6.12-test\n")
    return StockLinux(directory)


def test_modules_come_after_what_they_depend_on_and_without_what_is_built_in(tmp_path: Path) -> None:
    linux = fake_kernel(tmp_path)
    assert [name for name, _ in linux.modules_in_order(["disk-drive", "core", "bus"])] == ["bus", "disk_drive"]


def test_a_module_that_the_kernel_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(KernelUnavailable) as caught:
        fake_kernel(tmp_path).modules_in_order(["tape"])
    assert str(caught.value) == f"Linux 6.12-test in {tmp_path} has no module 'tape'"


@pytest.mark.kvmbox
def test_the_stock_kernel_has_a_pvh_entry(linux_vmlinux: Path) -> None:
    with linux_vmlinux.open("rb") as file:
        assert pvh_entry(file.read()) is not None


@pytest.mark.kvmbox
def test_the_same_script_gives_the_same_initramfs(stock_linux: StockLinux) -> None:
    assert archive("true\n", stock_linux, ["virtio_net"]) == archive("true\n", stock_linux, ["virtio_net"])
