"""The stock Linux kernel of the tests: the distribution's own image and modules, downloaded once and only unpacked.

Nothing is installed: no boot loader, no initramfs hook, no root needed. The cache holds, under `linux/<package>/`,

    vmlinuz          the bzImage as shipped
    vmlinux          the ELF file inside it, for PVH boot; made on first use
    modules/         the modules as shipped, compressed or not
    modules.txt      one line a module: its name, and its file below `modules/`
    release          what `uname -r` prints in a guest

and `linux/current`, a symbolic link to the one in use. Delete the cache directory to take a newer kernel.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

META_PACKAGES: Final = ("linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64", "linux-image-virtual")
"""Debian's and Ubuntu's kernels for virtual machines, the one wanted most first. The first that apt knows is taken."""

_PAYLOAD_PACKAGE: Final = re.compile(r"linux-(image|modules)-\d")
_ELF_MAGIC: Final = b"\x7fELF"
_PT_NOTE: Final = 4
_XEN_ELFNOTE_PHYS32_ENTRY: Final = 18


class KernelUnavailable(Exception):
    """The tests' kernel could not be had; the text says what to do."""


def cache_directory() -> Path:
    """Where the project keeps what it downloads."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trio-vmm"


@final
@attrs.frozen
class StockLinux:
    """An unpacked kernel."""

    directory: Path

    @classmethod
    def cached(cls) -> StockLinux:
        """The kernel in the cache; downloads it with apt if there is none.

        Raises:
            KernelUnavailable: apt is missing, knows no such package, or could not download it.
        """
        current = cache_directory() / "linux" / "current"
        if not (current / "modules.txt").exists():
            _download(current.parent)
        return cls(current.resolve())

    @property
    def release(self) -> str:
        """What `uname -r` prints."""
        return (self.directory / "release").read_text().strip()

    @property
    def vmlinuz(self) -> Path:
        """The bzImage."""
        return self.directory / "vmlinuz"

    @property
    def vmlinux(self) -> Path:
        """The ELF file inside the bzImage."""
        path = self.directory / "vmlinux"
        if not path.exists():
            _write_at_once(path, extract_vmlinux(self.vmlinuz.read_bytes()))
        return path

    def modules_in_order(self, names: Iterable[str]) -> list[tuple[str, bytes]]:
        """Names and contents (ELF, not compressed) of `names` and all that they depend on, in the order of loading.

        `-` and `_` are the same in a name. A module that this kernel has built in is left out.

        Raises:
            KernelUnavailable: the kernel has no such module.
        """
        files = self._module_files
        loaded: dict[str, bytes] = {}

        def load(name: str) -> None:
            name = name.replace("-", "_")
            if name in loaded:
                return
            if name not in files:
                raise KernelUnavailable(f"Linux {self.release} in {self.directory} has no module {name!r}")
            if files[name] == "built-in":
                return
            content = _decompressed((self.directory / "modules" / files[name]).read_bytes())
            for dependency in _dependencies(content):
                load(dependency)
            loaded[name] = content

        for name in names:
            load(name)
        return list(loaded.items())

    @property
    def _module_files(self) -> dict[str, str]:
        lines = (self.directory / "modules.txt").read_text().splitlines()
        return {name: file for name, _, file in (line.partition(" ") for line in lines)}


def extract_vmlinux(bzimage: bytes) -> bytes:
    """The ELF kernel inside `bzimage`.

    The setup header says where the compressed payload lies. The four bytes behind it, little endian, are the size
    of what it unpacks to, which is checked (gzip has that field in its own trailer).
    Source: Linux, Documentation/arch/x86/boot.rst, fields setup_sects, payload_offset and payload_length.

    Raises:
        KernelUnavailable: not a bzImage of protocol 2.08 or later, or compressed in a way that nothing here unpacks.
    """
    if bzimage[0x202:0x206] != b"HdrS" or struct.unpack_from("<H", bzimage, 0x206)[0] < 0x208:
        raise KernelUnavailable("the kernel image is no bzImage of boot protocol 2.08 or later")
    protected_mode = ((bzimage[0x1F1] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    payload = bzimage[protected_mode + offset : protected_mode + offset + length]
    vmlinux = _decompressed(payload)
    size = struct.unpack_from("<I", payload, length - 4)[0]
    if len(vmlinux) != size or vmlinux[:4] != _ELF_MAGIC:
        raise KernelUnavailable(f"the kernel's payload unpacks to {len(vmlinux)} bytes, not to an ELF file of {size}")
    return vmlinux


def pvh_entry(vmlinux: bytes) -> int | None:
    """The 32-bit PVH entry point that `vmlinux` declares in its notes, or None.

    Source: Xen, docs/misc/pvh.pandoc; the note is XEN_ELFNOTE_PHYS32_ENTRY of owner "Xen".
    """
    table, _, _, _, entry_size, count = struct.unpack_from("<QQIHHH", vmlinux, 32)
    for index in range(count):
        kind, _, start, _, _, size = struct.unpack_from("<IIQQQQ", vmlinux, table + index * entry_size)
        at, end = start, start + size
        while kind == _PT_NOTE and at + 12 <= end:
            name_size, value_size, note = struct.unpack_from("<III", vmlinux, at)
            name_at = at + 12
            value_at = name_at + (name_size + 3 & ~3)
            if note == _XEN_ELFNOTE_PHYS32_ENTRY and vmlinux[name_at : name_at + name_size] == b"Xen\0":
                return int.from_bytes(vmlinux[value_at : value_at + value_size], "little")
            at = value_at + (value_size + 3 & ~3)
    return None


def _decompressed(data: bytes) -> bytes:
    """Unpack the gzip, xz or zstd stream that `data` starts with, told by its magic. An ELF file is returned as it is.

    Bytes behind the stream are ignored, since a bzImage has its payload's size there.
    """
    if data[:4] == _ELF_MAGIC:
        return data
    if data[:6] == b"\xfd7zXZ\0":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data)
    if data[:2] == b"\x1f\x8b":
        return zlib.decompressobj(wbits=31).decompress(data)
    if data[:4] == b"\x28\xb5\x2f\xfd":
        zstd = shutil.which("zstd")
        if zstd is None:
            raise KernelUnavailable("the kernel is compressed with zstd, and there is no zstd command: install zstd")
        unpacked = subprocess.run([zstd, "-dcq"], input=data, capture_output=True, check=False)
        # zstd has written the whole stream by the time that it complains of the bytes behind it.
        if unpacked.stdout:
            return unpacked.stdout
    raise KernelUnavailable(f"cannot unpack what starts with {data[:6].hex(' ')}: only gzip, xz and zstd are known")


def _dependencies(module: bytes) -> list[str]:
    """The modules that `module` names in its `.modinfo` section."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [name for name in found.group(1).decode().split(",") if name] if found else []


