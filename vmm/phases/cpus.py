"""The machine's processors: what this host's KVM offers, and what was chosen of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, final

import attrs

from vmm import hostio
from vmm.errors import OptionInvalid
from vmm.kvm.cpuid import cache_neighbours, guest_cpuid
from vmm.phases.config import CpuOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.kvm.cpuid import CpuidEntry
    from vmm.phases.accel import Accelerator
    from vmm.phases.assembly import Definition


@final
@attrs.frozen(eq=False)
class CpuModel:
    """The CPU model that was chosen."""

    options: CpuOptions
    """As recorded: every feature under its one name, and those named that are off because of another."""
    offer: CpuOffer
    _off: tuple[str, ...] = ()

    def leaves(self, index: int, nodes: Sequence[int] = ()) -> tuple[CpuidEntry, ...]:
        """Return what vCPU `index` answers to CPUID; `nodes` are the NUMA nodes of all vCPUs, empty without any."""
        leaves = self.offer.leaves(index, cache_neighbours(nodes) if nodes else None)
        if not self._off:
            return leaves
        from vmm.kvm.cpu_features import without  # Most machines have the host's CPU as it is.

        return without(leaves, self._off)


@final
@attrs.frozen(eq=False)
class CpuOffer:
    """What KVM offers of the host's CPU to a machine such as this one. Published to `may-query`."""

    what: ClassVar[str] = "What KVM offers of the host's CPU"
    phase: ClassVar[str] = "preconfig"

    supported: tuple[CpuidEntry, ...]
    tsc_deadline: bool
    cpus: int
    """How many vCPUs the machine has."""
    starts_in_long_mode: str = ""
    """The image that wants to be started in 64-bit mode; empty where none does."""

    @classmethod
    def of(cls, accelerator: Accelerator, definition: Definition) -> CpuOffer:
        """Ask the accelerator."""
        plan = definition.plan
        image = plan.image if plan is not None and plan.start.mode == "long" else ""
        return cls(accelerator.supported_cpuid(), accelerator.has_tsc_deadline, definition.options.smp.cpus, image)

    def leaves(self, index: int, sharing: int | None = None) -> tuple[CpuidEntry, ...]:
        """Return what vCPU `index` answers to CPUID with nothing switched off; `sharing` as in `guest_cpuid`."""
        return guest_cpuid(self.supported, index, self.cpus, self.tsc_deadline, sharing)

    def choose(self, options: CpuOptions) -> CpuModel:
        """Find out what `options` come to.

        Raises:
            Unsupported: the model is none of this host's.
            CpuFeatureMissing: a feature cannot be had.
            OptionInvalid: a feature is unknown, or cannot be off, or not without another one.
            HostFileRefused: the host did not let the table of features be imported.
        """
        options.check()
        bare = options.model == "base"
        if not options.props and not bare:
            return CpuModel(options, self)
        with hostio.importing("vmm.kvm.cpu_features"):
            from vmm.kvm.cpu_features import canonical, resolve, shown

        offered = shown(self.leaves(0))
        props = resolve(canonical(options.props), offered, shown(self.supported), bare=bare)
        off = tuple(name for name, wanted in props.items() if not wanted)
        if self.starts_in_long_mode and "lm" in off:
            wanted = f"possible: {self.starts_in_long_mode} starts in 64-bit mode"
            raise OptionInvalid(option="props.lm", value=False, wanted=wanted)
        recorded: dict[str, object] = {name: wanted for name, wanted in props.items() if wanted or not bare}
        return CpuModel(CpuOptions(model=options.model, props=recorded), self, off)

    def features(self, options: CpuOptions) -> dict[str, bool]:
        """Return for every feature that has a name whether a guest with `options` would have it. Raises as `choose`."""
        with hostio.importing("vmm.kvm.cpu_features"):
            from vmm.kvm.cpu_features import FEATURES, shown

        found = shown(self.choose(options).leaves(0))
        return {name: name in found for name in sorted(FEATURES)}
