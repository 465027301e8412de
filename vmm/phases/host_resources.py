"""What of the host a recipe names, and what it is called: the names that `-allow-resource` and descriptors have.

A resource's name is that of its descriptors, without the last part where it has several: `kernel`, `initrd`,
`chardev/serial0`, `monitor/ws0`, `netdev/n0`. A recipe that came from elsewhere may have what its sender gave
descriptors for, and what the operator allowed by name; nothing else of this host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import attrs

from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

BUILTIN: Final = "builtin:"
"""How the name of a kernel begins that is part of this program: no resource of the host."""

NO_LOG: Final = "none"
"""What a qtest object has for the path of its log if it logs nothing."""

_CHARDEVS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "file": ("out", ("backend", "data", "out")),
    "pipe": ("", ("backend", "data", "device")),
    "socket": ("listener", ("backend", "data", "addr", "data", "path")),
    "pty": ("master", ()),
    "stdio": ("", ()),
}
"""Kind of a chardev -> what its one descriptor is called (empty where there are more), and where its arguments have
the path (empty where there is none). The others have no resource."""

_OBJECTS: Final[Mapping[str, tuple[str, str, tuple[str, ...]]]] = {
    "rng-random": ("object", "file", ("filename",)),
    "memory-backend-file": ("object", "memory", ("mem-path",)),
    "memory-backend-memfd": ("object", "memory", ()),
    "monitor-websocket": ("monitor", "", ()),
    "qtest": ("monitor", "log", ("log",)),
    "tls-creds-x509": ("object", "", ("dir",)),
    "snapshot-directory": ("object", "directory", ("path",)),
}
"""Type of an object -> how the name of its resource begins, and the same."""


@final
@attrs.frozen
class HostResource:
    """A resource that one command names."""

    name: str
    path: tuple[str | int, ...] = ()
    """Where in the command's arguments its path is; empty where there is none."""
    descriptor: str = ""
    """Name of its descriptor, if it has one alone."""
    needed: bool = True
    """Whether the machine cannot be without. The client of a socket may have hung up."""
    private: bool = False
    """Whether it is made here, of nothing that others could have: nobody need allow it. Where it goes over in a live
    update it is claimed all the same."""


def resources_of(step: Step) -> Iterator[HostResource]:
    """Yield the host resources that `step` names. Its arguments have been checked for their form."""
    arguments = step.arguments
    if step.execute == "machine-set":
        for member in ("kernel", "initrd"):
            value = arguments.get(member)
            if isinstance(value, str) and not (member == "kernel" and value.startswith(BUILTIN)):
                yield HostResource(member, (member,), member)
        for number, table in enumerate(arguments.get("acpi-tables") or ()):
            if table.get("file") is not None:
                name = f"acpi-table.{number}"
                yield HostResource(name, ("acpi-tables", number, "file"), name)
    elif step.execute == "chardev-add":
        backend, name = arguments["backend"], f"chardev/{arguments['id']}"
        if backend["type"] in _CHARDEVS:
            last, path = _CHARDEVS[backend["type"]]
            is_client = backend["type"] == "socket" and backend["data"].get("server") is False
            last = "client-1" if is_client else last
            if backend["type"] == "socket" and backend["data"]["addr"]["type"] != "unix":
                path = ()  # it has an address, or was open already where it comes from
            yield HostResource(name, path, f"{name}/{last}" if last else "", needed=not is_client)
    elif step.execute == "netdev_add":
        name = f"netdev/{arguments['id']}"
        yield HostResource(name, ("ifname",), name)
    elif step.execute == "object-add" and arguments["qom-type"] in _OBJECTS:
        if arguments["qom-type"] == "qtest" and arguments.get("log", NO_LOG) == NO_LOG:
            return
        prefix, last, path = _OBJECTS[arguments["qom-type"]]
        name = f"{prefix}/{arguments['id']}"
        private = arguments["qom-type"] == "memory-backend-memfd"
        yield HostResource(name, path, f"{name}/{last}" if last else "", private=private)


def socket_paths(recipe: Recipe) -> dict[str, str]:
    """Return the path of each unix socket on which the machine listens, by the name of its descriptor."""
    return {
        f"chardev/{step.arguments['id']}/listener": step.arguments["backend"]["data"]["addr"]["data"]["path"]
        for step in recipe
        if step.execute == "chardev-add"
        and step.arguments["backend"]["type"] == "socket"
        and step.arguments["backend"]["data"].get("server", True)
        and step.arguments["backend"]["data"]["addr"]["type"] == "unix"
    }


def is_of(descriptor: str, resources: Collection[str]) -> bool:
    """Say whether `descriptor` is a name of a descriptor of one of `resources`: that, or with one part more."""
    return descriptor in resources or descriptor.rpartition("/")[0] in resources


def owners(descriptors: Iterable[str]) -> frozenset[str]:
    """Return what resources `descriptors` may be of. There can be thousands of them."""
    names = frozenset(descriptors)
    return names | {name.rpartition("/")[0] for name in names}


def unused(descriptors: Iterable[str], here: frozenset[str]) -> list[str]:
    """Return the names among `descriptors` that belong to resources which this host opens itself."""
    return [name for name in descriptors if is_of(name, here)] if here else []


def missing(recipe: Recipe, sent: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """Return the resources that `recipe` needs, that came with no descriptor of `sent`, and that nobody `allowed`."""
    at_hand = owners(sent) | frozenset(allowed)
    return [
        resource.name
        for step in recipe
        for resource in resources_of(step)
        if resource.needed and not resource.private and resource.name not in at_hand
    ]


def private(recipe: Recipe) -> frozenset[str]:
    """Return the names of the resources of `recipe` that are made wherever it is carried out."""
    return frozenset(resource.name for step in recipe for resource in resources_of(step) if resource.private)


def redirected(recipe: Recipe, paths: Mapping[str, str]) -> Recipe:
    """Return `recipe` with the path of each resource in `paths` replaced; an empty path leaves it as it is."""
    return Recipe(recipe.source, tuple(_redirected(step, paths) for step in recipe))


def _redirected(step: Step, paths: Mapping[str, str]) -> Step:
    arguments: Any = dict(step.arguments)
    for resource in resources_of(step):
        path = paths.get(resource.name)
        if path and resource.path:
            arguments = _with(arguments, resource.path, path)
    return Step(step.execute, arguments)


def _with(value: Any, at: Sequence[str | int], new: str) -> Any:
    """Return a copy of `value` in which `at` leads to `new`."""
    if not at:
        return new
    first, *rest = at
    if isinstance(value, list):
        return [_with(item, rest, new) if number == first else item for number, item in enumerate(value)]
    return {**value, first: _with(value.get(first), rest, new)}
