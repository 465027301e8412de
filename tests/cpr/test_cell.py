from __future__ import annotations

import fcntl
import mmap
import os
import socket
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.cpr.peer import no_descriptor_left
from vmm.cpr.cell import Owner, OwnershipCell
from vmm.errors import CprRefused, DescriptorWrongKind, HostFileRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    # Children of Python 3.12 and later; they do nothing that a thread could have locked.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

SIZE = mmap.PAGESIZE
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@pytest.fixture
def source() -> Iterator[OwnershipCell]:
    with closing(OwnershipCell.create()) as cell:
        yield cell


@pytest.fixture
def destination(source: OwnershipCell) -> Iterator[OwnershipCell]:
    with closing(OwnershipCell.adopt(os.dup(source.fd))) as cell:
        yield cell


def write(cell: OwnershipCell, word: int) -> None:
    os.pwrite(cell.fd, word.to_bytes(4, "little"), 0)


def test_a_new_cell_is_the_sources(source: OwnershipCell, destination: OwnershipCell) -> None:
    assert (source.owner, source.ours) == (Owner.SOURCE, True)
    assert (destination.owner, destination.ours) == (Owner.SOURCE, False)


def test_the_way_of_a_hand_over(source: OwnershipCell, destination: OwnershipCell) -> None:
    source.offer()
    assert (source.owner, source.ours, destination.ours) == (Owner.OFFERED, False, False)
    assert destination.take()
    assert (source.owner, source.ours, destination.ours) == (Owner.TAKEN, False, False)
    assert destination.run()
    assert (source.owner, source.ours, destination.ours) == (Owner.RUNNING, False, True)


def test_a_destination_may_make_the_cell_too() -> None:
    with (
        closing(OwnershipCell.create(ours=False)) as destination,
        closing(OwnershipCell.adopt(os.dup(destination.fd), ours=True)) as source,
    ):
        assert (source.ours, destination.ours) == (True, False)
        source.offer()
        assert destination.take()
        assert not source.take_back()
        assert not source.ours


def test_nothing_can_be_taken_that_is_not_offered(source: OwnershipCell, destination: OwnershipCell) -> None:
    assert not destination.take()
    assert not destination.run()
    assert (source.owner, source.ours, destination.ours) == (Owner.SOURCE, True, False)


def test_what_was_taken_back_is_not_there_to_take(source: OwnershipCell, destination: OwnershipCell) -> None:
    source.offer()
    assert source.take_back()
    assert not destination.take()
    assert (source.owner, source.ours) == (Owner.SOURCE, True)


def test_what_was_taken_cannot_be_taken_back_and_only_be_reclaimed(
    source: OwnershipCell, destination: OwnershipCell
) -> None:
    source.offer()
    assert destination.take()
    assert not source.take_back()
    assert source.reclaim()
    assert source.ours
    assert not destination.run()
    assert not destination.ours


def test_what_runs_can_neither_be_taken_back_nor_reclaimed(source: OwnershipCell, destination: OwnershipCell) -> None:
    source.offer()
    assert destination.take()
    assert destination.run()
    assert not source.take_back()
    assert not source.reclaim()
    assert not source.ours
    assert destination.ours


def test_a_cell_that_the_destination_wrote_to_is_not_offered_and_stays_the_sources(
    source: OwnershipCell, destination: OwnershipCell
) -> None:
    write(destination, Owner.TAKEN)
    with pytest.raises(CprRefused) as caught:
        source.offer()
    assert str(caught.value) == (
        "Live update refused by the source at step 'loaded': the destination wrote to the ownership cell unasked"
    )
    assert source.ours


def test_a_word_that_is_no_state_counts_as_running(source: OwnershipCell) -> None:
    write(source, 77)
    assert source.owner is Owner.RUNNING


