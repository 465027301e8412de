#!/usr/bin/env python3
"""Generates the tables in docs/ from the code that they are about. `make docs` runs it; a test fails if they are stale.

A generated part stands between two comments, and the text around it is written by hand:

    <!-- generated: NAME -->
    <!-- end of NAME -->

    .venv/bin/python scripts/generate_docs.py           # writes
    .venv/bin/python scripts/generate_docs.py --check   # only says which are stale, with exit status 1
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from vmm.capabilities import ADMIN, KINDS, MIGRATE, OBSERVE, OPERATE, QTEST, REPLAY
from vmm.cli_options import OPTIONS
from vmm.cpr.limits import CprLimits
from vmm.cpr.steps import DESTINATION_STEPS, SOURCE_STEPS
from vmm.migration.capability_table import MIGRATION_CAPABILITIES, SUPPORTED
from vmm.monitor.qapi import Alternate, AnyObject, Array, Builtin, Enum, Integer, Object, UnionShape, shape_of
from vmm.phases.catalog import COMMANDS, EVENTS
from vmm.phases.chain import chain, phases_granting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from vmm.monitor.command import Command
    from vmm.monitor.qapi import Member, Shape
    from vmm.phases.chain import PhaseFacts

ROOT: Final = Path(__file__).resolve().parent.parent
DOCS: Final = ROOT / "docs"

_COMMANDS: Final = """
add-fd chardev-add chardev-remove closefd cont device-list-properties device_add device_del getfd job-cancel
job-dismiss migrate migrate-incoming migrate-pause migrate-recover migrate-set-capabilities migrate-set-parameters
migrate-continue migrate-start-postcopy migrate_cancel
netdev_add netdev_del object-add object-del qmp_capabilities qom-get qom-list qom-set
query-accelerators query-chardev
query-commands query-cpu-definitions query-cpu-model-expansion query-cpus-fast query-current-machine query-fdsets
query-hotpluggable-cpus query-jobs query-kvm query-machines query-memory-size-summary query-migrate
query-migrate-capabilities query-migrate-parameters query-name query-qmp-schema query-status query-target query-uuid
query-version quit remove-fd set-numa-node stop system_powerdown system_reset system_wakeup x-exit-preconfig
"""
_EVENTS: Final = """
DEVICE_DELETED GUEST_PANICKED JOB_STATUS_CHANGE MIGRATION MIGRATION_PASS POWERDOWN RESET RESUME SHUTDOWN STOP
SUSPEND WAKEUP
"""
QEMU_COMMANDS: Final = frozenset(_COMMANDS.split())
QEMU_EVENTS: Final = frozenset(_EVENTS.split())
"""Names that QEMU 11.0 has, as far as they are, or may be, ours too. All others are documented as extensions."""

MARKED: Final = re.compile(
    r"<!-- generated: (?P<name>[a-z-]+) -->\n(?P<body>.*?)<!-- end of (?P=name) -->\n", re.DOTALL
)

OBSERVED: Final = re.compile(r"<!-- observed: (?P<name>[^>]+) -->\n(?P<body>.*?)<!-- end of (?P=name) -->\n", re.DOTALL)
"""What the run of the tests has written: see tests/phases/fault_table.py."""

SIDES: Final = (("source", SOURCE_STEPS), ("destination", DESTINATION_STEPS))


# --- phases and tokens ------------------------------------------------------------------------------------------


def phases() -> str:
    """Each phase: what it is to `query-machine-phase`, what it grants and withholds, and what ends its window."""
    rows = [
        (
            f"[`{phase.name}`](../vmm/phases/{phase.name}.py)",
            phase.machine_phase,
            ", ".join(_granted(phase)) or "nothing",
            ", ".join(f"`{kind.wire_name}`" for kind in phase.withholds),
            phase.left_by,
        )
        for phase in chain()
    ]
    return _table(("phase", "`query-machine-phase`", "grants", "withholds", "left by"), rows)


def _granted(phase: PhaseFacts) -> list[str]:
    granted = []
    for kind in phase.kinds():
        scope = phase.scopes.get(kind.wire_name)
        granted.append(f"`{kind.wire_name}`" + (f" for {', '.join(scope)}" if scope else ""))
    return granted


def commands() -> str:
    """Each command: the tokens that it needs, and the phases in which there are such."""
    rows = [
        (f"`{command.name}`", _needs(command), _phases(phases_granting(command.signature.needs)))
        for command in sorted(COMMANDS, key=lambda command: command.name)
    ]
    return _table(("command", "tokens", "phases"), rows)


def _needs(command: Command) -> str:
    described = []
    for need in command.signature.needs:
        scopes = [str(alternative.scope) for alternative in need.alternatives() if alternative.scope]
        scope = f" for {' or '.join(scopes)}" if scopes else ""
        if need.choice is not None:
            scope += f" (by `{need.choice.member}`)"
        described.append(" or ".join(f"`{kind.wire_name}`" for kind in need.kinds) + scope)
    return ", ".join(described)


def _phases(names: Sequence[str]) -> str:
    lent = [phase.name for phase in chain() if phase.lent]
    missing = [name for name in lent if name not in names]
    if not missing:
        return "all"
    if len(missing) < len(names):
        return f"all but {', '.join(missing)}"
    return ", ".join(names) or "none"


def tokens() -> str:
    """Each kind of token: what it allows, which phases grant it, which commands need it."""
    rows = []
    for kind in KINDS:
        granting = [phase for phase in chain() if kind in phase.kinds()]
        users = [
            f"`{command.name}`"
            for command in sorted(COMMANDS, key=lambda command: command.name)
            if any(kind in need.kinds for need in command.signature.needs)
        ]
        by = "every `query-` command" if kind.wire_name == "may-query" else ", ".join(users)
        rows.append((f"`{kind.wire_name}`", _first_paragraph(kind.__doc__), ", ".join(p.name for p in granting), by))
    return _table(("token", "who holds it", "granted in", "commands that need it"), rows)


def grants() -> str:
    """Each named grant, and the kinds in it."""
    rows = []
    for grant in (OBSERVE, OPERATE, MIGRATE, ADMIN, REPLAY, QTEST):
        left_out = [f"`{kind.wire_name}`" for kind in KINDS if kind not in grant.kinds]
        if len(left_out) < len(grant.kinds):
            held = f"all but {' and '.join(left_out)}"
        else:
            held = ", ".join(f"`{kind.wire_name}`" for kind in KINDS if kind in grant.kinds)
        rows.append((f"`{grant.name}`", held))
    return _table(("grant", "kinds"), rows)


# --- QMP --------------------------------------------------------------------------------------------------------


def own_commands() -> str:
    """The commands that QEMU has not, with arguments and results."""
    parts = []
    for command in COMMANDS:
        if command.name in QEMU_COMMANDS:
            continue
        parts.append(f"### `{command.name}`\n")
        parts.append(_paragraphs(command.handler.__doc__))
        parts.append(f"Needs {_needs(command)}.\n")
        parts += _members_of("Arguments", command.arguments)
        parts += _members_of("Returns", command.returns)
    return "\n".join(parts)


def own_events() -> str:
    """The events that QEMU has not, with their data."""
    parts = []
    for event in EVENTS:
        if event.name in QEMU_EVENTS:
            continue
        data = event.data
        parts.append(f"### `{event.name}`\n")
        parts.append(_paragraphs(data.__doc__ if data else ""))
        parts += _members_of("Data", data)
    return "\n".join(parts)


def _members_of(title: str, annotation: object) -> list[str]:
    if annotation is None:
        return []
    shape = shape_of(annotation)
    rows = list(_rows(shape, ""))
    if not rows:
        return [f"{title}: {_type(shape)}.\n"] if title == "Returns" else []
    return [f"{title}:\n", _table(("member", "type", ""), rows)]


def _rows(shape: Shape, prefix: str, seen: tuple[object, ...] = ()) -> Iterable[tuple[str, str, str]]:
    if isinstance(shape, Array):
        shape, prefix = shape.element, f"{prefix[:-1]}[]." if prefix else ""
    if not isinstance(shape, Object) or shape in seen:
        return
    texts = _member_texts(shape.kind)
    for member in shape.members:
        notes = [_default(shape.kind, member), texts.get(member.attribute, "").removesuffix(".")]
        yield f"`{prefix}{member.wire}`", _type(member.shape), "; ".join(filter(None, notes))
        yield from _rows(member.shape, f"{prefix}{member.wire}.", (*seen, shape))
    for _, inner in shape.inlined:
        yield from _rows(inner, prefix, (*seen, shape))


def _default(kind: type[Any], member: Member) -> str:
    if member.required:
        return ""
    default = getattr(attrs.fields_dict(kind)[member.attribute], "default", None)
    return f"default `{default}`" if isinstance(default, (str, int)) and default != "" else "optional"


def _type(shape: Shape) -> str:
    match shape:
        case Builtin():
            return {"str": "string", "bool": "boolean", "any": "any"}.get(shape.name, shape.name)
        case Integer():
            return "integer"
        case Enum():
            return "one of " + ", ".join(f"`{value}`" for value in shape.values)
        case Array():
            return f"list of {_plural(_type(shape.element))}"
        case Alternate():
            return " or ".join(_type(choice) for choice in shape.choices)
        case AnyObject() | Object() | UnionShape():
            return "object"


def _plural(name: str) -> str:
    return f"{name}s" if name in ("string", "integer", "object", "boolean") else name


def _member_texts(kind: type[Any]) -> dict[str, str]:
    """Return the docstrings that stand below the members of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    texts[statement.target.id] = " ".join(text.split())
    return texts


