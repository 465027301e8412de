"""Virtio devices: virtqueues, the transport, and one file a device."""
