"""Stored sections of every version that is read. Once released, a file never changes and never goes.

A new version gets a new file; `python -m tests.conformance.test_golden_state` writes those that are missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conformance.devices import CASES, Bench, Case
from vmm.hw.codec import StateCodec
from vmm.hw.state import describe

if TYPE_CHECKING:
    from typing import Any, Final

FOLDER: Final = Path(__file__).resolve().parent.parent / "golden" / "state"

every_device = pytest.mark.parametrize("case", CASES, ids=str)


def to_json(value: Any) -> Any:
    """Bytes are not JSON: they become an object with their hexadecimal digits."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list) else value


def from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"]) if value.keys() == {"hex"} else {key: from_json(value[key]) for key in value}
    return [from_json(item) for item in value] if isinstance(value, list) else value


def codec_of(case: Case) -> StateCodec[Any]:
    return StateCodec.of(type(case.make(Bench()).state))


def golden(name: str, version: int) -> Path:
    return FOLDER / f"{name}-{version}.json"


def stored(case: Case, version: int) -> dict[str, Any]:
    path = golden(codec_of(case).schema.name, version)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def present(case: Case) -> dict[str, Any]:
    """What a file of the present version holds: the declaration, an idle section, and a busy one."""
    codec, device = codec_of(case), case.make(Bench())
    idle = codec.dump(device.state)
    case.keep_busy(device)
    return {"fields": describe(codec.kind), "idle": to_json(idle), "busy": to_json(codec.dump(device.state))}


@every_device
def test_the_declaration_has_not_changed_without_a_new_version(case: Case) -> None:
    codec = codec_of(case)
    assert describe(codec.kind) == stored(case, codec.schema.version)["fields"]


@every_device
def test_the_power_on_state_has_not_changed_without_a_new_version(case: Case) -> None:
    codec = codec_of(case)
    assert to_json(codec.dump(case.make(Bench()).state)) == stored(case, codec.schema.version)["idle"]


@every_device
def test_stored_sections_of_every_version_are_read(case: Case) -> None:
    codec = codec_of(case)
    for version in range(codec.schema.accepts, codec.schema.version + 1):
        for which in ("idle", "busy"):
            device = case.make(Bench())
            device.state = codec.load(from_json(stored(case, version)[which]), version)
            device.after_load()


@every_device
def test_a_stored_section_of_the_present_version_is_written_back_as_it_was(case: Case) -> None:
    codec = codec_of(case)
    for which in ("idle", "busy"):
        section = from_json(stored(case, codec.schema.version)[which])
        assert codec.dump(codec.load(section)) == section


def test_there_is_a_file_for_every_version_and_none_else() -> None:
    schemas = [codec_of(case).schema for case in CASES]
    wanted = {golden(schema.name, version) for schema in schemas for version in range(1, schema.version + 1)}
    assert set(FOLDER.iterdir()) == wanted


def write_missing() -> None:
    """Store what the present version is like, unless it is stored."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        schema = codec_of(case).schema
        path = golden(schema.name, schema.version)
        if not path.exists():
            path.write_text(json.dumps(present(case), indent=2) + "\n")


if __name__ == "__main__":
    write_missing()
