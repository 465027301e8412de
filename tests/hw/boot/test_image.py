from __future__ import annotations

import pytest

from tests.hw.boot.images import MIB, bzimage, elf, source
from vmm.errors import BootError
from vmm.hw.boot.image import image_kind, image_path, plan_boot

CODE = b"\xf4" * 16


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("vmlinuz", bzimage(), "bzimage"),
        ("vmlinux", elf(), "pvh"),
        ("vmlinux.bin", elf(), "pvh"),
        ("kernel.bin", bzimage(), "bzimage"),
        ("code.bin", CODE, "flat"),
        ("flat:code", CODE, "flat"),
        ("flat:vmlinux", elf(), "flat"),
    ],
)
def test_the_kind_is_read_from_the_content_and_flat_from_the_name(name: str, data: bytes, kind: str) -> None:
    assert image_kind(source(data, name)) == kind


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"\x1f\x8b" + bytes(999), "it is compressed with gzip; unpack it first"),
        (b"!<arch>\n", "it is an archive, perhaps a Debian package; the kernel is a file in it"),
        (
            CODE,
            "it is neither a bzImage nor an ELF kernel; if it is a flat real-mode image, say flat:kernel",
        ),
    ],
)
def test_what_is_no_kernel_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BootError) as caught:
        image_kind(source(data))
    assert str(caught.value) == f"Cannot boot kernel: {reason}"


def test_a_bzimage_cut_off_before_its_magic_is_no_flat_image() -> None:
    with pytest.raises(BootError, match="neither a bzImage nor an ELF kernel"):
        image_kind(source(bzimage()[:0x202]))


def test_the_prefix_is_not_part_of_the_path() -> None:
    assert (image_path("flat:/a/b"), image_path("/a/b.bin")) == ("/a/b", "/a/b.bin")


@pytest.mark.parametrize(
    ("data", "name", "kind"), [(bzimage(), "k", "bzimage"), (elf(), "k", "pvh"), (CODE, "k.bin", "flat")]
)
def test_each_kind_is_planned(data: bytes, name: str, kind: str) -> None:
    plan = plan_boot(source(data, name), None, "", 64 * MIB, 1)
    assert (plan.kind, plan.image) == (kind, name)


def test_the_same_files_give_the_same_plan() -> None:
    plans = [plan_boot(source(bzimage()), source(b"i" * 5000, "initrd"), "quiet", 64 * MIB, 2) for _ in range(2)]
    assert plans[0] == plans[1]


def test_a_machine_without_memory_above_1_mib_is_refused() -> None:
    with pytest.raises(BootError) as caught:
        plan_boot(source(elf()), None, "", MIB, 1)
    assert str(caught.value) == "Cannot boot kernel: the machine has 1 MiB of RAM, at least 2 MiB are needed"
