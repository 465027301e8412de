"""Options of chardevs, and of those who speak over them: serial ports, monitors, qtest."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from vmm.cli_options import split
from vmm.errors import OptionInvalid, Unsupported
from vmm.recipe import Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmm.cli_values import Kind


_SERIAL: Final = (
    "null, stdio, pty, file:PATH, pipe:PATH, unix:PATH[,server=on], "
    "tcp:[HOST]:PORT[,server=on][,nodelay=on] or chardev:ID"
)
_MONITOR: Final = "unix:PATH[,server=on][,wait=off], tcp:HOST:PORT[,server=on][,wait=off], stdio, chardev:ID or fd:N"
_QTEST: Final = "unix:PATH[,server=on|off], tcp:HOST:PORT[,server=on], stdio or chardev:ID"
_ADDRESS: Final = "ADDR:PORT[,token-file=PATH][,grant=observe|operate|migrate|admin], with ADDR 127.0.0.1 or [::1]"
_TCP: Final = "[HOST]:PORT with a decimal port, and an IPv6 address in brackets"
_INET: Final[Mapping[str, Kind]] = {
    "to": "number", "ipv4": "switch", "ipv6": "switch", "numeric": "switch", "keep-alive": "switch",
}  # fmt: skip
"""Members of a TCP address beside host and port."""


def uses_stdio(steps: Sequence[Step]) -> bool:
    """Say whether a chardev among `steps` is on standard input and output."""
    return any(step.execute == "chardev-add" and step.arguments["backend"]["type"] == "stdio" for step in steps)


def serial_steps(devices: Sequence[str]) -> tuple[list[str], list[Step]]:
    """Return the labels of the chardevs behind the serial ports, and the commands that make those that are new."""
    labels: list[str] = []
    steps: list[Step] = []
    for number, device in enumerate(device for device in devices if device != "none"):
        if device.startswith("chardev:"):
            labels.append(device.removeprefix("chardev:"))
            continue
        label = f"serial{number}"
        labels.append(label)
        steps.append(Step("chardev-add", {"id": label, "backend": _backend(device, "-serial", _SERIAL)}))
    return labels, steps


def chardev_step(text: str) -> Step:
    """Return the command that a `-chardev` stands for. Raises `OptionInvalid`, `Unsupported`."""
    kind, *parts = split(text)
    given: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        given[name] = value if equals else "on"
    label = given.pop("id", "")
    if not label:
        raise OptionInvalid(option="-chardev", value=text, wanted="complete: it needs id=NAME")
    data: dict[str, Any] = {}
    if kind == "file":
        data = {"out": _path(text, given)}
        if "append" in given:
            data["append"] = _switch(text, given, "append")
    elif kind == "pipe":
        data = {"device": _path(text, given)}
    elif kind == "socket":
        data = _socket_data(text, given)
    elif kind == "stdio" and "signal" in given:
        data = {"signal": _switch(text, given, "signal")}
    elif kind not in ("null", "pty", "stdio"):
        raise Unsupported(what="Chardev kind", name=kind, instead="there are file, null, pipe, pty, socket, stdio")
    if given:
        raise Unsupported(what=f"Option of chardev kind {kind}", name=sorted(given)[0], instead="leave it out")
    return Step("chardev-add", {"id": label, "backend": {"type": kind, "data": data}})


def qmp_steps(text: str, name: str) -> list[Step]:
    """Return the commands that a `-qmp` stands for; `name` is the monitor's, or its chardev's."""
    kind, _, rest = text.partition(":")
    if kind == "chardev" and rest:
        return [_monitor(name, chardev=rest)]
    if kind == "fd" and re.fullmatch(r"\d{1,9}", rest):
        return [_monitor(name, fd=int(rest))]
    if kind not in ("unix", "tcp", "stdio"):
        raise OptionInvalid(option="-qmp", value=text, wanted=_MONITOR)
    backend = _backend(text, "-qmp", _MONITOR)
    return [Step("chardev-add", {"id": name, "backend": backend}), _monitor(f"qmp_{name}", chardev=name)]


def mon_step(text: str, name: str) -> Step:
    """Return the command that a `-mon` stands for; `name` is the monitor's, unless it says another.

    Raises:
        OptionInvalid, Unsupported: no chardev is named, or another mode than control.
    """
    from vmm.cli_values import members  # Which most starts need not.

    given = members(text, "chardev", "-mon")
    mode, pretty, name = given.pop("mode", "control"), given.pop("pretty", "off"), given.pop("id", name)
    chardev = given.pop("chardev", "")
    if not chardev:
        raise OptionInvalid(option="-mon", value=text, wanted="complete: it needs chardev=ID")
    if mode != "control":
        raise Unsupported(what="Monitor mode", name=mode, instead="there is control, which is QMP")
    if pretty != "off" or given:
        other = "pretty" if pretty != "off" else sorted(given)[0]
        raise Unsupported(what="Option of -mon", name=other, instead="leave it out")
    return _monitor(name, chardev=chardev)


def websocket_step(text: str, name: str) -> Step:
    """Return the command that a `-websocket` stands for; `name` is the monitor's."""
    where, *parts = text.split(",")
    address, colon, port = where.rpartition(":")
    bare = address[1:-1] if address.startswith("[") and address.endswith("]") else address
    given = dict(part.partition("=")[::2] for part in parts)
    if not colon or not bare or (":" in bare and bare == address) or not {"token-file", "grant"}.issuperset(given):
        raise OptionInvalid(option="-websocket", value=text, wanted=_ADDRESS)
    addr = {"host": bare, "port": port}
    return Step("object-add", {"qom-type": "monitor-websocket", "id": name, "addr": addr, **given})


