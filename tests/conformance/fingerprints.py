"""What a state class declares, line by line, and what is recorded of it beside its version.

A fingerprint has everything that a section's meaning hangs on: names, kinds, ranges, order, nesting. It is recorded
once for each kind and version, in `tests/golden/fingerprints.json`: a class that has another one and the same version
would be misread by an older program. `scripts/golden_state.py` records, and rewrites nothing that was released.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, get_args, get_origin, get_type_hints

import attrs

from vmm.hw.state import describe, items_of, optional_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmm.phases.section_kinds import SectionKind

GOLDEN: Final = Path(__file__).resolve().parent.parent / "golden"
RECORD: Final = GOLDEN / "fingerprints.json"
RELEASED: Final = GOLDEN / "released"

Fingerprints = dict[str, dict[str, list[str]]]
"""Lines by kind and version, the latter in decimal."""

WHAT_TO_DO: Final = (
    "{kind}: what it declares has changed, and its version, {version}, has not:\n{changes}\n"
    'Give it version {next} with an upgrade from {version} (CONTRIBUTING.md, "State that travels"), then run '
    "scripts/golden_state.py. If version {version} was in no release, that alone will do."
)


def fingerprint(kind: SectionKind) -> list[str]:
    """Return the lines of a kind, in the order of the declaration."""
    several = len(kind.declared) > 1
    return [line for declared in kind.declared for line in _fields(declared, declared.__name__ if several else "")]


def _fields(declared: type, path: str) -> Iterator[str]:
    hints = get_type_hints(declared, include_extras=True)
    for field in attrs.fields(declared):
        yield from _lines(hints[field.name], f"{path}.{field.name}", _validated(field.validator))


def _lines(declared: Any, path: str, validated: str = "") -> Iterator[str]:
    if (items := items_of(declared)) is not None:
        yield f"{path}: at most {items[0]} of"
        yield from _lines(items[1], f"{path}[]")
    elif (inner := optional_of(declared)) is not None and not validated:
        yield f"{path}: may be none"
        yield from _lines(inner, path)
    elif isinstance(declared, type) and attrs.has(declared):
        yield f"{path}: fields"
        yield from _fields(declared, path)
    else:
        yield f"{path}: {_words(declared)}{validated}"


def _words(declared: Any) -> str:
    try:
        return str(describe(declared))
    except TypeError:  # a class whose owner checks it without a schema
        if get_args(declared) and get_origin(declared) is not None:
            return f"one of {', '.join(str(part) for part in get_args(declared) if part is not NoneType)}"
        return getattr(declared, "__name__", str(declared))


def _validated(validator: Any) -> str:
    """Put a validator into words: its name, and the numbers of its module that it compares with."""
    if validator is None:
        return ""
    named = {name: validator.__globals__.get(name) for name in validator.__code__.co_names}
    limits = [f"{name} {value}" for name, value in named.items() if isinstance(value, int)]
    return f", {validator.__name__.strip('_').replace('_', ' ')} ({', '.join(limits)})"


def recorded() -> Fingerprints:
    """Return what is recorded."""
    content: Fingerprints = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return content


def released() -> Mapping[str, Mapping[str, int]]:
    """Return for every release which version of each kind it wrote."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(RELEASED.glob("*/sections.json"))}


def was_released(kind: str, version: int) -> str | None:
    """Return the first release that wrote this version of `kind`, or a later one; None if there is none."""
    return next((release for release, kinds in released().items() if kinds.get(kind, 0) >= version), None)


def changes(before: list[str], now: list[str]) -> str:
    """Return the lines that went and came."""
    gone = [f"  - {line}" for line in before if line not in now]
    come = [f"  + {line}" for line in now if line not in before]
    return "\n".join([*gone, *come] or ["  the order of the fields"])


def complaint(kind: SectionKind, before: list[str]) -> str:
    """Say that `kind` is not what was recorded, and what to do."""
    now = fingerprint(kind)
    return WHAT_TO_DO.format(kind=kind.name, version=kind.version, next=kind.version + 1, changes=changes(before, now))


def updated(kinds: Mapping[str, SectionKind], record: Fingerprints) -> tuple[Fingerprints, list[str], list[str]]:
    """Return the record as `kinds` are now, what of it is new or rewritten (`kind-version`), and what is refused."""
    result = {name: dict(versions) for name, versions in record.items()}
    written, refused = [], []
    for name, kind in sorted(kinds.items()):
        now, before = fingerprint(kind), record.get(name, {}).get(str(kind.version))
        if before == now:
            continue
        release = was_released(name, kind.version)
        if before is not None and release is not None:
            refused.append(f"{complaint(kind, before)}\nIt was: release {release} has it.")
            continue
        result.setdefault(name, {})[str(kind.version)] = now
        written.append(f"{name}-{kind.version}")
    return result, written, refused
