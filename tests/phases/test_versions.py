"""A source and a destination of different programs: what one would send and the other cannot read is told in time."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

import vmm
from tests.phases.copy_kit import parts
from tests.phases.test_overrides import channels, guest, update
from vmm.errors import RecipeInvalid, SectionsUnreadable
from vmm.phases import migrating
from vmm.phases.section_kinds import DECLARED, require_readable, section_kinds, sections_of

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine
    from vmm.phases.machine import Machine

HERE: Final = [{"name": "uart0", "kind": "uart16550", "version": 1}, {"name": "kvm", "kind": "kvm", "version": 1}]


def devices(folder: Path) -> list[dict[str, Any]]:
    """The recipe of a machine that has a section of every kind that a board has."""
    *recipe, finish, cont = guest(folder)
    rng = {"qom-type": "rng-random", "id": "rng0"}
    plug = {"driver": "virtio-rng-device", "rng": "rng0"}
    return [
        *recipe,
        {"execute": "object-add", "arguments": rng},
        {"execute": "device_add", "arguments": plug},
        finish,
        cont,
    ]


def sections(machine: EmbeddedMachine) -> list[dict[str, Any]]:
    return sections_of(parts(machine))


def test_sections_that_are_read_here_are_admitted() -> None:
    require_readable(HERE)
    require_readable([])
    require_readable(None)


def test_sections_of_a_later_program_are_named_with_what_to_do() -> None:
    later = [
        {"name": "uart0", "kind": "uart16550", "version": 2},
        {"name": "tpm", "kind": "tpm", "version": 1},
        HERE[1],
    ]
    with pytest.raises(SectionsUnreadable) as caught:
        require_readable(later)
    assert str(caught.value) == (
        "The state that would come is not read here: uart0 has version 2 of uart16550, read here: 1; "
        "tpm is a tpm, which is not known here; use a destination whose program is as new as the source's"
    )


def test_sections_that_are_no_longer_read_are_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = section_kinds()["uart16550"]
    newer = type(kind)(kind.name, 4, 3, kind.declared)
    monkeypatch.setattr("vmm.phases.section_kinds.section_kinds", lambda: {"uart16550": newer})
    with pytest.raises(SectionsUnreadable) as caught:
        require_readable([{"name": "uart0", "kind": "uart16550", "version": 2}])
    assert str(caught.value) == (
        "The state that would come is not read here: uart0 has version 2 of uart16550, read here: 3 to 4; "
        "update by way of a program that reads these and writes later ones"
    )
    require_readable([{"name": "uart0", "kind": "uart16550", "version": 3}])


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({}, "sections must be a list of at most 4096"),
        ([HERE[0]] * 4097, "sections must be a list of at most 4096"),
        ([HERE[0], 7], "sections[1] must have name and kind, texts, and version, a number"),
        ([{"name": "a", "kind": "b"}], "sections[0] must have name and kind, texts, and version, a number"),
        ([{**HERE[0], "version": "1"}], "sections[0] must have name and kind, texts, and version, a number"),
        ([{**HERE[0], "name": "a" * 600}], "sections[0] must have name and kind, texts, and version, a number"),
    ],
)
def test_what_is_no_list_of_sections_is_refused(told: object, reason: str) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        require_readable(told)
    assert str(caught.value) == f"Recipe of the source, as a whole: {reason}"


def test_every_class_with_a_schema_is_a_kind() -> None:
    found = set()
    for module in pkgutil.walk_packages(vmm.__path__, "vmm."):
        if module.name == "vmm.__main__":
            continue
        for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if hasattr(kind, "SCHEMA"):
                found.add(kind)
    assert found == set(DECLARED)
    assert len(section_kinds()) == len(DECLARED) + 2


@pytest.mark.kvm
@pytest.mark.parametrize("accelerator", ["kvm", "qtest"])
async def test_every_section_of_a_machine_is_of_a_kind(tmp_path: Path, accelerator: str) -> None:
    recipe = [
        {**step, "arguments": {"accel": accelerator}} if step["execute"] == "accel-set" else step
        for step in devices(tmp_path)
        if accelerator == "kvm" or step["execute"] != "cont"
    ]
    async with vmm.machine(recipe) as machine:
        told = sections(machine)
        require_readable(told)
        names = [section["name"] for section in told]
        assert set(parts(machine).state.order()) | {"pause"} == set(names)
        assert len(names) == len(set(names))
        kinds = {section["kind"] for section in told}
        assert kinds >= section_kinds().keys() - {"kvm", "qtest"}
        assert accelerator in kinds


def later_uart(machine: Machine) -> list[dict[str, Any]]:
    """What a later program would tell."""
    return [{**told, "version": 2} if told["kind"] == "uart16550" else told for told in sections_of(machine)]


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
async def test_a_later_source_is_refused_before_the_guest_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = (
        "The state that would come is not read here: uart0 has version 2 of uart16550, read here: 1; "
        "use a destination whose program is as new as the source's"
    )
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        with monkeypatch.context() as later:
            later.setattr(migrating, "sections_of", later_uart)
            said = await source.execute("x-cpr-check", channels=channels(tmp_path))
            assert (said["admitted"], said["reason"]) == (False, reason)
            async with source.events() as events:
                info = await update(source, tmp_path)
                assert info["error-desc"] == f"Live update refused by the destination at step 'describing': {reason}"
                with trio.move_on_after(0):
                    async for event in events:
                        assert event["event"] != "STOP"
        # The destination waits on for a source that it can read.
        assert (await source.execute("x-cpr-check", channels=channels(tmp_path)))["admitted"] is True
        assert (await update(source, tmp_path))["status"] == "completed"


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
async def test_a_source_that_tells_no_sections_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrating, "sections_of", lambda machine: None)
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        assert (await update(source, tmp_path))["status"] == "completed"
