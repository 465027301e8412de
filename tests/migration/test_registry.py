from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from vmm.errors import DeviceNotFound, NameTaken, StateRejected
from vmm.migration.registry import StateRegistry
from vmm.migration.stream_records import Section

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@attrs.define
class Chip:
    """A device with one register, and a log that all devices of a test share."""

    name: str
    log: list[str]
    register: int = 0

    def save(self) -> dict[str, Any]:
        self.log.append(f"save {self.name}")
        return {"register": self.register}

    def load(self, version: int, state: Mapping[str, Any]) -> Callable[[], None]:
        self.log.append(f"check {self.name} version {version}")
        value = state.get("register")
        if not isinstance(value, int):
            raise StateRejected(section=self.name, faults=("register is missing",))

        def apply() -> None:
            self.log.append(f"apply {self.name}")
            self.register = value

        return apply


@attrs.define
class Board:
    registry: StateRegistry = attrs.field(factory=StateRegistry)
    log: list[str] = attrs.field(factory=list)

    def add(self, name: str, *after: str, version: int = 1, accepts: int | None = None) -> Chip:
        chip = Chip(name, self.log)
        self.registry.register(name, version, save=chip.save, load=chip.load, accepts=accepts, after=after)
        return chip


def section(name: str, register: int = 7, version: int = 1) -> Section:
    return Section(name, version, {"register": register})


def test_order_is_that_of_registration_but_for_declared_dependencies() -> None:
    board = Board()
    board.add("uart0", "chips")
    board.add("rtc")
    board.add("chips", "cpu0", "cpu1")
    board.add("cpu0")
    board.add("cpu1")
    assert board.registry.order() == ("cpu0", "cpu1", "chips", "uart0", "rtc")


def test_a_second_section_of_one_name_is_refused() -> None:
    board = Board()
    board.add("rtc")
    with pytest.raises(NameTaken) as caught:
        board.add("rtc")
    assert str(caught.value) == "State section 'rtc' exists already; choose another name"


@pytest.mark.parametrize("chain", [("a",), ("a", "b"), ("a", "b", "c")])
def test_a_cycle_fails_when_it_is_closed(chain: tuple[str, ...]) -> None:
    board = Board()
    for name, after in pairwise(chain):
        board.add(name, after)
    expected = " after ".join((chain[-1], *chain))
    with pytest.raises(ValueError, match=f"sections wait for each other: {expected}$"):
        board.add(chain[-1], "a")


def test_waiting_for_what_is_not_registered_is_a_bug() -> None:
    board = Board()
    board.add("uart0", "chips")
    with pytest.raises(ValueError, match="section uart0 is after chips, which is not registered"):
        board.registry.order()


def test_versions_must_make_sense() -> None:
    with pytest.raises(ValueError, match="section rtc: reads versions 3 to 2"):
        Board().add("rtc", version=2, accepts=3)


def test_saving_follows_the_order_and_tells_versions() -> None:
    board = Board()
    board.add("uart0", "cpu0", version=3).register = 5
    board.add("cpu0")
    assert list(board.registry.save()) == [section("cpu0", 0), section("uart0", 5, version=3)]


def test_all_are_checked_before_any_is_applied() -> None:
    board = Board()
    uart, cpu = board.add("uart0", "cpu0"), board.add("cpu0")
    checked = board.registry.check([section("uart0", 1), section("cpu0", 2)])
    assert board.log == ["check cpu0 version 1", "check uart0 version 1"]
    assert (uart.register, cpu.register) == (0, 0)
    assert checked.order == ("cpu0", "uart0")
    checked.apply()
    assert board.log[2:] == ["apply cpu0", "apply uart0"]
    assert (uart.register, cpu.register) == (1, 2)


def test_a_checked_state_is_applied_once() -> None:
    board = Board()
    board.add("cpu0")
    checked = board.registry.check([section("cpu0")])
    checked.apply()
    checked.apply()
    assert board.log.count("apply cpu0") == 1


def test_a_refused_section_leaves_all_devices_as_they_were() -> None:
    board = Board()
    cpu = board.add("cpu0")
    board.add("uart0")
    with pytest.raises(StateRejected) as caught:
        board.registry.check([section("cpu0"), Section("uart0", 1, {})])
    assert str(caught.value) == "Section uart0: register is missing"
    assert cpu.register == 0


def test_a_missing_section_is_named() -> None:
    board = Board()
    board.add("cpu0")
    board.add("rtc")
    with pytest.raises(StateRejected) as caught:
        board.registry.check([section("cpu0")])
    assert str(caught.value) == "Section rtc: 'rtc' is missing from the stream"


def test_missing_and_foreign_sections_are_named_together() -> None:
    board = Board()
    board.add("cpu0")
    with pytest.raises(StateRejected) as caught:
        board.registry.check([section("cpu1")])
    assert str(caught.value) == (
        "Section cpu0, cpu1: 'cpu0' is missing from the stream; 'cpu1' is in the stream, and no device here has it"
    )
    assert board.log == []


