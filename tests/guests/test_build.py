from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import vmm.guests
from vmm.errors import BootError
from vmm.guests import build, guest_path
from vmm.hw.boot.image import image_kind, plan_boot
from vmm.hw.boot.plan import BinarySource


@pytest.mark.parametrize("name", build.GUESTS)
def test_each_guest_compiles_to_an_image_that_boots(name: str, tmp_path: Path) -> None:
    image = build.build(name, tmp_path)
    source = BinarySource.from_bytes(name, image.read_bytes())
    assert image_kind(source) == "pvh"
    plan_boot(source, None, "", 16 << 20, 1)
    assert list(tmp_path.iterdir()) == [image]


def test_the_same_sources_give_the_same_image(tmp_path: Path) -> None:
    first = build.build("chatter", tmp_path).read_bytes()
    assert build.build("chatter", tmp_path).read_bytes() == first


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    with pytest.raises(build.GuestNotBuilt) as caught:
        build.build("chatter", tmp_path, "no-such-gcc")
    assert str(caught.value) == (
        "Cannot build guest chatter: there is no no-such-gcc in PATH; install gcc with 32-bit x86 code generation"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_words_of_the_compiler_are_passed_on(tmp_path: Path) -> None:
    with pytest.raises(build.GuestNotBuilt, match=r"(?s)Cannot build guest nothing: gcc refused it:.*nothing\.c"):
        build.build("nothing", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_script_ends_in_failure_with_one_sentence() -> None:
    script = Path(build.__file__)
    done = subprocess.run(
        [sys.executable, "-I", str(script)], env={"PATH": "/nonexistent"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "Cannot build guest heartbeat: there is no gcc in PATH; install gcc with 32-bit x86 code generation\n"
    )


def test_an_unknown_guest_is_refused_with_those_there_are() -> None:
    with pytest.raises(BootError) as caught:
        guest_path("heartbleed")
    known = "heartbeat, deadline, chatter, dirtier"
    assert str(caught.value) == f"Cannot boot built-in guest 'heartbleed': there are {known}"


def test_a_guest_that_was_not_built_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vmm.guests, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(BootError) as caught:
        guest_path("chatter")
    assert str(caught.value) == (
        f"Cannot boot built-in guest 'chatter': {tmp_path}/chatter.elf is missing; run python {tmp_path}/build.py"
    )
    (tmp_path / "chatter.elf").touch()
    assert guest_path("chatter") == tmp_path / "chatter.elf"
