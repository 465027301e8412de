"""Compiles what is not Python: the KVM binding and the built-in guests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithGuests(build_py):
    """Also builds the built-in guests beside their sources, so that they are packaged."""

    def run(self) -> None:
        """Build the guests, then the package."""
        subprocess.run([sys.executable, str(Path("vmm/guests/build.py"))], check=True)
        super().run()


setup(
    cffi_modules=[f"vmm/kvm/build_ffi.py:{name}" for name in ("binding", "pages", "mapped", "faults")],
    cmdclass={"build_py": BuildWithGuests},
)