@pytest.mark.parametrize("version", [2, 3, 4])
def test_declared_versions_are_read(version: int) -> None:
    board = Board()
    board.add("rtc", version=4, accepts=2)
    board.registry.check([section("rtc", version=version)])
    assert board.log == [f"check rtc version {version}"]


@pytest.mark.parametrize(
    ("accepts", "version", "readable"), [(2, 1, "2 to 4"), (2, 5, "2 to 4"), (None, 3, "4"), (None, 5, "4")]
)
def test_other_versions_are_refused(accepts: int | None, version: int, readable: str) -> None:
    board = Board()
    board.add("rtc", version=4, accepts=accepts)
    with pytest.raises(StateRejected) as caught:
        board.registry.check([section("rtc", version=version)])
    assert str(caught.value) == f"Section rtc: it has version {version}, read here: {readable}"


def test_a_section_can_be_unregistered_unless_another_waits_for_it() -> None:
    board = Board()
    board.add("cpu0")
    board.add("uart0", "cpu0")
    with pytest.raises(ValueError, match="section uart0 is after cpu0, which is to be unregistered"):
        board.registry.unregister("cpu0")
    board.registry.unregister("uart0")
    board.registry.unregister("cpu0")
    assert board.registry.order() == ()
    with pytest.raises(DeviceNotFound) as caught:
        board.registry.unregister("cpu0")
    assert str(caught.value) == "State section 'cpu0' does not exist"


def test_an_optional_section_is_left_out_where_there_is_nothing_and_need_not_come() -> None:
    registry, loaded = StateRegistry(), list[object]()
    state: dict[str, int] | None = None

    def load(version: int, section: object) -> Callable[[], None]:
        return lambda: loaded.append(section)

    registry.register("sets", 1, save=lambda: state, load=load, optional=True)
    assert list(registry.save()) == []
    registry.check([]).apply()
    state = {"n": 1}
    assert list(registry.save()) == [Section("sets", 1, {"n": 1})]
    assert list(registry.save(optional=False)) == []
    registry.check(registry.save()).apply()
    assert loaded == [{"n": 1}]
    with pytest.raises(StateRejected, match="'more' is in the stream, and no device here has it"):
        registry.check([Section("more", 1, {})])


def test_what_was_checked_ahead_is_not_checked_again() -> None:
    board = Board()
    uart, rtc = board.add("uart0"), board.add("rtc")
    sections = [section("uart0", 1), section("rtc", 2)]
    ahead = board.registry.check_ahead([*sections, section("elsewhere")])
    assert (uart.register, rtc.register) == (0, 0)
    board.log.clear()
    board.registry.check(sections, ahead).apply()
    assert board.log == ["apply uart0", "apply rtc"]
    assert (uart.register, rtc.register) == (1, 2)


def test_a_section_that_came_again_is_checked_as_it_is_now() -> None:
    board = Board()
    uart = board.add("uart0")
    ahead = board.registry.check_ahead([section("uart0", 1)])
    board.log.clear()
    board.registry.check([section("uart0", 2)], ahead).apply()
    assert board.log == ["check uart0 version 1", "apply uart0"]
    assert uart.register == 2


def test_a_section_is_saved_when_it_is_asked_for() -> None:
    board = Board()
    board.add("cpu0")
    uart = board.add("uart0")
    saved = board.registry.save()
    assert next(saved) == section("cpu0", 0)
    uart.register = 5
    assert next(saved) == section("uart0", 5)


def test_what_was_loaded_ahead_is_in_force_and_not_loaded_again() -> None:
    board = Board()
    cpu, uart = board.add("cpu0"), board.add("uart0", "cpu0")
    sections = [section("cpu0", 1), section("uart0", 2)]
    ahead = board.registry.check_ahead([])
    for each in (*sections, section("elsewhere")):
        board.registry.load_ahead(each, ahead)
    # The port waits for the processor, and so do its checks and its load.
    assert (cpu.register, uart.register) == (1, 0)
    board.log.clear()
    board.registry.check(sections, ahead).apply()
    assert board.log == ["check uart0 version 1", "apply uart0"]
    assert (cpu.register, uart.register) == (1, 2)


def test_what_is_refused_is_not_loaded_ahead_though_one_before_it_was_good() -> None:
    board = Board()
    cpu = board.add("cpu0")
    bad = Section("cpu0", 1, {})
    ahead = board.registry.check_ahead([section("cpu0", 1)])
    board.registry.load_ahead(bad, ahead)
    assert cpu.register == 0
    with pytest.raises(StateRejected, match="register is missing"):
        board.registry.check([bad], ahead)


def test_what_is_wrong_with_a_section_is_told_when_all_are_there() -> None:
    board = Board()
    board.add("uart0")
    bad = Section("uart0", 1, {})
    ahead = board.registry.check_ahead([bad])
    with pytest.raises(StateRejected, match="register is missing"):
        board.registry.check([bad], ahead)
