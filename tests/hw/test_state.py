from __future__ import annotations

import enum
import subprocess
import sys
from typing import Annotated, ClassVar

import attrs
import pytest

from vmm.errors import StateRejected
from vmm.hw.codec import FAULTS_SHOWN, Codecs, DeviceSection, StateCodec, state_converter
from vmm.hw.state import (
    I64,
    U8,
    U64,
    Fields,
    Integer,
    Items,
    Octets,
    Schema,
    adds,
    derived,
    host_only,
    undeclared_fields,
)


class Mode(enum.Enum):
    IDLE = 0
    BUSY = 1


@attrs.define(kw_only=True)
class Queue:
    """A nested part."""

    head: U64 = 0
    ready: bool = False


@attrs.define(kw_only=True)
class Kinds:
    """Every kind of field there is."""

    SCHEMA: ClassVar[Schema] = Schema("kinds", version=1, accepts=1)

    register: U8 = 0x12
    skew: I64 = -5
    index: Annotated[int, Integer(1, 9)] = 1
    fifo: Annotated[bytes, Octets(4)] = b"ab"
    block: Annotated[bytes, Octets(2, 2)] = b"\0\1"
    on: bool = True
    mode: Mode = Mode.BUSY
    queue: Queue = attrs.Factory(Queue)
    queues: Annotated[tuple[Queue, ...], Items(2)] = (Queue(head=7),)
    numbers: Annotated[list[U8], Items(3)] = attrs.Factory(lambda: [1, 2])
    extra: Queue | None = None
    limit: U8 | None = None


@pytest.fixture(scope="module")
def codec() -> StateCodec[Kinds]:
    return StateCodec.of(Kinds)


def refusal(codec: StateCodec[Kinds], **changes: object) -> str:
    with pytest.raises(StateRejected) as caught:
        codec.load({**codec.dump(Kinds()), **changes}, device="dev0")
    return str(caught.value)


def test_a_section_is_made_of_plain_values(codec: StateCodec[Kinds]) -> None:
    assert codec.dump(Kinds(extra=Queue())) == {
        "register": 0x12,
        "skew": -5,
        "index": 1,
        "fifo": b"ab",
        "block": b"\0\1",
        "on": True,
        "mode": 1,
        "queue": {"head": 0, "ready": False},
        "queues": [{"head": 7, "ready": False}],
        "numbers": [1, 2],
        "extra": {"head": 0, "ready": False},
        "limit": None,
    }
    assert type(codec.dump(Kinds())["queues"]) is list


def test_every_kind_round_trips(codec: StateCodec[Kinds]) -> None:
    state = Kinds(extra=Queue(head=1 << 63, ready=True), limit=3, mode=Mode.IDLE, queues=(), numbers=[0, 0xFF])
    assert codec.load(codec.dump(state)) == state


def test_a_dump_shares_nothing_with_the_state(codec: StateCodec[Kinds]) -> None:
    state = Kinds()
    section = codec.dump(state)
    state.numbers.append(9)
    state.queue.head = 9
    assert section == codec.dump(Kinds())


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("register", 0x1FF, "dev0.register is 0x1ff, not an integer from 0x0 to 0xff"),
        ("register", -1, "dev0.register is -0x1, not an integer from 0x0 to 0xff"),
        ("register", True, "dev0.register is True, not an integer from 0x0 to 0xff"),
        ("register", "x" * 1000, f"dev0.register is '{'x' * 39}…, not an integer from 0x0 to 0xff"),
        ("register", 1.0, "dev0.register is 1.0, not an integer from 0x0 to 0xff"),
        ("register", 1 << 5000, "dev0.register is an integer of more than 64 bits, not an integer from 0x0 to 0xff"),
        (
            "skew",
            1 << 63,
            "dev0.skew is 9223372036854775808, not an integer from -9223372036854775808 to 9223372036854775807",
        ),
        ("fifo", b"abcde", "dev0.fifo is 5 bytes (61 62 63 64 65), not 0 to 4 bytes"),
        ("fifo", "abc", "dev0.fifo is 'abc', not 0 to 4 bytes"),
        ("block", b"", "dev0.block is 0 bytes, not 2 bytes"),
        ("on", 1, "dev0.on is 0x1, not true or false"),
        ("mode", 2, "dev0.mode is 0x2, not one of 0, 1"),
        ("mode", True, "dev0.mode is True, not one of 0, 1"),
        ("mode", [], "dev0.mode is a list (0), not one of 0, 1"),
        ("queue", None, "dev0.queue is none, not the fields head, ready"),
        ("queue", {"head": 0}, "dev0.queue.ready is missing; it should be true or false"),
        ("queue", {"head": 0, "ready": 3}, "dev0.queue.ready is 0x3, not true or false"),
        ("queues", (), "dev0.queues is a list (0), not at most 2 items"),
        ("queues", [{}, {}, {}], "dev0.queues is a list (3), not at most 2 items"),
        (
            "queues",
            [{"head": -1, "ready": True}],
            "dev0.queues[0].head is -0x1, not an integer from 0x0 to 0xffffffffffffffff",
        ),
        ("numbers", [0, 256], "dev0.numbers[1] is 0x100, not an integer from 0x0 to 0xff"),
        ("extra", 5, "dev0.extra is 0x5, not the fields head, ready"),
        ("limit", 256, "dev0.limit is 0x100, not an integer from 0x0 to 0xff"),
    ],
)
def test_a_fault_names_device_field_value_and_what_would_be_right(
    codec: StateCodec[Kinds], field: str, value: object, fault: str
) -> None:
    assert refusal(codec, **{field: value}) == f"Section dev0: {fault}"


