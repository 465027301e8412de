"""What guests are told about their processors."""

from __future__ import annotations

import pytest

from tests.kvm.tiny import TinyMachine
from vmm.kvm.cpuid import CpuidEntry, cache_neighbours, guest_cpuid

ALL = 0xFFFFFFFF


def host(vendor: bytes, *extra: tuple[int, int, int, int, int, int]) -> list[CpuidEntry]:
    """A host of that vendor that supports everything in the leaves that matter here."""
    ebx, edx, ecx = (int.from_bytes(vendor[at : at + 4], "little") for at in (0, 4, 8))
    leaves = [
        (0, 0, 0x1F, ebx, ecx, edx),
        (1, 0, 0x000A0671, 0x07FF0800, ALL, ALL),
        (7, 0, 2, ALL, ALL, ALL),
        (0x0A, 0, ALL, ALL, ALL, ALL),
        (0x0B, 0, 0, 0, 0, 7),
        (0x1F, 0, 0, 0, 0, 7),
        (0x4000_0000, 0, 0x4000_0001, 1, 2, 3),
        (0x4000_0001, 0, 0x01007EFB, 0, 0, 0),
        (0x8000_0000, 0, 0x8000_0021, 0, 0, 0),
        (0x8000_0001, 0, 0, 0, ALL, ALL),
        (0x8000_0008, 0, 0x3930, 0, 0xF0FF, 0),
        *extra,
    ]
    return [CpuidEntry(function, index, 0, *registers) for function, index, *registers in leaves]


INTEL = host(
    b"GenuineIntel",
    *(
        (4, n, 0xFFFF_C000 | kind | level << 5, 1, 2, 3)
        for n, (kind, level) in enumerate([(1, 1), (2, 1), (3, 2), (3, 3)])
    ),
    (4, 4, 0, 0, 0, 0),
)
AMD = host(
    b"AuthenticAMD",
    *((0x8000_001D, n, 0x3FF_C000 | 3 | n << 5, 1, 2, 3) for n in (1, 2, 3)),
    (0x8000_001E, 0, 0xFF, 0xFFFF, 0x707, 0),
    (0x8000_000A, 0, 1, 2, 3, 4),
)
HOSTS = pytest.mark.parametrize("supported", [INTEL, AMD], ids=["Intel", "AMD"])


def leaves(
    supported: list[CpuidEntry], index: int, count: int, *, deadline: bool = True
) -> dict[tuple[int, int], CpuidEntry]:
    entries = guest_cpuid(supported, index, count, deadline)
    by_leaf = {(entry.function, entry.index): entry for entry in entries}
    assert len(by_leaf) == len(entries)
    return by_leaf


@HOSTS
def test_each_vcpu_has_its_index_for_apic_id_everywhere(supported: list[CpuidEntry]) -> None:
    for index in range(5):
        found = leaves(supported, index, 5)
        assert found[1, 0].ebx >> 24 == index
        assert {found[leaf, level].edx for leaf in (0x0B, 0x1F) for level in (0, 1, 2)} == {index}
        if supported is AMD:
            assert found[0x8000_001E, 0].eax == index
            assert found[0x8000_001E, 0].ebx == index  # core id, and one thread of it


@HOSTS
@pytest.mark.parametrize(("count", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6)])
def test_the_topology_is_one_package_of_single_threaded_cores(
    supported: list[CpuidEntry], count: int, bits: int
) -> None:
    found = leaves(supported, 0, count)
    threads, cores, end = (found[0x0B, level] for level in range(3))
    assert (threads.eax, threads.ebx, threads.ecx) == (0, 1, 0x100)
    assert (cores.eax, cores.ebx, cores.ecx) == (bits, count, 0x201)
    assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)
    assert all(entry.flags == 1 for entry in (threads, cores, end))
    assert found[1, 0].edx >> 28 & 1 == (count > 1)


def test_intel_caches_are_a_cores_own_but_the_last_is_shared() -> None:
    found = leaves(INTEL, 0, 4)
    assert [found[4, n].eax >> 14 & 0xFFF for n in range(4)] == [0, 0, 0, 3]
    assert [found[4, n].eax >> 26 for n in range(4)] == [3] * 4
    assert found[4, 4].eax == 0
    assert found[0x8000_0008, 0].ecx == 0


@pytest.mark.parametrize(
    ("nodes", "neighbours"),
    [
        ((0,), 1), ((0, 0), 2), ((0, 0, 0), 4), ((0, 1), 1), ((0, 0, 1, 1), 2), ((1, 1, 0), 2), ((0, 1, 0, 1), 1),
        ((0, 0, 0, 0, 1, 1, 1, 1), 4), ((0, 0, 0, 0, 0, 1), 1), ((0, 0, 0, 0, 1), 4), ((2, 2, 2, 2), 4),
    ],
)  # fmt: skip
def test_a_cache_is_shared_by_as_many_as_never_cuts_across_nodes(nodes: tuple[int, ...], neighbours: int) -> None:
    assert cache_neighbours(nodes) == neighbours


