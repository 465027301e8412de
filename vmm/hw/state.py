"""How a device declares the state that travels.

The declared class *is* the section: one attrs class per device, each field of a kind with a bound. `describe` puts a
declaration into words, `misfits` finds everything in which a hostile section differs from it. `vmm.hw.codec` reads
and writes.

Kinds: `U8` … `U64`, `I64` and other `Integer` ranges; `Octets`; bool; enumerations; nested attrs classes; `Items` of
one kind; and any of them or None.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Final,
    Protocol,
    TypeAlias,
    TypeGuard,
    Union,
    final,
    get_args,
    get_origin,
    get_type_hints,
)

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator


@final
@attrs.frozen
class Integer:
    """An integer from `first` to `last`, both included."""

    first: int
    last: int

    def fits(self, value: object) -> bool:
        """Tell whether `value` is of this kind; True and False are not."""
        return type(value) is int and self.first <= value <= self.last

    @property
    def wanted(self) -> str:
        """What fits, as the end of the sentence "it is not …"."""
        if self.first < 0:
            return f"an integer from {self.first} to {self.last}"
        return f"an integer from {self.first:#x} to {self.last:#x}"


@final
@attrs.frozen
class Octets:
    """A byte string of at most `most` bytes, at least `least`."""

    most: int
    least: int = 0

    def fits(self, value: object) -> bool:
        """Tell whether `value` is of this kind."""
        return type(value) is bytes and self.least <= len(value) <= self.most

    @property
    def wanted(self) -> str:
        """What fits, as the end of the sentence "it is not …"."""
        return f"{self.most} bytes" if self.least == self.most else f"{self.least} to {self.most} bytes"


@final
@attrs.frozen
class Items:
    """At most `most` items, for a field declared as ``tuple[KIND, ...]`` or ``list[KIND]``."""

    most: int


Rule: TypeAlias = Integer | Octets
Collect: TypeAlias = Callable[[Iterable[object]], object]

U8 = Annotated[int, Integer(0, 0xFF)]
U16 = Annotated[int, Integer(0, 0xFFFF)]
U32 = Annotated[int, Integer(0, 0xFFFF_FFFF)]
U64 = Annotated[int, Integer(0, 0xFFFF_FFFF_FFFF_FFFF)]
I64 = Annotated[int, Integer(-(1 << 63), (1 << 63) - 1)]

Fields: TypeAlias = dict[str, Any]
Upgrade: TypeAlias = Callable[[Fields], Fields]
"""Makes the fields of one version from those of the version before.

The dict that it is given is its own to change, and hostile and unchecked: it may move values and add some, but rely on
none. A `KeyError` of its says that a field of the old version is missing.
"""


@final
class Misfit(ValueError):
    """A section does not fit its declaration. Never leaves `vmm.hw`: `StateRejected` collects them."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path: Final = path
        self.problem: Final = problem


def adds(**defaults: object) -> Upgrade:
    """Return the upgrade to a version that has these fields more; an older section gets the given values."""

    def upgrade(fields: Fields) -> Fields:
        for name in defaults:
            if name in fields:
                raise Misfit(f".{name}", f"is {shown(fields[name])}, but that version had no such field")
        return {**fields, **defaults}

    return upgrade


def drops(**defaults: object) -> Upgrade:
    """Return the downgrade from a version that has these fields more; it loses nothing where they have these values."""

    def downgrade(fields: Fields) -> Fields:
        for name, value in defaults.items():
            if fields[name] != value:
                raise Misfit(f".{name}", f"is {shown(fields[name])}, which an older version has no field for")
        return {name: value for name, value in fields.items() if name not in defaults}

    return downgrade


@final
@attrs.frozen
class Schema:
    """Name and versions of a state class.

    `upgrades[i]` leads from version ``accepts + i`` to the next. A change of any field needs a new version and an
    upgrade; raise `accepts`, and drop the upgrades below it, when an old section can no longer be understood.
    `downgrades[i]` leads from ``version - i`` to the version before, for a destination that is older than the source:
    where nothing is lost. It raises `Misfit` for what would be.
    """

    name: str
    version: int
    accepts: int
    upgrades: tuple[Upgrade, ...] = ()
    downgrades: tuple[Upgrade, ...] = ()

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.accepts <= self.version or len(self.upgrades) != self.version - self.accepts:
            raise ValueError(
                f"{self.name}: {len(self.upgrades)} upgrades from version {self.accepts} to {self.version}"
            )
        if len(self.downgrades) >= self.version:
            raise ValueError(f"{self.name}: {len(self.downgrades)} downgrades from version {self.version}")


class State(Protocol):
    """A device's declared state: an attrs class with a schema."""

    SCHEMA: ClassVar[Schema]


# --- what a device keeps besides its state --------------------------------------------------------------------------

_KEPT: Final = "vmm-kept"


def host_only(why: str) -> dict[str, str]:
    """Return the metadata of a device field that does not travel: it belongs to this host."""
    return {_KEPT: f"host: {why}"}


def derived(why: str) -> dict[str, str]:
    """Return the metadata of a device field that does not travel: `after_load` computes it from what does."""
    return {_KEPT: f"derived: {why}"}


