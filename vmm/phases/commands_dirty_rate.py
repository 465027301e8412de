"""Commands that find out, or limit, how fast the guest writes to its memory."""

from __future__ import annotations

from typing import final

import attrs
import trio

from vmm.capabilities import MayQuery, MayStartMigration
from vmm.errors import OptionInvalid
from vmm.migration.dirty_rate import (
    SAMPLES,
    LimitedVcpu,
    Measurement,
    MeasureMode,
    MeasureStatus,
    TimeUnit,
    milliseconds,
)
from vmm.monitor.qapi import U64
from vmm.phases.migration_state import MigrationState


@final
@attrs.frozen(kw_only=True)
class CalcDirtyRate:
    """Arguments of `calc-dirty-rate`."""

    calc_time: int
    """How long to measure, 50 ms to 60 s."""
    calc_time_unit: TimeUnit = "second"
    sample_pages: int | None = None
    """Pages of each GiB that are looked at, 128 to 16384; 512 if it is left out. Of mode page-sampling alone."""
    mode: MeasureMode = "page-sampling"


@final
@attrs.frozen(kw_only=True)
class QueryDirtyRate:
    """Arguments of `query-dirty-rate`."""

    calc_time_unit: TimeUnit = "second"


@final
@attrs.frozen(kw_only=True)
class DirtyRateInfo:
    """QEMU's DirtyRateInfo."""

    status: MeasureStatus
    start_time: int
    """When the measurement began, by the host's monotonic clock, in `calc-time-unit`."""
    calc_time: int
    calc_time_unit: TimeUnit
    sample_pages: int
    mode: MeasureMode
    dirty_rate: int | None = None
    """MiB a second; a page counts once, however often it was written meanwhile."""


async def calc_dirty_rate(may: MayStartMigration, args: CalcDirtyRate) -> None:
    """Begin to measure how fast the guest writes to its memory; `query-dirty-rate` has the result.

    Mode page-sampling compares pages taken at random; dirty-bitmap has KVM log every page, which slows the guest down a
    little; dirty-ring is not supported. A migration that begins calls it off.
    """
    await trio.lowlevel.checkpoint()
    if args.sample_pages is not None and args.mode != "page-sampling":
        raise OptionInvalid(option="sample-pages", value=args.sample_pages, wanted="of use but in mode page-sampling")
    samples = SAMPLES if args.sample_pages is None else args.sample_pages
    may.measure(Measurement(milliseconds(args.calc_time, args.calc_time_unit), args.mode, samples))


def query_dirty_rate(may: MayQuery, args: QueryDirtyRate) -> DirtyRateInfo:
    """Say what was measured last, or that it is being measured."""
    found, unit = may.view(MigrationState).dirty_rate, args.calc_time_unit
    per_unit = 1 if unit == "second" else 1000
    return DirtyRateInfo(
        status=found.status,
        start_time=int(found.started * per_unit),
        calc_time=found.time * per_unit // 1000,
        calc_time_unit=unit,
        sample_pages=found.samples,
        mode=found.mode,
        dirty_rate=found.rate,
    )


@final
@attrs.frozen(kw_only=True)
class SetVcpuDirtyLimit:
    """Arguments of `set-vcpu-dirty-limit`."""

    dirty_rate: U64
    """MiB a second for each; 0 ends the limit."""
    cpu_index: int | None = None
    """All of them if it is left out."""


@final
@attrs.frozen(kw_only=True)
class CancelVcpuDirtyLimit:
    """Arguments of `cancel-vcpu-dirty-limit`."""

    cpu_index: int | None = None
    """All of them if it is left out."""


async def set_vcpu_dirty_limit(may: MayStartMigration, args: SetVcpuDirtyLimit) -> None:
    """Limit how fast vCPUs write to memory, by keeping them out of the guest for the share of the time that it takes.

    One of several only with accel-set's dirty-ring-size; all of them also by KVM's log, each to an even part of what
    they write together. A migration suspends it.
    """
    await trio.lowlevel.checkpoint()
    may.limit(args.cpu_index, args.dirty_rate)


async def cancel_vcpu_dirty_limit(may: MayStartMigration, args: CancelVcpuDirtyLimit) -> None:
    """Let vCPUs write as fast as they will."""
    await trio.lowlevel.checkpoint()
    may.limit(args.cpu_index, 0)


def query_vcpu_dirty_limit(may: MayQuery) -> list[LimitedVcpu]:
    """List the vCPUs that are limited, and how fast they have written in the last second."""
    return list(may.view(MigrationState).limited)
