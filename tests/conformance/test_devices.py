"""What every device owes the machine. A new device belongs into `tests.conformance.devices.CASES`."""

from __future__ import annotations

import ast
import copy
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

import vmm.hw
from tests.conformance.devices import CASES, Bench, Case
from vmm.errors import StateRejected
from vmm.hw.codec import StateCodec
from vmm.hw.state import Fields, Integer, Octets, declared_fields, describe, rule_of, undeclared_fields

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.hw.device import Device

every_device = pytest.mark.parametrize("case", CASES, ids=str)


@attrs.define(eq=False)
class Subject:
    """A device with what it is wired to, and its codec."""

    case: Case
    bench: Bench = attrs.Factory(Bench)
    device: Device = attrs.field(init=False)
    codec: StateCodec[Any] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.device = self.case.make(self.bench)
        self.codec = StateCodec.of(type(self.device.state))

    def save(self) -> Fields:
        return self.codec.dump(self.device.state)

    def load(self, section: object, version: int | None = None) -> None:
        self.device.state = self.codec.load(section, version, self.device.name)
        self.device.after_load()

    def faults(self, section: object, version: int | None = None) -> tuple[str, ...]:
        """Everything for which the section is refused; the device must not notice."""
        before = self.save()
        with pytest.raises(StateRejected) as caught:
            self.load(section, version)
        assert self.save() == before
        assert caught.value.section == self.device.name
        return caught.value.faults

    def twin(self) -> Subject:
        """A new device of the kind, on a host that is in the same situation."""
        bench = Bench()
        bench.sink.free, bench.clock.ns = self.bench.sink.free, self.bench.clock.ns
        return Subject(self.case, bench)

    def access(self, chance: random.Random) -> int | None:
        """Make one access that a guest could make; return what it read."""
        addresses = chance.choice(self.device.addresses)
        size = self.device.widest if chance.random() < 0.8 else 1
        offset = (chance.choice(addresses) - self.device.addresses[0].start) // size * size
        if chance.random() < 0.4:
            return self.device.read(offset, size)
        value = chance.choice((0x00, 0x01, 0x03, 0x0F, 0x80, 0xFF, chance.randrange(1 << 8 * size)))
        self.device.write(offset, size, value)
        return None


def busy(case: Case) -> Subject:
    subject = Subject(case)
    case.keep_busy(subject.device)
    return subject


def state_of(case: Case) -> type:
    return type(Subject(case).device.state)


# --- the suite itself -----------------------------------------------------------------------------------------------


def test_every_device_is_in_the_suite() -> None:
    """A class with `after_load` below vmm/hw is a device."""
    root = Path(vmm.hw.__file__ or "").parent
    found = {
        node.name
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and "after_load" in {getattr(item, "name", "") for item in node.body}
    }
    assert found - {"Device"} == {type(case.make(Bench())).__name__ for case in CASES}


@every_device
def test_busy_is_not_the_power_on_state(case: Case) -> None:
    idle, at_work = Subject(case).save(), busy(case).save()
    assert idle != at_work or not idle


# --- declaration ----------------------------------------------------------------------------------------------------


@every_device
def test_every_field_travels_or_says_why_not(case: Case) -> None:
    assert undeclared_fields(type(Subject(case).device)) == []


@every_device
def test_the_state_is_declared_in_bounded_kinds(case: Case) -> None:
    assert isinstance(describe(state_of(case)), dict)


@every_device
def test_the_wiring_is_complete(case: Case) -> None:
    device = Subject(case).device
    assert device.widest in (1, 2, 4, 8)
    assert list(device.addresses) == sorted(device.addresses, key=lambda addresses: addresses.start)
    assert not device.lock.locked()


# --- round trip -----------------------------------------------------------------------------------------------------


@every_device
def test_state_round_trips_in_the_middle_of_activity(case: Case) -> None:
    source = busy(case)
    target = source.twin()
    target.load(source.save())
    assert target.save() == source.save()
    assert target.bench.line.is_up() == source.bench.line.is_up()


@every_device
def test_a_loaded_device_goes_on_exactly_as_the_first_would_have(case: Case) -> None:
    for seed in range(20):
        source, chance = busy(case), random.Random(seed)
        for _ in range(chance.randrange(60)):
            source.access(chance)
        target = source.twin()
        target.load(source.save())
        source_chance, target_chance = random.Random(seed), random.Random(seed)
        for _ in range(200):
            assert target.access(target_chance) == source.access(source_chance)
            assert target.bench.line.is_up() == source.bench.line.is_up()
        assert target.save() == source.save()


@every_device
def test_a_section_is_a_copy(case: Case) -> None:
    subject = busy(case)
    section = subject.save()
    again = subject.save()
    chance = random.Random(1)
    for _ in range(100):
        subject.access(chance)
    assert section == again


