"""JSON arguments to attrs objects, strictly, and results back to JSON.

A request's arguments are checked as QAPI checks them: nothing is converted, nothing is ignored. All faults are told at
once, object by object, in the order missing members, unexpected members, then each member's value (its JSON type, its
enumeration, its range). Names are those of the wire, nested ones dotted: `channels[0].addr.type`.

cattrs, the project's library for such work, is not used here: it takes 60 ms to import, and a monitor answers before
that; and its faults come neither in QAPI's order nor under QAPI's names.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import attrs

from vmm.errors import InvalidArguments
from vmm.monitor import qapi
from vmm.monitor.qapi import Alternate, Array, Builtin, Enum, Integer, Object, UnionShape, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmm.monitor.qapi import Shape

_MANY: Final = 12
"""A list of more names than this is left out of an error text."""


def structure(kind: object, arguments: Mapping[str, object], command: str) -> object:
    """Make a `kind` (an attrs class, or a union of such) of the JSON object `arguments`.

    Raises:
        InvalidArguments: they don't fit; `faults` has everything that is wrong with them, in the order of check.
    """
    faults: list[str] = []
    value = _load(shape_of(kind), dict(arguments), "", faults)
    if faults:
        raise InvalidArguments(command=command, faults=tuple(faults))
    return value


def unstructure(value: object) -> object:
    """Make JSON of `value`: attrs objects by their members' wire names, without those that are None.

    Raises:
        TypeError: something in it has no form on the wire.
    """
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return {key: unstructure(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [unstructure(item) for item in value]
    if value is qapi.NULL:
        return None
    kind: type[Any] = type(value)
    if not attrs.has(kind):
        raise TypeError(f"{value!r} has no form on the wire")
    members: dict[str, object] = {}
    for attribute, wire, how in qapi.result_members(kind):
        item = getattr(value, attribute)
        if item is None:
            continue
        if how == "member":
            members[wire] = unstructure(item)
        else:
            inner = unstructure(item)
            assert isinstance(inner, dict), "what stands inline is an object"
            members.update(inner)
    return members


# --- checking ---------------------------------------------------------------------------------------------


def _load(shape: Shape, value: object, path: str, faults: list[str]) -> object:
    """Return what `value` stands for; if it is wrong, append to `faults` and return anything."""
    if not _fits(shape, value):
        faults.append(f"'{path}' must be {_expected(shape)}, not {_shown(value)}")
    elif isinstance(shape, Builtin):
        return float(value) if shape.name == "number" else qapi.NULL if shape.name == "null" else value  # type: ignore[arg-type]
    elif isinstance(shape, Enum):
        if value not in shape.values:
            faults.append(f"'{path}' does not accept {_shown(value)}; {_listed('it accepts', shape.values)}")
    elif isinstance(shape, Integer):
        width = shape.width
        assert isinstance(value, (int, float))
        if not width.low <= value <= width.high:
            faults.append(f"'{path}' is {_shown(value)}, outside {width.low} to {width.high} ({width.name})")
    elif isinstance(shape, Array):
        assert isinstance(value, list)
        return shape.kind(_load(shape.element, item, f"{path}[{n}]", faults) for n, item in enumerate(value))
    elif isinstance(shape, Alternate):
        return _load(next(choice for choice in shape.choices if _fits(choice, value)), value, path, faults)
    elif isinstance(shape, (Object, UnionShape)):
        assert isinstance(value, dict)
        before = len(faults)
        _check_names(shape, value, path, faults)
        return _build(shape, value, path, faults, before)
    return value


def _fits(shape: Shape, value: object) -> bool:
    """Tell whether the JSON type of `value` is that of `shape`."""
    if isinstance(shape, Builtin):
        if shape.name == "str":
            return isinstance(value, str)
        if shape.name == "bool":
            return isinstance(value, bool)
        if shape.name == "number":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        return shape.name == "any" or value is None
    if isinstance(shape, Integer):
        # A number that the parser could only hold as a float is an integer out of range, not of a wrong type.
        huge = isinstance(value, float) and abs(value) >= 1 << 63 and value.is_integer()
        return huge or (isinstance(value, int) and not isinstance(value, bool))
    if isinstance(shape, Enum):
        return isinstance(value, str)
    if isinstance(shape, Array):
        return isinstance(value, list)
    if isinstance(shape, Alternate):
        return any(_fits(choice, value) for choice in shape.choices)
    return isinstance(value, dict)


def _expected(shape: Shape) -> str:
    if isinstance(shape, Builtin):
        return {"str": "a string", "bool": "a boolean", "number": "a number", "null": "null"}[shape.name]
    if isinstance(shape, Alternate):
        return " or ".join(_expected(choice) for choice in shape.choices)
    if isinstance(shape, Enum):
        return f"a string ({', '.join(shape.values)})" if len(shape.values) <= _MANY else "a string"
    return "an integer" if isinstance(shape, Integer) else "an array" if isinstance(shape, Array) else "an object"


def _check_names(shape: Object | UnionShape, given: dict[str, object], path: str, faults: list[str]) -> None:
    """Report the missing and the unexpected members of one object."""
    names: list[str] = []
    closed = not _open(shape)
    for member in qapi.applicable(shape, given):
        if member is None:
            closed = False  # a bad tag is reported by its value; what belongs to it can't be judged
            continue
        names.append(member.wire)
        if member.required and member.wire not in given:
            faults.append(f"'{_join(path, member.wire)}' is missing")
    if closed:
        known = _listed("there are", names) if names else "there are none"
        faults.extend(f"'{_join(path, name)}' is unexpected; {known}" for name in given if name not in names)


def _open(shape: Object | UnionShape) -> bool:
    if isinstance(shape, UnionShape):
        return any(_open(branch) for branch in shape.branches.values())
    return shape.rest is not None or any(_open(inner) for _, inner in shape.inlined)


def _build(shape: Object | UnionShape, given: dict[str, object], path: str, faults: list[str], before: int) -> object:
    """Check the members' values and make the object, unless `faults` has grown since it had `before`."""
    if isinstance(shape, UnionShape):
        if shape.tag not in given:
            return None
        tag = _load(shape.tag_member.shape, given[shape.tag], _join(path, shape.tag), faults)
        branch = shape.branches.get(tag) if isinstance(tag, str) else None
        return None if branch is None else _build(branch, given, path, faults, before)
    values: dict[str, Any] = {}
    for member in shape.members:
        if member.wire in given:
            values[member.attribute] = _load(member.shape, given[member.wire], _join(path, member.wire), faults)
    for attribute, inner in shape.inlined:
        values[attribute] = _build(inner, given, path, faults, before)
    if shape.rest is not None:
        names = {member.wire for member in qapi.applicable(shape, given) if member is not None}
        values[shape.rest] = {name: value for name, value in given.items() if name not in names}
    return shape.kind(**values) if len(faults) == before else None


# --- wording ----------------------------------------------------------------------------------------------


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _listed(what: str, names: Iterator[str] | tuple[str, ...] | list[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    shown = quoted if len(quoted) <= _MANY else [*quoted[:_MANY], f"and {len(quoted) - _MANY} more"]
    return f"{what} {', '.join(shown)}"


def _shown(value: object) -> str:
    """Word a JSON value for an error text: its type, and the value as far as it is short."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
