"""A directory of snapshots: one file for each, whole or not there, under the name of its tag.

What is being written has a name that no tag can have, and is locked meanwhile. So whoever finds such a file unlocked
knows that its writer has died, and removes it.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Final, final

from vmm import host_dirs, hostio
from vmm.backends.held import Held
from vmm.errors import BackendNotFound, HostFileRefused, NameTaken, OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping

SUFFIX: Final = ".tvmm"

_TAG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,126}")
_PART: Final = re.compile(r"\.[A-Za-z0-9][A-Za-z0-9_.-]{0,126}\.[0-9a-f]{16}\.part")


@final
class SnapshotDirectory(Held):
    """Owns the directory's descriptor. Whatever becomes of its path, snapshots are in the directory that was opened.

    Nothing here waits for anybody, but the disk.

    Args:
        path: for texts.
    """

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self.path: Final = path

    def descriptors(self) -> Mapping[str, int]:
        """Return what a successor needs, by the last part of its name."""
        return {"directory": self._fd}

    def close(self) -> None:
        """Close it. A snapshot that is to be made or removed by then is refused."""
        fd, self._fd = self._fd, -1
        os.close(fd)

    def tags(self) -> list[str]:
        """Return the tags of all snapshots, in order. Raises `HostFileRefused`."""
        tags = (name.removesuffix(SUFFIX) for name in self._names() if name.endswith(SUFFIX))
        return sorted(tag for tag in tags if _TAG.fullmatch(tag))

    def require_new(self, tag: str) -> None:
        """Raise `OptionInvalid` if `tag` can be none, `NameTaken` if there is such a snapshot; `HostFileRefused`."""
        self._require_tag(tag)
        if os.access(f"{tag}{SUFFIX}", os.F_OK, dir_fd=self._fd, follow_symlinks=False):
            raise NameTaken(what="Snapshot", name=tag)

    def require(self, tag: str) -> None:
        """Raise `OptionInvalid` if `tag` can be none, `BackendNotFound` if it is of none; `HostFileRefused`."""
        self._require_tag(tag)
        if not os.access(f"{tag}{SUFFIX}", os.F_OK, dir_fd=self._fd, follow_symlinks=False):
            known = f"; there are: {', '.join(self.tags()) or 'none'}"
            raise BackendNotFound(what="Snapshot", name=tag, known=known)

    def path_of(self, tag: str) -> str:
        """Return the path of a snapshot's file, for texts."""
        return os.path.join(self.path, f"{tag}{SUFFIX}")

    def open(self, tag: str) -> int:
        """Open the file of a snapshot. Raises as `require`, and `HostFileRefused`."""
        self.require(tag)
        return host_dirs.open_within(self._fd, f"{tag}{SUFFIX}", self.path_of(tag))

    def begin(self, tag: str) -> Unfinished:
        """Begin a snapshot. Raises as `require_new`, and `HostFileRefused`."""
        self.require_new(tag)
        return Unfinished(self._fd, tag, self.path_of(tag))

    def remove(self, tag: str) -> None:
        """Remove a snapshot, on disk too. Raises as `require`, and `HostFileRefused`."""
        self.require(tag)
        try:
            os.unlink(f"{tag}{SUFFIX}", dir_fd=self._fd)
            os.fsync(self._fd)
        except OSError as error:
            raise hostio.refused("remove", self.path_of(tag), error) from error

    def sweep(self) -> None:
        """Remove what writers have left that have died. Whatever cannot be removed stays."""
        for name in self._names():
            if not _PART.fullmatch(name):
                continue
            with suppress(HostFileRefused, OSError):
                fd = host_dirs.open_within(self._fd, name, name)
                try:
                    if hostio.lock_saved_state(fd, name):
                        os.unlink(name, dir_fd=self._fd)
                finally:
                    os.close(fd)

    def _require_tag(self, tag: str) -> None:
        if not _TAG.fullmatch(tag):
            wanted = "a tag: a letter or a digit, then letters, digits, '-', '_' and '.', at most 127 in all"
            raise OptionInvalid(option="tag", value=tag, wanted=wanted)
        if self._fd < 0:
            raise HostFileRefused(action="use", path=self.path, reason="its object has been deleted meanwhile")

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._fd)
        except OSError as error:
            raise hostio.refused("read", self.path, error) from error


@final
class Unfinished:
    """A snapshot that is being written. It is not there before `finish`, and never if that does not come."""

    def __init__(self, directory: int, tag: str, path: str) -> None:
        """Make its file. Raises `HostFileRefused`."""
        self._directory: Final = directory
        self._tag: Final = tag
        self._path: Final = path
        while not self._make():
            self.close()  # whoever cleans up took it for one whose writer has died

    def _make(self) -> bool:
        """Make its file under its first name; return whether it is locked, and has that name."""
        self._name = f".{self._tag}.{secrets.token_hex(8)}.part"
        self._fd = host_dirs.create_within(self._directory, self._name, self._path)
        self._done = False
        try:
            return hostio.lock_saved_state(self._fd, self._path) and os.fstat(self._fd).st_nlink > 0
        except BaseException:
            self.close()
            raise

    def writer(self) -> int:
        """Return a descriptor of its own to write it by."""
        return hostio.dup(self._fd)

    def finish(self) -> None:
        """Put it on disk, and give it its name. Blocks as long as the disk takes; for a thread.

        Raises:
            HostFileRefused: the disk won't. It is not there then.
            NameTaken: another one has that name by now.
        """
        try:
            os.fsync(self._fd)
            os.link(self._name, f"{self._tag}{SUFFIX}", src_dir_fd=self._directory, dst_dir_fd=self._directory)
            try:
                os.fsync(self._directory)
            except OSError:
                os.unlink(f"{self._tag}{SUFFIX}", dir_fd=self._directory)
                raise
        except FileExistsError as error:
            raise NameTaken(what="Snapshot", name=self._tag) from error
        except OSError as error:
            raise hostio.refused("write", self._path, error) from error

    def close(self) -> None:
        """Take its first name away, and close it. What was finished stays. Idempotent."""
        if not self._done:
            self._done = True
            with suppress(OSError):
                os.unlink(self._name, dir_fd=self._directory)
            os.close(self._fd)
