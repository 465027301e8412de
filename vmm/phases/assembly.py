"""What the phases hand on: a machine's definition, then its parts."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar, final

import attrs

from vmm import hostio
from vmm.guests import guest_path
from vmm.hw.boot.acpi import acpi_tables
from vmm.hw.boot.acpi_file import AcpiTable
from vmm.hw.boot.image import image_path, plan_boot
from vmm.hw.boot.plan import BinarySource
from vmm.phases.host_resources import BUILTIN
from vmm.phases.numa import NumaTable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm.backends.memory import MemoryBackend
    from vmm.capabilities import MayAdoptDescriptor, MayOpenHostFile
    from vmm.hw.boot.numa import Numa
    from vmm.hw.boot.plan import BootPlan
    from vmm.phases.config import MachineOptions
    from vmm.phases.foundation import Host
    from vmm.phases.incoming_port import IncomingPort
    from vmm.phases.migration_state import MigrationState


@final
@attrs.define(eq=False)
class Definition:
    """What `machine-set` defined: the options, with the files that they name open. Published to `may-query`."""

    what: ClassVar[str] = "The machine's definition"
    phase: ClassVar[str] = "accel"

    options: MachineOptions
    kernel: BinarySource | None
    initrd: BinarySource | None
    tables: tuple[AcpiTable, ...]
    _fds: dict[str, int]
    plan: BootPlan | None = None
    ram: MemoryBackend | None = None
    """What its RAM is made of; None for a memfd of its own."""
    numa: NumaTable = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.numa = NumaTable(self.options.smp.cpus, self.options.memory.size)

    @classmethod
    def obtain(cls, options: MachineOptions, source: MayOpenHostFile | MayAdoptDescriptor) -> Definition:
        """Open, or claim, the files that `options` names. They stay open: a reset reads them again."""
        options.check()
        with ExitStack() as stack:

            def opened(resource: str, name: str, path: str) -> BinarySource:
                if resource == "kernel" and name.startswith(BUILTIN):
                    # Part of this program, as much as its code: no host resource, so never claimed.
                    fd = hostio.open_input_file(path)
                else:
                    fd = source.obtain(resource, lambda: hostio.open_input_file(path))
                stack.callback(os.close, fd)
                fds[resource] = fd
                return BinarySource.from_fd(name, fd)

            fds: dict[str, int] = {}
            kernel = initrd = None
            if options.kernel is not None:
                kernel = opened("kernel", options.kernel, _path_of(options.kernel))
            if options.initrd is not None:
                initrd = opened("initrd", options.initrd, options.initrd)
            paths = [str(table.file) for table in options.firmware.acpi_tables]
            tables = [AcpiTable.read(opened(f"acpi-table.{at}", path, path)) for at, path in enumerate(paths)]
            stack.pop_all()
        return cls(options, kernel, initrd, tuple(tables), fds)

    def check(self) -> None:
        """Find out whether the images can be booted on this machine. Raises `BootError`, `HostFileRefused`."""
        self._plan(None)

    def complete(self) -> Numa | None:
        """Put into the boot plan what has been decided since `check`: NUMA nodes, which are returned, if there are any.

        Raises `OptionInvalid`, `BootError`.
        """
        numa = self.numa.complete()
        if numa is not None:
            self._plan(numa)
        return numa

    def _plan(self, numa: Numa | None) -> None:
        options = self.options
        cpus = options.smp.cpus
        tables = acpi_tables(cpus, numa=numa, extra=self.tables)
        if self.kernel is not None:
            self.plan = plan_boot(self.kernel, self.initrd, options.append, options.memory.size, cpus, tables)

    def descriptors(self) -> Mapping[str, int]:
        """Return what a successor needs of the open files, by resource name."""
        builtin = str(self.options.kernel).startswith(BUILTIN)
        return {name: fd for name, fd in self._fds.items() if not (builtin and name == "kernel")}

    def close(self) -> None:
        """Close the files. Idempotent."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def _path_of(kernel: str) -> str:
    if kernel.startswith(BUILTIN):
        return str(guest_path(kernel.removeprefix(BUILTIN)))
    return image_path(kernel)


@final
@attrs.frozen(eq=False)
class Precreated:
    """What phase precreate hands on."""

    host: Host
    incoming: IncomingPort
    migration: MigrationState
    definition: Definition
