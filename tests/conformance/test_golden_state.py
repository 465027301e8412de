"""Stored sections of every version that is read. Once released, a file never changes and never goes.

A new version gets a new file: `scripts/golden_state.py` writes those that are missing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.conformance.devices import CASES, Bench, Case
from tests.conformance.fingerprints import GOLDEN, fingerprint
from tests.conformance.other_sections import OTHERS
from vmm.hw.codec import StateCodec
from vmm.hw.state import describe
from vmm.phases.section_kinds import section_kinds

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any, Final

    from tests.conformance.other_sections import OtherCase

FOLDER: Final = GOLDEN / "state"

every_device = pytest.mark.parametrize("case", CASES, ids=str)
every_other = pytest.mark.parametrize("case", OTHERS, ids=str)


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


@every_other
def test_stored_sections_that_are_no_devices_are_read_in_every_version(case: OtherCase) -> None:
    kind = section_kinds()[case.name]
    for version in range(kind.accepts, kind.version + 1):
        content = json.loads(golden(case.name, version).read_text())
        for which in ("idle", "busy"):
            case.load(version, from_json(content[which]))


@every_other
def test_what_is_written_of_them_has_not_changed_without_a_new_version(case: OtherCase) -> None:
    content = json.loads(golden(case.name, section_kinds()[case.name].version).read_text())
    for which, section in case.sections().items():
        assert to_json(section) == content[which]


def test_there_is_a_file_for_every_version_and_none_else() -> None:
    kinds = section_kinds().values()
    assert set(FOLDER.iterdir()) == {golden(kind.name, n) for kind in kinds for n in range(1, kind.version + 1)}


def test_every_kind_has_a_case() -> None:
    assert {codec_of(case).schema.name for case in CASES} | {case.name for case in OTHERS} == section_kinds().keys()


def files() -> dict[str, dict[str, Any]]:
    """Return the content of the golden file of every kind's present version, by `kind-version`."""
    kinds = section_kinds()
    of_devices = {codec_of(case).schema.name: present(case) for case in CASES}
    of_others = {
        case.name: {
            "fields": fingerprint(kinds[case.name]),
            **{which: to_json(section) for which, section in case.sections().items()},
        }
        for case in OTHERS
    }
    return {f"{name}-{kinds[name].version}": content for name, content in {**of_devices, **of_others}.items()}
