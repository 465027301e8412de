from __future__ import annotations

from typing import Any, Literal

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.monitor.test_arguments import DeviceAdd, Everything, Migrate, SocketAddress, Tree
from vmm.errors import InvalidArguments
from vmm.monitor.arguments import structure
from vmm.monitor.events import Event
from vmm.monitor.schema import schema
from vmm.monitor.session import Negotiation


@attrs.frozen
class Command:
    name: str
    arguments: object = None
    returns: object = None
    oob: bool = False
    features: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class StatusInfo:
    running: bool
    status: Literal["running", "paused"]
    latency: int | None = attrs.field(default=None, metadata={"features": ("unstable",)})


COMMANDS = (
    Negotiation(),
    Command("query-status", returns=StatusInfo),
    Command("query-all", returns=list[StatusInfo]),
    Command("migrate", Migrate),
    Command("listen", SocketAddress),
    Command("set", Everything),
    Command("plant", Tree),
    Command("device_add", DeviceAdd),
    Command("yank", oob=True, features=("unstable",)),
    Command("quit"),
)
EVENTS = (Event("STOP"), Event("STATUS", StatusInfo))
SCHEMA = schema(COMMANDS, EVENTS)
BY_NAME: dict[str, dict[str, Any]] = {str(info["name"]): info for info in SCHEMA}


def argument(command: str) -> dict[str, Any]:
    return BY_NAME[BY_NAME[command]["arg-type"]]


def member(info: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (member for member in info["members"] if member["name"] == name)
    return dict(found)


def test_every_type_that_is_referred_to_exists_once() -> None:
    assert len(BY_NAME) == len(SCHEMA)
    for info in SCHEMA:
        types = [info[key] for key in ("arg-type", "ret-type", "element-type") if key in info]
        members: Any = info.get("members", ())
        types += [found["type"] for found in members if "type" in found]
        variants: Any = info.get("variants", ())
        types += [found["type"] for found in variants]
        assert set(map(str, types)) <= BY_NAME.keys()
        if info["meta-type"] not in ("command", "event"):
            assert any(refers == info["name"] for refers in _all_types())


def _all_types() -> list[object]:
    found: list[object] = []
    for info in SCHEMA:
        found += [info[key] for key in ("arg-type", "ret-type", "element-type") if key in info]
        for part in ("members", "variants"):
            parts: Any = info.get(part, ())
            found += [inner["type"] for inner in parts if "type" in inner]
    return found


def test_commands_and_events_have_the_shape_of_schema_info() -> None:
    empty = BY_NAME["quit"]["arg-type"]
    assert BY_NAME[empty] == {"name": empty, "meta-type": "object", "members": []}
    yank = {"name": "yank", "meta-type": "command", "arg-type": empty, "ret-type": empty}
    assert BY_NAME["yank"] == {**yank, "allow-oob": True, "features": ["unstable"]}
    assert BY_NAME["STOP"] == {"name": "STOP", "meta-type": "event", "arg-type": empty}
    assert BY_NAME["STATUS"]["arg-type"] == BY_NAME["query-status"]["ret-type"]
    assert BY_NAME["query-all"]["ret-type"] == f"[{BY_NAME['query-status']['ret-type']}]"


def test_members_tell_optional_features_and_enumerations() -> None:
    info = BY_NAME[BY_NAME["query-status"]["ret-type"]]
    assert member(info, "running") == {"name": "running", "type": "bool"}
    assert member(info, "latency") == {"name": "latency", "type": "int", "default": None, "features": ["unstable"]}
    status = BY_NAME[member(info, "status")["type"]]
    assert status["members"] == [{"name": "running"}, {"name": "paused"}]
    assert status["values"] == ["running", "paused"]
    assert BY_NAME["int"] == {"name": "int", "meta-type": "builtin", "json-type": "int"}


def test_unions_tell_their_tag_and_variants_and_nest() -> None:
    channels = BY_NAME[member(argument("migrate"), "channels")["type"]]
    address = BY_NAME[member(BY_NAME[channels["element-type"]], "addr")["type"]]
    assert address["tag"] == "transport"
    assert [found["case"] for found in address["variants"]] == ["socket", "file"]
    socket = BY_NAME[address["variants"][0]["type"]]
    assert socket["tag"] == "type"
    assert [found["name"] for found in socket["members"]] == ["type"]
    inet = BY_NAME[socket["variants"][0]["type"]]
    assert [found["name"] for found in inet["members"]] == ["host", "port", "to"]


def test_an_alternate_lists_its_types() -> None:
    info = BY_NAME[member(argument("set"), "tls-creds")["type"]]
    assert info["meta-type"] == "alternate"
    assert info["members"] == [{"type": "str"}, {"type": "null"}]


def arguments_by_schema(type_name: str, depth: int = 0) -> st.SearchStrategy[Any]:
    """Make values of a type from nothing but the schema, as a client would."""
    info = BY_NAME[type_name]
    kind = info["meta-type"]
    if kind == "builtin":
        builtin: dict[str, st.SearchStrategy[Any]] = {
            "int": st.integers(0, 255), "bool": st.booleans(), "str": st.text(max_size=3), "null": st.none(),
            "number": st.floats(-1, 1), "any": st.just({}),
        }  # fmt: skip
        return builtin[type_name]
    if kind == "enum":
        return st.sampled_from(info["values"])
    if kind == "array":
        return st.lists(arguments_by_schema(info["element-type"], depth + 1), max_size=2)
    if kind == "alternate":
        return st.one_of(*(arguments_by_schema(found["type"], depth + 1) for found in info["members"]))
    return _object_by_schema(info, depth)


@st.composite
def _object_by_schema(draw: st.DrawFn, info: dict[str, Any], depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for found in info["members"]:
        if "default" not in found or (depth < 4 and draw(st.booleans())):
            value[found["name"]] = draw(arguments_by_schema(found["type"], depth + 1))
    for variant in info.get("variants", ()):
        if variant["case"] == value[info["tag"]]:
            value |= draw(arguments_by_schema(variant["type"], depth + 1))
    return value


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([command for command in COMMANDS if command.arguments is not None]))
def test_a_command_takes_what_the_schema_says_and_nothing_else(data: st.DataObject, command: Command) -> None:
    value = data.draw(arguments_by_schema(BY_NAME[command.name]["arg-type"]))
    structure(command.arguments, value, command.name)
    if command.arguments is not DeviceAdd:
        with pytest.raises(InvalidArguments, match="'no-such-member' is unexpected"):
            structure(command.arguments, {**value, "no-such-member": 1}, command.name)
