"""A directory of snapshots: a file is there whole, under its tag, or not at all."""

from __future__ import annotations

import errno
import os
import re
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
import trio

from vmm import host_dirs, hostio
from vmm.backends.snapshots import SnapshotDirectory
from vmm.errors import BackendNotFound, DescriptorWrongKind, HostFileRefused, NameTaken, OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def directory(no_leaks: None, tmp_path: Path) -> Iterator[SnapshotDirectory]:
    with closing(SnapshotDirectory(hostio.open_directory(str(tmp_path)), str(tmp_path))) as made:
        yield made


def save(directory: SnapshotDirectory, tag: str, content: bytes = b"state") -> None:
    with closing(directory.begin(tag)) as part:
        fd = part.writer()
        os.write(fd, content)
        os.close(fd)
        part.finish()


def test_what_was_finished_is_there_for_its_owner_alone(directory: SnapshotDirectory, tmp_path: Path) -> None:
    save(directory, "before.1")
    save(directory, "a")
    assert sorted(os.listdir(tmp_path)) == ["a.tvmm", "before.1.tvmm"]
    assert (tmp_path / "a.tvmm").stat().st_mode & 0o777 == 0o600
    assert directory.tags() == ["a", "before.1"]
    fd = directory.open("a")
    assert os.read(fd, 100) == b"state"
    os.close(fd)
    directory.remove("a")
    assert directory.tags() == ["before.1"]


def test_what_was_not_finished_has_never_been_there(directory: SnapshotDirectory, tmp_path: Path) -> None:
    with closing(directory.begin("a")):
        assert directory.tags() == []
        (name,) = os.listdir(tmp_path)
        assert re.fullmatch(r"\.a\.[0-9a-f]{16}\.part", name)
    assert os.listdir(tmp_path) == []


def test_a_tag_is_given_once_however_late_the_other_comes(directory: SnapshotDirectory, tmp_path: Path) -> None:
    with closing(directory.begin("a")) as part:
        save(directory, "a", b"first")
        with pytest.raises(NameTaken, match="Snapshot 'a' exists already; choose another name"):
            part.finish()
    with pytest.raises(NameTaken):
        directory.begin("a")
    assert (tmp_path / "a.tvmm").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.tvmm"]
    (tmp_path / "b.tvmm").symlink_to("nowhere")
    with pytest.raises(NameTaken):
        directory.begin("b")


@pytest.mark.parametrize("tag", ["", ".", "..", ".a", "a/b", "../a", "a\0", "a b", "é", "-a", "a" * 128, "a\n"])
def test_a_tag_is_a_name_and_no_path(directory: SnapshotDirectory, tag: str) -> None:
    for use in (directory.begin, directory.open, directory.remove):
        with pytest.raises(OptionInvalid) as caught:
            use(tag)
        assert str(caught.value) == (
            f"tag: {tag!r} is not a tag: a letter or a digit, then letters, digits, '-', '_' and '.', "
            "at most 127 in all"
        )


def test_what_is_not_there_is_told_with_what_is(directory: SnapshotDirectory) -> None:
    with pytest.raises(BackendNotFound, match="Snapshot 'x' does not exist; there are: none"):
        directory.open("x")
    save(directory, "a")
    save(directory, "b")
    with pytest.raises(BackendNotFound, match="Snapshot 'x' does not exist; there are: a, b"):
        directory.remove("x")


def test_names_of_others_are_not_tags(directory: SnapshotDirectory, tmp_path: Path) -> None:
    for name in ("notes", ".a.tvmm", "é.tvmm", ".a.0123456789abcdef.part"):
        (tmp_path / name).touch()
    assert directory.tags() == []