def qtest_steps(text: str, log: str | None) -> list[Step]:
    """Return the commands that `-qtest` stands for. Its socket is connected to, unless it says server=on: so is QEMU's,
    and so the libraries that drive it have it."""
    made: list[Step] = []
    label = "qtest"
    if text.startswith("chardev:") and text != "chardev:":
        label = text.removeprefix("chardev:")
    else:
        made.append(Step("chardev-add", {"id": label, "backend": _backend(text, "-qtest", _QTEST, server=False)}))
    arguments = {"qom-type": "qtest", "id": "qtest", "chardev": label}
    if log is not None:
        arguments["log"] = log
    return [*made, Step("object-add", arguments)]


def _monitor(name: str, **over: str | int) -> Step:
    return Step("object-add", {"qom-type": "monitor-qmp", "id": name, **over})


def _backend(device: str, option: str, wanted: str, *, server: bool = True) -> dict[str, Any]:
    """Turn QEMU's short form of a character device into a ChardevBackend."""
    kind, _, rest = device.removeprefix("mon:").partition(":")
    if kind in ("null", "stdio", "pty") and not rest:
        return {"type": kind, "data": {}}
    if kind == "file" and rest:
        return {"type": "file", "data": {"out": rest}}
    if kind == "pipe" and rest and option == "-serial":
        return {"type": "pipe", "data": {"device": rest}}
    if kind == "unix" and (rest or option != "-serial"):
        path, flags = _unix(rest, option, server=server)
        return _socket({"type": "unix", "data": {"path": path}}, server=flags["server"])
    if kind == "tcp" and rest:
        return _tcp(rest, option)
    raise OptionInvalid(option=option, value=device, wanted=wanted)


def _socket(address: Mapping[str, Any], *, server: bool, nodelay: bool = False) -> dict[str, Any]:
    more = {"nodelay": True} if nodelay else {}
    return {"type": "socket", "data": {"addr": address, "server": server, "wait": False, **more}}


def _tcp(rest: str, option: str) -> dict[str, Any]:
    """Turn QEMU's `tcp:HOST:PORT[,...]` into a ChardevBackend. It connects, unless it says server=on."""
    where, *parts = split(rest)
    host, colon, port = where.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not port.isdecimal() or (":" in bare and bare == host):
        raise OptionInvalid(option=option, value=rest, wanted=_TCP)
    given: dict[str, str] = {"host": bare, "port": port}
    for part in parts:
        name, equals, value = part.partition("=")
        if name in ("host", "port"):
            raise OptionInvalid(option=option, value=rest, wanted=f"possible: {name} is given twice")
        given[name] = value if equals else "on"
    if "nowait" in given:
        given["wait"] = "off" if given.pop("nowait") == "on" else "on"
    data = _socket_data(rest, given, option)
    if given:
        instead = f"leave it out; there are server, wait, nodelay, {', '.join(_INET)}"
        raise Unsupported(what="Option of tcp:", name=sorted(given)[0], instead=instead)
    return {"type": "socket", "data": data}


def _unix(rest: str, option: str, *, server: bool) -> tuple[str, dict[str, bool]]:
    path, *parts = split(rest)
    path = path.removeprefix("path=")
    flags = {"server": server, "wait": False}
    for part in parts:
        name, _, value = part.partition("=")
        if name == "nowait":
            name, value = "wait", "off"
        if name not in flags or value not in ("", "on", "off"):
            raise OptionInvalid(option=option, value=rest, wanted="PATH[,server=on|off][,wait=off]")
        flags[name] = value != "off"
    if not path:
        raise OptionInvalid(option=option, value=rest, wanted="a socket with a path")
    if flags["wait"]:
        raise OptionInvalid(
            option=option, value=rest, wanted="possible: wait=on would hold up the monitor; use wait=off"
        )
    return path, flags


def _socket_data(text: str, given: dict[str, str], option: str = "-chardev") -> dict[str, Any]:
    address: dict[str, Any]
    nodelay = False
    if "fd" in given and "path" not in given:
        fd = given.pop("fd")
        if not re.fullmatch(r"\d{1,9}", fd):
            wanted = "possible: fd is the number of a socket that this process was started with"
            raise OptionInvalid(option=option, value=text, wanted=wanted)
        address = {"type": "fd", "data": {"str": fd}}
    elif "port" in given and "path" not in given:
        address = {"type": "inet", "data": _inet(given, option)}
        nodelay = _switch(text, given, "nodelay", option)
    else:
        address = {"type": "unix", "data": {"path": _path(text, given)}}
    server = _switch(text, given, "server", option)
    if _switch(text, given, "wait", option):
        raise OptionInvalid(option=option, value=text, wanted="possible: use wait=off")
    data: dict[str, Any] = _socket(address, server=server, nodelay=nodelay)["data"]
    return data


def _inet(given: dict[str, str], option: str) -> dict[str, Any]:
    """Take the members of a TCP address out of `given`."""
    from vmm.cli_values import convert  # Which most starts need not.

    found: dict[str, Any] = {"host": given.pop("host", ""), "port": given.pop("port")}
    for name, kind in _INET.items():
        if name in given:
            found[name] = convert(given.pop(name), kind, f"{option}: {name}")
    return found


def _path(text: str, given: dict[str, str]) -> str:
    path = given.pop("path", "")
    if not path:
        wanted = "complete: it needs path=PATH" + (", port=N or fd=N" if text.startswith("socket") else "")
        raise OptionInvalid(option="-chardev", value=text, wanted=wanted)
    return path


def _switch(text: str, given: dict[str, str], name: str, option: str = "-chardev") -> bool:
    value = given.pop(name, "off")
    if value not in ("on", "off"):
        raise OptionInvalid(option=option, value=text, wanted=f"possible: {name} is on or off")
    return value == "on"