def migration_capabilities() -> str:
    """Which of QEMU's migration capabilities can be turned on."""
    names = ", ".join(f"`{name}`" for name in MIGRATION_CAPABILITIES if name in SUPPORTED)
    others = ", ".join(f"`{name}`" for name in MIGRATION_CAPABILITIES if name not in SUPPORTED)
    return f"Can be turned on: {names}.\n\nKnown by name, off, and refused with a reason: {others}.\n"


# --- the command line ---------------------------------------------------------------------------------------------


def options() -> str:
    """Each option of `trio-vmm run`, and the command that it stands for."""
    names = {command.name for command in COMMANDS}
    rows = [
        (
            ", ".join(f"`{name}`" for name in (option.name, *option.also))
            + (f" `{option.metavar}`" * bool(option.metavar)),
            re.sub(r"[a-z][a-z_-]+", lambda word: f"`{word[0]}`" if word[0] in names else word[0], option.command),
            "yes" if option.admitted else "",
            option.help + ("; may be repeated" if option.repeated else ""),
        )
        for option in OPTIONS
    ]
    return _table(("option", "stands for", "with `--precreate`", ""), rows)


# --- live update --------------------------------------------------------------------------------------------------


def limits() -> str:
    """How long one side waits for the other."""
    texts = _member_texts(CprLimits)
    rows = [(f"`{field.name}`", f"{field.default:g} s", texts[field.name]) for field in attrs.fields(CprLimits)]
    return _table(("limit", "default", "whose, for what"), rows)