def test_all_faults_are_told_at_once(codec: StateCodec[Kinds]) -> None:
    section = codec.dump(Kinds()) | {"register": 256, "fifo": None, "mystery": 1}
    del section["skew"]
    with pytest.raises(StateRejected) as caught:
        codec.load(section)
    assert caught.value.faults == (
        "kinds.register is 0x100, not an integer from 0x0 to 0xff",
        "kinds.skew is missing; it should be an integer from -9223372036854775808 to 9223372036854775807",
        "kinds.fifo is none, not 0 to 4 bytes",
        "kinds.mystery is 0x1, but the fields here are register, skew, index, fifo, block, on, mode, queue, queues, "
        "numbers, extra, limit",
    )


def test_a_flood_of_faults_is_cut_short(codec: StateCodec[Kinds]) -> None:
    with pytest.raises(StateRejected) as caught:
        codec.load(codec.dump(Kinds()) | {f"f{n}": n for n in range(1000)})
    assert len(caught.value.faults) == FAULTS_SHOWN + 1
    assert caught.value.faults[-1] == "and 980 more faults"


@pytest.mark.parametrize("section", [None, 5, [], b"", "text"])
def test_a_section_that_is_no_dict_is_refused(codec: StateCodec[Kinds], section: object) -> None:
    with pytest.raises(StateRejected, match=r"^Section kinds: kinds is .*, not the fields register, skew"):
        codec.load(section)


def test_a_field_with_a_default_must_be_there_all_the_same(codec: StateCodec[Kinds]) -> None:
    section = codec.dump(Kinds())
    del section["on"]
    with pytest.raises(StateRejected, match=r"^Section kinds: kinds\.on is missing; it should be true or false$"):
        codec.load(section)


# --- versions -------------------------------------------------------------------------------------------------------


def rename_level(fields: Fields) -> Fields:
    fields["irq_level"] = fields.pop("level")
    return fields


@attrs.define(kw_only=True)
class Aged:
    """Version 1 had `level`; 2 renamed it; 3 added `count`."""

    SCHEMA: ClassVar[Schema] = Schema("aged", version=3, accepts=1, upgrades=(rename_level, adds(count=4)))

    irq_level: bool
    count: U8


@pytest.fixture(scope="module")
def aged() -> StateCodec[Aged]:
    return StateCodec.of(Aged)


def test_older_versions_are_read_by_the_declared_upgrades(aged: StateCodec[Aged]) -> None:
    section = {"level": True}
    assert aged.load(section, version=1) == Aged(irq_level=True, count=4)
    assert section == {"level": True}
    assert aged.load({"irq_level": True}, version=2) == Aged(irq_level=True, count=4)
    assert aged.load({"irq_level": True, "count": 1}, version=3) == Aged(irq_level=True, count=1)


def test_the_present_version_lacks_nothing(aged: StateCodec[Aged]) -> None:
    with pytest.raises(StateRejected, match=r"aged\.count is missing"):
        aged.load({"irq_level": True}, version=3)


def test_a_missing_field_of_an_old_version_is_named(aged: StateCodec[Aged]) -> None:
    with pytest.raises(StateRejected, match=r"^Section d: d\.level is missing; version 1 of aged has it$"):
        aged.load({}, version=1, device="d")


