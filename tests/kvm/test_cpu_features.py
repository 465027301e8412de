"""Named CPU features, switched on and off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.kvm.test_cpuid import AMD, HOSTS, INTEL
from tests.kvm.tiny import ENTRY, KICK_PORT, TinyMachine
from vmm.errors import CpuFeatureMissing, OptionInvalid
from vmm.kvm.cpu_features import ALWAYS, FEATURES, canonical, resolve, shown, without
from vmm.kvm.cpuid import CpuidEntry, guest_cpuid

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vmm.kvm.cpu_features import Feature


def offer(supported: Sequence[CpuidEntry]) -> tuple[CpuidEntry, ...]:
    return guest_cpuid(supported, 0, 2, True)


def entry(leaves: Iterable[CpuidEntry], function: int, index: int = 0) -> CpuidEntry:
    (found,) = (leaf for leaf in leaves if (leaf.function, leaf.index) == (function, index))
    return found


def off(leaves: Sequence[CpuidEntry], *names: str) -> tuple[CpuidEntry, ...]:
    resolved = resolve(dict.fromkeys(names, False), shown(leaves), shown(leaves))
    return without(leaves, [name for name, wanted in resolved.items() if not wanted])


def cpuid(features: Iterable[Feature]) -> str:
    """A guest that executes CPUID for each bit of `features`, and writes all four registers."""
    reads = (
        f"mov eax, {function}\n mov ecx, {index}\n cpuid\n out 0x80, eax\n mov eax, ebx\n out 0x80, eax\n"
        "mov eax, ecx\n out 0x80, eax\n mov eax, edx\n out 0x80, eax\n"
        for feature in features
        for function, index, _, _ in feature.bits
    )
    return "".join(reads) + "out 0x99, al\n hlt"


def seen_by(machine: TinyMachine, features: Sequence[Feature], index: int = 0) -> set[str]:
    """Which of `features` the guest finds in the CPUID of vCPU `index`."""
    machine.boot(cpuid(features))
    machine.fds[index].set_registers({"cs": 0, "ds": 0, "es": 0, "ss": 0, "rip": ENTRY, "rsp": 0xF00, "rflags": 2})
    machine.ports.written.clear()
    while not machine.outs(KICK_PORT):  # a kick that was for the other one, too, is still to be taken
        machine.run(index)
    words = iter(machine.outs(0x80))
    seen = set()
    for feature in features:
        for _, _, register, mask in feature.bits:
            found = {name: next(words) for name in ("eax", "ebx", "ecx", "edx")}
            if found[register] & mask:
                seen.add(feature.name)
    return seen


# --- names ------------------------------------------------------------------------------------------------


def test_names_are_those_of_qemu_with_hyphens_or_underscores_or_by_their_aliases() -> None:
    given = {"avx2": False, "lahf_lm": False, "sse4_1": True, "sse3": True, "xd": False, "tsc-adjust": True}
    assert canonical(given) == {
        "avx2": False, "lahf-lm": False, "sse4.1": True, "pni": True, "nx": False, "tsc-adjust": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("props", "text"),
    [
        ({"avx22": True}, "props: 'avx22' is not a CPU feature; there are avx2, avx, "),
        ({"€": True}, "props: '€' is not a CPU feature; query-cpu-model-expansion lists them"),
        ({"avx2": "off"}, "props.avx2: 'off' is not true or false"),
        ({"avx2": 0}, "props.avx2: 0 is not true or false"),
        ({"pni": True, "sse3": False}, "props.sse3: False is not what is said of pni, the same feature"),
        (
            {"apic": False},
            "props.apic: False is not possible: KVM shows it to a guest whose interrupt controllers are in the kernel",
        ),
    ],
)
def test_what_is_wrong_with_a_name_or_a_value_is_said(props: dict[str, object], text: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        canonical(props)
    assert str(caught.value).startswith(text)


def test_every_bit_has_one_name_and_every_dependence_leads_somewhere() -> None:
    bits = [bit for feature in FEATURES.values() for bit in feature.bits]
    assert len(bits) == len(set(bits))
    for name in FEATURES:
        assert resolve({name: False}, frozenset(FEATURES), frozenset(FEATURES))[name] is False


# --- what goes along --------------------------------------------------------------------------------------


def test_what_needs_a_feature_is_off_with_it() -> None:
    everything = frozenset(FEATURES)
    assert resolve({"avx512bw": False}, everything, everything) == dict.fromkeys(
        ("avx512bw", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512-bf16", "avx512-fp16"), False
    )
    gone = resolve({"xsave": False}, everything, everything)
    assert {"avx", "avx2", "avx512f", "avx512vl", "fma", "xsaves", "pku", "amx-int8"} <= gone.keys()
    assert "sse4.2" not in gone


def test_only_what_is_offered_goes_along() -> None:
    assert resolve({"avx": False}, frozenset({"avx", "xsave", "fma"}), frozenset()) == {"avx": False, "fma": False}


def test_a_feature_is_not_to_be_had_without_the_one_it_needs() -> None:
    everything = frozenset(FEATURES)
    with pytest.raises(OptionInvalid) as caught:
        resolve({"xsave": False, "avx2": True}, everything, everything)
    assert str(caught.value) == "props.avx2: True is not possible without xsave"


def test_what_cannot_be_had_is_named_with_whose_fault_it_is() -> None:
    offered = shown(offer(INTEL))
    assert not offered & {"vmx", "pdcm", "sgx", "intel-pt", "svm"}
    for props, text in (
        ({"vmx": True},
         "CPU feature 'vmx' cannot be switched on: KVM offers it, but this VMM does not give it to this machine"),
        ({"kvm-hint-dedicated": True},
         "CPU feature 'kvm-hint-dedicated' cannot be switched on: this host's KVM does not offer it"),
    ):  # fmt: skip
        with pytest.raises(CpuFeatureMissing) as caught:
            resolve(props, offered, shown(INTEL))
        assert str(caught.value) == text
        assert caught.value.qmp_class == "KVMMissingCap"


def test_the_bare_model_has_what_is_named_and_what_cannot_be_off() -> None:
    offered = frozenset({"apic", "avx", "fma", "sse", "xsave"})
    assert resolve({"sse": True}, offered, offered, bare=True) == {
        "avx": False, "fma": False, "sse": True, "xsave": False,
    }  # fmt: skip
    with pytest.raises(OptionInvalid) as caught:
        resolve({"avx": True}, offered, offered, bare=True)
    assert str(caught.value) == "props.avx: True is not possible without xsave"


# --- leaves -----------------------------------------------------------------------------------------------


@HOSTS
def test_each_feature_can_be_off_by_itself_and_nothing_else_changes(supported: list[CpuidEntry]) -> None:
    leaves = offer(supported)
    for name in sorted(shown(leaves) - ALWAYS.keys()):
        assert shown(leaves) - shown(without(leaves, [name])) == {name}


def test_what_amd_shows_twice_is_off_twice() -> None:
    leaves = off(offer(AMD), "mmx")
    assert not entry(leaves, 1).edx & 1 << 23
    assert not entry(leaves, 0x8000_0001).edx & 1 << 23


XSAVE = (
    (0xD, 0, 0b1110_0111, 0xA88, 0xA88, 0),
    (0xD, 1, 0xF, 0xA88, 0, 0),
    (0xD, 2, 0x100, 0x240, 0, 0),
    (0xD, 5, 0x40, 0x440, 0, 0),
    (0xD, 6, 0x200, 0x480, 0, 0),
    (0xD, 7, 0x400, 0x680, 0, 0),
    (0xD, 11, 0x10, 0, 1, 0),
)


def with_xsave() -> tuple[CpuidEntry, ...]:
    return (*offer(INTEL), *(CpuidEntry(function, index, 1, *registers) for function, index, *registers in XSAVE))


def test_the_area_that_is_saved_shrinks_with_what_is_off() -> None:
    leaves = off(with_xsave(), "avx512f")
    assert (entry(leaves, 0xD).eax, entry(leaves, 0xD).ecx) == (0b111, 0x340)
    assert [leaf.index for leaf in leaves if leaf.function == 0xD] == [0, 1, 2, 11]
    leaves = off(with_xsave(), "avx")
    assert (entry(leaves, 0xD).eax, entry(leaves, 0xD).ecx) == (0b11, 576)


def test_without_xsave_there_is_nothing_to_save() -> None:
    leaves = off(with_xsave(), "xsave")
    assert {(e.eax, e.ebx, e.ecx, e.edx) for e in leaves if e.function == 0xD} == {(0, 0, 0, 0)}


# --- on a real KVM ----------------------------------------------------------------------------------------


@pytest.mark.kvm
def test_a_guest_does_not_see_what_is_off_on_any_vcpu() -> None:
    # What every KVM offers, and no KVM leaves to the processor to answer.
    features = [FEATURES[name] for name in ("x2apic", "lahf-lm", "nx", "kvmclock", "kvm-steal-time")]
    for names in ((), ("x2apic", "kvmclock"), ("nx", "lahf-lm", "kvm-steal-time")):
        # Without interrupt controllers, no vCPU waits to be started by another one.
        with TinyMachine(2, chips=False) as machine:
            for index, fd in enumerate(machine.fds):
                fd.set_cpuid(off(guest_cpuid(machine.kvm.supported_cpuid(), index, 2, False), *names))
                assert seen_by(machine, features, index) == {feature.name for feature in features} - set(names)
