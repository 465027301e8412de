"""On what terms a guest is copied: what its source has decided, and the destination goes by."""

from __future__ import annotations

from typing import ClassVar, Final, Literal, final, get_args

import attrs

from vmm.migration.section_payload import Misshapen, canonical, parse_canonical

_LIMIT: Final = 4096
_ID_DIGITS: Final = 32

Compression = Literal["none", "zlib", "zstd"]


@final
@attrs.frozen(kw_only=True)
class Terms:
    """The last record of a stream's head, from format version 2 on. A destination needs no setting of its own."""

    TYPE: ClassVar[int] = 8
    NOUN: ClassVar[str] = "terms"
    LIMIT: ClassVar[int] = _LIMIT

    answers: bool = False
    """Whether the source hears the destination, and waits for its words."""
    id: str = ""
    """32 hexadecimal digits that name this migration, for its further channels; empty where there are none."""
    multifd: int = 0
    """Number of further channels that carry pages, 0 to 16."""
    compression: Compression = "none"
    postcopy: bool = False
    """Whether the guest may run at the destination before all of its RAM is there."""
    preempt: bool = False
    """Whether pages that it waits for come on a channel of their own."""
    acknowledge: bool = False
    """Whether the source waits for the destination's word before it stops the guest."""

    def payload(self) -> bytes:
        """Encode."""
        return canonical(attrs.asdict(self))

    @classmethod
    def decode(cls, payload: bytes) -> Terms:
        """Undo `payload`, or raise `Misshapen`. A member that is missing has its default."""
        found = parse_canonical(payload)
        if not isinstance(found, dict):
            raise Misshapen("no object")
        kinds = {field.name: field.default for field in attrs.fields(cls)}
        for name, value in found.items():
            if name not in kinds:
                raise Misshapen(f"{name!r} is not known here")
            if type(value) is not type(kinds[name]):
                raise Misshapen(f"{name!r} is {value!r}, expected something like {kinds[name]!r}")
        terms = cls(**found)
        if not 0 <= terms.multifd <= 16:
            raise Misshapen(f"'multifd' is {terms.multifd}, expected 0 to 16")
        if terms.compression not in get_args(Compression):
            raise Misshapen(f"'compression' is {terms.compression!r}, expected one of {get_args(Compression)}")
        if terms.id and (len(terms.id) != _ID_DIGITS or terms.id.strip("0123456789abcdef")):
            raise Misshapen(f"'id' is not {_ID_DIGITS} hexadecimal digits")
        if terms.postcopy and not (terms.answers and terms.id):
            raise Misshapen("'postcopy' without 'answers' or 'id': nobody could be asked for the pages that are left")
        return terms
