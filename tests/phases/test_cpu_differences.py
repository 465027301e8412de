"""A program that makes another processor of what KVM offers than the one before it did."""

from __future__ import annotations

import sys
from typing import Any, Final

import pytest

from tests.phases.update_command import machine
from tests.phases.update_command import update as update_command
from vmm.errors import RecipeInvalid
from vmm.kvm.cpuid import CpuidEntry
from vmm.phases.config import CpuOptions
from vmm.phases.cpu_differences import compare_cpus, cpu_to_json
from vmm.phases.cpus import CpuOffer
from vmm.recipe import Recipe

OFFERED: Final = (
    CpuidEntry(0, 0, 0, 7, 0x756E6547, 0x6C65746E, 0x49656E69),
    CpuidEntry(1, 0, 0, 0x806EA, 0x800, 0x7FFA3203, 0x1F8BFBFF),
    CpuidEntry(7, 0, 1, 0, 0x29C6FBF, 0, 0),
)
RECIPE: Final = Recipe.from_json("r", [{"execute": "machine-set"}, {"execute": "cpu-model-set"}])


def said() -> dict[str, Any]:
    return cpu_to_json(CpuOffer(OFFERED, True, 1).choose(CpuOptions()))


def test_the_same_program_makes_the_same_processor() -> None:
    assert list(compare_cpus(said(), RECIPE)) == []


def test_a_leaf_that_is_another_one_is_named_with_its_registers() -> None:
    body = said()
    words = next(words for words in body["leaves"] if words[:2] == [7, 0])
    words[4] |= 1 << 31
    (found,) = compare_cpus(body, RECIPE)
    assert (found.name, found.effect) == ("cpuid 0x7.0", "guest-visible")
    assert (found.source, found.here) == ("00000000 809c6fbb 00000000 00000000", "00000000 009c6fbb 00000000 00000000")


def test_a_leaf_that_only_one_side_has_is_named_unless_it_is_all_zero() -> None:
    body = said()
    body["leaves"] += [[0x19, 0, 0, 1, 0, 0, 0], [0x20, 0, 0, 0, 0, 0, 0]]
    (found,) = compare_cpus(body, RECIPE)
    assert (found.name, found.here) == ("cpuid 0x19.0", None)


@pytest.mark.parametrize(
    "body",
    [
        7, {}, {"tsc-deadline": 1}, {"tsc-deadline": True, "offered": [], "leaves": [[1]]},
        {"tsc-deadline": True, "offered": [[0, 0, 0, 0, 0, 0, 1 << 32]], "leaves": []},
        {"tsc-deadline": True, "offered": [[0, 0, 0, 0, 0, 0, True]], "leaves": []},
        {"tsc-deadline": True, "offered": [[0] * 7] * 1025, "leaves": []},
    ],
)  # fmt: skip
def test_what_is_no_processor_is_refused(body: object) -> None:
    with pytest.raises(RecipeInvalid, match="what it says of the processor is no list of CPUID leaves"):
        list(compare_cpus(body, RECIPE))


LATER: Final = """#!{python}
import sys
import attrs
from vmm.cli import main
from vmm.phases import cpus

original = cpus.guest_cpuid

def without_fpu(supported, *rest):
    leaves = original(supported, *rest)
    return tuple(attrs.evolve(leaf, edx=leaf.edx & ~1) if leaf.function == 1 else leaf for leaf in leaves)

cpus.guest_cpuid = without_fpu
sys.exit(main())
"""
"""A program that hides a feature which the one before it shows."""


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
async def test_a_guest_is_not_given_another_processor_by_a_later_program() -> None:
    async with machine() as (bench, _):
        binary = bench.folder / "later"
        binary.write_text(LATER.format(python=sys.executable))
        binary.chmod(0o700)
        done = await update_command(bench, "--check", "--binary", str(binary))
        assert done.returncode == 1
        assert done.stdout.startswith("guest-visible  cpuid 0x1.0: "), done.stderr
        done = await update_command(bench, "--binary", str(binary))
        assert done.returncode == 1
        assert "The guest would see that its machine is another one here: cpuid 0x1.0 (" in done.stderr
