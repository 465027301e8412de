"""The shape of the code base, checked on its syntax trees."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parent.parent / "vmm"
MODULES: Final = tuple(sorted(path for path in ROOT.rglob("*.py")))

ORDER: Final = (
    *(
        "errors",
        "guests",
        "outside",
        "facets",
        "tokens",
        "capabilities",
        "deferral",
        "decisions",
        "residents",
        "nursery_tree",
        "hostio",
        "host_fds",
        "host_sockets",
        "host_tcp",
        "host_dirs",
        "hostmem",
        "taps",
        "terminals",
        "recipe",
        "qmp_client",
        "service",
        "monitor",
        "kvm",
        "backends",
        "hw",
    ),
    *("qtest", "migration", "cpr", "phases", "roles", "process", "embedding", "cli"),
)
"""A package may import those before it. `cli` is `cli.py` and each `cli_*.py`."""

ABOVE_ALL: Final = ("__init__", "__main__")
"""These are the package's front door and see everything."""

LONGEST: Final = 800
"""Lines. Aim at 200, justify 400."""

HOST_RESOURCES: Final = (
    *("hostio.py", "host_fds.py", "host_sockets.py", "host_tcp.py", "host_dirs.py", "hostmem.py"),
    *("taps.py", "terminals.py", "kvm/"),
    "cpr/cell.py",  # makes one page of memory, for itself and its peer
    "guests/build.py",  # a program of its own
    "service.py",  # one datagram, and nothing stays open
)
"""Who may open files, sockets and memory of the host, and map them."""

MUTABLE_CALLS: Final = frozenset(
    {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict", "ChainMap"}
    | {"WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "ContextVar", "count"}
)

every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def for_types_only(node: ast.AST) -> bool:
    """Whether `node` is an `if TYPE_CHECKING:`, whose imports never happen."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker reads. Imports inside functions count: they happen too."""
    for child in ast.iter_child_nodes(node):
        if not for_types_only(child):
            yield child
            yield from nodes_at_run_time(child)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of each thing that `path` imports at run time."""
    for node in nodes_at_run_time(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: write the import with the package's name"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def uses(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each dotted name, such as `os.environ`, that `path` uses at run time."""
    for node in nodes_at_run_time(parsed(path)):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def calls(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of each thing, such as `os.open`, that `path` calls. To adopt a descriptor is not to make one."""
    for node in nodes_at_run_time(parsed(path)):
        if isinstance(node, ast.Call) and all(keyword.arg != "fileno" for keyword in node.keywords):
            yield node.lineno, ast.unparse(node.func)


def package_of(name: str) -> str:
    """The package or module of `ORDER` that `name`, the part of a module's name right below `vmm`, belongs to."""
    return "cli" if name.startswith("cli_") else name


def offences(path: Path, found: Iterator[tuple[int, str]], forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{name_of(path)}:{line}: {name}"
        for line, name in found
        if any(name == word or name.startswith(word + ".") for word in forbidden)
    ]


@every_module
def test_imports_point_one_way(path: Path) -> None:
    own = package_of(path.relative_to(ROOT).parts[0].removesuffix(".py"))
    if own in ABOVE_ALL:
        return
    assert own in ORDER, f"give {own} its place in ORDER"
    seen = ORDER[: ORDER.index(own) + 1]
    above = [
        f"{name_of(path)}:{line}: {name}"
        for line, name in imports(path)
        if name.startswith("vmm.") and package_of(name.split(".")[1]) not in (*seen, "__version__")
    ]
    assert not above


@every_module
def test_nothing_at_module_or_class_level_can_change(path: Path) -> None:
    def bodies(node: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
        for statement in node.body:
            yield statement
            if isinstance(statement, ast.ClassDef):
                yield from bodies(statement)

    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for statement in bodies(parsed(path)):
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or "__all__" in ast.unparse(statement):
            continue
        # A table that the type checker lets nobody write to.
        if isinstance(statement, ast.AnnAssign) and re.search(r"\bMapping\[", ast.unparse(statement.annotation)):
            continue
        value = statement.value
        called = ast.unparse(value.func).split(".")[-1] if isinstance(value, ast.Call) else ""
        mutable = isinstance(value, displays) or called in MUTABLE_CALLS
        assert not mutable, f"{name_of(path)}:{statement.lineno}: two machines in one process would share this"


@every_module
def test_no_function_rebinds_a_name_of_its_module(path: Path) -> None:
    found = [node.lineno for node in ast.walk(parsed(path)) if isinstance(node, ast.Global)]
    assert not found, f"{name_of(path)} says `global` in lines {found}"


@every_module
def test_no_module_is_too_long_to_be_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


@every_module
def test_concurrency_is_a_nursery_and_state_is_an_argument(path: Path) -> None:
    modules = ("asyncio", "contextvars", "ctypes", "multiprocessing", "concurrent", "threading.Thread", "_thread")
    names = ("threading.Thread", "trio.lowlevel.spawn_system_task", "lowlevel.spawn_system_task", "os.fork")
    assert not offences(path, imports(path), modules) + offences(path, calls(path), names)


@every_module
def test_only_hostio_and_kvm_open_and_map_what_the_host_has(path: Path) -> None:
    if name_of(path).startswith(HOST_RESOURCES):
        return
    sockets = (
        "socket.socket",
        "socket.socketpair",
        "socket.fromfd",
        "socket.create_connection",
        "socket.create_server",
    )
    modules = ("mmap", "fcntl", "termios", "tty", "pty", *sockets)
    names = ("os.open", "os.memfd_create", "os.openpty", "os.mkfifo", "os.eventfd", "io.open", *sockets)
    assert not offences(path, imports(path), modules) + offences(path, calls(path), names)


@every_module
def test_the_environment_is_read_at_the_front_door_only(path: Path) -> None:
    if name_of(path).startswith(("cli", "__main__.py", "guests/build.py")):
        return
    assert not offences(path, uses(path), ("os.environ", "os.getenv", "os.putenv"))


@every_module
def test_only_expected_failures_are_caught(path: Path) -> None:
    """A bug must end its nursery. Who catches to clean up raises again."""
    broad = [
        handler.lineno
        for handler in ast.walk(parsed(path))
        if isinstance(handler, ast.ExceptHandler)
        and (handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException"))
        and not any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))
    ]
    assert not broad, f"{name_of(path)} catches everything in lines {broad}"


def test_only_phase_windows_mint_tokens() -> None:
    minting = {
        name_of(path)
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Mint"
    }
    assert minting == {"nursery_tree.py"}


def test_the_order_names_each_package_once() -> None:
    assert len(set(ORDER)) == len(ORDER)
