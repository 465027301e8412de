"""Writes initramfs archives: cpio in the "newc" form, the same bytes for the same entries, device nodes without root.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from typing import Final, final

import attrs

_TRAILER: Final = "TRAILER!!!"
_ALIGNMENT: Final = 4
_END_ALIGNMENT: Final = 512


@final
@attrs.define
class Archive:
    """An archive in the making. Paths have no leading slash; a directory comes before what is in it."""

    _parts: list[bytes] = attrs.field(factory=list, init=False)
    _names: set[str] = attrs.field(factory=set, init=False)

    def add_directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory. One that is there already is left as it is."""
        if path not in self._names:
            self._add(path, stat.S_IFDIR | mode, links=2)

    def add_file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(path, stat.S_IFREG | mode, content)

    def add_link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def add_character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node. The kernel makes it when it unpacks the archive, so nobody needs root here."""
        self._add(path, stat.S_IFCHR | mode, device=(major, minor))

    def to_bytes(self) -> bytes:
        """The whole archive."""
        archive = b"".join([*self._parts, self._entry(_TRAILER, 0, b"", 1, (0, 0), inode=0)])
        return _padded(archive, _END_ALIGNMENT)

    def _add(
        self, path: str, mode: int, content: bytes = b"", links: int = 1, device: tuple[int, int] = (0, 0)
    ) -> None:
        if path.startswith("/") or path in self._names:
            raise ValueError(f"{path!r} is absolute or in the archive already")
        parent = path.rpartition("/")[0]
        if parent and parent not in self._names:
            raise ValueError(f"{path!r} comes before its directory {parent!r}")
        self._names.add(path)
        self._parts.append(self._entry(path, mode, content, links, device, inode=len(self._names)))

    @staticmethod
    def _entry(path: str, mode: int, content: bytes, links: int, device: tuple[int, int], inode: int) -> bytes:
        name = path.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, the file's device, the node's device, name size, checksum (unused)
        numbers = (inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers)
        return _padded(header + name, _ALIGNMENT) + _padded(content, _ALIGNMENT)


def _padded(data: bytes, to: int) -> bytes:
    return data + bytes(-len(data) % to)
