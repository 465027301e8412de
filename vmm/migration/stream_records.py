"""The records of a state stream: what each holds, and its payload as bytes.

Framing, order and checksums are `vmm.migration.stream`'s. All integers are little-endian. A decoder gets a payload
whose length is within the type's limit and whose checksum is right, and still treats it as hostile.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, final

import attrs

from vmm.errors import MigrationRefused, OptionInvalid, StateRejected
from vmm.migration.ram_records import RamPages, RamPass
from vmm.migration.section_payload import Misshapen, StateValue, canonical, decode_state, encode_state, parse_canonical
from vmm.migration.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Iterable

SECTION_LIMIT: Final = 16 << 20  # bytes of payload
RECIPE_LIMIT: Final = 4 << 20  # bytes of payload
EXTENTS_LIMIT: Final = 1 << 20  # bytes of payload
NAME_LIMIT: Final = 255  # bytes of UTF-8
RECIPE_DEPTH_LIMIT: Final = 64  # containers within each other
DIGEST_SIZE: Final = 32  # bytes, SHA-256
PAGE_SIZE: Final = 4096  # bytes

PROCESSOR: Final = "processor"
PROCESSOR_VERSION: Final = 1
"""The section that follows the recipe where a guest is copied: what its vCPUs answer to CPUID."""

_SECTION_FIXED: Final = struct.Struct("<II")  # version, bytes of JSON
_EXTENT: Final = struct.Struct("<QQ")  # guest-physical address, bytes
_WHERE: Final = struct.Struct("<I")
_IN_PLACE: Final = struct.Struct("<Q16s")  # bytes, identity
_MAPPED: Final = struct.Struct("<IIQQQQ")  # bytes of a page, zero, bitmap, checksums, pages, what follows
_MAPPED_SUMS: Final = struct.Struct("<QII")  # pages that are there, CRC-32C of bitmap and of checksums
_END: Final = struct.Struct("<II")  # records before this one, checksum over their headers

IDENTITY_SIZE: Final = 16  # bytes

_IN_SHARED_MEMORY: Final = 0
_IN_STREAM: Final = 1

MAPPED_ALIGNMENT: Final = 1 << 20  # bytes: where pages begin that have fixed places in a file

CONTENT_SIZE: Final = 1 << 20  # bytes of RAM in one record of content, at most
CONTENT_RUNS: Final = CONTENT_SIZE // PAGE_SIZE  # runs in one record, at most: each a page at least


@final
@attrs.frozen
class Header:
    """Record 0: whose state this is."""

    TYPE: ClassVar[int] = 1
    NOUN: ClassVar[str] = "header"
    LIMIT: ClassVar[int] = 2 + NAME_LIMIT + DIGEST_SIZE

    machine: str
    """The machine's name."""
    recipe_digest: bytes = b""
    """SHA-256 of the recipe that the state belongs to (`recipe_digest`); empty where it does not matter."""

    def payload(self) -> bytes:
        """Encode. Raises `OptionInvalid` for a name that does not fit."""
        if len(self.recipe_digest) not in (0, DIGEST_SIZE):
            raise ValueError(f"a recipe's digest has {DIGEST_SIZE} bytes, not {len(self.recipe_digest)}")
        try:
            name = _pack_name(self.machine)
        except Misshapen as error:
            raise OptionInvalid(
                option="Machine name", value=self.machine, wanted=f"1 to {NAME_LIMIT} bytes of UTF-8"
            ) from error
        return name + bytes([len(self.recipe_digest)]) + self.recipe_digest

    @classmethod
    def decode(cls, payload: bytes) -> Header:
        """Undo `payload`, or raise `Misshapen`."""
        machine, at = _unpack_name(payload)
        digest = payload[at + 1 :]
        if at == len(payload) or payload[at] != len(digest) or len(digest) not in (0, DIGEST_SIZE):
            raise Misshapen(f"no recipe digest of 0 or {DIGEST_SIZE} bytes after the name")
        return cls(machine, digest)


