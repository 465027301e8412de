"""Commands that tell what CPUs there are to choose from, and where a machine's vCPUs sit."""

from __future__ import annotations

from typing import Literal, final

import attrs

from vmm.capabilities import MayQuery
from vmm.phases.commands_facts import kvm_is_present
from vmm.phases.config import CpuOptions
from vmm.phases.cpus import CpuOffer


@final
@attrs.frozen(kw_only=True)
class CpuModelInfo:
    """QEMU's CpuModelInfo: a model, and its differences from what its name stands for."""

    name: str
    props: dict[str, object] | None = None


@final
@attrs.frozen(kw_only=True)
class CpuModelExpansion:
    """Arguments of `query-cpu-model-expansion`."""

    type: Literal["static", "full"]
    model: CpuModelInfo


@final
@attrs.frozen(kw_only=True)
class CpuModelExpansionInfo:
    """QEMU's CpuModelExpansionInfo."""

    model: CpuModelInfo


def query_cpu_model_expansion(may: MayQuery, args: CpuModelExpansion) -> CpuModelExpansionInfo:
    """Tell for every CPU feature whether a guest with this model would have it; `static` in terms of model base."""
    offer = may.view(CpuOffer)
    features = offer.features(CpuOptions(model=args.model.name, props=args.model.props or {}))
    name = "base" if args.type == "static" else args.model.name
    return CpuModelExpansionInfo(model=CpuModelInfo(name=name, props=dict(features)))


@final
@attrs.frozen(kw_only=True)
class CpuDefinitionInfo:
    """QEMU's CpuDefinitionInfo."""

    name: str
    typename: str
    unavailable_features: list[str]
    migration_safe: bool
    static: bool
    deprecated: bool = False


def query_cpu_definitions(may: MayQuery) -> list[CpuDefinitionInfo]:
    """List the CPU models. None is static: what each has comes from this host, but for what props of base names."""
    lacking = [] if kvm_is_present() else ["kvm"]
    return [
        CpuDefinitionInfo(
            name=name,
            typename=f"{name}-x86_64-cpu",
            unavailable_features=lacking,
            migration_safe=False,
            static=False,
        )
        for name in ("host", "max", "base")
    ]
