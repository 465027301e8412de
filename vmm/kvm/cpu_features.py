"""CPU features by name: the CPUID bits behind QEMU's property names, and what switching some of them off means.

Source: Intel SDM volume 2A, CPUID; AMD64 APM volume 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst, and
QEMU's `query-cpu-model-expansion` for the names, of which an underscore may stand for a hyphen.

A bit that software may rely on only together with another one (SDM volume 1, 13.2 to 15.4: AVX with XSAVE, AVX-512 with
AVX2, ...) is off when that one is off: a guest is never shown a combination that no processor has.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, final

import attrs

from vmm import hostio
from vmm.errors import CpuFeatureMissing, OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vmm.kvm.cpuid import CpuidEntry

Register = Literal["eax", "ebx", "ecx", "edx"]

_WORDS: Final[tuple[tuple[int, int, Register, str], ...]] = (
    # Function, index, register, and the names of its bits from bit 0; "-" is a bit that has no name.
    (1, 0, "edx",
     "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov "
     "pat pse36 pn clflush - ds acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"),
    (1, 0, "ecx",
     "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm "
     "- pcid dca sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand hypervisor"),
    (6, 0, "eax", "- - arat"),
    (7, 0, "ebx",
     "fsgsbase tsc-adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm - - mpx - "
     "avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel-pt avx512pf avx512er avx512cd sha-ni "
     "avx512bw avx512vl"),
    (7, 0, "ecx",
     "- avx512vbmi umip pku - waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni avx512bitalg - avx512-vpopcntdq - "
     "la57 - - - - - rdpid - bus-lock-detect cldemote - movdiri movdir64b - sgxlc pks"),
    (7, 0, "edx",
     "- - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - - - serialize - "
     "tsx-ldtrk - - arch-lbr - - amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl stibp flush-l1d arch-capabilities "
     "core-capability ssbd"),
    (7, 1, "eax",
     "sha512 sm3 sm4 - avx-vnni avx512-bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - amx-fp16 - "
     "avx-ifma - - lam"),
    (7, 1, "edx", "- - - - avx-vnni-int8 avx-ne-convert - - amx-complex - avx-vnni-int16 - - - prefetchiti"),
    (7, 2, "edx", "intel-psfd ipred-ctrl rrsba-ctrl ddpd-u bhi-ctrl mcdt-no"),
    (0xD, 1, "eax", "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (0x4000_0001, 0, "eax",
     "kvmclock kvm-nopiodelay kvm-mmu kvmclock kvm-asyncpf kvm-steal-time kvm-pv-eoi kvm-pv-unhalt "
     "- kvm-pv-tlb-flush - kvm-pv-ipi kvm-poll-control kvm-pv-sched-yield kvm-asyncpf-int kvm-msi-ext-dest-id "
     "- - - - - - - - kvmclock-stable-bit"),
    (0x4000_0001, 0, "edx", "kvm-hint-dedicated"),
    (0x8000_0001, 0, "edx",
     "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr-opt pdpe1gb rdtscp - lm 3dnowext 3dnow"),
    (0x8000_0001, 0, "ecx",
     "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp "
     "fma4 tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb"),
    (0x8000_0007, 0, "ebx", "overflow-recov succor"),
    (0x8000_0007, 0, "edx", "- - - - - - - - invtsc"),
    (0x8000_0008, 0, "ebx",
     "clzero - xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs amd-stibp - stibp-always-on - - - - - - "
     "amd-ssbd virt-ssbd amd-no-ssb - amd-psfd btc-no"),
    (0x8000_000A, 0, "edx",
     "npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists - - pause-filter - pfthreshold avic - "
     "v-vmsave-vmload vgif - - - - - - - - vnmi - - svme-addr-chk"),
    (0x8000_0021, 0, "eax",
     "no-nested-data-bp fs-gs-base-ns lfence-always-serializing - - - null-sel-clr-base - auto-ibrs"),
)  # fmt: skip

_ALIASES: Final = MappingProxyType(
    {
        "sse3": "pni", "pclmuldq": "pclmulqdq", "sse4-1": "sse4.1", "sse4-2": "sse4.2", "xd": "nx", "i64": "lm",
        "ffxsr": "fxsr-opt",
    }
)  # fmt: skip

_NEEDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "avx": "xsave", "fma": "avx", "f16c": "avx", "xop": "avx", "fma4": "avx", "avx2": "avx", "mpx": "xsave",
        "pku": "xsave", "vaes": "avx", "vpclmulqdq": "avx", "avx-vnni": "avx2", "avx-ifma": "avx2",
        "avx-vnni-int8": "avx2", "avx-vnni-int16": "avx2", "avx-ne-convert": "avx2", "sha512": "avx2", "sm3": "avx",
        "sm4": "avx2", "avx512f": "avx2", "amx-tile": "xsave", "amx-int8": "amx-tile", "amx-bf16": "amx-tile",
        "amx-fp16": "amx-tile", "amx-complex": "amx-tile", "xfd": "xsave", "lwp": "xsave",
        **dict.fromkeys(("xsaveopt", "xsavec", "xgetbv1", "xsaves", "xsaveerptr"), "xsave"),
        **dict.fromkeys(
            ("avx512dq", "avx512ifma", "avx512pf", "avx512er", "avx512cd", "avx512bw", "avx512vl", "avx512-4vnniw",
             "avx512-4fmaps", "avx512-vp2intersect", "avx512vnni", "avx512-vpopcntdq"), "avx512f"),
        **dict.fromkeys(("avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512-bf16", "avx512-fp16"), "avx512bw"),
        **dict.fromkeys(("mmxext", "3dnow"), "mmx"), "3dnowext": "3dnow", "sse": "fxsr", "fxsr-opt": "fxsr",
        "sse2": "sse", "pni": "sse2", "ssse3": "pni", "sse4.1": "ssse3", "sse4.2": "sse4.1", "sse4a": "pni",
        **dict.fromkeys(("aes", "pclmulqdq", "gfni", "sha-ni"), "sse2"),
        "lm": "pae", "pdpe1gb": "lm", "la57": "lm", "lahf-lm": "lm", "pcid": "lm", "invpcid": "pcid",
        **dict.fromkeys(("kvmclock-stable-bit",), "kvmclock"), "kvm-asyncpf-int": "kvm-asyncpf",
        "tsc-deadline": "tsc", "tsc-adjust": "tsc", "invtsc": "tsc", "rdtscp": "tsc",
    }
)  # fmt: skip
"""Feature -> the one that it is nothing without. Itself may need another one."""

_AMD_COPIES: Final = 0x0183_F3FF
"""Bits of leaf 0x8000_0001 EDX that repeat leaf 1 EDX on AMD. Source: AMD APM volume 3, E.4.2."""

_COMPONENTS: Final[tuple[tuple[str, tuple[int, ...]], ...]] = (
    ("avx", (2,)), ("mpx", (3, 4)), ("avx512f", (5, 6, 7)), ("pku", (9,)), ("amx-tile", (17, 18)), ("lwp", (62,)),
)  # fmt: skip
"""Parts of the XSAVE area that come with a feature. Source: Intel SDM volume 1, 13.1."""

_XSAVE_LEAF: Final = 0xD
_LEGACY_AREA: Final = 576  # bytes: the FXSAVE area and the XSAVE header

ALWAYS: Final = MappingProxyType({"apic": "KVM shows it to a guest whose interrupt controllers are in the kernel"})
"""What cannot be switched off, and why."""


@final
@attrs.frozen
class Feature:
    """A feature, and where CPUID shows it: (function, index, register, bit mask). All of its bits go together."""

    name: str
    bits: tuple[tuple[int, int, Register, int], ...]

    def shown_by(self, leaves: Mapping[tuple[int, int], CpuidEntry]) -> bool:
        """Whether `leaves` have any of its bits: only the clock has two, for its older and its newer registers."""
        return any(
            (function, index) in leaves and bool(getattr(leaves[function, index], register) & mask)
            for function, index, register, mask in self.bits
        )


def _features() -> dict[str, Feature]:
    bits: dict[str, tuple[tuple[int, int, Register, int], ...]] = {}
    for function, index, register, names in _WORDS:
        for number, name in enumerate(names.split()):
            if name != "-":
                bits[name] = (*bits.get(name, ()), (function, index, register, 1 << number))
    return {name: Feature(name, where) for name, where in bits.items()}


FEATURES: Final[Mapping[str, Feature]] = MappingProxyType(_features())
"""Every feature that has a name, by it."""


def canonical(props: Mapping[str, object]) -> dict[str, bool]:
    """Return `props` with each feature under the one name it has here.

    Raises:
        OptionInvalid: a name that no feature has, a value that is not a boolean, or two that contradict each other.
    """
    found: dict[str, bool] = {}
    for given, value in props.items():
        name = _ALIASES.get(given.replace("_", "-"), given.replace("_", "-"))
        if name not in FEATURES:
            raise OptionInvalid(option="props", value=given, wanted=f"a CPU feature{_close_to(name)}")
        if not isinstance(value, bool):
            raise OptionInvalid(option=f"props.{given}", value=value, wanted="true or false")
        if found.setdefault(name, value) != value:
            raise OptionInvalid(
                option=f"props.{given}", value=value, wanted=f"what is said of {name}, the same feature"
            )
        if not value and name in ALWAYS:
            raise OptionInvalid(option=f"props.{given}", value=value, wanted=f"possible: {ALWAYS[name]}")
    return found


def _close_to(name: str) -> str:
    with hostio.importing("difflib"):
        from difflib import get_close_matches  # only for an error text

    close = get_close_matches(name, (*FEATURES, *_ALIASES), n=4)
    return f"; there are {', '.join(close)}" if close else "; query-cpu-model-expansion lists them"


def shown(leaves: Iterable[CpuidEntry]) -> frozenset[str]:
    """Return the names of the features that `leaves` show."""
    by_leaf = {(entry.function, entry.index): entry for entry in leaves}
    return frozenset(name for name, feature in FEATURES.items() if feature.shown_by(by_leaf))


def resolve(
    props: Mapping[str, bool], offered: frozenset[str], supported: frozenset[str], *, bare: bool = False
) -> dict[str, bool]:
    """Return `props` with what goes along: each feature that is off because one is off that it needs.

    `offered` is what this VMM shows to guests on this host, `supported` what KVM could give. With `bare`, all that is
    not asked for is off.

    Raises:
        CpuFeatureMissing: a feature is asked for that is not offered.
        OptionInvalid: a feature is asked for, but one that it needs is off.
    """
    resolved = dict.fromkeys(sorted(offered - ALWAYS.keys()), False) | dict(props) if bare else dict(props)
    for name, wanted in props.items():
        if wanted and name not in offered:
            reason = "KVM offers it, but this VMM does not give it to this machine"
            if name not in supported:
                reason = "this host's KVM does not offer it"
            raise CpuFeatureMissing(name=name, reason=reason)
    for name in _NEEDS:
        missing = next((need for need in _needs_of(name) if not resolved.get(need, True)), None)
        if missing is None:
            continue
        if props.get(name):
            raise OptionInvalid(option=f"props.{name}", value=True, wanted=f"possible without {missing}")
        if name in offered:
            resolved[name] = False
    return resolved


def _needs_of(name: str) -> list[str]:
    """Return what `name` is nothing without, the most fundamental first."""
    needs: list[str] = []
    while name in _NEEDS:
        name = _NEEDS[name]
        needs.insert(0, name)
    return needs


def without(leaves: Sequence[CpuidEntry], off: Iterable[str]) -> tuple[CpuidEntry, ...]:
    """Return `leaves` without the features `off`, each of them resolved, and without their parts of the XSAVE area."""
    gone = frozenset(off)
    masks: dict[tuple[int, int], dict[Register, int]] = {}
    for name in gone:
        for function, index, register, mask in FEATURES[name].bits:
            word = masks.setdefault((function, index), {})
            word[register] = word.get(register, 0) | mask
    copies = masks.get((1, 0), {}).get("edx", 0) & _AMD_COPIES
    if copies and _is_amds(leaves):
        word = masks.setdefault((0x8000_0001, 0), {})
        word["edx"] = word.get("edx", 0) | copies
    changed = []
    for entry in leaves:
        word = masks.get((entry.function, entry.index), {})
        changed.append(
            attrs.evolve(entry, **{register: getattr(entry, register) & ~word[register] for register in word})
        )
    parts = [part for name, numbers in _COMPONENTS if name in gone for part in numbers]
    if "xsave" in gone or parts:
        return _with_less_to_save(changed, None if "xsave" in gone else frozenset(parts))
    return tuple(changed)


def _is_amds(leaves: Sequence[CpuidEntry]) -> bool:
    """Whether the copies mean anything: on Intel those bits are reserved, and zero."""
    return any(entry.function == 0x8000_0001 and entry.edx & 1 for entry in leaves)


def _with_less_to_save(leaves: Sequence[CpuidEntry], parts: frozenset[int] | None) -> tuple[CpuidEntry, ...]:
    """Take `parts` out of the XSAVE leaves; None empties them."""
    if parts is None:
        return tuple(
            attrs.evolve(entry, eax=0, ebx=0, ecx=0, edx=0) if entry.function == _XSAVE_LEAF else entry
            for entry in leaves
        )
    mask = sum(1 << part for part in parts)
    left: list[CpuidEntry] = []
    size = _LEGACY_AREA
    for entry in leaves:
        if entry.function == _XSAVE_LEAF and entry.index >= 2:
            if entry.index in parts:
                continue
            if not entry.ecx & 1:  # in XCR0, so in the standard format at a fixed offset
                size = max(size, entry.ebx + entry.eax)
        left.append(entry)
    for at, entry in enumerate(left):
        if (entry.function, entry.index) == (_XSAVE_LEAF, 0):
            # What is enabled right now (EBX) is KVM's to set.
            left[at] = attrs.evolve(
                entry, eax=entry.eax & ~mask & 0xFFFF_FFFF, edx=entry.edx & ~(mask >> 32), ebx=size, ecx=size
            )
        elif (entry.function, entry.index) == (_XSAVE_LEAF, 1):
            left[at] = attrs.evolve(entry, ecx=entry.ecx & ~mask & 0xFFFF_FFFF, edx=entry.edx & ~(mask >> 32))
    return tuple(left)
