"""Measuring how fast the guest writes to its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.phases.copy_kit import HANGS, commands, goes_on, parts, save, started
from vmm import machine
from vmm.errors import InvalidState, KvmCallFailed, OptionInvalid, Unsupported
from vmm.guests.dirtier import DirtierReader
from vmm.kvm.dirty_log import DirtyLog

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine
    from vmm.kvm.page_map import PageMap

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

PAGES = 2048
GUEST = {"kernel": "builtin:dirtier", "append": f"region={PAGES * 4}K pages=64 hz=100"}
"""Writes 6400 pages a second."""


async def measured(guest: EmbeddedMachine, **options: Any) -> dict[str, Any]:
    """Measure, and return the result."""
    await guest.execute("calc-dirty-rate", **options)
    with trio.fail_after(HANGS):
        while (info := await guest.execute("query-dirty-rate"))["status"] == "measuring":  # noqa: ASYNC110
            await trio.sleep(0.01)  # there is no event
    return dict(info)


async def rounds(guest: EmbeddedMachine, count: int) -> None:
    """Wait until the guest has written all of its region so often, from now on."""
    reader = DirtierReader(parts(guest).memory.read)
    with trio.fail_after(HANGS):
        while (begun := reader.written()) is None:  # noqa: ASYNC110 - a guest does not tell
            await trio.sleep(0.005)
        while (reader.written() or 0) < begun + count * PAGES:  # noqa: ASYNC110
            await trio.sleep(0.005)


async def test_before_the_first_nothing_was_measured() -> None:
    async with machine(commands(upto="machine-set")) as guest:
        assert await guest.execute("query-dirty-rate") == {
            "status": "unstarted", "start-time": 0, "calc-time": 0, "calc-time-unit": "second", "sample-pages": 512,
            "mode": "page-sampling",
        }  # fmt: skip


@pytest.mark.parametrize("mode", ["page-sampling", "dirty-bitmap"])
async def test_a_guest_that_writes_is_measured(mode: str) -> None:
    # Of 16 MiB it writes 8; by samples of 16384 a GiB those are some 128 pages of 256.
    options = {"sample-pages": 16384} if mode == "page-sampling" else {}
    async with machine(commands(**GUEST)) as guest:
        await rounds(guest, 1)
        arguments = {name.replace("-", "_"): value for name, value in options.items()}
        info = await measured(guest, calc_time=300, calc_time_unit="millisecond", mode=mode, **arguments)
        assert (info["status"], info["mode"], info["calc-time"]) == ("measured", mode, 0)
        assert 0 < info["dirty-rate"] < 50  # 8 MiB, once, in 0.3 s or longer
        in_ms = await guest.execute("query-dirty-rate", calc_time_unit="millisecond")
        assert (in_ms["calc-time"], in_ms["calc-time-unit"]) == (300, "millisecond")
        assert in_ms["start-time"] // 1000 == info["start-time"] > 0
        report = DirtierReader(parts(guest).memory.read).look()
        assert report is not None
        assert report.intact, str(report)


@pytest.mark.parametrize("mode", ["page-sampling", "dirty-bitmap"])
async def test_a_guest_that_stands_writes_nothing(mode: str) -> None:
    async with started() as guest:
        await guest.execute("stop")
        assert (await measured(guest, calc_time=50, calc_time_unit="millisecond", mode=mode))["dirty-rate"] == 0


async def test_what_this_process_writes_for_the_guest_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    collect = DirtyLog.collect

    async with started() as guest:
        await guest.execute("stop")
        memory = parts(guest).memory

        def write_and_collect(log: DirtyLog, into: PageMap) -> None:
            memory.write(0x80_0000, bytes(4 << 20))  # twice: before the measurement, and during it
            collect(log, into)

        monkeypatch.setattr(DirtyLog, "collect", write_and_collect)
        info = await measured(guest, calc_time=100, calc_time_unit="millisecond", mode="dirty-bitmap")
        assert info["dirty-rate"] > 0


async def test_a_second_one_waits_for_nobody() -> None:
    async with started() as guest:
        await guest.execute("calc-dirty-rate", calc_time=60)
        with pytest.raises(InvalidState) as caught:
            await guest.execute("calc-dirty-rate", calc_time=1)
        assert str(caught.value) == (
            "calc-dirty-rate is not possible while another measurement is under way; query-dirty-rate tells when that "
            "is over"
        )
        assert (await guest.execute("query-dirty-rate"))["status"] == "measuring"


@pytest.mark.parametrize("mode", ["page-sampling", "dirty-bitmap"])
async def test_a_migration_calls_it_off(tmp_path: Path, mode: str) -> None:
    async with started() as guest:
        await guest.execute("calc-dirty-rate", calc_time=60, mode=mode)
        await save(guest, tmp_path / "state")
        assert (await guest.execute("query-dirty-rate"))["status"] == "unstarted"


async def test_a_log_that_cannot_be_had_ends_the_measurement_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(log: DirtyLog) -> None:
        raise KvmCallFailed(ioctl="KVM_SET_USER_MEMORY_REGION", errno=12, context="slot 0")

    monkeypatch.setattr(DirtyLog, "start", refuse)
    async with started() as guest:
        info = await measured(guest, calc_time=1, mode="dirty-bitmap")
        assert info["status"] == "unstarted"
        await goes_on(guest)


REFUSED: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"calc_time": 61}, OptionInvalid, "calc-time: '61000 ms' is not from 50 ms to 60 s"),
    ({"calc_time": 49, "calc_time_unit": "millisecond"}, OptionInvalid, "calc-time: '49 ms' is not from 50 ms to 60 s"),
    ({"calc_time": 1, "sample_pages": 127}, OptionInvalid, "sample-pages: 127 is not from 128 to 16384"),
    (
        {"calc_time": 1, "sample_pages": 512, "mode": "dirty-bitmap"}, OptionInvalid,
        "sample-pages: 512 is not of use but in mode page-sampling",
    ),
    (
        {"calc_time": 1, "mode": "dirty-ring"}, Unsupported,
        "Mode of calc-dirty-rate 'dirty-ring' is not supported here; use dirty-bitmap or page-sampling",
    ),
)  # fmt: skip


async def test_what_cannot_be_measured_is_refused() -> None:
    async with started(ticks=0) as guest:
        for options, kind, words in REFUSED:
            with pytest.raises(kind) as caught:
                await guest.execute("calc-dirty-rate", **options)
            assert str(caught.value) == words
        assert (await guest.execute("query-dirty-rate"))["status"] == "unstarted"
