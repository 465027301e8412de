from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import attrs
import pytest

from vmm.errors import InvalidArguments
from vmm.monitor.arguments import structure, unstructure
from vmm.monitor.qapi import NULL, U8, U16, U64, Null, Size, Union


@attrs.frozen(kw_only=True)
class Inet:
    type: Literal["inet"] = "inet"
    host: str
    port: str
    to: U16 | None = None


@attrs.frozen(kw_only=True)
class Unix:
    type: Literal["unix"] = "unix"
    path: str


SocketAddress: TypeAlias = Annotated[Inet | Unix, Union("type")]


@attrs.frozen(kw_only=True)
class OverSocket:
    transport: Literal["socket"] = "socket"
    address: SocketAddress = attrs.field(metadata={"inline": True})


@attrs.frozen(kw_only=True)
class ToFile:
    transport: Literal["file"] = "file"
    filename: str
    offset: U64


MigrationAddress: TypeAlias = Annotated[OverSocket | ToFile, Union("transport")]


@attrs.frozen(kw_only=True)
class Channel:
    channel_type: Literal["main", "cpr"]
    addr: MigrationAddress


@attrs.frozen(kw_only=True)
class Migrate:
    uri: str | None = None
    channels: list[Channel] | None = None
    resume: bool = False


@attrs.frozen(kw_only=True)
class Everything:
    flag: bool = False
    count: int = 0
    small: U8 = 0
    size: Size = 0
    ratio: float = 0.0
    tls_creds: str | Null | None = None
    names: tuple[str, ...] = ()
    props: dict[str, object] | None = None
    anything: object = None
    qom_type: str = attrs.field(default="", metadata={"wire": "qom_type"})


@attrs.frozen(kw_only=True)
class DeviceAdd:
    driver: str
    id: str | None = None
    properties: dict[str, object] = attrs.field(factory=dict, metadata={"rest": True})


@attrs.frozen(kw_only=True)
class Tree:
    name: str
    children: list[Tree] | None = None


MEMBERS = "'flag', 'count', 'small', 'size', 'ratio', 'tls-creds', 'names', 'props', 'anything', 'qom_type'"


