"""A virtual machine monitor for Linux KVM on trio, with QEMU's monitor protocol and live update."""

__version__ = "0.1.0"
