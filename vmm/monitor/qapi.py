"""QAPI's types, written as Python annotations, and read back from them.

The arguments and results of commands and the data of events are attrs classes. Their annotations say all that the wire
needs to know:

    bool, int, float, str       boolean, int64, number, string
    U8 ... U64, I8 ... I32, Size  integers of other widths
    Literal["a", "b"]           an enumeration
    list[T], tuple[T, ...]      an array
    an attrs class              an object; members with a default are optional
    T | None                    the same as T; None stands for an absent member and is never on the wire
    str | Null                  an alternate: either may be on the wire (JSON's null is NULL)
    Annotated[A | B, Union("type")]
                                a union: attrs classes, each with a Literal member that says when it is meant
    object, dict[str, object]   any value, an object of any members

A member's name on the wire has `-` for `_`. `attrs.field(metadata={...})` says what an annotation can't:

    "wire": "qom_type"          another name
    "features": ("unstable",)   features of the member, for the schema
    "inline": True              the members of this object or union stand beside the others
    "rest": True                this dict takes all members of other names

Shapes are what is read back: one description from which arguments are checked, and the schema is generated.
"""

from __future__ import annotations

import enum
import types
import typing
from functools import cache, cached_property
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping


@final
class Null(enum.Enum):
    """JSON's null, where it is a value (None means an absent member)."""

    NULL = None


NULL: Final = Null.NULL


@final
@attrs.frozen
class Width:
    """Annotates an integer with QAPI's name for its width, and its bounds, both included."""

    name: str
    low: int
    high: int


U8: TypeAlias = Annotated[int, Width("uint8", 0, 0xFF)]
U16: TypeAlias = Annotated[int, Width("uint16", 0, 0xFFFF)]
U32: TypeAlias = Annotated[int, Width("uint32", 0, 0xFFFF_FFFF)]
U64: TypeAlias = Annotated[int, Width("uint64", 0, (1 << 64) - 1)]
Size: TypeAlias = Annotated[int, Width("size", 0, (1 << 64) - 1)]
I8: TypeAlias = Annotated[int, Width("int8", -(1 << 7), (1 << 7) - 1)]
I32: TypeAlias = Annotated[int, Width("int32", -(1 << 31), (1 << 31) - 1)]

_INT64: Final = Width("int", -(1 << 63), (1 << 63) - 1)


@final
@attrs.frozen
class Union:
    """Annotates a union of attrs classes with the wire name of the member that tells which one is meant."""

    tag: str


# --- shapes -----------------------------------------------------------------------------------------------


@final
@attrs.frozen
class Builtin:
    """A scalar, or any value at all. `name` is QAPI's: str, bool, number, null, any."""

    name: str

    @property
    def json_type(self) -> str:
        """The JSON type, as error texts and the schema call it."""
        return {"str": "string", "bool": "boolean", "any": "value"}.get(self.name, self.name)


@final
@attrs.frozen
class Integer:
    """An integer of some width. The schema calls all of them `int`."""

    width: Width


@final
@attrs.frozen
class Enum:
    """One of some strings."""

    values: tuple[str, ...]


@final
@attrs.frozen
class Array:
    """A list of values of one shape. `kind` is the Python class to make of it."""

    element: Shape
    kind: type


@final
@attrs.frozen
class AnyObject:
    """An object of any members (`dict[str, object]`)."""


@final
@attrs.frozen
class Alternate:
    """A value of one of some shapes, which differ in their JSON type."""

    choices: tuple[Shape, ...]


@final
@attrs.frozen
class Member:
    """One member of an object. `attribute` is its keyword in the class."""

    wire: str
    attribute: str
    shape: Shape
    required: bool
    features: tuple[str, ...] = ()
    inherited: bool = False


@final
@attrs.define(eq=False, slots=False)
class Object:
    """An attrs class. Compared by identity: one class has one shape. A class may contain itself."""

    kind: type

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """The members declared one by one, in order."""
        hints = self._hints
        return tuple(
            Member(
                wire_name(field),
                field.alias or field.name,
                shape_of(hints[field.name]),
                required=field.default is attrs.NOTHING,
                features=tuple(field.metadata.get("features", ())),
                inherited=field.inherited,
            )
            for field in attrs.fields(self.kind)
            if field.init and not field.metadata.get("inline") and not field.metadata.get("rest")
        )

    @cached_property
    def inlined(self) -> tuple[tuple[str, Object | UnionShape], ...]:
        """The attributes whose own members stand beside the others."""
        found = []
        for field in attrs.fields(self.kind):
            if field.metadata.get("inline"):
                shape = shape_of(self._hints[field.name])
                if not isinstance(shape, (Object, UnionShape)):
                    raise TypeError(f"{self.kind.__name__}.{field.name} is no object, so it can't stand inline")
                found.append((field.alias or field.name, shape))
        return tuple(found)

    @cached_property
    def rest(self) -> str | None:
        """The attribute that takes the members of other names."""
        return next((f.alias or f.name for f in attrs.fields(self.kind) if f.metadata.get("rest")), None)

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return typing.get_type_hints(self.kind, include_extras=True)


