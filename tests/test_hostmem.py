"""What guest RAM is made of, and what is let pass of what another process sent."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from typing import TYPE_CHECKING

import pytest

from vmm import hostio, hostmem
from vmm.errors import DescriptorWrongKind, HostFileRefused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")

SIZE = 1 << 20
MEMFD = f"a memfd of {SIZE} bytes or more, sealed against shrinking and not against writing, open to read and write"
FILE = f"a regular file of {SIZE} bytes or more, open to read and write"
ADD_SEALS, SHRINK, WRITE, FUTURE_WRITE = 1033, 0x2, 0x8, 0x10


def memfd(size: int = SIZE, *seals: int) -> int:
    fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    for seal in seals:
        fcntl.fcntl(fd, ADD_SEALS, seal)
    return fd


def read_only(fd: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


def file(path: Path, size: int = SIZE, flags: int = os.O_RDWR) -> int:
    path.write_bytes(b"")
    os.truncate(path, size)
    return os.open(path, flags | os.O_CLOEXEC)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: memfd(), "not sealed against shrinking"),
        (lambda path: memfd(SIZE - 4096, SHRINK), f"{SIZE - 4096} bytes long"),
        (lambda path: memfd(SIZE, SHRINK, WRITE), "sealed against writing"),
        (lambda path: memfd(SIZE, SHRINK, FUTURE_WRITE), "sealed against writing"),
        (lambda path: read_only(memfd(SIZE, SHRINK)), "not open to read and write"),
        (lambda path: file(path / "f"), "a file"),
        (lambda path: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), "a character device"),
        (lambda path: os.open(path, os.O_RDONLY | os.O_CLOEXEC), "a directory"),
        (lambda path: os.eventfd(0, os.EFD_CLOEXEC), "of an unknown kind"),
    ],
    ids=["unsealed", "short", "write", "future write", "read only", "file", "device", "directory", "eventfd"],
)
def test_a_memfd_that_could_harm_is_refused(make: Callable[[Path], int], found: str, tmp_path: Path) -> None:
    fd = make(tmp_path)
    try:
        with pytest.raises(DescriptorWrongKind) as caught:
            hostmem.require_ram(fd, "ram", "memfd", SIZE)
        assert str(caught.value) == f"Descriptor 'ram' is {found}, not {MEMFD}"
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: file(path / "f", SIZE - 1), f"{SIZE - 1} bytes long"),
        (lambda path: file(path / "f", flags=os.O_RDONLY), "not open to read and write"),
        (lambda path: file(path / "f", flags=os.O_WRONLY), "not open to read and write"),
        (lambda path: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), "a character device"),
    ],
    ids=["short", "read only", "write only", "device"],
)
def test_a_file_that_cannot_be_ram_is_refused(make: Callable[[Path], int], found: str, tmp_path: Path) -> None:
    fd = make(tmp_path)
    try:
        with pytest.raises(DescriptorWrongKind) as caught:
            hostmem.require_ram(fd, "object/m/memory", "file", SIZE)
        assert str(caught.value) == f"Descriptor 'object/m/memory' is {found}, not {FILE}"
    finally:
        os.close(fd)


def test_small_pages_are_no_huge_ones() -> None:
    fd = memfd(2 << 20, SHRINK)
    try:
        with pytest.raises(DescriptorWrongKind, match=r"is in pages of 4096 bytes, not a memfd of .* in pages of 2097"):
            hostmem.require_ram(fd, "ram", "memfd", 2 << 20, 2 << 20)
    finally:
        os.close(fd)


def test_what_is_made_passes(tmp_path: Path) -> None:
    fd = hostmem.create_memfd(SIZE, "x")
    hostmem.require_ram(fd, "x", "memfd", SIZE)
    os.close(fd)
    fd = hostmem.open_ram_file(str(tmp_path / "f"), SIZE)
    hostmem.require_ram(fd, "x", "file", SIZE)
    os.close(fd)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


def test_a_file_of_a_directory_has_no_name(tmp_path: Path) -> None:
    fd = hostmem.open_ram_file(str(tmp_path), SIZE)
    assert (os.listdir(tmp_path), os.fstat(fd).st_nlink, os.fstat(fd).st_size) == ([], 0, SIZE)
    os.close(fd)


def refusal(path: Path | str, size: int = SIZE) -> str:
    with pytest.raises(HostFileRefused) as caught:
        hostmem.open_ram_file(str(path), size)
    return str(caught.value)


def test_what_can_be_no_ram_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"x")
    assert refusal(short) == (
        f"Cannot use as RAM {short}: it has 1 bytes, fewer than the {SIZE} of the RAM; remove it, or give another size"
    )
    assert short.read_bytes() == b"x"
    assert refusal("/dev/null") == (
        "Cannot use as RAM /dev/null: it is a character device, not a regular file; "
        "give a file, also on a DAX file system"
    )
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == f"Cannot use as RAM {tmp_path}/pipe: it is a pipe, not a regular file"
    assert refusal(tmp_path / "no" / "f") == f"Cannot use as RAM {tmp_path}/no/f: No such file or directory"
    assert refusal("a\0b") == r"Cannot use as RAM 'a\x00b': a path has no NUL"


def test_a_file_that_cannot_have_the_size_is_not_left_behind(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - 1, limits[1]))
    try:
        assert refusal(tmp_path / "f") == f"Cannot use as RAM {tmp_path}/f: File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_file_is_the_ram_of_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "f"
    fd = hostmem.open_ram_file(str(path), SIZE)
    assert refusal(path) == (
        f"Cannot use as RAM {path}: it is locked: it is the RAM of another machine, which must end first"
    )
    # The lock is of what is open, not of who has it: with a duplicate it stays, and is no second one.
    copy = os.dup(fd)
    os.close(fd)
    hostmem.lock(copy, str(path))
    assert "it is locked" in refusal(path)
    os.close(copy)
    os.close(hostmem.open_ram_file(str(path), SIZE))


def test_room_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    fd = hostmem.open_ram_file(str(tmp_path / "f"), SIZE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limits[1]))
    try:
        with pytest.raises(HostFileRefused) as caught:
            hostmem.allocate(fd, 2 * SIZE, "f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        os.close(fd)
    assert str(caught.value) == f"Cannot allocate {2 * SIZE} bytes of f: File too large"


@pytest.mark.parametrize(("before", "after"), [(b"", 0), (b"RAM", SIZE)])
def test_a_disk_that_is_full_gets_back_what_was_taken_of_it(
    before: bytes, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = os.posix_fallocate

    def half(fd: int, start: int, size: int) -> None:
        allocate(fd, start, size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", half)
    with (tmp_path / "ram").open("wb+", buffering=0) as file:
        file.write(before)
        file.truncate(SIZE)
        with pytest.raises(HostFileRefused) as caught:
            hostmem.allocate(file.fileno(), SIZE, "f")
        assert str(caught.value) == f"Cannot allocate {SIZE} bytes of f: No space left on device"
        found = os.fstat(file.fileno())
        assert (found.st_size, bool(found.st_blocks)) == (after, bool(before))
        assert os.pread(file.fileno(), len(before), 0) == before


def test_huge_pages_that_are_not_there_are_named() -> None:
    if 2 << 20 not in hostmem.huge_page_sizes():
        pytest.skip("this host knows no huge pages of 2 MiB")
    terabyte = 1 << 40
    with pytest.raises(HostFileRefused) as caught:
        hostmem.create_memfd(terabyte, "m", 2 << 20)
    assert str(caught.value) == (
        f"Cannot reserve {terabyte} bytes of huge pages as memfd:m: Cannot allocate memory; "
        "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages says how many there are, and can be set"
    )


def test_a_size_must_be_of_whole_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostmem, "page_size_of", lambda fd: 2 << 20)  # as hugetlbfs has it
    assert refusal(tmp_path / "f") == (
        f"Cannot use as RAM {tmp_path}/f: its file system has pages of {2 << 20} bytes, of which {SIZE} is no multiple"
    )
    fd = file(tmp_path / "g")
    with pytest.raises(DescriptorWrongKind) as caught:
        hostmem.require_ram(fd, "m", "file", SIZE)
    assert (
        str(caught.value)
        == f"Descriptor 'm' is in pages of {2 << 20} bytes, of which {SIZE} is no multiple, not {FILE}"
    )
    os.close(fd)


def hugetlbfs() -> str | None:
    with open("/proc/mounts") as mounts:
        return next((line.split()[1] for line in mounts if line.split()[2] == "hugetlbfs"), None)


def test_huge_pages_that_a_file_lacks_are_named() -> None:
    where = hugetlbfs()
    if where is None or not os.access(where, os.W_OK):
        pytest.skip("no file system of huge pages is mounted where files can be made")
    path = f"{where}/trio-vmm-test-{os.getpid()}"
    terabyte = 1 << 40
    for name in (path, where):
        assert refusal(name, terabyte).startswith(
            f"Cannot use as RAM {name}: Cannot allocate memory; {hostmem.HUGE_PAGES}"
        )
    assert not os.path.exists(path)


# --- the mark of a state whose RAM has been left in a file ---------------------------------------------------

IDENTITY = bytes(range(16))


def test_a_mark_is_there_until_the_file_is_used(tmp_path: Path) -> None:
    path = tmp_path / "f"
    fd = hostmem.open_ram_file(str(path), SIZE)
    os.pwrite(fd, b"guest", SIZE - 5)
    assert hostmem.mark_of(fd, SIZE) is None
    hostmem.mark(fd, SIZE, IDENTITY)
    os.close(fd)
    fd = hostmem.open_ram_file(str(path), SIZE)
    assert hostmem.mark_of(fd, SIZE) == IDENTITY
    hostmem.mark(fd, SIZE, IDENTITY[::-1])
    assert hostmem.mark_of(fd, SIZE) == IDENTITY[::-1]
    hostmem.unmark(fd, SIZE)
    assert hostmem.mark_of(fd, SIZE) is None
    hostmem.unmark(fd, SIZE)
    assert (os.fstat(fd).st_size, os.pread(fd, 5, SIZE - 5)) == (SIZE, b"guest")
    os.close(fd)


def test_a_guest_cannot_mark_its_own_ram(tmp_path: Path) -> None:
    fd = hostmem.open_ram_file(str(tmp_path / "f"), SIZE)
    hostmem.mark(fd, SIZE, IDENTITY)
    page = os.pread(fd, 4096, SIZE)
    hostmem.unmark(fd, SIZE)
    os.ftruncate(fd, SIZE + 4096)
    os.pwrite(fd, page, SIZE)
    # The same file as the RAM of a larger machine: its last page is the guest's.
    assert hostmem.mark_of(fd, SIZE) == IDENTITY
    assert hostmem.mark_of(fd, SIZE + 4096) is None
    hostmem.unmark(fd, SIZE + 4096)
    assert os.fstat(fd).st_size == SIZE + 4096
    os.close(fd)


@pytest.mark.parametrize("at", [0, 15, 16, 31, 32, 39, 40, 43])
def test_a_damaged_mark_is_none(at: int, tmp_path: Path) -> None:
    fd = hostmem.open_ram_file(str(tmp_path / "f"), SIZE)
    hostmem.mark(fd, SIZE, IDENTITY)
    (byte,) = os.pread(fd, 1, SIZE + at)
    os.pwrite(fd, bytes([byte ^ 1]), SIZE + at)
    assert hostmem.mark_of(fd, SIZE) is None
    os.close(fd)


def test_a_mark_that_finds_no_room_is_an_error(tmp_path: Path) -> None:
    fd = hostmem.open_ram_file(str(tmp_path / "f"), SIZE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limits[1]))
    try:
        with pytest.raises(HostFileRefused, match=r"^Cannot write .*/f: File too large$"):
            hostmem.mark(fd, SIZE, IDENTITY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert hostmem.mark_of(fd, SIZE) is None
    os.close(fd)


def test_a_host_without_huge_pages_has_no_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostmem, "HUGE_PAGES", "/nowhere")
    assert hostmem.huge_page_sizes() == []


def test_what_cannot_be_locked_is_told() -> None:
    fd = read_only(hostio.create_ram(4096, "x"))  # as one that may not be written, which cannot be locked so
    with pytest.raises(HostFileRefused, match=r"^Cannot lock x: Bad file descriptor$"):
        hostmem.lock(fd, "x")
    os.close(fd)
