"""Which record of a state stream may come where, and how often.

`vmm.migration.stream` shows it one record after the other, none of which is missing or damaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

from vmm.migration.ram_file_records import RamMapped
from vmm.migration.ram_records import RamContent, RamExtents, RamPages, RamPass, Switchover
from vmm.migration.stream_records import PAGES_VERSION, Header, Recipe, Section, noun
from vmm.migration.terms import Terms

if TYPE_CHECKING:
    from vmm.migration.stream_records import Record

_HEADER_NUMBER: Final = 0
RECIPE_NUMBER: Final = 1
SECTIONS_LIMIT: Final = 4096

UNLIMITED: Final = (RamContent, RamPages, RamPass)
"""What RAM comes in: of these there may be any number, of any size in all, as far as the extents go."""


_OF_PAGES: Final = (RamPages.TYPE, RamPass.TYPE, Switchover.TYPE)


class Misplaced(ValueError):
    """A record where the format has no place for it. Caught by `vmm.migration.stream`, which says where."""


@final
class RecordOrder:
    """Follows one stream."""

    def __init__(self, *, seekable: bool) -> None:
        self._seekable: Final = seekable  # whether pages may have fixed places in it
        self._names: Final[set[str]] = set()
        self._ram: Final = _RamOrder()
        self._mapped = False  # whether its pages have fixed places
        self._switches = False  # whether it says that the guest is about to stand
        self._unlimited = 0  # how many of these records there were

    def check_kind(self, kind: int, number: int, version: int) -> None:
        """Check what the head of the record that comes next says: its type.

        Args:
            number: the record's own, from 0.
            version: the stream's.

        Raises:
            Misplaced: it has no place there.
        """
        if (kind == Header.TYPE) != (number == _HEADER_NUMBER):
            raise Misplaced(f"{noun(kind)}, expected the header as record 0 and nowhere else")
        if kind == Recipe.TYPE and number != RECIPE_NUMBER:
            raise Misplaced("recipe, expected as record 1 or not at all")
        if kind in (Terms.TYPE, *_OF_PAGES) and version < PAGES_VERSION:
            raise Misplaced(f"{noun(kind)}, which format version {version} has not")
        if kind in _OF_PAGES and not self._ram.listed:
            raise Misplaced(f"{noun(kind)}, expected after the RAM extents")
        if number - self._unlimited > 3 * SECTIONS_LIMIT:
            raise Misplaced(f"at most {3 * SECTIONS_LIMIT} records are read")

    def take(self, record: Record, end: int) -> None:
        """Take in the record that came, which ends `end` bytes after the stream's beginning.

        Raises:
            Misplaced: it has no place there, for what it holds.
        """
        if isinstance(record, Section):
            if record.name in self._names:
                raise Misplaced(f"section {record.name!r} is there a second time")
            if len(self._names) == SECTIONS_LIMIT:
                raise Misplaced(f"section {record.name!r}, at most {SECTIONS_LIMIT} sections are read")
            self._names.add(record.name)
        elif isinstance(record, (RamExtents, RamContent)):
            self._ram.take(record)
        elif isinstance(record, RamMapped):
            self._take_map(record, end)
        elif isinstance(record, Switchover):
            if self._switches:
                raise Misplaced(f"a second {record.NOUN}")
            self._switches = True
            self._names.clear()  # a section that has changed comes once more
        if isinstance(record, UNLIMITED):
            self._unlimited += 1

    def _take_map(self, record: RamMapped, end: int) -> None:
        if not self._seekable:
            raise Misplaced(f"{record.NOUN}, which only a file can have")
        if self._mapped or record.bitmap < end:
            raise Misplaced(f"{record.NOUN}, a second one, or with its bitmap at {record.bitmap}, before {end}")
        self._mapped = True


@final
class _RamOrder:
    """Follows extents and content of RAM through a stream: no byte comes twice, or from outside the extents."""

    def __init__(self) -> None:
        self._extents: list[tuple[int, int]] = []
        self._listed = 0  # end of the last extent
        self._at = 0  # end of the last run of content

    @property
    def listed(self) -> bool:
        """Whether there were extents whose content is in the stream."""
        return self._listed > 0

    def take(self, record: RamExtents | RamContent) -> None:
        """Follow one record. Raises `Misplaced` where it is out of place."""
        if isinstance(record, RamContent):
            for address, size in record.runs:
                self._take_run(address, size)
        elif record.in_stream:
            for address, size in record.extents:
                if address < self._listed:
                    raise Misplaced(
                        f"a misplaced {record.NOUN}: extent {address:#x} of {size:#x} bytes begins before the end of "
                        "one before it"
                    )
                self._extents.append((address, address + size))
                self._listed = address + size

    def _take_run(self, address: int, size: int) -> None:
        while self._extents and self._extents[0][1] <= address:
            self._extents.pop(0)
        if address < self._at or not self._extents or not _inside(address, size, self._extents[0]):
            raise Misplaced(
                f"a misplaced {RamContent.NOUN}: {size:#x} bytes at {address:#x} are outside its extents, or not after "
                "what came before"
            )
        self._at = address + size


def _inside(address: int, size: int, extent: tuple[int, int]) -> bool:
    start, end = extent
    return start <= address and address + size <= end
