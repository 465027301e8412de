"""Whether this machine's own KVM can boot the stock Linux guests of these tests."""

from __future__ import annotations

import os
from pathlib import Path

from tests.kvmbox.box import IN_THE_BOX

_HARDWARE = ("kvm_intel", "kvm_amd")
"""The modules of KVM that run guests on the processor's virtualization. Built in, they show up in /sys/module too."""


def boots_stock_linux() -> bool:
    """Whether guests run on hardware here (that of the box included).

    Without it /dev/kvm may still be there, from a KVM in software whose guests run real-mode code and little else.
    TRIO_VMM_BOX=0 in the environment makes the answer no, which sends the tests to the box on any machine.
    """
    if os.environ.get(IN_THE_BOX) in ("0", "1"):
        return os.environ[IN_THE_BOX] == "1"
    return any(Path("/sys/module", module).is_dir() for module in _HARDWARE)
