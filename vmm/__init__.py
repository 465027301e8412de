"""A virtual machine monitor for Linux KVM on trio, with QEMU's monitor protocol and live update."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vmm.embedding import EmbeddedMachine as EmbeddedMachine
    from vmm.embedding import machine as machine


def __getattr__(name: str) -> object:
    """Import the embedding API when it is first asked for: the command's own start needs none of it."""
    if name in ("machine", "EmbeddedMachine"):
        from vmm import embedding

        return getattr(embedding, name)
    raise AttributeError(f"module 'vmm' has no attribute {name!r}")
