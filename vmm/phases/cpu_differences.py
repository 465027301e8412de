"""Whether a guest's processor stays what it is when another program makes its machine.

Both sides start from what KVM offers. What a guest sees of that is decided by the program, and a later one may decide
otherwise. The source says what it was offered and what it made of it; the destination makes of the same offer what it
would, and compares: so nothing has to be built to find out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vmm.errors import RecipeInvalid
from vmm.kvm.cpuid import CpuidEntry
from vmm.monitor.arguments import structure
from vmm.phases.config import CpuOptions, MachineOptions
from vmm.phases.cpus import CpuOffer
from vmm.phases.differences import Difference

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vmm.phases.cpus import CpuModel
    from vmm.recipe import Recipe

_MOST: Final = 1024
"""Leaves and subleaves; KVM has about a hundred."""


def cpu_to_json(model: CpuModel) -> dict[str, Any]:
    """Return what a source says of its guest's processor."""
    offer = model.offer
    return {
        "offered": [_words(entry) for entry in offer.supported],
        "tsc-deadline": offer.tsc_deadline,
        "leaves": [_words(entry) for entry in model.leaves(0)],
    }


def compare_cpus(body: object, recipe: Recipe) -> Iterator[Difference]:
    """Yield each CPUID leaf that the first vCPU of `recipe`, made here, would answer otherwise than `body` says.

    `recipe` has been checked.

    Raises:
        RecipeInvalid: `body`, which a peer sent, is nothing that `cpu_to_json` returns.
        VmmError: the CPU model of `recipe` cannot be had of that offer.
    """
    offered, deadline, leaves = _checked(body)
    arguments = {step.execute: step.arguments for step in recipe}
    machine = structure(MachineOptions, arguments["machine-set"], "machine-set")
    options = structure(CpuOptions, arguments["cpu-model-set"], "cpu-model-set")
    assert isinstance(machine, MachineOptions)
    assert isinstance(options, CpuOptions)
    yield from _compared(leaves, CpuOffer(offered, deadline, machine.smp.cpus).choose(options))


def compare_made(body: object, model: CpuModel) -> Iterator[Difference]:
    """Yield each CPUID leaf that `model`, of a machine made here, answers otherwise than `body` says.

    That may be of another host, whose KVM offers something else.

    Raises:
        RecipeInvalid: as `compare_cpus`.
    """
    _, _, leaves = _checked(body)
    yield from _compared(leaves, model)


def _compared(leaves: Sequence[CpuidEntry], model: CpuModel) -> Iterator[Difference]:
    source, here = _by_leaf(leaves), _by_leaf(model.leaves(0))
    for leaf in sorted({*source, *here}):
        there, ours = source.get(leaf), here.get(leaf)
        if there != ours:
            name = f"cpuid {leaf[0]:#x}.{leaf[1]}"
            yield Difference(name=name, effect="guest-visible", source=_shown(there), here=_shown(ours))


def _words(entry: CpuidEntry) -> list[int]:
    return [entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx]


def _checked(body: object) -> tuple[tuple[CpuidEntry, ...], bool, tuple[CpuidEntry, ...]]:
    if isinstance(body, dict) and isinstance(body.get("tsc-deadline"), bool):
        offered, leaves = _leaves(body.get("offered")), _leaves(body.get("leaves"))
        if offered is not None and leaves is not None:
            return offered, body["tsc-deadline"], leaves
    reason = "what it says of the processor is no list of CPUID leaves"
    raise RecipeInvalid(source="of the source", where="as a whole", reason=reason)


def _leaves(value: object) -> tuple[CpuidEntry, ...] | None:
    if not isinstance(value, list) or len(value) > _MOST:
        return None
    well_formed = all(
        isinstance(words, list) and len(words) == 7 and all(type(word) is int and 0 <= word < 1 << 32 for word in words)
        for words in value
    )
    return tuple(CpuidEntry(*words) for words in value) if well_formed else None


def _by_leaf(entries: Sequence[CpuidEntry]) -> Mapping[tuple[int, int], tuple[int, int, int, int]]:
    # What is all zero is what a leaf answers that is not there.
    found = {(entry.function, entry.index): (entry.eax, entry.ebx, entry.ecx, entry.edx) for entry in entries}
    return {leaf: registers for leaf, registers in found.items() if any(registers)}


def _shown(registers: tuple[int, int, int, int] | None) -> str | None:
    return None if registers is None else " ".join(f"{register:08x}" for register in registers)
