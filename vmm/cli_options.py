"""The options of `trio-vmm run`, and the recipe that they stand for.

Options are QEMU's. Each becomes a command; the command line does nothing that a client could not do. What QEMU has
and this VMM has not is refused by name by argparse; what is decided over the monitor has no option.
"""

from __future__ import annotations

import argparse
import os
import re
from typing import TYPE_CHECKING, Any, Final, NoReturn, final

from vmm.errors import OptionInvalid, Unsupported
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from collections.abc import Mapping

_SUFFIXES: Final[Mapping[str, int]] = {"": 20, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_MACHINE_OPTIONS: Final = (
    "kernel", "initrd", "append", "memory", "smp", "name", "uuid", "cpu", "accel", "machine", "serial", "no_reboot",
)  # fmt: skip
SOURCE: Final = "of the command line"


@final
class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are sentences on standard error, with exit status 1."""

    def error(self, message: str) -> NoReturn:
        """Print the error and leave."""
        self.exit(1, f"{self.prog}: {message}\n")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    add = parser.add_argument
    machine = parser.add_argument_group("machine")
    machine.add_argument("-machine", "-M", metavar="TYPE", help="machine type; there is microvm")
    machine.add_argument("-accel", metavar="NAME", help="accelerator; there is kvm")
    machine.add_argument("-cpu", metavar="MODEL", help="CPU model; there is host")
    machine.add_argument(
        "-m", dest="memory", metavar="[size=]SIZE", help="RAM, in MiB or with a suffix K, M, G, T (default 128)"
    )
    machine.add_argument("-smp", metavar="[cpus=]N", help="vCPUs, 1 to 8 (default 1)")
    machine.add_argument("-name", metavar="[guest=]NAME", help="the machine's name")
    machine.add_argument("-uuid", metavar="UUID", help="the machine's UUID")
    machine.add_argument(
        "-no-reboot", action="store_true", default=None, help="end instead of resetting when the guest reboots"
    )
    boot = parser.add_argument_group("what it boots")
    boot.add_argument(
        "-kernel", metavar="FILE", help="a bzImage, an ELF file with a PVH note, flat:FILE, or builtin:heartbeat"
    )
    boot.add_argument("-initrd", metavar="FILE", help="initial RAM disk")
    boot.add_argument("-append", metavar="TEXT", help="kernel command line")
    devices = parser.add_argument_group("devices and monitors")
    devices.add_argument(
        "-serial",
        action="append",
        metavar="DEV",
        help="null, none, stdio, pty, file:PATH, unix:PATH[,server=on], chardev:ID",
    )
    devices.add_argument(
        "-chardev",
        action="append",
        default=[],
        metavar="KIND,id=ID[,...]",
        help="null, stdio, pty, file,path=, socket,path=[,server=on]",
    )
    devices.add_argument(
        "-qmp", action="append", default=[], metavar="DEV", help="a monitor: unix:PATH, or fd:N (a connected socket)"
    )
    devices.add_argument(
        "-websocket", action="append", default=[], metavar="ADDR:PORT[,...]",
        help="a monitor at 127.0.0.1 or [::1]: [,token-file=PATH][,grant=observe|operate|migrate|admin]; port 0: any",
    )  # fmt: skip
    devices.add_argument("-display", metavar="TYPE", help="there is none")
    devices.add_argument("-nographic", action="store_true", help="accepted: there is no display to leave out")
    devices.add_argument("-nodefaults", action="store_true", help="no serial port unless one is named")
    start = parser.add_argument_group("start")
    start.add_argument("-S", dest="stopped", action="store_true", help="complete the machine and leave it standing")
    start.add_argument("-precreate", "--precreate", action="store_true", help="wait in phase precreate for commands")
    start.add_argument("-preconfig", "--preconfig", action="store_true", help="wait in phase preconfig for commands")
    start.add_argument(
        "-incoming",
        action="append",
        default=[],
        metavar="CHANNEL",
        help="await a live update; once for the main channel, once for cpr",
    )
    start.add_argument("--recipe", metavar="FILE", help="carry out the commands in FILE, after those of the options")
    start.add_argument(
        "--print-recipe", action="store_true", help="print the commands that the options stand for, and leave"
    )
    add("--x-cpr-stop-at", default="", metavar="SIDE:STEP", help=argparse.SUPPRESS)
    add("--x-cpr-limits", default="", metavar="NAME=SECONDS,...", help=argparse.SUPPRESS)


def defines_machine(options: argparse.Namespace) -> bool:
    """Say whether any option is about the machine itself."""
    return any(getattr(options, name) is not None for name in _MACHINE_OPTIONS)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the commands that `options` stand for, in the order of their phases.

    Raises:
        OptionInvalid, Unsupported: an option's value cannot be, or the option not in this start.
    """
    if options.display not in (None, "none"):
        raise Unsupported(what="Display", name=options.display, instead="there is none; use -display none or no option")
    steps: list[Step] = []
    for text in options.chardev:
        steps.append(_chardev_step(text))
    incoming = [_incoming_channel(text) for text in options.incoming if text != "defer"]
    awaits = any(channel.get("channel-type") == "cpr" for channel in incoming)
    for number, text in enumerate(options.qmp):
        # A destination's own monitors must not take the names that the source's have.
        suffix = f"@{os.getpid()}" if awaits else ""
        steps += _monitor_steps(text, f"compat_monitor{number}{suffix}")
    for number, text in enumerate(options.websocket):
        steps.append(_websocket_step(text, f"websocket{number}{f'@{os.getpid()}' if awaits else ''}"))
    if incoming:
        steps.append(Step("migrate-incoming", {"channels": incoming}))
    if not defines_machine(options):
        return Recipe(SOURCE, tuple(steps))
    if options.precreate or awaits:
        _refuse_machine_options(options, "--precreate" if options.precreate else "-incoming with a cpr channel")
    serial, serial_steps = _serial(options)
    steps += serial_steps
    steps.append(Step("machine-set", _machine_arguments(options, serial)))
    steps.append(Step("accel-set", {"accel": _first(options.accel or "kvm", "accel")}))
    if not options.preconfig:
        steps.append(Step("cpu-model-set", {"model": options.cpu or "host"}))
        steps.append(Step("finish-machine-init"))
        if not options.stopped:
            steps.append(Step("cont"))
    elif options.cpu is not None:
        wanted = "possible with --preconfig: send cpu-model-set over the monitor"
        raise OptionInvalid(option="-cpu", value=options.cpu, wanted=wanted)
    return Recipe(SOURCE, tuple(steps))


_REPLACED_BY: Final[Mapping[str, str]] = {
    "cpu": "cpu-model-set",
    "accel": "accel-set",
    "serial": "chardev-add and machine-set",
}


def _refuse_machine_options(options: argparse.Namespace, why: str) -> None:
    for name in _MACHINE_OPTIONS:
        value = getattr(options, name)
        if value is not None:
            option = {"memory": "-m", "no_reboot": "-no-reboot"}.get(name, f"-{name}")
            if why == "--precreate":
                wanted = (
                    f"possible with {why}, which admits monitors only: send {_REPLACED_BY.get(name, 'machine-set')}"
                )
            else:
                wanted = f"possible with {why}: the machine's recipe comes from the source"
            raise OptionInvalid(option=option, value=value, wanted=wanted)


def _machine_arguments(options: argparse.Namespace, serial: list[str]) -> dict[str, Any]:
    arguments: dict[str, Any] = {"type": _first(options.machine or "microvm", "type")}
    if options.name is not None:
        arguments["name"] = _first(options.name, "guest")
        if "," in options.name:
            raise OptionInvalid(option="-name", value=options.name, wanted="[guest=]NAME without further options")
    if options.uuid is not None:
        arguments["uuid"] = options.uuid
    if options.memory is not None:
        arguments["memory"] = {"size": parse_size(_first(options.memory, "size"), "-m")}
    if options.smp is not None:
        arguments["smp"] = _smp(options.smp)
    for name in ("kernel", "initrd", "append"):
        if getattr(options, name) is not None:
            arguments[name] = getattr(options, name)
    if options.no_reboot:
        arguments["reboot-action"] = "shutdown"
    arguments["serial"] = serial
    return arguments


def _smp(text: str) -> dict[str, int]:
    members: dict[str, int] = {}
    for index, part in enumerate(text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            name, value = ("cpus" if index == 0 else ""), part
        if name not in ("cpus", "cores", "sockets", "threads", "maxcpus") or not re.fullmatch(r"\d{1,9}", value):
            raise OptionInvalid(option="-smp", value=text, wanted="[cpus=]N with N a number of vCPUs from 1 to 8")
        members[name] = int(value)
    return members


def _serial(options: argparse.Namespace) -> tuple[list[str], list[Step]]:
    devices = options.serial
    if devices is None:
        devices = [] if options.nodefaults else ["stdio"]
    labels: list[str] = []
    steps: list[Step] = []
    for number, device in enumerate(device for device in devices if device != "none"):
        if device.startswith("chardev:"):
            labels.append(device.removeprefix("chardev:"))
            continue
        label = f"serial{number}"
        labels.append(label)
        steps.append(Step("chardev-add", {"id": label, "backend": _backend(device, "-serial")}))
    return labels, steps


def _backend(device: str, option: str) -> dict[str, Any]:
    """Turn QEMU's short form of a character device into a ChardevBackend."""
    kind, _, rest = device.removeprefix("mon:").partition(":")
    if kind in ("null", "stdio", "pty") and not rest:
        return {"type": kind, "data": {}}
    if kind == "file" and rest:
        return {"type": "file", "data": {"out": rest}}
    if kind == "unix" and rest:
        path, flags = _unix(rest, option)
        return _socket_backend(path, server=flags["server"])
    wanted = "null, stdio, pty, file:PATH, unix:PATH[,server=on] or chardev:ID"
    raise OptionInvalid(option=option, value=device, wanted=wanted)


def _socket_backend(path: str, *, server: bool) -> dict[str, Any]:
    address = {"type": "unix", "data": {"path": path}}
    return {"type": "socket", "data": {"addr": address, "server": server, "wait": False}}


def _unix(rest: str, option: str) -> tuple[str, dict[str, bool]]:
    path, *parts = rest.split(",")
    flags = {"server": True, "wait": False}
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


def _chardev_step(text: str) -> Step:
    kind, *parts = text.split(",")
    members: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        members[name] = value if equals else "on"
    label = members.pop("id", "")
    if not label:
        raise OptionInvalid(option="-chardev", value=text, wanted="complete: it needs id=NAME")
    data: dict[str, Any] = {}
    if kind in ("file", "socket") and not members.get("path"):
        raise OptionInvalid(option="-chardev", value=text, wanted="complete: it needs path=PATH")
    if kind == "file":
        data = {"out": members.pop("path")}
        if "append" in members:
            data["append"] = _switch(text, members, "append")
    elif kind == "socket":
        path, server = members.pop("path"), _switch(text, members, "server")
        if _switch(text, members, "wait"):
            raise OptionInvalid(option="-chardev", value=text, wanted="possible: use wait=off")
        backend = _socket_backend(path, server=server)
        data = backend["data"]
    elif kind == "stdio" and "signal" in members:
        data = {"signal": _switch(text, members, "signal")}
    elif kind not in ("null", "pty", "stdio"):
        raise Unsupported(what="Chardev kind", name=kind, instead="there are file, null, pty, socket, stdio")
    if members:
        raise Unsupported(what=f"Option of chardev kind {kind}", name=sorted(members)[0], instead="leave it out")
    return Step("chardev-add", {"id": label, "backend": {"type": kind, "data": data}})


def _switch(text: str, members: dict[str, str], name: str) -> bool:
    value = members.pop(name, "off")
    if value not in ("on", "off"):
        raise OptionInvalid(option="-chardev", value=text, wanted=f"possible: {name} is on or off")
    return value == "on"


def _monitor_steps(text: str, name: str) -> list[Step]:
    kind, _, rest = text.partition(":")
    if kind == "unix":
        path, flags = _unix(rest, "-qmp")
        backend = _socket_backend(path, server=flags["server"])
    elif kind == "chardev":
        return [Step("object-add", {"qom-type": "monitor-qmp", "id": name, "chardev": rest})]
    elif kind == "fd" and re.fullmatch(r"\d{1,9}", rest):
        return [Step("object-add", {"qom-type": "monitor-qmp", "id": name, "fd": int(rest)})]
    else:
        raise OptionInvalid(option="-qmp", value=text, wanted="unix:PATH[,server=on][,wait=off], chardev:ID or fd:N")
    return [
        Step("chardev-add", {"id": name, "backend": backend}),
        Step("object-add", {"qom-type": "monitor-qmp", "id": f"qmp_{name}", "chardev": name}),
    ]


def _websocket_step(text: str, name: str) -> Step:
    where, *parts = text.split(",")
    address, colon, port = where.rpartition(":")
    bare = address[1:-1] if address.startswith("[") and address.endswith("]") else address
    members = dict(part.partition("=")[::2] for part in parts)
    if not colon or not bare or (":" in bare and bare == address) or not {"token-file", "grant"}.issuperset(members):
        wanted = "ADDR:PORT[,token-file=PATH][,grant=observe|operate|migrate|admin], with ADDR 127.0.0.1 or [::1]"
        raise OptionInvalid(option="-websocket", value=text, wanted=wanted)
    addr = {"host": bare, "port": port}
    return Step("object-add", {"qom-type": "monitor-websocket", "id": name, "addr": addr, **members})


def _incoming_channel(text: str) -> dict[str, object]:
    from vmm.migration.channel import Channel

    return Channel.parse(text, "-incoming").to_json()


def _first(text: str, key: str) -> str:
    """Return the value of a short option whose first key may be left out."""
    return text.removeprefix(f"{key}=")


def parse_size(text: str, option: str) -> int:
    """Parse a size in bytes; a bare number is MiB, as QEMU's -m has it."""
    match = re.fullmatch(r"(\d{1,15})([bkmgt]?)", text.lower())
    if match is None:
        raise OptionInvalid(option=option, value=text, wanted="a size such as 512, 512M or 2G")
    return int(match[1]) << _SUFFIXES[match[2]]