@every_device
def test_after_load_can_be_called_again(case: Case) -> None:
    source = busy(case)
    target = source.twin()
    target.load(source.save())
    level, state = target.bench.line.is_up(), target.save()
    target.device.after_load()
    assert target.bench.line.is_up() == level
    assert target.bench.line.edges <= 1
    assert target.save() == state
    assert target.bench.callback.count == 0
    assert not target.bench.sink.data


# --- hostile sections -----------------------------------------------------------------------------------------------


def places(kind: type) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every field, those of nested classes too: the way to it, and its kind."""
    for field, declared in declared_fields(kind).items():
        yield (field,), declared
        if isinstance(declared, type) and attrs.has(declared):
            for way, inner in places(declared):
                yield (field, *way), inner


def inside(section: Fields, way: tuple[str, ...]) -> Fields:
    """The fields among which the last one of `way` is."""
    for field in way[:-1]:
        section = section[field]
    return section


def wrong_values(kind: object) -> list[object]:
    """Values of the wrong type, and values just out of range."""
    rule = rule_of(kind)
    values: list[object] = [None, 1.5, "1", [], [0]]
    if isinstance(kind, type) and attrs.has(kind):
        return [*values, 0, b"", True]
    values += [{}, {"0": 0}]
    if isinstance(rule, Integer):
        return [*values, rule.first - 1, rule.last + 1, True, b"\0", 1 << 100]
    if isinstance(rule, Octets):
        return [
            *values,
            0,
            bytes(rule.most + 1),
            bytearray(rule.most),
            *([bytes(rule.least - 1)] if rule.least else []),
        ]
    assert kind is bool, "say here what is wrong for this kind"
    return [*values, 0, 1, b"\0"]


@every_device
def test_a_value_of_the_wrong_kind_is_refused_by_name(case: Case) -> None:
    subject = busy(case)
    for way, kind in places(state_of(case)):
        for value in wrong_values(kind):
            section = copy.deepcopy(subject.save())
            inside(section, way)[way[-1]] = value
            (fault,) = subject.faults(section)
            assert fault.startswith(f"{subject.device.name}.{'.'.join(way)} is ")
            assert ", not " in fault


@every_device
def test_a_missing_field_is_refused_by_name(case: Case) -> None:
    subject = busy(case)
    for way, _ in places(state_of(case)):
        section = copy.deepcopy(subject.save())
        del inside(section, way)[way[-1]]
        (fault,) = subject.faults(section)
        assert fault.startswith(f"{subject.device.name}.{'.'.join(way)} is missing; it should be ")


@every_device
def test_an_unknown_field_is_refused_by_name(case: Case) -> None:
    subject = busy(case)
    (fault,) = subject.faults({**subject.save(), "mystery": 3})
    assert fault.startswith(f"{subject.device.name}.mystery is 0x3, but the fields here are ")


@every_device
def test_all_faults_of_a_section_are_told_together(case: Case) -> None:
    subject = busy(case)
    faults = subject.faults({**dict.fromkeys(subject.save(), "x"), "mystery": 3})
    assert len(faults) == len(subject.save()) + 1


@every_device
def test_another_version_is_refused_by_number(case: Case) -> None:
    subject = busy(case)
    schema = subject.codec.schema
    for version in (schema.accepts - 1, schema.version + 1, -1, 1 << 31):
        (fault,) = subject.faults(subject.save(), version)
        assert fault.startswith(f"{subject.device.name} has version {version} of {schema.name}, read here: ")


def some_value(kind: object, chance: random.Random) -> object:
    """Any value that fits."""
    rule = rule_of(kind)
    if isinstance(kind, type) and attrs.has(kind):
        return {field: some_value(declared, chance) for field, declared in declared_fields(kind).items()}
    if isinstance(rule, Integer):
        return chance.choice((rule.first, rule.last, chance.randint(rule.first, rule.last)))
    if isinstance(rule, Octets):
        return chance.randbytes(chance.choice((rule.least, rule.most)))
    assert kind is bool, "say here what fits this kind"
    return chance.random() < 0.5


@every_device
def test_no_state_that_fits_and_no_access_makes_a_device_fail(case: Case) -> None:
    """Fields that fit one by one need not fit together; and the guest is hostile too."""
    subject, chance = busy(case), random.Random(2)
    for _ in range(100):
        subject.load(some_value(state_of(case), chance))
        for _ in range(50):
            value = subject.access(chance)
            assert value is None or 0 <= value < 1 << 8 * subject.device.widest
            subject.bench.clock.pass_seconds(0.7)
        subject.codec.load(subject.save())  # what it made of it fits the declaration still


# --- reset ----------------------------------------------------------------------------------------------------------


@every_device
def test_reset_is_the_power_on_state(case: Case) -> None:
    subject = busy(case)
    before = subject.save()
    subject.device.reset()
    fresh = Subject(case).save()
    after = subject.save()
    assert {field: after[field] for field in after if field not in case.survives_reset} == {
        field: fresh[field] for field in fresh if field not in case.survives_reset
    }
    assert case.survives_reset <= before.keys()
    assert not subject.bench.line.is_up()
    assert not subject.device.lock.locked()
