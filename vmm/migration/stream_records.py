"""The records of a state stream: what each holds, and its payload as bytes.

Those of RAM are in `vmm.migration.ram_records` and `ram_file_records`, the terms of a migration in `terms`.
Framing and checksums are `vmm.migration.stream`'s, order is `stream_order`'s. All integers are little-endian. A decoder
gets a payload whose length is within the type's limit and whose checksum is right, and still treats it as hostile.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, final, get_args

import attrs

from vmm.errors import MigrationRefused, OptionInvalid, StateRejected
from vmm.migration.ram_file_records import RamInPlace, RamMapped, RamMappedSums
from vmm.migration.ram_records import RamAbsent, RamContent, RamExtents, RamPages, RamPass, Switchover
from vmm.migration.record_fields import NAME_LIMIT, pack_name, unpack_fixed, unpack_name
from vmm.migration.section_payload import Misshapen, StateValue, canonical, decode_state, encode_state, parse_canonical
from vmm.migration.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMAT_VERSION: Final = 1
PAGES_VERSION: Final = 2
"""Of a stream with terms and pages."""

SECTION_LIMIT: Final = 16 << 20  # bytes of payload
RECIPE_LIMIT: Final = 4 << 20  # bytes of payload
RECIPE_DEPTH_LIMIT: Final = 64  # containers within each other
DIGEST_SIZE: Final = 32  # bytes, SHA-256

PROCESSOR: Final = "processor"
PROCESSOR_VERSION: Final = 1
"""The section that follows the recipe where a guest is copied: what its vCPUs answer to CPUID."""

_SECTION_FIXED: Final = struct.Struct("<II")  # version, bytes of JSON
_END: Final = struct.Struct("<II")  # records before this one, checksum over their headers


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
            name = pack_name(self.machine)
        except Misshapen as error:
            raise OptionInvalid(
                option="Machine name", value=self.machine, wanted=f"1 to {NAME_LIMIT} bytes of UTF-8"
            ) from error
        return name + bytes([len(self.recipe_digest)]) + self.recipe_digest

    @classmethod
    def decode(cls, payload: bytes) -> Header:
        """Undo `payload`, or raise `Misshapen`."""
        machine, at = unpack_name(payload)
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
            name = pack_name(self.name)
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
        name, at = unpack_name(payload)
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
        return cls(*unpack_fixed(_END, payload))


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
    | Switchover
    | End
)

KINDS: Final[Mapping[int, type[Record]]] = {kind.TYPE: kind for kind in get_args(Record)}
"""By type."""


def noun(kind: int) -> str:
    """Return what a record of type `kind` is called."""
    return KINDS[kind].NOUN if kind in KINDS else f"record of type {kind}"


def recipe_digest(commands: Iterable[Mapping[str, Any]]) -> bytes:
    """Return the SHA-256 of a recipe as the stream would carry it. Raises `MigrationRefused` as `Recipe.payload`."""
    import hashlib  # takes its time to load, and a machine that is never migrated does without

    return hashlib.sha256(Recipe(tuple(commands)).payload()).digest()


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