def test_of_two_processes_that_swap_at_once_one_wins() -> None:
    """A child takes while its parent takes back, a thousand cells long."""
    rounds = 1000
    cells = [OwnershipCell.create() for _ in range(rounds)]
    ready_read, ready_write = os.pipe()
    result_read, result_write = os.pipe()
    child = os.fork()
    if not child:
        # The parent's views are of the same memory. Nothing but swaps and pipes here.
        os.read(ready_read, 1)
        os.write(result_write, bytes(cell.take() for cell in cells))
        os._exit(0)
    for cell in cells:
        cell.offer()
    os.write(ready_write, b"x")
    taken_back = bytes(cell.take_back() for cell in cells)
    os.waitpid(child, 0)
    taken = os.read(result_read, rounds + 1)
    assert len(taken) == rounds
    assert all(mine != theirs for mine, theirs in zip(taken_back, taken, strict=True))
    for mine, cell in zip(taken_back, cells, strict=True):
        assert cell.owner is (Owner.SOURCE if mine else Owner.TAKEN)
        assert cell.ours is bool(mine)
        cell.close()
    for fd in (ready_read, ready_write, result_read, result_write):
        os.close(fd)


def test_its_size_and_its_seals_cannot_be_changed(source: OwnershipCell) -> None:
    for size in (0, SIZE * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(source.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(source.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_it_is_closed_once(source: OwnershipCell) -> None:
    source.close()
    source.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(source.fd)


def memfd(size: int = SIZE, *, word: int = Owner.SOURCE, seals: int = SEALS) -> int:
    fd = os.memfd_create("cell", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if size:
        os.pwrite(fd, word.to_bytes(4, "little"), 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def read_only() -> int:
    fd = memfd()
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def pipe() -> int:
    read, write_end = os.pipe()
    os.close(write_end)
    return read


@pytest.mark.parametrize(
    ("make", "found", "wanted"),
    [
        (pipe, "no file", "a sealed memfd of 4096 bytes"),
        (lambda: socket.socket().detach(), "no file", "a sealed memfd of 4096 bytes"),
        (lambda: os.open("/dev/null", os.O_RDWR), "no file", "a sealed memfd of 4096 bytes"),
        (lambda: memfd(0), "a file of 0 bytes", "a sealed memfd of 4096 bytes"),
        (lambda: memfd(8192), "a file of 8192 bytes", "a sealed memfd of 4096 bytes"),
        (lambda: memfd(seals=0), "a file with seals 0x0", "a sealed memfd of 4096 bytes"),
        (lambda: memfd(seals=fcntl.F_SEAL_SHRINK), "a file with seals 0x2", "a sealed memfd of 4096 bytes"),
        (
            lambda: memfd(seals=SEALS | fcntl.F_SEAL_WRITE),
            "a file that can't be written",
            "a sealed memfd of 4096 bytes",
        ),
        (read_only, "a file that can't be written", "a sealed memfd of 4096 bytes"),
        (lambda: memfd(word=Owner.OFFERED), "a cell that says 2", "a fresh one"),
        (lambda: memfd(word=77), "a cell that says 77", "a fresh one"),
    ],
)
def test_what_is_no_fresh_cell_is_refused_and_closed(make: Callable[[], int], found: str, wanted: str) -> None:
    fd = make()
    with pytest.raises(DescriptorWrongKind) as caught:
        OwnershipCell.adopt(fd)
    assert str(caught.value) == f"Descriptor 'owner' is {found}, not {wanted}"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_file_on_disk_is_no_cell(tmp_path: object) -> None:
    fd = os.open(f"{tmp_path}/file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, SIZE)
    with pytest.raises(DescriptorWrongKind) as caught:
        OwnershipCell.adopt(fd)
    assert str(caught.value) == "Descriptor 'owner' is a file with seals 0x0, not a sealed memfd of 4096 bytes"


def test_without_a_descriptor_left_none_is_made() -> None:
    with no_descriptor_left(), pytest.raises(HostFileRefused) as caught:
        OwnershipCell.create()
    assert str(caught.value) == "Cannot create an ownership cell: Too many open files"


def test_without_a_descriptor_left_none_is_adopted_and_that_is_not_its_fault(source: OwnershipCell) -> None:
    sent = os.dup(source.fd)
    with no_descriptor_left(), pytest.raises(HostFileRefused) as caught:
        OwnershipCell.adopt(sent)
    assert str(caught.value) == "Cannot map an ownership cell: Too many open files"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(sent)