def test_a_link_is_not_followed_and_what_is_no_file_is_not_read(directory: SnapshotDirectory, tmp_path: Path) -> None:
    (tmp_path / "link.tvmm").symlink_to("/etc/passwd")
    (tmp_path / "dir.tvmm").mkdir()
    with pytest.raises(HostFileRefused) as caught:
        directory.open("link")
    assert str(caught.value) == f"Cannot read {tmp_path}/link.tvmm: {os.strerror(errno.ELOOP)}"
    with pytest.raises(HostFileRefused) as caught:
        directory.open("dir")
    assert str(caught.value) == f"Cannot read {tmp_path}/dir.tvmm: it is a directory, not a regular file"
    with pytest.raises(HostFileRefused) as caught:
        directory.remove("dir")
    assert str(caught.value) == f"Cannot remove {tmp_path}/dir.tvmm: {os.strerror(errno.EISDIR)}"


def test_what_a_writer_has_left_that_died_is_removed_and_what_one_writes_is_not(
    directory: SnapshotDirectory, tmp_path: Path
) -> None:
    (tmp_path / ".a.0123456789abcdef.part").touch()
    (tmp_path / ".b.0123456789abcdef.part").mkdir()
    (tmp_path / ".notes.part").touch()
    with closing(directory.begin("c")) as part:
        directory.sweep()
        assert len(os.listdir(tmp_path)) == 3
        part.finish()
    assert sorted(os.listdir(tmp_path)) == [".b.0123456789abcdef.part", ".notes.part", "c.tvmm"]


def test_what_is_swept_before_it_is_locked_is_made_again(
    directory: SnapshotDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = hostio.lock_saved_state

    def sweeps(fd: int, path: str) -> bool:
        monkeypatch.setattr(hostio, "lock_saved_state", lock)
        directory.sweep()
        return lock(fd, path)

    monkeypatch.setattr(hostio, "lock_saved_state", sweeps)
    save(directory, "a")
    assert os.listdir(tmp_path) == ["a.tvmm"]


@pytest.mark.parametrize("broken", ["file", "directory"])
def test_a_disk_that_fails_leaves_no_snapshot(
    directory: SnapshotDirectory, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fail(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}") is (broken == "directory"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fail)
    with closing(directory.begin("a")) as part, pytest.raises(HostFileRefused) as caught:
        part.finish()
    assert str(caught.value) == f"Cannot write {tmp_path}/a.tvmm: Input/output error"
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_gone_is_told(directory: SnapshotDirectory, tmp_path: Path) -> None:
    os.rename(tmp_path, f"{tmp_path}.old")
    save(directory, "a")  # it is the directory that was opened, whatever its name
    assert os.listdir(f"{tmp_path}.old") == ["a.tvmm"]
    os.unlink(f"{tmp_path}.old/a.tvmm")
    os.rmdir(f"{tmp_path}.old")
    with pytest.raises(HostFileRefused) as caught:
        directory.begin("a")
    assert str(caught.value) == f"Cannot write {tmp_path}/a.tvmm: No such file or directory"


def test_what_was_to_be_done_in_a_directory_that_is_deleted_meanwhile_is_refused(tmp_path: Path) -> None:
    made = SnapshotDirectory(hostio.open_directory(str(tmp_path)), str(tmp_path))
    save(made, "a")
    made.close()
    for use, tag in ((made.begin, "b"), (made.open, "a"), (made.remove, "a")):
        with pytest.raises(HostFileRefused, match=r"Cannot use .*: its object has been deleted meanwhile"):
            use(tag)


def test_what_is_no_directory_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(HostFileRefused, match=f"Cannot read {tmp_path}/f: Not a directory"):
        hostio.open_directory(str(tmp_path / "f"))
    fd = hostio.open_input_file(str(tmp_path / "f"))
    with pytest.raises(DescriptorWrongKind) as caught:
        host_dirs.adopt_directory(fd, "object/s/directory")
    assert str(caught.value) == "Descriptor 'object/s/directory' is a regular file, not a directory"


async def test_its_descriptor_ends_with_its_task(tmp_path: Path) -> None:
    made, found = SnapshotDirectory(hostio.open_directory(str(tmp_path)), str(tmp_path)), os.stat(tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(made.serve)
        assert os.path.samestat(os.fstat(made.descriptors()["directory"]), found)
        nursery.cancel_scope.cancel()
