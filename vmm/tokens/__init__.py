"""Tokens: how they are made, narrowed and revoked, and each of their kinds. Import them from `vmm.capabilities`."""