@final
@attrs.frozen
class Recipe:
    """Record 1 where there is one: the commands that build the machine."""

    TYPE: ClassVar[int] = 2
    NOUN: ClassVar[str] = "recipe"
    LIMIT: ClassVar[int] = RECIPE_LIMIT

    commands: tuple[Mapping[str, Any], ...]
    """Each `{"execute": name}` or `{"execute": name, "arguments": {…}}`, as QMP has it."""

    def payload(self) -> bytes:
        """Encode. Raises `MigrationRefused` for a recipe that does not fit."""
        try:
            text = canonical(list(self.commands))
            if len(text) > RECIPE_LIMIT:
                raise Misshapen(f"{len(text)} bytes, at most {RECIPE_LIMIT} fit")
            self.decode(text)
        except Misshapen as error:
            raise MigrationRefused(reason=f"The recipe does not fit into a state stream: {error}") from error
        return text

    @classmethod
    def decode(cls, payload: bytes) -> Recipe:
        """Undo `payload`, or raise `Misshapen`. The commands are checked as far as their form goes."""
        commands = parse_canonical(payload)
        if not isinstance(commands, list):
            raise Misshapen("no list of commands")
        for index, command in enumerate(commands):
            if not _is_command(command):
                raise Misshapen(f"element {index} is not {{execute: name}} with or without arguments: {{…}}")
            if not _within(command, RECIPE_DEPTH_LIMIT):
                raise Misshapen(f"element {index} has more than {RECIPE_DEPTH_LIMIT} containers within each other")
        return cls(tuple(commands))


@final
@attrs.frozen
class Section:
    """The state of one device, vCPU or chip."""

    TYPE: ClassVar[int] = 3
    NOUN: ClassVar[str] = "section"
    LIMIT: ClassVar[int] = SECTION_LIMIT

    name: str
    version: int
    """Of the section's own declaration; 32 bits."""
    state: Mapping[str, StateValue]

    def payload(self) -> bytes:
        """Encode. Raises `StateRejected` for a state that does not fit."""
        try:
            name = _pack_name(self.name)
            structure, blobs = encode_state(self.state)
            payload = b"".join((name, _SECTION_FIXED.pack(self.version, len(structure)), structure, *blobs))
            if len(payload) > SECTION_LIMIT:
                raise Misshapen(f"{len(payload)} bytes, at most {SECTION_LIMIT} fit")
        except Misshapen as error:
            raise StateRejected(section=self.name, faults=(f"{error}",)) from error
        return payload

    @classmethod
    def decode(cls, payload: bytes) -> Section:
        """Undo `payload`, or raise `Misshapen`."""
        name, at = _unpack_name(payload)
        if len(payload) < at + _SECTION_FIXED.size:
            raise Misshapen(f"{name!r}: ends before its version and size")
        version, size = _SECTION_FIXED.unpack_from(payload, at)
        at += _SECTION_FIXED.size
        if size > len(payload) - at:
            raise Misshapen(f"{name!r}: {size} bytes of JSON where {len(payload) - at} are left")
        try:
            state = decode_state(payload[at : at + size], memoryview(payload)[at + size :])
        except Misshapen as error:
            raise Misshapen(f"{name!r}: {error}") from error
        return cls(name, version, state)


@final
@attrs.frozen
class RamExtents:
    """Parts of the guest's RAM whose content belongs to this state."""

    TYPE: ClassVar[int] = 4
    NOUN: ClassVar[str] = "list of RAM extents"
    LIMIT: ClassVar[int] = EXTENTS_LIMIT

    extents: tuple[tuple[int, int], ...]
    """Guest-physical address and bytes of each: whole pages, ascending, apart from each other."""
    in_stream: bool = False
    """Whether the content is in the records of content that follow, zeros left out; else it is in the memory object
    whose descriptor was handed over."""

    def payload(self) -> bytes:
        """Encode. Raises `ValueError` for extents that are none."""
        where = _IN_STREAM if self.in_stream else _IN_SHARED_MEMORY
        payload = _WHERE.pack(where) + b"".join(_EXTENT.pack(*extent) for extent in self.extents)
        if len(payload) > EXTENTS_LIMIT:
            raise ValueError(f"{len(self.extents)} extents do not fit into one record; write several")
        self.decode(payload)
        return payload

    @classmethod
    def decode(cls, payload: bytes) -> RamExtents:
        """Undo `payload`, or raise `Misshapen`."""
        if len(payload) < _WHERE.size or (len(payload) - _WHERE.size) % _EXTENT.size:
            raise Misshapen(f"{len(payload)} bytes, expected {_WHERE.size} and {_EXTENT.size} for each extent")
        (where,) = _WHERE.unpack_from(payload)
        if where not in (_IN_SHARED_MEMORY, _IN_STREAM):
            raise Misshapen(
                f"content of kind {where}, only {_IN_SHARED_MEMORY} (in shared memory) and {_IN_STREAM} (in this "
                "stream) are read here"
            )
        return cls(_extents(memoryview(payload)[_WHERE.size :]), where == _IN_STREAM)


