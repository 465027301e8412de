"""A source and a destination of different programs: what one would send and the other cannot read is told in time."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

import vmm
from tests.conformance.release import overheard
from tests.phases.copy_kit import parts
from tests.phases.test_overrides import channels, guest, update
from vmm.errors import RecipeInvalid, SectionsUnreadable, VmmError
from vmm.hw.state import Misfit, Schema, drops
from vmm.hw.uart import UartState
from vmm.migration.stream import StreamReader
from vmm.migration.stream_records import Section
from vmm.phases import fd_receive, migrating
from vmm.phases.section_kinds import (
    DECLARED,
    SectionKind,
    read_here,
    require_readable,
    section_kinds,
    sections_of,
    version_for,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
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


NOW_AND_THEN = {"fdsets", "monitor", "qtest-server"}
"""Kinds of sections that a machine has only if a client wants it."""


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
        assert set(parts(machine).state.versions()) | {"pause"} == set(names)
        assert len(names) == len(set(names))
        kinds = {section["kind"] for section in told}
        assert kinds >= section_kinds().keys() - {"kvm", "qtest", *NOW_AND_THEN}
        assert accelerator in kinds


def later_uart(machine: Machine, hello: Mapping[str, Any], *, sessions: bool = False) -> list[dict[str, Any]]:
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
    monkeypatch.setattr(migrating, "sections_of", lambda machine, hello, **more: [])
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        assert (await update(source, tmp_path))["status"] == "completed"


def with_later_uart(monkeypatch: pytest.MonkeyPatch, **lost: object) -> None:
    """Have a version 2 of the UART's state, with what `lost` says more in it, and the way back to 1."""
    later = Schema("uart16550", 2, 1, upgrades=(dict,), downgrades=(drops(**lost) if lost else dict,))
    monkeypatch.setattr(UartState, "SCHEMA", later)


def earlier() -> dict[str, Any]:
    """What a destination says that reads version 1 alone."""
    reads = read_here()["reads"]
    return {"reads": {**reads, "uart16550": [1, 1]}}


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
async def test_an_earlier_destination_gets_the_version_that_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_later_uart(monkeypatch)
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        monkeypatch.setattr(fd_receive, "read_here", earlier)
        with overheard(source) as heard:
            assert (await update(source, tmp_path))["status"] == "completed"
    told = next(said.body["sections"] for said in heard.said if said.kind == "machine")
    assert next(section["version"] for section in told if section["name"] == "uart0") == 1
    sent = StreamReader().feed(heard.state)
    assert [found.version for found in sent if isinstance(found, Section) and found.name == "uart0"] == [1]


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
async def test_what_an_earlier_version_has_no_field_for_keeps_the_guest_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_later_uart(monkeypatch, scr=0x77)
    with pytest.RaisesGroup(pytest.RaisesExc(VmmError), flatten_subgroups=True):
        async with vmm.machine() as destination:
            async with vmm.machine(guest(tmp_path)) as source:
                await destination.execute("migrate-incoming", channels=channels(tmp_path))
                monkeypatch.setattr(fd_receive, "read_here", earlier)
                assert (await update(source, tmp_path))["error-desc"] == (
                    "Section uart0: uart0.scr is 0x0, which an older version has no field for; "
                    "the destination reads version 1 alone"
                )
                assert (await source.execute("query-status"))["running"] is True
            await trio.sleep_forever()


def test_a_version_is_written_that_the_destination_reads_and_that_there_is_a_way_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = SectionKind("uart16550", 3, 1, (UartState,), (dict,))
    monkeypatch.setattr("vmm.phases.section_kinds.section_kinds", lambda: {"uart16550": kind})

    def version(hello: object) -> int:
        return version_for("uart16550", 3, hello)

    assert [version({"reads": {"uart16550": [1, newest]}}) for newest in (4, 3, 2, 1)] == [3, 3, 2, 3]
    hostile: tuple[object, ...] = (None, 7, {}, {"reads": 7}, {"reads": {}}, {"reads": {"uart16550": 2}})
    for hello in (*hostile, {"reads": {"uart16550": [1, "2"]}}):
        assert version(hello) == 3
    assert version_for("tpm", 3, {"reads": {"tpm": [1, 2]}}) == 3


def test_a_schema_has_no_more_downgrades_than_versions_before() -> None:
    with pytest.raises(ValueError, match="thing: 1 downgrades from version 1"):
        Schema("thing", 1, 1, downgrades=(drops(),))


def test_a_field_is_dropped_where_it_has_the_value_that_an_older_version_stands_for() -> None:
    assert drops(more=0)({"level": 1, "more": 0}) == {"level": 1}
    with pytest.raises(Misfit) as caught:
        drops(more=0)({"level": 1, "more": 5})
    assert (caught.value.path, caught.value.problem) == (".more", "is 0x5, which an older version has no field for")
