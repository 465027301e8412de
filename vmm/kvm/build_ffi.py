"""Builds `vmm.kvm._kvm`, the binding to linux/kvm.h. Run as a program it compiles beside the sources.

Nothing imports this at run time.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent

ffi = FFI()
ffi.cdef((HERE / "binding.h").read_text())
ffi.set_source(
    "vmm.kvm._kvm",
    (HERE / "binding.c").read_text(),
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-function"],
)

if __name__ == "__main__":
    ffi.compile(tmpdir=str(HERE.parent.parent), verbose=False)
