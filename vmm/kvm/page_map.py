"""A set of pages of the guest's RAM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

from vmm.kvm._pages import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.kvm._pages import CData


@final
class PageMap:
    """A bit for each page, by its place in the RAM's memory object, all regions in a row. Empty at first.

    Not for two threads at a time.
    """

    def __init__(self, pages: int) -> None:
        self.pages: Final = pages
        self.words: Final[CData] = ffi.new("uint64_t[]", -(-pages // 64))
        """Little-endian words of 64 pages, for C; bits beyond the last page are clear."""

    @property
    def address(self) -> int:
        """Of the first word. Valid as long as this object."""
        return int(ffi.cast("uintptr_t", self.words))  # type: ignore[call-overload,no-any-return]

    def count(self, first: int = 0, end: int | None = None) -> int:
        """Return how many pages from `first` to before `end` are in the set."""
        return int(lib.tv_map_count(self.words, first, self._end(end)))

    def add(self, first: int, pages: int = 1) -> None:
        """Put `pages` pages from `first` on into the set."""
        lib.tv_map_set(self.words, first, self._end(first + pages))

    def discard(self, first: int, pages: int = 1) -> None:
        """Take `pages` pages from `first` on out of it."""
        lib.tv_map_clear(self.words, first, self._end(first + pages))

    def set_all(self) -> None:
        """Put every page into it."""
        self.add(0, self.pages)

    def clear(self) -> None:
        """Take every page out of it."""
        self.discard(0, self.pages)

    def merge(self, other: PageMap) -> None:
        """Put all that is in `other` into it."""
        lib.tv_map_merge(self.words, other.words, 0, self._end(other.pages))

    def first(self, page: int = 0, end: int | None = None) -> int:
        """Return the first page from `page` on that is in the set; `end` if there is none before that."""
        return int(lib.tv_map_next(self.words, page, self._end(end)))

    def runs(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (first page, pages) of what lies together, ascending."""
        last = self._end(end)
        while (first := self.first(first, last)) < last:
            after = int(lib.tv_map_next_clear(self.words, first, last))
            yield first, after - first
            first = after

    def dump(self) -> bytes:
        """Return its words, little-endian."""
        return ffi.buffer(self.words)[:]

    def load(self, words: bytes) -> None:
        """Undo `dump`, of a set of as many pages. Raises `ValueError` for one that has others."""
        size = len(ffi.buffer(self.words))
        if len(words) != size or int.from_bytes(words[-8:], "little") >> (self.pages - 1) % 64 + 1:
            raise ValueError(f"{len(words)} bytes, expected {size} for {self.pages} pages, and none beyond them")
        ffi.memmove(self.words, words, size)

    def __contains__(self, page: int) -> bool:
        return self.count(page, page + 1) == 1

    def __len__(self) -> int:
        return self.count()

    def _end(self, end: int | None) -> int:
        return self.pages if end is None else min(end, self.pages)