def static_busybox() -> Path:
    """A statically linked busybox: the machine's own, or one unpacked into the cache.

    Not installed, because the package would replace the busybox that the machine's own initramfs is made with.

    Raises:
        KernelUnavailable: there is none, and apt could not download it.
    """
    own = shutil.which("busybox")
    if own is not None and _is_static(Path(own)):
        return Path(own)
    path = cache_directory() / "busybox" / "busybox"
    if not path.exists():
        with _scratch(path.parent) as scratch:
            tree = _unpacked(["busybox-static"], scratch)
            found = next(file for file in (tree / "bin/busybox", tree / "usr/bin/busybox") if file.exists())
            found.replace(path)
    return path


def _is_static(program: Path) -> bool:
    """Whether no program header of `program` asks for the dynamic loader. It names it in its first page if one does."""
    with program.open("rb") as file:
        return b"/ld-linux" not in file.read(4096)


def _download(linux: Path) -> None:
    """Put a kernel into directory `linux` and point `linux/current` at it. Safe if several processes do it at once."""
    with _scratch(linux) as scratch:
        packages = _payload_packages()
        kernel = _arranged(_unpacked(packages, scratch), scratch / "kernel")
        home = linux / packages[0]
        if not home.exists():
            try:
                kernel.rename(home)
            except OSError:  # another process was first, with the same content
                if not home.exists():
                    raise
        link = scratch / "current"
        link.symlink_to(home.name)
        link.replace(linux / "current")


