"""The stock Linux guest of the tests, as fixtures."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import pytest

from tests.kvmbox.guest import archive, write_archive
from tests.kvmbox.stock_linux import StockLinux

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of single tests here."""
    parser.addoption("--transcript", metavar="PATH", help="where test_qmp_only.py writes its session to")


class MakeInitramfs(Protocol):
    """Writes an initramfs that loads `modules` and runs `script`, and returns its path."""

    def __call__(
        self,
        script: str,
        modules: Iterable[str] = (),
        console: str = "ttyS0",
        programs: Mapping[str, bytes] = MappingProxyType({}),
    ) -> Path: ...


@pytest.fixture(scope="session")
def stock_linux() -> StockLinux:
    """The tests' kernel with its modules."""
    return StockLinux.cached()


@pytest.fixture(scope="session")
def linux_kernel(stock_linux: StockLinux) -> Path:
    """The kernel as a bzImage."""
    return stock_linux.vmlinuz


@pytest.fixture(scope="session")
def linux_vmlinux(stock_linux: StockLinux) -> Path:
    """The same kernel as an ELF file with a PVH entry point."""
    return stock_linux.vmlinux


@pytest.fixture(scope="session")
def initramfs(stock_linux: StockLinux, tmp_path_factory: pytest.TempPathFactory) -> MakeInitramfs:
    """Makes initramfs archives; one of the same content is written once."""
    directory = tmp_path_factory.mktemp("initramfs")

    def make(
        script: str,
        modules: Iterable[str] = (),
        console: str = "ttyS0",
        programs: Mapping[str, bytes] = MappingProxyType({}),
    ) -> Path:
        return write_archive(directory, archive(script, stock_linux, modules, console, programs))

    return make
