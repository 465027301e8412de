"""`trio-vmm stream dump` and `trio-vmm stream diff`: what is in a file in which a guest was saved."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any, Final

import attrs

from vmm import hostio
from vmm.cli_progress import harmless
from vmm.errors import VmmError
from vmm.migration.record_fields import PAGE_SIZE
from vmm.migration.stream_file import StreamFile, read_stream_file

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

_SHOWN: Final = 20
"""Runs of pages, and differences of one kind, that are shown to people."""
_LONG: Final = 32
"""Bytes of a string of bytes that are shown to people whole."""

SAME: Final = 0
DIFFERENT: Final = 1
TROUBLE: Final = 2


def add_stream_options(parser: argparse.ArgumentParser) -> None:
    """Add the two commands."""
    commands = parser.add_subparsers(dest="what", metavar="dump|diff", required=True)
    dump = commands.add_parser(
        "dump", help="show what is in a file", allow_abbrev=False,
        description="Show recipe, state of the devices and map of the RAM in FILE; verify all checksums.",
    )  # fmt: skip
    dump.add_argument("file", metavar="FILE", help="what migrate has written to a file:, save, or a snapshot")
    dump.add_argument("--json", action="store_true", help="all of it, as JSON")
    diff = commands.add_parser(
        "diff", help="compare two files", allow_abbrev=False,
        description="Compare two files; the status is 0 if they hold the same guest, 1 if not, 2 if one is damaged.",
    )  # fmt: skip
    diff.add_argument("one", metavar="A")
    diff.add_argument("two", metavar="B")
    for command in (dump, diff):
        command.add_argument("--offset", type=int, default=0, metavar="BYTES", help="where the stream begins")


def run_stream(options: argparse.Namespace) -> int:
    """Carry one of them out; return the exit status."""
    try:
        if options.what == "diff":
            return _diff(_load(options.one, options.offset), _load(options.two, options.offset))
        found = _load(options.file, options.offset)
    except VmmError as error:
        print(f"trio-vmm stream: {error}", file=sys.stderr)
        return TROUBLE
    if options.json:
        print(_without_controls(json.dumps(to_json(found), indent=1, ensure_ascii=False)))
    else:
        for line in describe(found):
            print(harmless(line))
    return SAME


def _without_controls(text: str) -> str:
    """Return JSON with escapes in place of what a terminal would obey, which it may have in its strings."""
    return re.sub(r"[^ -~\n]", lambda sign: sign[0] if sign[0].isprintable() else json.dumps(sign[0])[1:-1], text)


def _load(path: str, offset: int) -> StreamFile:
    fd = hostio.open_saved_state(path, offset)
    try:
        return read_stream_file(fd)
    finally:
        os.close(fd)


# --- as JSON ----------------------------------------------------------------------------------------------


def to_json(found: StreamFile) -> dict[str, Any]:
    """Return all of it as JSON. Strings of bytes are `{"$hex": "…"}`."""
    ram: dict[str, Any] = {"where": found.ram, "extents": [list(extent) for extent in found.extents]}
    if found.in_place is not None:
        place = found.in_place
        ram |= {"backend": place.name, "size": place.size, "identity": place.identity.hex()}
    if found.ram in ("stream", "places"):
        runs = [[first * PAGE_SIZE, count * PAGE_SIZE] for first, count in found.pages.runs()]
        ram |= {"passes": found.passes, "sent": found.sent, "unverified": found.unverified, "absent": found.absent}
        ram |= {"runs": runs, "pages": sum(size for _, size in runs) // PAGE_SIZE, "digest": ram_digest(found)}
    return {
        "format": found.version,
        "size": found.size,
        "records": found.records,
        "machine": found.machine,
        "recipe-digest": found.recipe_digest.hex(),
        "terms": None if found.terms is None else attrs.asdict(found.terms),
        "recipe": None if found.recipe is None else list(found.recipe),
        "home": None if found.home is None else list(found.home),
        "sections": [
            {"name": section.name, "version": section.version, "state": _json(section.state)}
            for section in found.sections.values()
        ],
        "ram": ram,
    }


def ram_digest(found: StreamFile) -> str:
    """Return a digest of the content of RAM: the same where every page has the same checksum."""
    digest = hashlib.blake2b(digest_size=16)
    for page in found.pages.pages():
        digest.update(f"{page}:{found.pages.get(page)},".encode())
    return digest.hexdigest()


def _json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"$hex": value.hex()}
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json(item) for item in value]
    return value


# --- for people -------------------------------------------------------------------------------------------


def describe(found: StreamFile) -> Iterator[str]:
    """Yield lines that say what there is."""
    head = f"format version {found.version}, {found.size} bytes, {found.records} records"
    yield f"stream    {head}; all checksums are right"
    yield f"machine   {found.machine}"
    if found.terms is not None:
        yield f"terms     {json.dumps(attrs.asdict(found.terms))}"
    yield from _commands("recipe", found.recipe)
    yield from _commands("home", found.home)
    for section in found.sections.values():
        yield f"section   {section.name}, version {section.version}"
        for path, value in flat(section.state):
            yield f"            {path}: {shown(value)}"
    yield f"RAM       {_WHERE[found.ram]}"
    if found.in_place is not None:
        place = found.in_place
        yield f"            {place.size} bytes, in the file of {place.name}, marked {place.identity.hex()}"
    for address, size in found.extents:
        yield f"            extent {address:#x} to {address + size - 1:#x}, {size} bytes"
    if found.ram in ("stream", "places"):
        runs = list(found.pages.runs())
        count = sum(count for _, count in runs)
        if found.passes:
            yield f"            sent in {found.passes} passes, {found.sent} pages in all"
        if found.unverified:
            yield f"            {found.unverified} of them are packed by zstd, which this host cannot unpack"
        if found.absent:
            yield f"            {found.absent} pages come only after its end, by postcopy"
        yield f"            {count} pages are not zero, in {len(runs)} runs; digest {ram_digest(found)}"
        for first, count in islice(runs, _SHOWN):
            yield f"              {first * PAGE_SIZE:#x} to {(first + count) * PAGE_SIZE - 1:#x}"
        if len(runs) > _SHOWN:
            yield f"              and {len(runs) - _SHOWN} more runs"


_WHERE: Final[Mapping[str, str]] = {
    "none": "is not in it",
    "shared memory": "was handed over in shared memory",
    "stream": "is in the stream",
    "places": "is at fixed places of the file",
    "file": "was left where it is",
}


def _commands(what: str, commands: Sequence[Mapping[str, Any]] | None) -> Iterator[str]:
    if commands is not None:
        yield f"{what:9} {len(commands)} commands"
        for command in commands:
            yield f"            {_command(command)}"


def _command(command: Mapping[str, Any]) -> str:
    arguments = command.get("arguments")
    return str(command["execute"]) + (f" {json.dumps(arguments, ensure_ascii=False)}" if arguments else "")


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of everything in a section's state that holds nothing else."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from flat(item, f"{path}[{index}]")
    elif path:
        yield path, value


def shown(value: Any) -> str:
    """Return a value for people."""
    if not isinstance(value, bytes):
        return json.dumps(value, ensure_ascii=False)
    if len(value) <= _LONG:
        return value.hex() or "no bytes"
    return f"{len(value)} bytes, sha256 {hashlib.sha256(value).hexdigest()[:16]}"


# --- differences ------------------------------------------------------------------------------------------


def _diff(one: StreamFile, two: StreamFile) -> int:
    lines = list(differences(one, two))
    for line in lines:
        print(harmless(line))
    return DIFFERENT if lines else SAME


def differences(one: StreamFile, two: StreamFile) -> Iterator[str]:
    """Yield a line for each thing in which the guests differ. How a stream is written is no difference."""
    if one.machine != two.machine:
        yield f"machine: {one.machine} | {two.machine}"
    for what, ours, theirs in (("recipe", one.recipe, two.recipe), ("home", one.home, two.home)):
        for a, b in zip_longest(ours or (), theirs or ()):
            if a != b:
                yield f"{what}: {'-' if a is None else _command(a)} | {'-' if b is None else _command(b)}"
    for name in dict.fromkeys((*one.sections, *two.sections)):
        yield from _sections(one, two, name)
    if one.extents != two.extents:
        yield f"RAM: extents {_extents(one)} | {_extents(two)}"
    if one.in_place != two.in_place:
        yield f"RAM: left in place {_place(one)} | {_place(two)}"
    pages = one.pages.differences(two.pages)
    for page in pages[:_SHOWN]:
        yield f"RAM: page {page * PAGE_SIZE:#x}: {_sum(one, page)} | {_sum(two, page)}"
    if len(pages) > _SHOWN:
        yield f"RAM: {len(pages) - _SHOWN} more pages"


def _sections(one: StreamFile, two: StreamFile, name: str) -> Iterator[str]:
    ours, theirs = one.sections.get(name), two.sections.get(name)
    if ours is None or theirs is None:
        yield f"section {name}: {'missing' if ours is None else 'there'} | {'missing' if theirs is None else 'there'}"
        return
    if ours.version != theirs.version:
        yield f"section {name}: version {ours.version} | {theirs.version}"
    before, after = dict(flat(ours.state)), dict(flat(theirs.state))
    for path in dict.fromkeys((*before, *after)):
        a, b = (shown(state[path]) if path in state else "-" for state in (before, after))
        if path not in before or path not in after or before[path] != after[path]:
            yield f"section {name}: {path}: {a} | {b}"


def _extents(found: StreamFile) -> str:
    return ", ".join(f"{size} bytes at {address:#x}" for address, size in found.extents) or "none"


def _place(found: StreamFile) -> str:
    return "-" if found.in_place is None else f"{found.in_place.name} {found.in_place.identity.hex()}"


def _sum(found: StreamFile, page: int) -> str:
    value = found.pages.get(page)
    return "zero" if value is None else f"{value:#010x}"
