"""Which CPUID leaves a guest sees.

Leaf numbers and bits: Intel SDM volume 2A, CPUID; AMD64 APM volume 3, appendix E. 0x4000_0000 and up: Linux
Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

INDEX_MATTERS = 1
"""KVM_CPUID_FLAG_SIGNIFCANT_INDEX"""

KVM_SIGNATURE = 0x4000_0000
KVM_FEATURES = 0x4000_0001

LEAF1_ECX_VMX = 1 << 5
LEAF1_ECX_PDCM = 1 << 15
LEAF1_ECX_TSC_DEADLINE = 1 << 24
LEAF1_ECX_OSXSAVE = 1 << 27
LEAF1_ECX_HYPERVISOR = 1 << 31
LEAF1_EDX_HTT = 1 << 28
LEAF7_EBX_SGX = 1 << 2
LEAF7_EBX_PT = 1 << 25
LEAF7_ECX_SGX_LC = 1 << 30
LEAF7_EDX_ARCH_LBR = 1 << 19
LEAF7_EDX_ARCH_CAPABILITIES = 1 << 29
EXT1_ECX_CMP_LEGACY = 1 << 1
EXT1_ECX_SVM = 1 << 2
EXT1_ECX_PERFCTR = 1 << 23 | 1 << 24 | 1 << 28

PROCESSOR_NAME: Final = range(0x8000_0002, 0x8000_0005)
"""Leaves with 48 characters of ASCII in all."""

# Whole leaves that a guest must find empty: performance counters, SGX, processor trace, last branch records, SVM,
# AMD's performance counters. They come with state that is not saved here, or with too much of it for what they are
# worth to a guest.
EMPTIED: Final = frozenset({0x0A, 0x12, 0x14, 0x1C, 0x8000_000A, 0x8000_0022})


@final
@attrs.frozen
class CpuidEntry:
    """What a vCPU answers to CPUID with EAX `function`, and with ECX `index` where `flags` has INDEX_MATTERS."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def guest_cpuid(
    supported: Iterable[CpuidEntry], index: int, count: int, tsc_deadline: bool, sharing: int | None = None
) -> tuple[CpuidEntry, ...]:
    """Make the leaves of vCPU `index` of `count` out of what KVM supports: one package, `count` cores of one thread.

    The APIC id is `index`. `tsc_deadline` is the extension KVM_CAP_TSC_DEADLINE_TIMER, which decides that bit alone;
    with in-kernel interrupt chips. `sharing` is how many vCPUs share a last-level cache (see `cache_neighbours`), None
    for all. Taken away are nested virtualization, SGX, and performance monitoring in all its forms, whose state is not
    carried over.
    """
    given: Mapping[tuple[int, int], CpuidEntry] = {(entry.function, entry.index): entry for entry in supported}
    amd = _is_amd(given.get((0, 0)))
    highest = given[0, 0].eax if (0, 0) in given else 0
    highest_extended = given[0x8000_0000, 0].eax if (0x8000_0000, 0) in given else 0
    entries = [
        _adapted(entry, index, count, tsc_deadline, amd, sharing or 1 << _id_bits(count))
        for entry in given.values()
        if entry.function not in (0x0B, 0x1F, 0x8000_001E) and not KVM_SIGNATURE <= entry.function <= 0x4FFF_FFFF
    ]
    for function in (0x0B, 0x1F):
        if highest >= function:
            entries.extend(_topology(function, index, count))
    if amd and highest_extended >= 0x8000_001E:
        entries.append(CpuidEntry(0x8000_001E, 0, 0, index, index & 0xFF, 0, 0))
    features = given.get((KVM_FEATURES, 0))
    entries.append(
        CpuidEntry(
            KVM_SIGNATURE,
            0,
            0,
            KVM_FEATURES,
            *(int.from_bytes(b"KVMKVMKVM\0\0\0"[n : n + 4], "little") for n in (0, 4, 8)),
        )
    )
    if features is not None:
        entries.append(attrs.evolve(features, index=0, flags=0))
    return tuple(entries)


