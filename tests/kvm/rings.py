"""Whether this host's dirty rings work."""

from __future__ import annotations

import pytest

from vmm.errors import KvmExtensionMissing, Unsupported
from vmm.kvm.dirty_ring import require_working_rings
from vmm.kvm.system import Kvm


def skip_without_rings() -> None:
    """Skip the test where they do not."""
    kvm = Kvm.open()
    try:
        require_working_rings(kvm)
    except (Unsupported, KvmExtensionMissing) as error:
        pytest.skip(str(error))
    finally:
        kvm.close()