@final
@attrs.define(eq=False, slots=False)
class UnionShape:
    """A union of attrs classes, told apart by the member `tag`."""

    tag: str
    kinds: tuple[type, ...]

    @cached_property
    def branches(self) -> dict[str, Object]:
        """The objects by the values of the tag."""
        branches: dict[str, Object] = {}
        for kind in self.kinds:
            branch = shape_of(kind)
            members = branch.members if isinstance(branch, Object) else ()
            tag = next((member.shape for member in members if member.wire == self.tag), None)
            if not isinstance(branch, Object) or not isinstance(tag, Enum):
                raise TypeError(f"{kind!r} is no attrs class with a Literal member {self.tag!r} to tell it apart")
            branches.update(dict.fromkeys(tag.values, branch))
        return branches

    @cached_property
    def tag_member(self) -> Member:
        """The tag as a member, which has all values of all branches."""
        return Member(self.tag, "", Enum(tuple(self.branches)), required=True)

    @cached_property
    def shared(self) -> tuple[Member, ...]:
        """The members besides the tag that all branches inherit, hence from one base class."""
        first, *others = self.branches.values()
        return tuple(
            member
            for member in first.members
            if member.inherited and member.wire != self.tag and all(member in other.members for other in others)
        )


Shape: TypeAlias = Builtin | Integer | Enum | Array | AnyObject | Alternate | Object | UnionShape


def shape_of(annotation: object) -> Shape:
    """Return the shape of an annotation, whose names are resolved already.

    Raises:
        TypeError: it says nothing about the wire.
    """
    return _shape_of(annotation)


@cache  # a pure function of a type; one class must have one shape, since shapes of objects compare by identity
def _shape_of(annotation: Hashable) -> Shape:
    scalar = _scalar(annotation)
    if scalar is not None:
        return scalar
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        for fact in parts[1:]:
            if isinstance(fact, Width):
                return Integer(fact)
            if isinstance(fact, Union):
                return UnionShape(fact.tag, typing.get_args(parts[0]) or (parts[0],))
        return shape_of(parts[0])
    if origin is Literal:
        return Enum(parts)
    if origin in (list, tuple):
        if origin is tuple and parts[1:] != (...,):
            raise TypeError(f"{annotation}: an array has elements of one type")
        return Array(shape_of(parts[0]), origin)
    if origin in (typing.Union, types.UnionType):
        choices = tuple(shape_of(part) for part in parts if part is not type(None))
        return choices[0] if len(choices) == 1 else Alternate(choices)
    if origin is dict or annotation is dict:
        return AnyObject()
    if isinstance(annotation, type) and attrs.has(annotation):
        return Object(annotation)
    raise TypeError(f"{annotation!r} has no form on the wire; see vmm.monitor.qapi for those that have")


def _scalar(annotation: object) -> Shape | None:
    if annotation is int:
        return Integer(_INT64)
    for kind, name in ((str, "str"), (bool, "bool"), (float, "number"), (Null, "null"), (object, "any"), (Any, "any")):
        if annotation is kind:
            return Builtin(name)
    return None


def wire_name(field: attrs.Attribute[Any]) -> str:
    """Return the name on the wire of a member."""
    name: str | None = field.metadata.get("wire")
    return name or field.name.strip("_").replace("_", "-")


@cache  # a pure function of a class, on the way of every reply
def result_members(kind: type) -> tuple[tuple[str, str, str], ...]:
    """Return (attribute, wire name, how) of the members of an attrs class; how is `member`, `inline` or `rest`.

    Unlike `shape_of` it looks at no annotation, so a result may hold what has no declared type.
    """
    found = []
    for field in attrs.fields(kind):
        how = "inline" if field.metadata.get("inline") else "rest" if field.metadata.get("rest") else "member"
        found.append((field.name, wire_name(field), how))
    return tuple(found)


def applicable(shape: Object | UnionShape, given: Mapping[str, object]) -> Iterator[Member | None]:
    """Yield the members that an object with the members `given` may have; None where a bad tag leaves it open."""
    if isinstance(shape, UnionShape):
        yield shape.tag_member
        tag = given.get(shape.tag)
        branch = shape.branches.get(tag) if isinstance(tag, str) else None
        if branch is None:
            yield from shape.shared
            yield None
            return
        for found in applicable(branch, given):
            if found is None or found.wire != shape.tag:
                yield found
        return
    yield from shape.members
    for _, inner in shape.inlined:
        yield from applicable(inner, given)