def test_an_old_section_with_a_field_of_a_newer_version_is_refused(aged: StateCodec[Aged]) -> None:
    with pytest.raises(StateRejected, match=r"^Section d: d\.count is 0x2, but that version had no such field$"):
        aged.load({"irq_level": True, "count": 2}, version=2, device="d")


def test_an_upgraded_section_is_checked_like_any_other(aged: StateCodec[Aged]) -> None:
    with pytest.raises(StateRejected, match=r"^Section d: d\.irq_level is 'x', not true or false$"):
        aged.load({"level": "x"}, version=1, device="d")
    with pytest.raises(StateRejected, match=r"^Section d: d is 0x7, not the fields irq_level, count$"):
        aged.load(7, version=1, device="d")


@pytest.mark.parametrize("version", [0, 4, -1])
def test_a_version_that_is_not_read_is_named(aged: StateCodec[Aged], version: int) -> None:
    with pytest.raises(StateRejected) as caught:
        aged.load({}, version=version, device="d")
    assert str(caught.value) == f"Section d: d has version {version} of aged, read here: 1 to 3"


def test_the_bug_of_an_upgrade_is_no_fault_of_the_section() -> None:
    def stumble(fields: Fields) -> Fields:
        raise KeyError("irq_level")

    @attrs.define
    class Buggy:
        SCHEMA: ClassVar[Schema] = Schema("buggy", version=2, accepts=1, upgrades=(stumble,))

    with pytest.raises(KeyError):
        StateCodec.of(Buggy).load({"irq_level": 1}, version=1)


@pytest.mark.parametrize(("version", "accepts", "count"), [(2, 1, 0), (1, 1, 1), (1, 2, 0), (1, 0, 1)])
def test_a_schema_without_the_right_upgrades_is_a_bug(version: int, accepts: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"^s: {count} upgrades from version {accepts} to {version}$"):
        Schema("s", version=version, accepts=accepts, upgrades=(adds(),) * count)


# --- declarations ---------------------------------------------------------------------------------------------------


@attrs.define
class Unbounded:
    SCHEMA: ClassVar[Schema] = Schema("unbounded", version=1, accepts=1)
    count: int = 0


def test_a_field_without_a_bound_has_no_codec() -> None:
    with pytest.raises(TypeError, match="<class 'int'> is no kind of state"):
        StateCodec.of(Unbounded)


@attrs.define
class Forgetful:
    state: Kinds
    irq: object = attrs.field(metadata=host_only("wired by the board"))
    level: bool = attrs.field(metadata=derived("follows"), default=False)
    cache: int = 0


def test_a_field_that_neither_travels_nor_says_why_is_found() -> None:
    assert undeclared_fields(Forgetful) == ["cache"]


def test_codecs_can_share_a_converter() -> None:
    converter = state_converter()
    one, two = StateCodec.of(Kinds, converter), StateCodec.of(Aged, converter)
    assert one.load(one.dump(Kinds())) == Kinds()
    assert two.load({"level": False}, version=1) == Aged(irq_level=False, count=4)


def test_a_codec_is_compiled_once_for_all_devices_of_a_machine() -> None:
    codecs = Codecs()
    assert codecs.of(Kinds) is codecs.of(Kinds)
    assert codecs.of(Aged).load({"level": False}, version=1) == Aged(irq_level=False, count=4)


def test_declaring_a_section_compiles_nothing() -> None:
    """Most machines are never saved: they should not pay for it as they start."""
    script = (
        "import sys; from vmm.hw.codec import DeviceSection; from vmm.hw.rtc import Rtc; DeviceSection(Rtc());"
        "sys.exit('cattrs' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_checked_section_changes_the_device_only_when_it_is_applied() -> None:
    from tests.hw.fakes import Calls, FakeLine
    from vmm.hw.i8042 import I8042

    line = FakeLine()
    device = I8042(irq=line, request_reset=Calls())
    section = DeviceSection(device)
    section.prepare()
    assert (section.name, section.version, section.accepts) == ("i8042", 1, 1)
    before = section.save()
    apply = section.load(1, {**before, "output_full": True})
    assert section.save() == before
    assert line.levels == []
    apply()
    assert section.save() == {**before, "output_full": True}
    assert line.levels == [True]
    with pytest.raises(
        StateRejected, match=r"^Section i8042: i8042\.output is 0x100, not an integer from 0x0 to 0xff$"
    ):
        section.load(1, {**before, "output": 256})