def steps() -> str:
    """The named steps."""
    return _table(("side", "steps, in order"), [(side, ", ".join(f"`{s}`" for s in names)) for side, names in SIDES])


def faults() -> str:
    """Who has the guest after each fault at each step: the observed tables of the same page, side by side."""
    page = (DOCS / "live-update-faults.md").read_text()
    seen = {
        found["name"]: dict(re.findall(r"^\| `([^`]+)` \| ([^|]*?) \|", found["body"], re.MULTILINE))
        for found in OBSERVED.finditer(page)
    }
    short = {"source": "S", "destination": "D", "nobody": "✗"}

    def cell(owner: str) -> str:
        return " or ".join(short[one] for one in owner.split(" or ")) if owner else ""

    steps = [f"{side}:{step}" for side, names in SIDES for step in names]
    rows = [(f"`{step}`", *(cell(seen[fault].get(step, "")) for fault in seen)) for step in steps]
    return _table(("step", *seen), rows)


# --- Markdown -------------------------------------------------------------------------------------------------------

PARTS: Final[Mapping[str, Callable[[], str]]] = {
    "phases": phases,
    "commands": commands,
    "tokens": tokens,
    "grants": grants,
    "own-commands": own_commands,
    "own-events": own_events,
    "migration-capabilities": migration_capabilities,
    "options": options,
    "limits": limits,
    "steps": steps,
    "faults": faults,
}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _first_paragraph(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def _paragraphs(text: str | None) -> str:
    found = [" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n")]
    return "\n\n".join(part.replace("``", "`") for part in found if not part.startswith("Raises:")) + "\n"


def refreshed(text: str) -> str:
    """Return a document with its generated parts as they should be."""

    def part(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in PARTS:
            raise SystemExit(f"generate_docs: there is no part {name!r}; there are {', '.join(PARTS)}")
        return f"<!-- generated: {name} -->\n\n{PARTS[name]()}\n<!-- end of {name} -->\n"

    return MARKED.sub(part, text)


def main() -> int:
    """Write what is stale, or say so."""
    stale = [path for path in sorted(DOCS.glob("*.md")) if refreshed(path.read_text()) != path.read_text()]
    for path in stale:
        if "--check" not in sys.argv[1:]:
            path.write_text(refreshed(path.read_text()))
        print(f"{path.relative_to(ROOT)}: {'is stale' if '--check' in sys.argv[1:] else 'written'}")
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