def faults(kind: object, arguments: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(InvalidArguments) as caught:
        structure(kind, arguments, "cmd")
    return caught.value.faults


def test_nested_unions_are_flat_on_the_wire() -> None:
    address = {"transport": "socket", "type": "inet", "host": "::1", "port": "4444"}
    wire = {"channels": [{"channel-type": "main", "addr": address}], "resume": True}
    value = structure(Migrate, wire, "migrate")
    inet = Inet(host="::1", port="4444")
    assert value == Migrate(channels=[Channel(channel_type="main", addr=OverSocket(address=inet))], resume=True)
    assert unstructure(value) == wire


def test_every_type_is_taken() -> None:
    wire: dict[str, object] = {
        "flag": True,
        "count": -1,
        "small": 255,
        "size": 2**64 - 1,
        "ratio": 2,
        "tls-creds": None,
        "names": ["a"],
        "props": {"x": {}},
        "anything": [None],
        "qom_type": "t",
    }
    value = structure(Everything, wire, "cmd")
    assert value == Everything(
        flag=True, count=-1, small=255, size=2**64 - 1, ratio=2.0, tls_creds=NULL, names=("a",), props={"x": {}},
        anything=[None], qom_type="t",
    )  # fmt: skip
    assert unstructure(value) == wire


def test_an_absent_member_takes_its_default_and_none_is_not_on_the_wire() -> None:
    assert structure(Migrate, {}, "migrate") == Migrate()
    assert unstructure(Migrate()) == {"resume": False}


def test_members_of_other_names_are_collected_where_a_class_asks_for_them() -> None:
    value = structure(DeviceAdd, {"driver": "virtio-blk-pci", "drive": "d0", "id": "x"}, "device_add")
    assert value == DeviceAdd(driver="virtio-blk-pci", id="x", properties={"drive": "d0"})
    assert unstructure(value) == {"driver": "virtio-blk-pci", "drive": "d0", "id": "x"}


def test_a_class_may_contain_itself() -> None:
    value = structure(Tree, {"name": "a", "children": [{"name": "b"}]}, "cmd")
    assert value == Tree(name="a", children=[Tree(name="b")])
    assert faults(Tree, {"name": "a", "children": [{}]}) == ("'children[0].name' is missing",)


def test_a_union_may_be_the_arguments_themselves() -> None:
    assert structure(SocketAddress, {"type": "unix", "path": "/p"}, "cmd") == Unix(path="/p")


def test_all_faults_are_told_in_the_order_of_check() -> None:
    channel: dict[str, object] = {
        "channel-type": "mian",
        "addr": {"transport": "socket", "type": "inet", "host": 5, "to": -1},
    }
    assert faults(Migrate, {"resume": "on", "channels": [{"addr": 7, "x": 1}, channel], "bogus": None}) == (
        "'bogus' is unexpected; there are 'uri', 'channels', 'resume'",
        "'channels[0].channel-type' is missing",
        "'channels[0].x' is unexpected; there are 'channel-type', 'addr'",
        "'channels[0].addr' must be an object, not 7",
        "'channels[1].channel-type' does not accept \"mian\"; it accepts 'main', 'cpr'",
        "'channels[1].addr.port' is missing",
        "'channels[1].addr.host' must be a string, not 5",
        "'channels[1].addr.to' is -1, outside 0 to 65535 (uint16)",
        "'resume' must be a boolean, not \"on\"",
    )


@pytest.mark.parametrize(
    ("member", "value", "fault"),
    [
        ("flag", 1, "'flag' must be a boolean, not 1"),
        ("count", True, "'count' must be an integer, not true"),
        ("count", 1.0, "'count' must be an integer, not 1.0"),
        ("count", "1", "'count' must be an integer, not \"1\""),
        ("count", 2**63, f"'count' is {2**63}, outside {-(2**63)} to {2**63 - 1} (int)"),
        ("count", 1e30, f"'count' is 1e+30, outside {-(2**63)} to {2**63 - 1} (int)"),
        ("small", 256, "'small' is 256, outside 0 to 255 (uint8)"),
        ("ratio", None, "'ratio' must be a number, not null"),
        ("tls-creds", 3, "'tls-creds' must be a string or null, not 3"),
        ("names", {}, "'names' must be an array, not an object"),
        ("names", ["a", 2], "'names[1]' must be a string, not 2"),
        ("props", [], "'props' must be an object, not an array"),
        ("qom-type", "t", f"'qom-type' is unexpected; there are {MEMBERS}"),
    ],
)
def test_a_fault_says_what_and_what_would_be_right(member: str, value: object, fault: str) -> None:
    assert faults(Everything, {member: value}) == (fault,)


def test_a_bad_tag_does_not_make_the_other_members_unexpected() -> None:
    assert faults(SocketAddress, {"type": "tcp", "host": "h"}) == (
        "'type' does not accept \"tcp\"; it accepts 'inet', 'unix'",
    )
    assert faults(SocketAddress, {"host": "h"}) == ("'type' is missing",)
    assert faults(SocketAddress, {"type": ["inet"]}) == ("'type' must be a string (inet, unix), not an array",)
    assert faults(SocketAddress, {"type": "unix", "host": "h"}) == (
        "'path' is missing",
        "'host' is unexpected; there are 'type', 'path'",
    )


def test_the_error_names_the_command() -> None:
    with pytest.raises(InvalidArguments) as caught:
        structure(Inet, {"host": "h", "port": 1}, "listen")
    assert str(caught.value) == "Command 'listen': 'port' must be a string, not 1"


def test_a_result_without_a_form_on_the_wire_is_a_bug() -> None:
    with pytest.raises(TypeError, match=r"b'x' has no form on the wire"):
        unstructure({"a": [b"x"]})


def test_an_annotation_without_a_form_on_the_wire_is_a_bug() -> None:
    @attrs.frozen
    class Bad:
        raw: bytes

    with pytest.raises(TypeError, match="has no form on the wire"):
        structure(Bad, {"raw": "x"}, "cmd")
