from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
import trio

from tests.conftest import why_no_kvm
from tests.leaks import Held


def test_nothing_is_reported_where_nothing_was_left() -> None:
    before = Held.now()
    Path("/proc/self/status").read_text()
    assert Held.now().not_in(before) == []


def test_an_open_descriptor_is_named_with_what_it_refers_to(tmp_path: Path) -> None:
    before = Held.now()
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert Held.now().not_in(before) == [f"descriptor {fd}: {tmp_path}"]
    finally:
        os.close(fd)


def test_a_descriptor_number_that_means_another_thing_by_now_is_reported(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    before = Held.now()
    os.close(fd)
    assert os.open("/dev/null", os.O_RDONLY) == fd
    try:
        assert Held.now().not_in(before) == [f"descriptor {fd}: /dev/null"]
    finally:
        os.close(fd)


def test_a_thread_that_still_runs_is_reported() -> None:
    before = Held.now()
    let_go = threading.Event()
    thread = threading.Thread(target=let_go.wait)
    thread.start()
    try:
        (line,) = Held.now().not_in(before)
        assert line.startswith(f"thread {thread.native_id}: ")
    finally:
        let_go.set()
        thread.join()


async def test_trio_s_idle_worker_is_no_leak() -> None:
    before = Held.now()
    await trio.to_thread.run_sync(lambda: None)
    assert [line for line in Held.now().not_in(before) if line.startswith("thread")] == []


def test_a_child_process_that_was_not_waited_for_is_reported() -> None:
    before = Held.now()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        # Its command line is this process's until it has become cat; the number is what counts.
        assert any(line.startswith(f"child process {child.pid}: ") for line in Held.now().not_in(before))
    assert not any(line.startswith("child process") for line in Held.now().not_in(before))


def test_a_missing_kvm_device_is_told_in_a_sentence(tmp_path: Path) -> None:
    assert why_no_kvm(f"{tmp_path}/kvm") == (
        f"{tmp_path}/kvm is not there: load the kvm module, or turn virtualization on for this machine"
    )


@pytest.mark.kvm
def test_a_usable_kvm_device_needs_no_sentence() -> None:
    assert why_no_kvm() is None
