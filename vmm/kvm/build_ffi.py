"""Builds the modules of `vmm.kvm` that are C. Run as a program it compiles them beside the sources.

Nothing imports this at run time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cffi import FFI

HERE: Final = Path(__file__).parent

FLAGS: Final = ("-O2", "-Wall", "-Wextra", "-Wno-unused-function", "-pthread")


def _builder(module: str, source: str) -> FFI:
    """Return what builds `vmm.kvm.<module>` from `source`.c, of which Python sees what is in `source`.h."""
    builder = FFI()
    builder.cdef((HERE / f"{source}.h").read_text())
    builder.set_source(
        f"vmm.kvm.{module}", (HERE / f"{source}.c").read_text(), extra_compile_args=[*FLAGS], include_dirs=[str(HERE)]
    )
    return builder


binding = _builder("_kvm", "binding")
"""The binding to linux/kvm.h."""

pages = _builder("_pages", "pages")
"""Pages of RAM on their way: looked through, checksummed, sent and received."""

mapped = _builder("_mapped", "mapped")
"""Pages of RAM at fixed places of a file: saved and loaded."""

faults = _builder("_faults", "faults")
"""Pages of RAM that come when they are used, from a file or over a connection, or are kept as they were."""

if __name__ == "__main__":
    for builder in (binding, pages, mapped, faults):
        builder.compile(tmpdir=str(HERE.parent.parent), verbose=False)
