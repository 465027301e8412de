"""README and docs/: what they say is so."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

import vmm
from tests.test_architecture import ORDER
from vmm.capabilities import KINDS
from vmm.errors import TokenError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = tuple(sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]))
README: Final = ROOT / "README.md"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fences(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def block(text: str, after: str) -> str:
    """The first fenced block of `text` that stands after `after`."""
    return fences(text[text.index(after) + len(after) :])[0][1]


# --- links and tables -------------------------------------------------------------------------------------------


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


@every_page
def test_tokens_that_are_named_exist(page: Path) -> None:
    known = {kind.wire_name for kind in KINDS}
    assert not set(re.findall(r"`(may-[a-z-]+)`", page.read_text())) - known


@pytest.fixture(scope="session")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "scripts" / "generate_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@every_page
def test_generated_tables_are_those_of_the_code(page: Path, generator: ModuleType) -> None:
    assert page.read_text() == generator.refreshed(page.read_text()), "run: make docs"


def test_every_generated_table_has_its_place(generator: ModuleType) -> None:
    used = [found["name"] for page in PAGES for found in generator.MARKED.finditer(page.read_text())]
    assert sorted(used) == sorted(generator.PARTS)


def test_a_stale_table_is_noticed(generator: ModuleType) -> None:
    fresh = (ROOT / "docs" / "tokens.md").read_text()
    stale = fresh.replace("| `may-quit` |", "| `may-leave` |", 1)
    assert stale != fresh
    assert generator.refreshed(stale) == fresh


@every_page
def test_targets_of_make_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"`make ((?:[a-z-]+ ?)+)`", page.read_text())
    named += [
        line for _, text in fences(page.read_text()) for line in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)
    ]
    assert not {target for words in named for target in words.split()} - targets


def test_the_parts_stand_in_the_order_of_imports() -> None:
    rows = re.findall(r"^\| \[?`vmm/(\w+)", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert tuple(rows) == ORDER


# --- commands -----------------------------------------------------------------------------------------------------


def trio_vmm(command: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a `trio-vmm` command line as it stands in a page, to its end."""
    words = shlex.split(command)
    assert words[0] == "trio-vmm"
    return subprocess.run(
        [sys.executable, "-m", "vmm", *words[1:], *more],
        capture_output=True, text=True, check=False, cwd=folder, env=environment(),
    )  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextmanager
def started(command: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a `trio-vmm` command line as long as the block lasts."""
    words = shlex.split(command)
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "vmm", *words[1:]],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True, cwd=folder, env=environment(),
        )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def commands() -> list[str]:
    lines = [line for _, text in fences(README.read_text()) for line in text.splitlines()]
    return [line for line in lines if line.startswith("trio-vmm ")]


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("trio-vmm run ")])
def test_options_of_the_readme_are_taken(command: str, tmp_path: Path) -> None:
    more = [] if "--print-recipe" in command else ["--print-recipe"]
    run = trio_vmm(command, tmp_path, *more)
    assert (run.returncode, run.stderr) == (0, "")


def test_the_recipe_of_the_readme_is_what_is_printed(tmp_path: Path) -> None:
    command = next(line for line in commands() if "--print-recipe" in line)
    assert trio_vmm(command, tmp_path).stdout == block(README.read_text(), f"{command}\n```\n")


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another process does and tells nobody of, for a minute at most."""
    last = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < last, "it did not come"
        time.sleep(0.01)


def beats(folder: Path) -> bool:
    """Whether the guest has printed three lines of its heartbeat."""
    file = folder / "beat.txt"
    return file.exists() and b"heartbeat 3 ok\r\n" in file.read_bytes()


def qmp_shell(folder: Path, *lines: str) -> list[str]:
    """What QEMU's shell prints for `lines`."""
    shell = Path(sys.executable).parent / "qmp-shell"
    run = subprocess.run(
        [str(shell), "qmp.sock"], input="".join(f"{line}\n" for line in lines),
        capture_output=True, text=True, check=True, cwd=folder, timeout=60,
    )  # fmt: skip
    return [reply.strip() for reply in run.stdout.split("(QEMU) ")[1:] if reply.strip()]


@pytest.mark.kvm
def test_the_tour_of_the_readme(tmp_path: Path) -> None:
    """A machine over the monitor alone, with QEMU's shell, and a live update, with the words of the page."""
    text = README.read_text()
    transcript = block(text, "```\ntrio-vmm run -qmp unix:qmp.sock\n```\n")
    asked = re.findall(r"^\(QEMU\) (.*)$", transcript, re.MULTILINE)
    replies = re.findall(r"^\{.*\}$", transcript, re.MULTILINE)
    assert len(asked) == len(replies) == 8
    with started("trio-vmm run -qmp unix:qmp.sock", tmp_path):
        until((tmp_path / "qmp.sock").exists)
        assert qmp_shell(tmp_path, *asked) == replies
        until(lambda: beats(tmp_path))
        update = trio_vmm("trio-vmm update --qmp qmp.sock", tmp_path)
        shown = re.escape(block(text, "```\ntrio-vmm update --qmp qmp.sock\n```\n"))
        assert re.fullmatch(re.sub(r"\d+", r"\\d+", shown), update.stdout), update.stdout + update.stderr
        as_json = trio_vmm("trio-vmm update --qmp qmp.sock --json", tmp_path)
        assert list(json.loads(as_json.stdout)["pause-ms"]) == [*stages_in_the_docs(), "total"]
        assert qmp_shell(tmp_path, "query-status", "quit") == [replies[-1], replies[1]]


def stages_in_the_docs() -> list[str]:
    page = (ROOT / "docs" / "live-update.md").read_text()
    return re.findall(r"^\| `(\w+)` \|", page[page.index("| stage | from, to |") :], re.MULTILINE)


@pytest.mark.kvm
def test_the_recipe_of_the_readme_runs(tmp_path: Path) -> None:
    command = next(line for line in commands() if "--print-recipe" in line)
    (tmp_path / "FILE").write_text(block(README.read_text(), f"{command}\n```\n"))
    with started("trio-vmm run --recipe FILE", tmp_path):
        until(lambda: beats(tmp_path))


@pytest.mark.kvm
def test_the_program_of_the_readme_runs(tmp_path: Path) -> None:
    (program,) = [text for language, text in fences(README.read_text()) if language == "python"]
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment()
    )
    assert (run.stdout, run.stderr) == ("machine-ready {'running': True, 'status': 'running'}\n", "")


async def test_the_error_that_the_docs_show_is_the_one_that_comes() -> None:
    shown = (ROOT / "docs" / "qmp-extensions.md").read_text()
    reply: dict[str, Any] = json.loads(re.search(r'^<- (\{"error".*\})$', shown, re.MULTILINE)[1])  # type: ignore[index]
    async with vmm.machine() as machine:
        with pytest.raises(TokenError) as caught:
            await machine.execute("cpu-model-set")
    assert reply == {"error": {"class": caught.value.qmp_class, "desc": str(caught.value)}}