def undeclared_fields(device: type) -> list[str]:
    """Return the names of the fields of `device` that neither travel nor say why they do not."""
    return [field.name for field in attrs.fields(device) if field.name != "state" and _KEPT not in field.metadata]


# --- walking a declaration ------------------------------------------------------------------------------------------


def declared_fields(kind: type) -> Mapping[str, object]:
    """Return the declared kind of each field of an attrs class."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in attrs.fields(kind)}


def rule_of(declared: object) -> Rule | None:
    """Return the rule of an annotated integer or byte string."""
    return next((part for part in getattr(declared, "__metadata__", ()) if isinstance(part, Rule)), None)


def items_of(declared: object) -> tuple[int, object, Collect] | None:
    """Return how many items a declared sequence has at most, their kind, and its type; None if it is something else."""
    bound = next((part for part in getattr(declared, "__metadata__", ()) if isinstance(part, Items)), None)
    if bound is None:
        return None
    sequence = get_args(declared)[0]
    return bound.most, get_args(sequence)[0], get_origin(sequence)


def optional_of(declared: object) -> object | None:
    """Return KIND, if `declared` is ``KIND | None``."""
    if get_origin(declared) not in (Union, UnionType):
        return None
    kinds = [kind for kind in get_args(declared) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 else None


def is_enum(declared: object) -> TypeGuard[type[enum.Enum]]:
    """Tell whether `declared` is an enumeration."""
    return isinstance(declared, type) and issubclass(declared, enum.Enum)


Description: TypeAlias = "str | dict[str, Description]"


def describe(declared: object) -> Description:
    """Put a declared kind into words; of an attrs class, its fields by name.

    The result is plain JSON: what the golden files hold and the reference prints.

    Raises:
        TypeError: a kind that is not listed at the head of this module, or has no bound. A bug of the device.
    """
    if (rule := rule_of(declared)) is not None:
        return rule.wanted
    if (items := items_of(declared)) is not None:
        return {f"at most {items[0]}": describe(items[1])}
    if (inner := optional_of(declared)) is not None:
        return {"or none": describe(inner)}
    if declared is bool:
        return "true or false"
    if is_enum(declared):
        return f"one of {', '.join(repr(member.value) for member in declared)}"
    if isinstance(declared, type) and attrs.has(declared):
        return {name: describe(kind) for name, kind in declared_fields(declared).items()}
    raise TypeError(f"{declared!r} is no kind of state")


def wanted(declared: object) -> str:
    """Say what fits, as the end of the sentence "it is not …"."""
    if (items := items_of(declared)) is not None:
        return f"at most {items[0]} items"
    if (inner := optional_of(declared)) is not None:
        return f"{wanted(inner)}, or none"
    if isinstance(declared, type) and attrs.has(declared):
        return f"the fields {', '.join(declared_fields(declared))}"
    return str(describe(declared))


def misfits(declared: object, value: object, path: str = "") -> Iterator[Misfit]:
    """Find every place at or below `value` that does not fit, each with its path from here."""
    if (inner := optional_of(declared)) is not None:
        if value is not None:
            yield from misfits(inner, value, path)
    elif not _fits_outside(declared, value):
        rule = rule_of(declared)
        signed = isinstance(rule, Integer) and rule.first < 0
        yield Misfit(path, f"is {shown(value, signed=signed)}, not {wanted(declared)}")
    elif (items := items_of(declared)) is not None:
        assert isinstance(value, list)
        for index, item in enumerate(value):
            yield from misfits(items[1], item, f"{path}[{index}]")
    elif isinstance(value, dict):
        assert isinstance(declared, type)
        yield from _misfits_of_fields(declared_fields(declared), value, path)


def _misfits_of_fields(kinds: Mapping[str, object], value: Fields, path: str) -> Iterator[Misfit]:
    for name, kind in kinds.items():
        if name in value:
            yield from misfits(kind, value[name], f"{path}.{name}")
        else:
            yield Misfit(f"{path}.{name}", f"is missing; it should be {wanted(kind)}")
    for name in value:
        if name not in kinds:
            known = ", ".join(kinds) or "none"
            yield Misfit(f"{path}.{_clipped(str(name))}", f"is {shown(value[name])}, but the fields here are {known}")


def _fits_outside(declared: object, value: object) -> bool:
    """Tell whether `value` fits, looking at no field and no item of it."""
    if (rule := rule_of(declared)) is not None:
        return rule.fits(value)
    if (items := items_of(declared)) is not None:
        return type(value) is list and len(value) <= items[0]
    if declared is bool:
        return type(value) is bool
    if is_enum(declared):
        return any(type(value) is type(member.value) and value == member.value for member in declared)
    return type(value) is dict


def shown(value: object, *, signed: bool = False) -> str:
    """Show a hostile value in an error: short whatever it is. Integers are registers, so in hex, unless `signed`."""
    if type(value) is int:
        if not -(1 << 64) < value < 1 << 64:
            return "an integer of more than 64 bits"
        return f"{value}" if signed else f"{value:#x}"
    if type(value) is bytes:
        return f"{len(value)} bytes ({_clipped(value[:20].hex(' '))})" if value else "0 bytes"
    if isinstance(value, list | tuple | dict):
        return f"{'fields' if isinstance(value, dict) else 'a list'} ({len(value)})"
    return "none" if value is None else _clipped(repr(value))


def _clipped(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"
