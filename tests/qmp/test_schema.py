"""`query-qmp-schema` of the real catalog: whole, and true of what commands take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.qmp.kit import Raw, machine
from vmm.phases.catalog import COMMANDS, EVENTS

if TYPE_CHECKING:
    from pathlib import Path

Entities = dict[str, dict[str, Any]]


def references(entity: dict[str, Any]) -> list[str]:
    """Return the names of the types that `entity` mentions."""
    found = [entity[key] for key in ("arg-type", "ret-type", "element-type") if key in entity]
    found += [member["type"] for member in entity.get("members", ()) if "type" in member]
    return found + [variant["type"] for variant in entity.get("variants", ())]


async def schema_of(raw: Raw) -> Entities:
    """Ask for the schema, by names."""
    entities = (await raw.ask({"execute": "query-qmp-schema"}))["return"]
    by_name = {entity["name"]: entity for entity in entities}
    assert len(by_name) == len(entities), "a name stands for two things"
    return by_name


async def test_the_schema_is_whole(tmp_path: Path) -> None:
    async with machine(tmp_path) as m, await m.raw() as raw:
        await raw.negotiate()
        schema = await schema_of(raw)
    kinds = {"command": {c.name for c in COMMANDS} | {"qmp_capabilities"}, "event": {e.name for e in EVENTS}}
    for kind, names in kinds.items():
        assert {name for name, entity in schema.items() if entity["meta-type"] == kind} == names
    used = {name for entity in schema.values() for name in references(entity)}
    assert used <= set(schema), "a type is used and not described"
    assert set(schema) - used == kinds["command"] | kinds["event"], "a type is described and not used"
    for entity in schema.values():
        match entity["meta-type"]:
            case "command" | "event":
                assert schema[entity["arg-type"]]["meta-type"] == "object"
            case "enum":
                assert [member["name"] for member in entity["members"]] == entity["values"]
            case "object" if "tag" in entity:
                (tag,) = [member for member in entity["members"] if member["name"] == entity["tag"]]
                assert {v["case"] for v in entity["variants"]} == set(schema[tag["type"]]["values"])
            case "array":
                assert entity["name"] == f"[{entity['element-type']}]"


async def test_the_channels_of_a_migration_are_a_union_of_addresses(tmp_path: Path) -> None:
    async with machine(tmp_path) as m, await m.raw() as raw:
        await raw.negotiate()
        schema = await schema_of(raw)

    def member(owner: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(each for each in schema[owner]["members"] if each["name"] == name)
        return found

    for command in ("migrate", "migrate-incoming"):
        channels = schema[member(schema[command]["arg-type"], "channels")["type"]]
        assert channels["meta-type"] == "array"
        channel = channels["element-type"]
        assert schema[member(channel, "channel-type")["type"]]["values"] == ["main", "cpr"]
        address = schema[member(channel, "addr")["type"]]
        assert address["tag"] == "transport"
        transports = {variant["case"]: schema[variant["type"]] for variant in address["variants"]}
        assert set(transports) == {"socket", "exec", "file"}  # those that are supported, and no other
        assert {each["name"] for each in transports["file"]["members"]} >= {"filename", "offset"}
        assert transports["socket"]["tag"] == "type"
        assert {variant["case"] for variant in transports["socket"]["variants"]} == {"inet", "unix", "vsock", "fd"}


# --- true ---------------------------------------------------------------------------------------------------

WRONG = {"string": 1, "int": "x", "boolean": "x", "number": "x", "object": 1, "array": 1}


def json_type(schema: Entities, name: str) -> str:
    """Return what stands on the wire for type `name`; empty for any."""
    entity = schema[name]
    kind = str(entity["json-type"] if entity["meta-type"] == "builtin" else entity["meta-type"])
    return {"enum": "string", "alternate": "", "value": ""}.get(kind, kind)


async def test_arguments_are_taken_and_refused_as_the_schema_says(tmp_path: Path) -> None:
    """A missing, an unknown and a wrongly typed member: each command names them as its schema has them.

    Commands are checked where their tokens are granted: authority comes before arguments.
    """
    async with machine(tmp_path) as m, await m.raw() as raw:
        await raw.negotiate()
        schema = await schema_of(raw)
        extended = await raw.ask({"execute": "query-commands", "arguments": {"extended": True}})
        admitted = [info["name"] for info in extended["return"] if info["admitted"]]
        checked = set()
        for name in admitted:
            members = schema[schema[name]["arg-type"]]["members"]
            required = [member["name"] for member in members if "default" not in member]

            async def faults(arguments: dict[str, Any], name: str = name) -> list[str]:
                reply = await raw.ask({"execute": name, "arguments": arguments})
                assert reply["error"]["class"] == "GenericError", (name, reply)
                desc: str = reply["error"]["desc"]
                assert desc.startswith(f"Command {name!r}: "), (name, reply)
                return desc.removeprefix(f"Command {name!r}: ").split("; ")

            said = await faults({"no-such-member": 1})
            assert [f"'{member}' is missing" for member in required] == said[: len(required)]
            if "tag" in schema[schema[name]["arg-type"]]:
                checked.add(name)
                continue  # Which other members there are goes by the tag.
            assert said[len(required)] == "'no-such-member' is unexpected"
            assert said[len(required) + 1].startswith("there are"), said
            for member in members:
                kind = json_type(schema, member["type"])
                if kind:
                    said = await faults({member["name"]: WRONG[kind]})
                    assert any(fault.startswith(f"'{member['name']}' must be ") for fault in said), (name, said)
            checked.add(name)
    # Those of the phases that are not precreate are refused for want of a token, whatever their arguments.
    assert {"machine-set", "chardev-add", "object-add", "migrate-incoming", "migrate-set-parameters"} <= checked
    assert len(checked) >= 20


@pytest.mark.parametrize("oob", [False, True])
async def test_query_commands_lists_what_the_schema_has(tmp_path: Path, oob: bool) -> None:
    async with machine(tmp_path) as m, await m.raw() as raw:
        await raw.negotiate(oob=oob)
        schema = await schema_of(raw)
        plain = (await raw.ask({"execute": "query-commands"}))["return"]
    assert all(set(info) == {"name"} for info in plain)
    assert [info["name"] for info in plain] == sorted(
        name for name, entity in schema.items() if entity["meta-type"] == "command"
    )
