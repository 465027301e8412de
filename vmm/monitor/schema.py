"""`query-qmp-schema`, made from what commands and events declare.

The same shapes check the arguments, so the schema can't promise what a command does not take. As in QEMU, the names of
enumerations, objects and alternates are masked, since nobody is to rely on them; commands, events and builtin types
have names of their own. An array is named after its element, in brackets.

Source: QEMU qapi/introspect.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, final

from vmm.monitor.qapi import Alternate, AnyObject, Array, Builtin, Enum, Integer, Member, Object, UnionShape, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.monitor.qapi import Shape


class CommandFacts(Protocol):
    """What the schema has to know of a command. It may also have `features: tuple[str, ...]`."""

    @property
    def name(self) -> str:
        """The name on the wire."""

    @property
    def arguments(self) -> object:
        """The attrs class (or annotated union) of the arguments; None if there are none."""

    @property
    def returns(self) -> object:
        """The annotation of the result; None for an empty object."""

    @property
    def oob(self) -> bool:
        """Whether `exec-oob` may run it."""


class EventFacts(Protocol):
    """What the schema has to know of an event. It may also have `features: tuple[str, ...]`."""

    @property
    def name(self) -> str:
        """The name on the wire."""

    @property
    def data(self) -> type | None:
        """The attrs class of the data; None if there are none."""


def schema(commands: Iterable[CommandFacts], events: Iterable[EventFacts]) -> list[dict[str, object]]:
    """Return the list of SchemaInfo: commands and events, then the types they refer to, directly or not."""
    catalog = _Catalog()
    entities: list[dict[str, object]] = []
    for command in commands:
        info: dict[str, object] = {
            "name": command.name,
            "meta-type": "command",
            "arg-type": catalog.object_name(command.arguments),
            "ret-type": catalog.result_name(command.returns),
        }
        if command.oob:
            info["allow-oob"] = True
        entities.append(_with_features(info, getattr(command, "features", ())))
    for event in events:
        info = {"name": event.name, "meta-type": "event", "arg-type": catalog.object_name(event.data)}
        entities.append(_with_features(info, getattr(event, "features", ())))
    catalog.complete()
    return entities + list(catalog.infos.values())


def _with_features(info: dict[str, object], features: tuple[str, ...]) -> dict[str, object]:
    if features:
        info["features"] = list(features)
    return info


_EMPTY: Final = Object(object)
"""Stands for the object that has no members."""


@final
class _Catalog:
    """The types by their names on the wire; each is described once, when something refers to it."""

    def __init__(self) -> None:
        self.infos: dict[str, dict[str, object]] = {}
        self._names: dict[object, str] = {}
        self._open: list[tuple[str, Object | UnionShape, frozenset[str]]] = []

    def object_name(self, annotation: object) -> str:
        """Name the type of the arguments of a command or the data of an event."""
        if annotation is None:
            return self._object(_EMPTY)
        shape = shape_of(annotation)
        if not isinstance(shape, (Object, UnionShape)):
            raise TypeError(f"{annotation!r} is no object, so it can't be the arguments of anything")
        return self._object(shape)

    def result_name(self, annotation: object) -> str:
        """Name the type of what a command returns."""
        return self._object(_EMPTY) if annotation is None else self._name(shape_of(annotation))

    def complete(self) -> None:
        """Describe the objects that were named; they were put off, because objects may refer to each other."""
        while self._open:
            name, shape, without = self._open.pop(0)
            self.infos[name].update(self._members(shape, without))

    def _name(self, shape: Shape) -> str:
        if isinstance(shape, (Object, UnionShape)):
            return self._object(shape)
        if isinstance(shape, Builtin):
            return self._builtin(shape.name, shape.json_type)
        if isinstance(shape, Integer):
            return self._builtin("int", "int")
        if isinstance(shape, AnyObject):
            return self._builtin("any", "value")
        if isinstance(shape, Array):
            element = self._name(shape.element)
            return self._add(f"[{element}]", {"meta-type": "array", "element-type": element})
        known = self._names.get(shape)
        if known is not None:
            return known
        if isinstance(shape, Enum):
            members = [{"name": value} for value in shape.values]
            info: dict[str, object] = {"meta-type": "enum", "members": members, "values": list(shape.values)}
        else:
            assert isinstance(shape, Alternate)
            info = {"meta-type": "alternate", "members": [{"type": self._name(choice)} for choice in shape.choices]}
        return self._add(self._mask(shape), info)

    def _builtin(self, name: str, json_type: str) -> str:
        return self._add(name, {"meta-type": "builtin", "json-type": json_type})

    def _object(self, shape: Object | UnionShape, without: frozenset[str] = frozenset()) -> str:
        """Name an object; `without` are the members that a branch of a union leaves to the union."""
        key = (id(shape), without)
        known = self._names.get(key)
        if known is not None:
            return known
        name = self._add(self._mask(key), {"meta-type": "object", "members": []})
        if shape is not _EMPTY:
            self._open.append((name, shape, without))
        return name

    def _mask(self, key: object) -> str:
        name = str(len(self._names))
        self._names[key] = name
        return name

    def _add(self, name: str, info: dict[str, object]) -> str:
        self.infos.setdefault(name, {"name": name, **info})
        return name

    def _members(self, shape: Object | UnionShape, without: frozenset[str]) -> dict[str, object]:
        """Describe members and variants; what stands inline belongs to the object itself."""
        if isinstance(shape, UnionShape):
            base = (shape.tag_member, *shape.shared)
            left = frozenset(member.wire for member in base)
            variants = [{"case": case, "type": self._object(branch, left)} for case, branch in shape.branches.items()]
            return {"members": [self._member(member) for member in base], "tag": shape.tag, "variants": variants}
        description: dict[str, object] = {}
        members = [self._member(member) for member in shape.members if member.wire not in without]
        for _, inner in shape.inlined:
            inner_description = self._members(inner, frozenset())
            if "tag" in description and "tag" in inner_description:
                raise TypeError(f"{shape.kind.__name__} has two unions inline; the schema can't say that")
            inner_members = inner_description.pop("members")
            assert isinstance(inner_members, list)
            members += inner_members
            description |= inner_description
        return {"members": members, **description}

    def _member(self, member: Member) -> dict[str, object]:
        info: dict[str, object] = {"name": member.wire, "type": self._name(member.shape)}
        if not member.required:
            info["default"] = None
        return _with_features(info, member.features)