@final
@attrs.frozen
class RamContent:
    """What is in some pages of RAM: at most `CONTENT_SIZE` bytes, in runs of pages that lie together.

    The record is a table (number of runs; of each its guest-physical address and bytes) and then the bytes. What no
    record of a stream has is zero.
    """

    TYPE: ClassVar[int] = 5
    NOUN: ClassVar[str] = "content of RAM"
    LIMIT: ClassVar[int] = _WHERE.size + CONTENT_RUNS * _EXTENT.size + CONTENT_SIZE

    runs: tuple[tuple[int, int], ...]
    """As `RamExtents.extents`; at least one."""
    data: tuple[bytes | memoryview, ...]
    """Of each run."""

    def table(self) -> bytes:
        """Return what comes before the bytes."""
        return _WHERE.pack(len(self.runs)) + b"".join(_EXTENT.pack(*run) for run in self.runs)

    def payload(self) -> bytes:
        """Encode. Raises `ValueError` for runs that are none."""
        payload = b"".join((self.table(), *self.data))
        self.decode(payload)
        return payload

    @classmethod
    def decode(cls, payload: bytes) -> RamContent:
        """Undo `payload`, or raise `Misshapen`. The data are views of it."""
        view = memoryview(payload)
        count = _WHERE.unpack_from(payload)[0] if len(payload) >= _WHERE.size else 0
        at = _WHERE.size + count * _EXTENT.size
        if not 1 <= count <= CONTENT_RUNS or at > len(payload):
            raise Misshapen(f"no table of 1 to {CONTENT_RUNS} runs at its beginning")
        runs = _extents(view[_WHERE.size : at])
        if (size := sum(size for _, size in runs)) != len(payload) - at:
            raise Misshapen(f"{len(payload) - at} bytes of content, its table says {size}")
        data: list[memoryview] = []
        for _, size in runs:
            data.append(view[at : at + size])
            at += size
        return cls(runs, tuple(data))


def _extents(table: memoryview) -> tuple[tuple[int, int], ...]:
    extents = tuple(_EXTENT.iter_unpack(table))
    end = 0
    for address, size in extents:
        if address < end or not size or (address | size) % PAGE_SIZE or address + size > 1 << 64:
            raise Misshapen(f"extent {address:#x} of {size:#x} bytes is empty, misaligned or out of order")
        end = address + size
    return extents


@final
@attrs.frozen
class RamInPlace:
    """All of the guest's RAM is in a file of its host, where it was left."""

    TYPE: ClassVar[int] = 6
    NOUN: ClassVar[str] = "notice of RAM in place"
    LIMIT: ClassVar[int] = 1 + NAME_LIMIT + _IN_PLACE.size

    name: str
    """What its back end is called."""
    size: int
    """Bytes."""
    identity: bytes
    """With which the file is marked, `IDENTITY_SIZE` bytes: of this save and no other."""

    def payload(self) -> bytes:
        """Encode. Raises `ValueError` for an identity that is none."""
        if len(self.identity) != IDENTITY_SIZE:
            raise ValueError(f"an identity has {IDENTITY_SIZE} bytes, not {len(self.identity)}")
        return _pack_name(self.name) + _IN_PLACE.pack(self.size, self.identity)

    @classmethod
    def decode(cls, payload: bytes) -> RamInPlace:
        """Undo `payload`, or raise `Misshapen`."""
        name, at = _unpack_name(payload)
        if len(payload) != at + _IN_PLACE.size:
            raise Misshapen(f"{len(payload) - at} bytes after the name, expected {_IN_PLACE.size}")
        return cls(name, *_IN_PLACE.unpack_from(payload, at))


