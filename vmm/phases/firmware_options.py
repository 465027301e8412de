"""The members of `machine-set` that are about what firmware would do: start order, clock, tables, ROMs.

There is no firmware: the VMM itself puts a kernel into memory. So most of them cannot be had, and each is refused by
name. Names are those of QEMU's options.
"""

from __future__ import annotations

from typing import Final, final

import attrs

from vmm.errors import OptionInvalid, Unsupported

_NO_FIRMWARE: Final = "there is no firmware, and the machine starts its kernel"


def _refuse(name: str, instead: str = _NO_FIRMWARE) -> Unsupported:
    return Unsupported(what="Member of machine-set", name=name, instead=instead)


@final
@attrs.frozen(kw_only=True)
class BootOptions:
    """`-boot`. What asks for nothing (no menu, no strictness) is taken."""

    order: str | None = None
    once: str | None = None
    menu: bool = False
    strict: bool = False
    splash: str | None = None
    splash_time: int | None = None
    reboot_timeout: int | None = None

    def check(self) -> None:
        """Raise `Unsupported` for the first member that asks for something."""
        for member in ("order", "once", "menu", "strict", "splash", "splash_time", "reboot_timeout"):
            value = getattr(self, member)
            if value is not None and value is not False:
                raise _refuse(f"boot.{member.replace('_', '-')}")


@final
@attrs.frozen(kw_only=True)
class RtcOptions:
    """`-rtc`: what the clock tells when the machine is made; from there on it goes with the host's."""

    base: str = "utc"
    """`utc`, `localtime`, or a time such as 2026-11-25T12:00:00 or 2026-11-25."""
    clock: str = "host"
    driftfix: str = "none"

    def check(self) -> None:
        """Raise `OptionInvalid` or `Unsupported` for what cannot be."""
        self.offset(0)
        if self.clock != "host":
            raise Unsupported(what="Clock", name=self.clock, instead="the one that the clock follows is host")
        if self.driftfix != "none":
            instead = "there are no periodic interrupts that could be lost; say none"
            raise Unsupported(what="Correction of drift", name=self.driftfix, instead=instead)

    def offset(self, now: int) -> int:
        """Return how many seconds the clock is ahead of the host's UTC clock, which says `now` (Unix time)."""
        if self.base == "utc":
            return 0
        from datetime import UTC, datetime  # few clocks show another time

        if self.base == "localtime":
            offset = datetime.fromtimestamp(now, UTC).astimezone().utcoffset()
            assert offset is not None, "a time with a zone has one"
            return round(offset.total_seconds())
        for form in ("%Y-%m-%dT%H:%M:%S", "%Y-%m-%d"):
            try:
                time = datetime.strptime(self.base, form)
            except ValueError:
                continue
            return int(time.replace(tzinfo=UTC).timestamp()) - now
        wanted = "utc, localtime, or a time such as 2026-11-25T12:00:00 or 2026-11-25"
        raise OptionInvalid(option="rtc.base", value=self.base, wanted=wanted)


@final
@attrs.frozen(kw_only=True)
class AcpiTableOptions:
    """`-acpitable`: one more table for the guest, complete in one file. The other members make up a header; refused."""

    file: str | None = None
    data: str | None = None
    sig: str | None = None
    rev: int | None = None
    oem_id: str | None = attrs.field(default=None, metadata={"wire": "oem_id"})
    oem_table_id: str | None = attrs.field(default=None, metadata={"wire": "oem_table_id"})
    oem_rev: int | None = attrs.field(default=None, metadata={"wire": "oem_rev"})
    asl_compiler_id: str | None = attrs.field(default=None, metadata={"wire": "asl_compiler_id"})
    asl_compiler_rev: int | None = attrs.field(default=None, metadata={"wire": "asl_compiler_rev"})

    def check(self, name: str) -> None:
        """Raise `Unsupported` for a table that is to be put together, `OptionInvalid` for none."""
        for field in attrs.fields(AcpiTableOptions):
            if field.name != "file" and getattr(self, field.name) is not None:
                raise _refuse(f"{name}.{field.name}", "give a whole table, with its header, as file")
        if not self.file:
            raise OptionInvalid(option=f"{name}.file", value=self.file, wanted="the path of a table")


@final
@attrs.frozen(kw_only=True)
class FwCfgOptions:
    """`-fw_cfg`; refused."""

    name: str | None = None
    file: str | None = None
    string: str | None = None
    gen_id: str | None = attrs.field(default=None, metadata={"wire": "gen_id"})


@final
@attrs.frozen(kw_only=True)
class OptionRomOptions:
    """`-option-rom`; refused."""

    romfile: str | None = None
    bootindex: int | None = None


@final
@attrs.frozen(kw_only=True)
class FirmwareOptions:
    """All of these members, inline in `machine-set`."""

    boot: BootOptions = BootOptions()
    rtc: RtcOptions = RtcOptions()
    smbios: list[dict[str, object]] = attrs.Factory(list)
    """Structures, or fields of one, as `-smbios` has them; refused."""
    acpi_tables: list[AcpiTableOptions] = attrs.Factory(list)
    fw_cfg: list[FwCfgOptions] = attrs.Factory(list)
    option_roms: list[OptionRomOptions] = attrs.Factory(list)

    def check(self) -> None:
        """Raise `OptionInvalid` or `Unsupported` for the first thing that cannot be."""
        self.boot.check()
        self.rtc.check()
        if self.smbios:
            raise _refuse("smbios", "there is no firmware that makes the guest's SMBIOS tables")
        for number, table in enumerate(self.acpi_tables):
            table.check(f"acpi-tables[{number}]")
        if self.fw_cfg:
            raise _refuse("fw-cfg", "there is no firmware that reads it, nor the device")
        if self.option_roms:
            raise _refuse("option-roms", "there is no firmware that runs them")