def _payload_packages() -> list[str]:
    """The packages that hold image and modules: what the first known of `META_PACKAGES` depends on."""
    _apt(["apt-cache", "--version"], cwd=Path("/"))
    for refreshed in (False, True):
        for meta in META_PACKAGES:
            found: list[str] = []
            wanted = [meta]
            while wanted:
                depends = subprocess.run(
                    ["apt-cache", "depends", "--important", wanted.pop()], capture_output=True, text=True, check=False
                )
                for name in re.findall(r"^ *\|?Depends: (\S+)$", depends.stdout, re.MULTILINE):
                    # Ubuntu's image may be had signed or not; the first alternative is what apt would install.
                    if _PAYLOAD_PACKAGE.match(name) and name not in found and "unsigned" not in name:
                        found.append(name)
                        wanted.append(name)
            if found:
                return found
        if refreshed or os.geteuid() != 0:
            break
        _apt(["apt-get", "-q", "update"], cwd=Path("/"))
    raise KernelUnavailable(
        f"apt knows none of {', '.join(META_PACKAGES)}: run `apt-get update` as root, on Debian 12 or Ubuntu 24.04"
    )


@contextmanager
def _scratch(home: Path) -> Iterator[Path]:
    """A directory for the time of the block, on the file system of `home`, which is made if need be."""
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="unpack.") as name:
        yield Path(name)


def _unpacked(packages: list[str], scratch: Path) -> Path:
    """Download `packages` into `scratch` and return the file tree that they would install."""
    _apt(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *packages], cwd=scratch)
    tree = scratch / "tree"
    for package in sorted(scratch.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(tree)], check=True)
    return tree


def _apt(command: list[str], cwd: Path) -> None:
    if shutil.which(command[0]) is None:
        raise KernelUnavailable(
            f"the tests' guests come from Debian's or Ubuntu's packages, and this machine has no {command[0]}"
        )
    done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelUnavailable(f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}".rstrip())


def _arranged(tree: Path, kernel: Path) -> Path:
    """Move what the cache keeps out of the unpacked packages' `tree` into the new directory `kernel`."""
    image = next((tree / "boot").glob("vmlinuz-*"), None)
    if image is None:
        raise KernelUnavailable("the kernel package has no /boot/vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    below = next((path for path in (tree / "lib/modules", tree / "usr/lib/modules") if path.is_dir()), None)
    if below is None:
        raise KernelUnavailable(f"the packages of Linux {release} have no modules")
    kernel.mkdir()
    image.rename(kernel / "vmlinuz")
    (below / release).rename(kernel / "modules")
    (kernel / "release").write_text(release + "\n")
    lines = [
        f"{Path(line).stem.replace('-', '_')} built-in"
        for line in (kernel / "modules/modules.builtin").read_text().split()
    ]
    lines += [
        f"{path.name.split('.')[0].replace('-', '_')} {path.relative_to(kernel / 'modules')}"
        for path in (kernel / "modules").rglob("*.ko*")
    ]
    (kernel / "modules.txt").write_text("\n".join(sorted(lines)) + "\n")
    return kernel


def _write_at_once(path: Path, content: bytes) -> None:
    """Make `path` appear with all of `content`, whoever else does the same meanwhile."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
        os.fchmod(file.fileno(), 0o644)
    Path(file.name).replace(path)
