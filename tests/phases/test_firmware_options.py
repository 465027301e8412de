"""What `machine-set` says of firmware's business: what of it can be had, and that the rest is refused by name."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.hw.boot.acpi_kit import table, tables
from tests.phases.machine import DEFINITION, PATHS, advance, bare, failure
from vmm.errors import OptionInvalid
from vmm.hw.boot import layout
from vmm.hw.boot.plan import Data
from vmm.hw.rtc import Rtc
from vmm.phases.firmware_options import RtcOptions
from vmm.phases.machine import Machine
from vmm.recipe import Step

if TYPE_CHECKING:
    from pathlib import Path

    from tests.phases.machine import Running
    from vmm.qmp_client import QmpClient

pytestmark = pytest.mark.usefixtures("no_leaks")

NO_FIRMWARE = "there is no firmware, and the machine starts its kernel"

WHOLE_TABLE = "give a whole table, with its header, as file"
NO_TIME = "is not utc, localtime, or a time such as 2026-11-25T12:00:00 or 2026-11-25"
BOOT: list[dict[str, object]] = [
    {"order": "cd"}, {"once": "d"}, {"menu": True}, {"strict": True}, {"splash": "/p"}, {"splash-time": 0},
    {"reboot-timeout": -1},
]  # fmt: skip


def unsupported(name: str, instead: str) -> str:
    return f"Member of machine-set '{name}' is not supported here; {instead}"


REFUSED: list[tuple[str, Any, str]] = [
    *(("boot", member, unsupported(f"boot.{next(iter(member))}", NO_FIRMWARE)) for member in BOOT),
    ("rtc", {"base": "now"}, f"rtc.base: 'now' {NO_TIME}"),
    ("rtc", {"base": "2026-02-30"}, f"rtc.base: '2026-02-30' {NO_TIME}"),
    ("rtc", {"clock": "vm"}, "Clock 'vm' is not supported here; the one that the clock follows is host"),
    (
        "rtc",
        {"driftfix": "slew"},
        "Correction of drift 'slew' is not supported here; there are no periodic interrupts that could be lost; "
        "say none",
    ),
    ("smbios", [{"type": 1}], unsupported("smbios", "there is no firmware that makes the guest's SMBIOS tables")),
    ("acpi-tables", [{"data": "/d", "sig": "SSDT"}], unsupported("acpi-tables[0].data", WHOLE_TABLE)),
    ("acpi-tables", [{"file": "/d", "oem_id": "X"}], unsupported("acpi-tables[0].oem_id", WHOLE_TABLE)),
    ("acpi-tables", [{}], "acpi-tables[0].file: None is not the path of a table"),
    ("acpi-tables", [{"file": "/none/t"}], "Cannot read /none/t: No such file or directory"),
    (
        "fw-cfg",
        [{"name": "opt/a", "string": "b"}],
        unsupported("fw-cfg", "there is no firmware that reads it, nor the device"),
    ),
    ("option-roms", [{"romfile": "/r"}], unsupported("option-roms", "there is no firmware that runs them")),
]

NULL = Step("chardev-add", {"id": "com", "backend": {"type": "null", "data": {}}})


def clock(running: Running) -> int:
    """The guest's clock, in seconds of Unix time, at most one second old."""
    (rtc,) = (device for device in running.tree.view(Machine).devices if isinstance(device, Rtc))

    def register(number: int) -> int:
        rtc.write(0, 1, number)
        value = rtc.read(1, 1)
        return (value >> 4) * 10 + (value & 15)

    second, minute, hour, day, month, year, century = (register(at) for at in (0, 2, 4, 7, 8, 9, 0x32))
    from calendar import timegm

    return timegm((century * 100 + year, month, day, hour, minute, second))


async def build(client: QmpClient, **definition: Any) -> None:
    """Build a machine without KVM, whose time stands still, as far as running."""
    await client.execute("machine-set", **{**DEFINITION, **definition})
    await client.execute("accel-set", accel="qtest")
    await client.execute("cpu-model-set")
    await client.execute("finish-machine-init")


@pytest.mark.parametrize(("member", "value", "text"), REFUSED)
async def test_a_member_that_is_refused_leaves_nothing_behind(
    tmp_path: Path, member: str, value: object, text: str
) -> None:
    async with bare(tmp_path, NULL) as (running, client):
        await client.execute("query-status")
        held, before = len(os.listdir("/proc/self/fd")), running.events()
        for _ in range(2):
            assert await failure(client, "machine-set", **DEFINITION, serial=["com"], **{member: value}) == text
        assert len(os.listdir("/proc/self/fd")) == held
        assert running.events() == before
        assert (await client.execute("query-machine-phase"))["path"] == PATHS["precreate"][1]
        assert {"com": False}.items() <= {
            chardev["label"]: chardev["frontend-open"] for chardev in await client.execute("query-chardev")
        }.items()
        await build(client, serial=["com"])


