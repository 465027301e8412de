"""Every kind of section that a machine's state is made of, with the versions of it that are read here.

A section is told by its name (``uart0``), and what is in it by its kind (``uart16550``) and version. A source says
which it will send along with its machine, so that a destination which could not read one refuses while the guest
still runs. The versions of all kinds are held by golden files (`tests/golden`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm.backends.chardev_state import ChardevState
from vmm.errors import RecipeInvalid, SectionsUnreadable, StateRejected
from vmm.hw.acpi_pm import AcpiPmState
from vmm.hw.debug_exit import DebugExitState
from vmm.hw.i8042 import I8042State
from vmm.hw.legacy import PostCodeState, SystemControlState
from vmm.hw.rtc import RtcState
from vmm.hw.state import Misfit
from vmm.hw.uart import UartState
from vmm.hw.virtio.rng import VirtioRngState
from vmm.kvm.state import ChipState, VcpuState
from vmm.migration.stream_records import Section
from vmm.phases.fdsets import SECTION as FDSETS
from vmm.phases.fdsets_state import FdSetsState
from vmm.phases.processors import KernelState
from vmm.phases.quiesced import Pause
from vmm.phases.session_state import MonitorState
from vmm.qtest.session_state import QtestServerState
from vmm.qtest.state import QtestState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmm.hw.state import Upgrade
    from vmm.phases.machine import Machine


@final
@attrs.frozen
class SectionKind:
    """What a section may be."""

    name: str
    version: int
    """That is written."""
    accepts: int
    """The oldest that is read."""
    declared: tuple[type, ...]
    """The classes whose fields it has."""
    downgrades: tuple[Upgrade, ...] = ()
    """As `vmm.hw.state.Schema` has them."""

    @property
    def read(self) -> str:
        """The versions that are read, in words."""
        return f"{self.version}" if self.accepts == self.version else f"{self.accepts} to {self.version}"


DECLARED: Final[tuple[Any, ...]] = (
    AcpiPmState, ChardevState, DebugExitState, FdSetsState, I8042State, MonitorState, PostCodeState, QtestServerState,
    QtestState, RtcState, SystemControlState, UartState, VirtioRngState,
)  # fmt: skip
"""The classes that have a schema, which is a kind each."""

_SECTIONS: Final = 4096


def section_kinds() -> Mapping[str, SectionKind]:
    """Return every kind by its name."""
    kinds = [_of_schema(kind) for kind in DECLARED]
    kinds.append(SectionKind("kvm", KernelState.VERSION, KernelState.VERSION, (VcpuState, ChipState)))
    kinds.append(SectionKind(Pause.KIND, Pause.VERSION, Pause.VERSION, (Pause,)))
    return {kind.name: kind for kind in kinds}


def _of_schema(declared: Any) -> SectionKind:
    schema = declared.SCHEMA
    return SectionKind(
        schema.name, schema.version, schema.accepts, (declared,), getattr(schema, "downgrades", ())
    )  # a chardev's has none


def read_here() -> dict[str, Any]:
    """Return the member of a destination's ``hello`` that says which versions of which kinds it reads."""
    return {"hears": [FDSETS], "reads": {kind.name: [kind.accepts, kind.version] for kind in section_kinds().values()}}


def version_for(kind: str, version: int, hello: object) -> int:
    """Return in which version a section of `kind`, which is saved as `version`, is written for who said `hello`."""
    reads = hello.get("reads") if isinstance(hello, dict) else None
    known = section_kinds().get(kind)
    match reads.get(kind) if isinstance(reads, dict) else None:
        case [int(), int(newest)] if known is not None and version - len(known.downgrades) <= newest < version:
            return newest
        case _:
            return version


def sections_of(
    machine: Machine, hello: Mapping[str, Any] | None = None, *, sessions: bool = False
) -> list[dict[str, Any]]:
    """Return name, kind and version of each section that `machine` will send, as message ``machine`` has them.

    Args:
        hello: what the destination said, unchecked. Of a kind that it knows in an older version alone it gets that, if
            there are downgrades to it.
        sessions: whether clients of its monitors go along.
    """
    machine.made.host.stores.declare_again(machine.state)
    kinds = {device.name: device.state.SCHEMA.name for device in (*machine.devices, *machine.slots.devices)}
    told = [
        {"name": name, "kind": kind, "version": version_for(kind, version, hello)}
        for name, version in (*machine.state.versions().items(), *machine.made.host.stores.extra_sections(sessions))
        for kind in (kinds.get(name, name.partition("/")[0]),)
    ]
    return [*told, {"name": Pause.KIND, "kind": Pause.KIND, "version": Pause.VERSION}]


@final
class OlderSections:
    """The sections of a machine that are written in an older version than they are saved in."""

    def __init__(self, told: Iterable[Mapping[str, Any]]) -> None:
        """`told` is what `sections_of` has returned."""
        kinds = section_kinds()
        self._older: Final = {
            section["name"]: (kinds[section["kind"]], section["version"])
            for section in told
            if section["kind"] in kinds and section["version"] < kinds[section["kind"]].version
        }

    def applied(self, section: Section) -> Section:
        """Return `section` in the version that it is written in.

        Raises:
            StateRejected: something in it would be lost.
        """
        if section.name not in self._older:
            return section
        kind, version = self._older[section.name]
        fields: Any = dict(section.state)
        for downgrade in kind.downgrades[: section.version - version]:
            try:
                fields = downgrade(fields)
            except Misfit as misfit:
                fault = f"{section.name}{misfit.path} {misfit.problem}; the destination reads version {version} alone"
                raise StateRejected(section=section.name, faults=(fault,)) from None
        return Section(section.name, version, fields)


def require_readable(sections: object) -> None:
    """Refuse sections that a source, which may be hostile, announced and that are not read here.

    Args:
        sections: as `sections_of` returns them; None of a source that announces none, whose sections are looked at
            when they come.

    Raises:
        RecipeInvalid: they are no such list.
        SectionsUnreadable: naming each, with what to do.
    """
    if sections is None:
        return
    kinds = section_kinds()
    faults, later = [], False
    for name, kind, version in _listed(sections):
        known = kinds.get(kind)
        if known is None:
            faults.append(f"{name} is a {kind}, which is not known here")
            later = True
        elif not known.accepts <= version <= known.version:
            faults.append(f"{name} has version {version} of {kind}, read here: {known.read}")
            later = later or version > known.version
    if faults:
        raise SectionsUnreadable(faults=tuple(faults), later=later)


def _listed(sections: object) -> Iterable[tuple[str, str, int]]:
    if not isinstance(sections, list) or len(sections) > _SECTIONS:
        raise _malformed(f"sections must be a list of at most {_SECTIONS}")
    for number, section in enumerate(sections):
        match section:
            case {"name": str(name), "kind": str(kind), "version": int(version)} if len(name) + len(kind) <= 512:
                yield name, kind, version
            case _:
                raise _malformed(f"sections[{number}] must have name and kind, texts, and version, a number")


def _malformed(reason: str) -> RecipeInvalid:
    return RecipeInvalid(source="of the source", where="as a whole", reason=reason)
