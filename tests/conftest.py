"""What all tests share: which of them this machine can run, and the check that a test left nothing behind."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.kvmbox.host import boots_stock_linux
from tests.leaks import Held

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE = "/dev/kvm"
WORKER_OUTPUT = "left_to_the_box"
LEFT_TO_THE_BOX = pytest.StashKey[int]()


def why_no_kvm(device: str = DEVICE) -> str | None:
    """The sentence that says why `device` can't be used, or None if it can."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return f"{device} is not there: load the kvm module, or turn virtualization on for this machine"
        if error.errno in (errno.EACCES, errno.EPERM):
            return f"{device} may not be opened by uid {os.getuid()}: add the user to group kvm, and log in again"
        return f"{device} cannot be opened: {error.strerror}"
    return None


def pytest_sessionstart(session: pytest.Session) -> None:
    """With VMM_REQUIRE_KVM=1, say once that there is no KVM, where each test that needs it would say it again."""
    reason = why_no_kvm()
    if reason and os.environ.get("VMM_REQUIRE_KVM") == "1":
        pytest.exit(f"VMM_REQUIRE_KVM=1, and {reason}", returncode=1)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say where the tests with stock Linux guests run."""
    stock = (
        "boots stock Linux guests" if boots_stock_linux() else "boots tiny guests only, the kvmbox tests need the box"
    )
    return [f"kvm: {why_no_kvm() or stock}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the kvmbox tests to the box where this machine's KVM can't boot their guests (`make test` runs both).

    What is marked as long comes first.
    """
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if boots_stock_linux():
        return
    elsewhere = [item for item in items if item.get_closest_marker("kvmbox")]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if not item.get_closest_marker("kvmbox")]
    config.stash[LEFT_TO_THE_BOX] = len(elsewhere)
    if hasattr(config, "workeroutput"):  # one of several processes, each of which has collected all tests
        config.workeroutput[WORKER_OUTPUT] = len(elsewhere)


class WorkerNotes:
    """Hooks of xdist, where several processes run the tests."""

    @staticmethod
    def pytest_testnodedown(node: Any) -> None:
        """Take over what a process that ends has left to the box."""
        node.config.stash[LEFT_TO_THE_BOX] = getattr(node, "workeroutput", {}).get(WORKER_OUTPUT, 0)


def pytest_configure(config: pytest.Config) -> None:
    """Know xdist's hooks where it is there: tests run one by one without it."""
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(WorkerNotes())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name what was left to the box, so that a run without it can't be taken for the whole."""
    left = config.stash.get(LEFT_TO_THE_BOX, 0)
    if left:
        terminalreporter.write_line(
            f"{left} kvmbox tests did not run here: this machine's KVM boots no stock Linux guest. "
            "Run them with `python -m tests.kvmbox`, as `make test` does.",
            yellow=True,
        )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test that needs KVM where there is none; skip it only if VMM_NO_KVM=1 says that this is so on purpose."""
    if not (item.get_closest_marker("kvm") or item.get_closest_marker("kvmbox")):
        return
    reason = why_no_kvm()
    if reason is None:
        return
    if os.environ.get("VMM_NO_KVM") == "1":
        pytest.skip(reason)
    pytest.fail(f"{reason} (VMM_NO_KVM=1 skips the tests that need it)", pytrace=False)


_LEAVING: Final = 200
"""Looks at threads that are still there: for the kernel one that was joined is, until it has been scheduled again."""


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fail the test if it leaves a descriptor, a thread or a child process behind. Looked at after trio's run ended."""
    before = Held.now()
    yield
    left = Held.now().not_in(before)
    for _ in range(_LEAVING):
        if not left or not all(what.startswith("thread ") for what in left):
            break
        time.sleep(0.01)
        left = Held.now().not_in(before)
    assert not left, "left behind: " + "; ".join(left)