@final
@attrs.frozen
class RamMapped:
    """All of the guest's RAM is in this file, each page at its fixed place; here is where.

    Places are bytes from the beginning of the stream. The pages of all extents are in one row, without gaps.
    """

    TYPE: ClassVar[int] = 11
    NOUN: ClassVar[str] = "map of RAM in the file"
    LIMIT: ClassVar[int] = _MAPPED.size + EXTENTS_LIMIT

    extents: tuple[tuple[int, int], ...]
    """As in `RamExtents`."""
    bitmap: int
    """One bit for each page that is not zero, in little-endian words of 64."""
    sums: int
    """The CRC-32C of each page, 4 bytes; of one that is zero, 0."""
    area: int
    """Page 0."""
    onward: int
    """The record that follows this one."""

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return sum(size for _, size in self.extents) // PAGE_SIZE

    @property
    def bitmap_size(self) -> int:
        """Bytes."""
        return -(-self.pages // 64) * 8

    @classmethod
    def after(cls, at: int, extents: tuple[tuple[int, int], ...], start: int) -> RamMapped:
        """Lay the pages out behind this record.

        Args:
            at: where this record's payload begins in the stream.
            start: where the stream begins in the file, in which `area` is a multiple of `MAPPED_ALIGNMENT`.
        """
        plan = cls(extents, 0, 0, 0, 0)
        bitmap = _round_up(at + _MAPPED.size + len(extents) * _EXTENT.size, PAGE_SIZE)
        sums = _round_up(bitmap + plan.bitmap_size, PAGE_SIZE)
        area = _round_up(start + sums + 4 * plan.pages, MAPPED_ALIGNMENT) - start
        return cls(extents, bitmap, sums, area, area + plan.pages * PAGE_SIZE)

    def payload(self) -> bytes:
        """Encode. Raises `ValueError` for places that cannot be."""
        payload = _MAPPED.pack(PAGE_SIZE, 0, self.bitmap, self.sums, self.area, self.onward)
        payload += b"".join(_EXTENT.pack(*extent) for extent in self.extents)
        self.decode(payload)
        return payload

    @classmethod
    def decode(cls, payload: bytes) -> RamMapped:
        """Undo `payload`, or raise `Misshapen`."""
        if len(payload) <= _MAPPED.size or (len(payload) - _MAPPED.size) % _EXTENT.size:
            raise Misshapen(f"{len(payload)} bytes, expected {_MAPPED.size} and {_EXTENT.size} for each extent")
        page_size, zero, *places = _MAPPED.unpack_from(payload)
        if (page_size, zero) != (PAGE_SIZE, 0):
            raise Misshapen(f"pages of {page_size} bytes and {zero}, expected {PAGE_SIZE} and 0")
        found = cls(_extents(memoryview(payload)[_MAPPED.size :]), *places)
        ends = (found.bitmap + found.bitmap_size, found.sums + 4 * found.pages, found.area + found.pages * PAGE_SIZE)
        if any(end > begin for end, begin in zip(ends, places[1:], strict=True)) or found.onward >= 1 << 62:
            raise Misshapen(f"bitmap, checksums, pages and what follows at {places}, which are too near to each other")
        return found


@final
@attrs.frozen
class RamMappedSums:
    """What was written where `RamMapped` says, once all of it is there."""

    TYPE: ClassVar[int] = 12
    NOUN: ClassVar[str] = "checksums of the map of RAM"
    LIMIT: ClassVar[int] = _MAPPED_SUMS.size

    present: int
    """How many pages are in the file."""
    bitmap: int
    """CRC-32C of the bitmap."""
    sums: int
    """CRC-32C of the table of checksums."""

    def payload(self) -> bytes:
        """Encode."""
        return _MAPPED_SUMS.pack(self.present, self.bitmap, self.sums)

    @classmethod
    def decode(cls, payload: bytes) -> RamMappedSums:
        """Undo `payload`, or raise `Misshapen`."""
        if len(payload) != _MAPPED_SUMS.size:
            raise Misshapen(f"{len(payload)} bytes, expected {_MAPPED_SUMS.size}")
        return cls(*_MAPPED_SUMS.unpack(payload))


@final
@attrs.frozen
class RamAbsent:
    """The pages that the destination has not got, or not as they are, while the guest begins to run there."""

    TYPE: ClassVar[int] = 13
    NOUN: ClassVar[str] = "list of absent pages"
    LIMIT: ClassVar[int] = 64 << 20  # that of 2 TiB

    words: bytes
    """One bit for each page of all extents in a row, in little-endian words of 64."""

    def payload(self) -> bytes:
        """Encode."""
        return self.words

    @classmethod
    def decode(cls, payload: bytes) -> RamAbsent:
        """Undo `payload`, or raise `Misshapen`."""
        if not payload or len(payload) % 8:
            raise Misshapen(f"{len(payload)} bytes, expected words of 8")
        return cls(payload)


@final
@attrs.frozen
class Home:
    """The commands that belong to the machine where it was and not to its guest: those of its monitors.

    Whoever goes on with the machine in the same place has them again. Others leave the record out.
    """

    TYPE: ClassVar[int] = 7
    NOUN: ClassVar[str] = "list of what stays at home"
    LIMIT: ClassVar[int] = RECIPE_LIMIT

    commands: tuple[Mapping[str, Any], ...]
    """As in `Recipe`."""

    def payload(self) -> bytes:
        """Encode. Raises `MigrationRefused` where it does not fit."""
        return Recipe(self.commands).payload()

    @classmethod
    def decode(cls, payload: bytes) -> Home:
        """Undo `payload`, or raise `Misshapen`."""
        return cls(Recipe.decode(payload).commands)


@final
@attrs.frozen
class End:
    """The last record. Nothing follows it."""

    TYPE: ClassVar[int] = 0xFFFF
    NOUN: ClassVar[str] = "end"
    LIMIT: ClassVar[int] = _END.size

    records: int
    """How many records there were before this one."""
    checksum: int
    """CRC-32 over the preamble and the headers of all records before this one, and so over all content."""

    def payload(self) -> bytes:
        """Encode."""
        return _END.pack(self.records, self.checksum)

    @classmethod
    def decode(cls, payload: bytes) -> End:
        """Undo `payload`, or raise `Misshapen`."""
        if len(payload) != _END.size:
            raise Misshapen(f"{len(payload)} bytes, expected {_END.size}")
        return cls(*_END.unpack(payload))


Record: TypeAlias = (
    Header
    | Recipe
    | Section
    | RamExtents
    | RamContent
    | RamInPlace
    | RamMapped
    | RamMappedSums
    | RamAbsent
    | Home
    | Terms
    | RamPages
    | RamPass
    | End
)


def recipe_digest(commands: Iterable[Mapping[str, Any]]) -> bytes:
    """Return the SHA-256 of a recipe as the stream would carry it. Raises `MigrationRefused` as `Recipe.payload`."""
    import hashlib  # takes its time to load, and a machine that is never migrated does without

    return hashlib.sha256(Recipe(tuple(commands)).payload()).digest()


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _pack_name(name: str) -> bytes:
    try:
        text = name.encode()
    except UnicodeEncodeError as error:
        raise Misshapen("its name is not Unicode") from error
    if not 1 <= len(text) <= NAME_LIMIT:
        raise Misshapen(f"its name has {len(text)} bytes, 1 to {NAME_LIMIT} fit")
    return bytes([len(text)]) + text


def _unpack_name(payload: bytes) -> tuple[str, int]:
    """Return the name that `payload` begins with, and where it ends."""
    end = 1 + payload[0] if payload else 0
    if not 2 <= end <= len(payload):
        raise Misshapen(f"no name of 1 to {NAME_LIMIT} bytes at its beginning")
    try:
        return payload[1:end].decode(), end
    except UnicodeDecodeError as error:
        raise Misshapen("a name that is not UTF-8") from error


def _is_command(command: object) -> bool:
    return (
        isinstance(command, dict)
        and isinstance(command.get("execute"), str)
        and isinstance(command.get("arguments", {}), dict)
        and not command.keys() - {"execute", "arguments"}
    )


def _within(value: object, depth: int) -> bool:
    """Say whether `value` has at most `depth` containers within each other."""
    if not isinstance(value, (dict, list)):
        return True
    items = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_within(item, depth - 1) for item in items)