async def test_what_asks_for_nothing_is_taken(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {
        "boot": {"menu": False, "strict": False}, "rtc": {}, "smbios": [], "acpi-tables": [], "fw-cfg": [],
        "option-roms": [],
    }  # fmt: skip
    async with bare(tmp_path) as (running, client):
        await build(client, **nothing)
        (step,) = (step for step in running.host.recorder.recipe() if step.execute == "machine-set")
        nothing["rtc"] = {"base": "utc", "clock": "host", "driftfix": "none"}
        assert nothing.items() <= step.arguments.items()


# --- the clock --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "wanted"),
    [("2026-11-25T12:00:00", 1_795_608_000), ("2000-02-29", 951_782_400), ("1970-01-01T00:00:01", 1)],
)
async def test_the_clock_begins_at_the_time_that_is_given(tmp_path: Path, base: str, wanted: int) -> None:
    async with bare(tmp_path) as (running, client):
        await build(client, rtc={"base": base})
        assert clock(running) == wanted


async def test_the_clock_tells_universal_time_if_nothing_is_said(tmp_path: Path) -> None:
    async with bare(tmp_path) as (running, client):
        await build(client)
        assert clock(running) == running.tree.view(Machine).accelerator.time_ns() // 1_000_000_000


async def test_the_clock_may_tell_the_hosts_local_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        async with bare(tmp_path) as (running, client):
            await build(client, rtc={"base": "localtime"})
            assert clock(running) - running.tree.view(Machine).accelerator.time_ns() // 1_000_000_000 == 20_700
    finally:
        monkeypatch.undo()
        time.tzset()


def test_an_offset_is_that_of_the_moment() -> None:
    assert RtcOptions().offset(5) == 0
    assert RtcOptions(base="1970-01-01T00:01:00").offset(50) == 10
    with pytest.raises(OptionInvalid):
        RtcOptions(base="").offset(0)


# --- tables -----------------------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_tables_from_files_are_in_the_guests_memory(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "two")]
    for path, data in zip(paths, (table(b"TST1"), table(b"TST2", b"a longer body")), strict=True):
        path.write_bytes(data)
    async with bare(tmp_path) as (running, client):
        await client.execute("machine-set", **DEFINITION, **{"acpi-tables": [{"file": str(path)} for path in paths]})
        await advance_from_accel(client)
        machine = running.tree.view(Machine)
        found = tables(Data(layout.ACPI, machine.memory.read(layout.ACPI, layout.ACPI_ROOM)))
        assert (found[b"TST1"], found[b"TST2"]) == (table(b"TST1"), table(b"TST2", b"a longer body"))
        assert {"acpi-table.0", "acpi-table.1"} <= machine.descriptors().keys()


async def advance_from_accel(client: QmpClient) -> None:
    await client.execute("accel-set")
    await client.execute("cont")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"short", "it has 5 bytes, a table has 36 (its header) to 131072"),
        (table(b"DSDT"), "the machine has a table DSDT of its own"),
    ],
)
async def test_a_file_that_cannot_be_a_table_keeps_precreate_as_it_was(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    path = tmp_path / "table"
    path.write_bytes(data)
    wrong: dict[str, Any] = {**DEFINITION, "serial": ["com"], "acpi-tables": [{"file": str(path)}]}
    async with bare(tmp_path, NULL) as (_, client):
        await client.execute("query-status")
        held = len(os.listdir("/proc/self/fd"))
        assert await failure(client, "machine-set", **wrong) == f"Cannot use ACPI table {path}: {reason}"
        assert len(os.listdir("/proc/self/fd")) == held
        path.write_bytes(table())
        await client.execute("machine-set", **wrong)


# --- accel-set --------------------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_an_accelerator_that_cannot_be_opened_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vmm.errors import KvmCallFailed
    from vmm.kvm.vm import Vm

    def refuse(vm: Vm) -> None:
        raise KvmCallFailed(ioctl="KVM_CREATE_PIT2", errno=28)

    async with bare(tmp_path) as (running, client):
        await advance(client, "accel")
        held, before = len(os.listdir("/proc/self/fd")), running.events()
        with monkeypatch.context() as patch:
            patch.setattr(Vm, "create_pit", refuse)
            for _ in range(2):
                text = "KVM_CREATE_PIT2 failed: No space left on device (errno 28)"
                assert await failure(client, "accel-set") == text
        assert len(os.listdir("/proc/self/fd")) == held
        assert running.events() == before
        assert "accel-set" not in [step.execute for step in running.host.recorder.recipe()]
        await client.execute("accel-set")
        await client.execute("cont")