def cache_neighbours(nodes: Sequence[int]) -> int:
    """Return how many vCPUs can share a last-level cache so that none is shared by two of `nodes`, each vCPU's.

    CPUID says it in powers of two: those share one whose APIC ids differ in the lower bits alone. Linux does not
    believe in a cache that two nodes share, and says so at length (topology_sane in arch/x86/kernel/smpboot.c).
    """
    bits = _id_bits(len(nodes))
    while any(nodes[index] != nodes[index >> bits << bits] for index in range(len(nodes))):
        bits -= 1
    return 1 << bits


def _is_amd(vendor: CpuidEntry | None) -> bool:
    if vendor is None:
        return False
    name = b"".join(word.to_bytes(4, "little") for word in (vendor.ebx, vendor.edx, vendor.ecx))
    return name in (b"AuthenticAMD", b"HygonGenuine")


def _id_bits(count: int) -> int:
    """How many bits of the APIC id tell `count` cores apart."""
    return (count - 1).bit_length()


def _topology(function: int, index: int, count: int) -> Iterator[CpuidEntry]:
    """Extended topology: a thread level with one thread, a core level with all cores, and the end."""
    yield CpuidEntry(function, 0, INDEX_MATTERS, 0, 1, 1 << 8, index)
    yield CpuidEntry(function, 1, INDEX_MATTERS, _id_bits(count), count, 2 << 8 | 1, index)
    yield CpuidEntry(function, 2, INDEX_MATTERS, 0, 0, 2, index)


def _adapted(entry: CpuidEntry, index: int, count: int, tsc_deadline: bool, amd: bool, neighbours: int) -> CpuidEntry:
    several = count > 1
    ids = 1 << _id_bits(count)
    if entry.function in EMPTIED:
        return attrs.evolve(entry, eax=0, ebx=0, ecx=0, edx=0)
    match entry.function, entry.index:
        case 1, _:
            ebx = entry.ebx & 0xFFFF | min(ids if not amd else count, 255) << 16 | (index & 0xFF) << 24
            # OSXSAVE mirrors the guest's CR4 and is KVM's to set.
            ecx = entry.ecx & ~(LEAF1_ECX_VMX | LEAF1_ECX_PDCM | LEAF1_ECX_TSC_DEADLINE | LEAF1_ECX_OSXSAVE)
            ecx |= LEAF1_ECX_HYPERVISOR | (LEAF1_ECX_TSC_DEADLINE if tsc_deadline else 0)
            edx = entry.edx & ~LEAF1_EDX_HTT | (LEAF1_EDX_HTT if several else 0)
            return attrs.evolve(entry, ebx=ebx, ecx=ecx, edx=edx)
        case 4, _ if entry.eax & 0x1F:
            level = entry.eax >> 5 & 7
            sharing = 0 if level < 3 else neighbours - 1
            return attrs.evolve(entry, eax=entry.eax & 0x3FFF | sharing << 14 | min(ids - 1, 63) << 26)
        case 7, 0:
            return attrs.evolve(
                entry,
                ebx=entry.ebx & ~(LEAF7_EBX_SGX | LEAF7_EBX_PT),
                ecx=entry.ecx & ~LEAF7_ECX_SGX_LC,
                # KVM emulates an MSR of Intel's on AMD too, where no processor has it and some guests fail over it.
                edx=entry.edx & ~(LEAF7_EDX_ARCH_LBR | (LEAF7_EDX_ARCH_CAPABILITIES if amd else 0)),
            )
        case 0x8000_0001, _:
            ecx = entry.ecx & ~(EXT1_ECX_SVM | EXT1_ECX_PERFCTR | EXT1_ECX_CMP_LEGACY)
            return attrs.evolve(entry, ecx=ecx | (EXT1_ECX_CMP_LEGACY if amd and several else 0))
        case 0x8000_0008, _:
            # Cores and the size of their id are AMD's; Intel has this register reserved.
            return attrs.evolve(entry, ecx=(count - 1) & 0xFF | _id_bits(count) << 12 if amd else 0)
        case 0x8000_001D, _ if entry.eax & 0x1F:
            sharing = 0 if entry.eax >> 5 & 7 < 3 else min(count, neighbours) - 1
            return attrs.evolve(entry, eax=entry.eax & 0x3FFF | sharing << 14)
        case _:
            return entry