def test_the_last_cache_is_shared_by_neighbours_alone() -> None:
    for neighbours in (1, 2, 4):
        intel, amd = (
            {(leaf.function, leaf.index): leaf for leaf in guest_cpuid(supported, 3, 4, True, neighbours)}
            for supported in (INTEL, AMD)
        )
        assert [intel[4, n].eax >> 14 & 0xFFF for n in range(4)] == [0, 0, 0, neighbours - 1]
        assert [amd[0x8000_001D, n].eax >> 14 & 0xFFF for n in (1, 2, 3)] == [0, 0, neighbours - 1]
        assert intel[4, 3].eax >> 26 == 3  # cores in the package


def test_amd_tells_cores_and_caches_in_its_own_leaves() -> None:
    found = leaves(AMD, 0, 4)
    assert found[0x8000_0008, 0].ecx == 0x2003
    assert [found[0x8000_001D, n].eax >> 14 & 0xFFF for n in (1, 2, 3)] == [0, 0, 3]
    assert found[0x8000_001E, 0].ecx == 0
    assert found[0x8000_0001, 0].ecx & 2
    assert not leaves(AMD, 0, 1)[0x8000_0001, 0].ecx & 2
    assert found[1, 0].ebx >> 16 & 0xFF == 4


@HOSTS
def test_linux_finds_the_hypervisor_and_its_clock(supported: list[CpuidEntry]) -> None:
    found = leaves(supported, 0, 1)
    assert found[1, 0].ecx >> 31
    signature = found[0x4000_0000, 0]
    name = b"".join(word.to_bytes(4, "little") for word in (signature.ebx, signature.ecx, signature.edx))
    assert (signature.eax, name) == (0x4000_0001, b"KVMKVMKVM\0\0\0")
    assert found[0x4000_0001, 0].eax & 1 << 3, "KVM_FEATURE_CLOCKSOURCE2"


@HOSTS
def test_the_deadline_timer_comes_from_the_extension_alone(supported: list[CpuidEntry]) -> None:
    assert leaves(supported, 0, 1, deadline=True)[1, 0].ecx & 1 << 24
    assert not leaves(supported, 0, 1, deadline=False)[1, 0].ecx & 1 << 24


@HOSTS
def test_what_has_state_that_is_not_carried_over_is_taken_away(supported: list[CpuidEntry]) -> None:
    found = leaves(supported, 0, 1)
    assert not found[1, 0].ecx & (1 << 5 | 1 << 15)  # VMX, PDCM
    assert not found[0x8000_0001, 0].ecx & 1 << 2  # SVM
    assert not found[7, 0].ebx & (1 << 2 | 1 << 25)  # SGX, processor trace
    empty = found[0x0A, 0]
    assert (empty.eax, empty.ebx, empty.ecx, empty.edx) == (0, 0, 0, 0)


def test_the_register_of_intels_that_kvm_emulates_on_amd_is_not_shown_there() -> None:
    assert leaves(INTEL, 0, 1)[7, 0].edx & 1 << 29
    assert not leaves(AMD, 0, 1)[7, 0].edx & 1 << 29


@pytest.mark.kvm
def test_a_guest_sees_the_name_of_the_processor() -> None:
    with open("/proc/cpuinfo") as file:
        name = next(line.partition(": ")[2].strip() for line in file if line.startswith("model name"))
    with TinyMachine() as machine:
        machine.boot("""
 mov dword [0x8000], 0x80000002
l: mov eax, [0x8000]
 cpuid
 out 0x80, eax
 mov eax, ebx
 out 0x80, eax
 mov eax, ecx
 out 0x80, eax
 mov eax, edx
 out 0x80, eax
 inc dword [0x8000]
 cmp dword [0x8000], 0x80000005
 jne l
 out 0x99, al
 hlt
""")
        machine.run()
        shown = b"".join(word.to_bytes(4, "little") for word in machine.outs(0x80))
    assert shown.rstrip(b"\0").decode().strip() == name


@pytest.mark.kvm
def test_this_host_takes_the_leaves_of_every_one_of_four_vcpus() -> None:
    with TinyMachine(4) as m:
        m.boot("mov eax, 0x40000000\n cpuid\n out 0x80, eax\n xchg eax, ebx\n out 0x80, eax\n"
               " mov eax, 1\n cpuid\n mov eax, ecx\n out 0x80, eax\n out 0x99, al")  # fmt: skip
        m.run()
        assert m.outs(0x80)[:2] == [0x4000_0001, 0x4B4D564B]
        assert m.outs(0x80)[2] >> 31
