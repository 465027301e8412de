"""A state class that changes has another version, or a test fails that says what to do."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import attrs
import pytest

from tests.conformance import fingerprints
from tests.conformance.fingerprints import complaint, fingerprint, recorded, updated, was_released
from vmm.hw.state import U8, U16, Integer, Items, Octets
from vmm.phases.section_kinds import SectionKind, section_kinds

if TYPE_CHECKING:
    from pathlib import Path


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@attrs.define
class Queue:
    size: U16 = 0
    ready: bool = False


@attrs.define
class Before:
    level: U8 = 0
    colour: Colour = Colour.RED
    name: Annotated[bytes, Octets(8)] = b""
    queues: Annotated[tuple[Queue, ...], Items(4)] = ()
    last: U8 | None = None


LINES = [
    ".level: an integer from 0x0 to 0xff",
    ".colour: one of 1, 2",
    ".name: 0 to 8 bytes",
    ".queues: at most 4 of",
    ".queues[]: fields",
    ".queues[].size: an integer from 0x0 to 0xffff",
    ".queues[].ready: true or false",
    ".last: may be none",
    ".last: an integer from 0x0 to 0xff",
]


def kind_of(declared: Any, version: int = 1) -> SectionKind:
    return SectionKind("thing", version, 1, (declared,))


def test_a_fingerprint_has_names_kinds_ranges_order_and_nesting() -> None:
    assert fingerprint(kind_of(Before)) == LINES


def thing(**fields: Any) -> Any:
    """Make a class with these fields, each of its kind."""
    made: Any = type("Thing", (), {"__annotations__": fields})
    return attrs.define(made)


@pytest.mark.parametrize(
    "fields",
    [
        {"height": U8},
        {"level": Annotated[int, Integer(0, 3)]},
        {"level": Queue},
        {"level": U8, "more": bool},
        {"level": U8 | None},
        {},
    ],
)
def test_every_change_is_another_fingerprint(fields: dict[str, Any]) -> None:
    before = fingerprint(kind_of(thing(level=U8)))
    assert before == [".level: an integer from 0x0 to 0xff"]
    assert fingerprint(kind_of(thing(**fields))) != before


def test_another_order_is_another_fingerprint_and_said_so() -> None:
    one, other = thing(a=U8, b=U8), thing(b=U8, a=U8)
    assert "\n  the order of the fields\n" in complaint(kind_of(other), fingerprint(kind_of(one)))


def test_classes_that_their_owner_checks_have_their_types_and_limits() -> None:
    @attrs.frozen
    class Plain:
        data: bytes = b""
        text: str = ""
        state: Literal["on", "off"] = "on"

    assert fingerprint(kind_of(Plain)) == [".data: bytes", ".text: str", ".state: one of on, off"]
    assert ".output: bytes, at most a buffer (BUFFER_LIMIT 65536)" in fingerprint(section_kinds()["chardev"])


@pytest.mark.parametrize("kind", section_kinds().values(), ids=lambda kind: kind.name)
def test_no_kind_has_changed_without_a_new_version(kind: SectionKind) -> None:
    before = recorded().get(kind.name, {}).get(str(kind.version))
    assert before is not None, f"{kind.name} version {kind.version} is not recorded: run scripts/golden_state.py"
    assert fingerprint(kind) == before, complaint(kind, before)


def test_every_version_is_recorded_and_no_other() -> None:
    wanted = {name: {str(n) for n in range(1, kind.version + 1)} for name, kind in section_kinds().items()}
    assert {name: set(versions) for name, versions in recorded().items()} == wanted


def test_a_version_that_was_released_is_not_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "RELEASED", tmp_path)
    (tmp_path / "0.7.0").mkdir()
    (tmp_path / "0.7.0" / "sections.json").write_text('{"thing": 1}')
    record = {"thing": {"1": [".level: 0 to 8 bytes"]}}
    kept, written, refused = updated({"thing": kind_of(Before)}, record)
    assert (kept, written) == (record, [])
    assert refused == [
        "thing: what it declares has changed, and its version, 1, has not:\n"
        "  - .level: 0 to 8 bytes\n" + "".join(f"  + {line}\n" for line in LINES) + "Give it version 2 with an upgrade "
        'from 1 (CONTRIBUTING.md, "State that travels"), then run scripts/golden_state.py. '
        "If version 1 was in no release, that alone will do.\nIt was: release 0.7.0 has it."
    ]
    now, written, refused = updated({"thing": kind_of(Before, 2)}, record)
    assert (now, written, refused) == ({"thing": {**record["thing"], "2": LINES}}, ["thing-2"], [])


def test_a_version_that_was_not_released_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "RELEASED", tmp_path)
    now, written, refused = updated({"thing": kind_of(Before)}, {"thing": {"1": []}})
    assert (now, written, refused) == ({"thing": {"1": LINES}}, ["thing-1"], [])
    assert was_released("thing", 1) is None
