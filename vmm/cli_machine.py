"""Options about the machine itself: what they say in `machine-set`, `accel-set`, `cpu-model-set` and its like."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from vmm.cli_values import convert, first, guessed, json_object, members, parse_size
from vmm.errors import OptionInvalid, Unsupported
from vmm.recipe import Step

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from vmm.cli_values import Kind

_BOOT: Final[Mapping[str, Kind]] = {
    "menu": "switch", "strict": "switch", "splash-time": "number", "reboot-timeout": "number",
}  # fmt: skip
_ACPI: Final[Mapping[str, Kind]] = {"rev": "number", "oem_rev": "number", "asl_compiler_rev": "number"}
_SMBIOS: Final[Mapping[str, Kind]] = {
    "type": "number", "uefi": "switch", "max-speed": "number", "current-speed": "number", "speed": "number",
    "processor-id": "number", "processor-family": "number",
}  # fmt: skip
_SMBIOS_LISTS: Final = frozenset({"value", "path"})
_NUMA: Final[Mapping[str, Mapping[str, Kind]]] = {
    "node": {"nodeid": "number", "cpus": "ranges", "mem": "size", "initiator": "number"},
    "dist": {"src": "number", "dst": "number", "val": "number"},
    "cpu": {"node-id": "number", "socket-id": "number", "core-id": "number", "thread-id": "number"},
}
_TEXT: Final = frozenset(
    {"driver", "id", "bus", "qom-type", "chardev", "log", "filename", "rng", "host", "port", "token-file", "grant"}
    | {"drive", "netdev", "serial", "mac", "name", "mem-path", "path", "dir"}
)
"""Members of `-device` and `-object` that are text even where they look like numbers or switches."""

_SIZES: Final = frozenset({"size", "hugetlbsize"})
"""Members of `-object` that are sizes in bytes, with a suffix or without."""
_TEXT_OF_NETDEV: Final = frozenset({"type", "id", "ifname", "fd", "fds", "script", "downscript", "br", "helper"})
"""Those of `-netdev`."""


def machine_step(options: argparse.Namespace, serial: Sequence[str]) -> Step:
    """Return the `machine-set` that `options` stand for. Raises `OptionInvalid`, `Unsupported`."""
    arguments: dict[str, Any] = {"type": _machine(options)["type"]}
    if options.name is not None:
        arguments["name"] = first(options.name, "guest")
        if "," in options.name:
            raise OptionInvalid(option="-name", value=options.name, wanted="[guest=]NAME without further options")
    if options.uuid is not None:
        arguments["uuid"] = options.uuid
    if "memory-backend" in _machine(options):
        arguments["memory-backend"] = _machine(options)["memory-backend"]
    if options.memory is not None:
        arguments["memory"] = {"size": parse_size(first(options.memory, "size"), "-m")}
    if options.smp is not None:
        arguments["smp"] = _smp(options.smp)
    for name in ("kernel", "initrd", "append"):
        if getattr(options, name) is not None:
            arguments[name] = getattr(options, name)
    if options.boot is not None:
        arguments["boot"] = members(options.boot, "order", "-boot", _BOOT)
    if options.rtc is not None:
        arguments["rtc"] = members(options.rtc, "base", "-rtc")
    for name, values in _tables(options).items():
        if values:
            arguments[name] = values
    if options.no_reboot:
        arguments["reboot-action"] = "shutdown"
    arguments["serial"] = list(serial)
    return Step("machine-set", arguments)


def accel_step(options: argparse.Namespace) -> Step:
    """Return the `accel-set` that `-accel`, or `-machine accel=`, stands for."""
    named = _machine(options).get("accel")
    if options.accel is None:
        return Step("accel-set", {"accel": named or "kvm"})
    if named is not None:
        raise OptionInvalid(option="-accel", value=options.accel, wanted="possible beside -machine accel=; give one")
    given = members(options.accel, "accel", "-accel")
    accel = given.pop("accel", "")
    ring = given.pop("dirty-ring-size", None)
    if given:
        raise Unsupported(what="Option of -accel", name=sorted(given)[0], instead="leave it out")
    rings = {} if ring is None else {"dirty-ring-size": convert(ring, "number", "-accel dirty-ring-size")}
    return Step("accel-set", {"accel": accel, **rings})


def names_accel(options: argparse.Namespace) -> bool:
    """Say whether an option chooses the accelerator."""
    return options.accel is not None or "accel" in _machine(options)


def numa_steps(texts: Sequence[str]) -> list[Step]:
    """Return the commands that `-numa` stands for."""
    steps = []
    for text in texts:
        kind = first(text.partition(",")[0], "type")
        lists = ("cpus",) if kind == "node" else ()
        steps.append(Step("set-numa-node", members(text, "type", "-numa", _NUMA.get(kind), lists=lists)))
    return steps


def cpu_step(text: str | None) -> Step:
    """Return the command that `-cpu` stands for: `MODEL[,FEATURE=on|off][,+FEATURE][,-FEATURE]`; None: the host's."""
    if text is None:
        return Step("cpu-model-set", {"model": "host"})
    model, *features = text.split(",")
    props: dict[str, bool] = {}
    for feature in features:
        name, equals, value = feature.partition("=")
        if not equals and feature[:1] in ("+", "-"):
            name, value = feature[1:], "on" if feature[0] == "+" else "off"
        elif not equals:
            value = "on"
        if value not in ("on", "off") or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            wanted = "MODEL, then features as FEATURE=on, FEATURE=off, +FEATURE or -FEATURE"
            raise OptionInvalid(option="-cpu", value=text, wanted=wanted)
        props[name] = value == "on"
    return Step("cpu-model-set", {"model": model, "props": props} if props else {"model": model})


def device_step(text: str) -> Step:
    """Return the command that a `-device` stands for: JSON, or `DRIVER[,id=ID][,bus=BUS][,PROPERTY=VALUE]`."""
    return Step("device_add", _described(text, "driver", "-device"))


def object_step(text: str) -> Step:
    """Return the command that an `-object` stands for: JSON, or `TYPE,id=ID[,PROPERTY=VALUE]`."""
    arguments = _described(text, "qom-type", "-object")
    for name in _SIZES & arguments.keys():
        if isinstance(arguments[name], str):
            arguments[name] = _bytes(arguments[name], f"-object: {name}")
    return Step("object-add", arguments)


def _bytes(text: str, option: str) -> int:
    """Parse a size of which a bare number is bytes, as QEMU's properties have it."""
    return parse_size(f"{text}B" if text.isdecimal() else text, option)


def netdev_step(text: str) -> Step:
    """Return the command that a `-netdev` stands for: JSON, or `TYPE,id=ID[,MEMBER=VALUE]`."""
    return Step("netdev_add", _described(text, "type", "-netdev", _TEXT_OF_NETDEV))


def _described(text: str, implied: str, option: str, plain: frozenset[str] = _TEXT) -> dict[str, Any]:
    if text.startswith("{"):
        return json_object(text, option)
    given: dict[str, Any] = guessed(members(text, implied, option, nested=True), plain)
    return given


def _machine(options: argparse.Namespace) -> dict[str, str]:
    """Return type, accel and memory-backend of `-machine`."""
    given = members(options.machine or "microvm", "type", "-machine")
    given.setdefault("type", "microvm")
    # A machine's memory is shared with a successor always.
    if given.pop("aux-ram-share", "on") != "on":
        raise Unsupported(what="Option of -machine", name="aux-ram-share=off", instead="it is on, always")
    other = sorted(given.keys() - {"type", "accel", "memory-backend"})
    if other:
        instead = "leave it out; there are type, accel and memory-backend"
        raise Unsupported(what="Option of -machine", name=other[0], instead=instead)
    return given


def _smp(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for index, part in enumerate(text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            name, value = ("cpus" if index == 0 else ""), part
        if name not in ("cpus", "cores", "sockets", "threads", "maxcpus") or not re.fullmatch(r"\d{1,9}", value):
            raise OptionInvalid(option="-smp", value=text, wanted="[cpus=]N with N a number of vCPUs from 1 to 8")
        found[name] = int(value)
    return found


def _tables(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return what firmware and guest find beside the machine itself."""
    return {
        "smbios": [
            members(text, "file", "-smbios", _SMBIOS, lists=() if text.startswith("file=") else _SMBIOS_LISTS)
            for text in options.smbios
        ],
        "acpi-tables": [members(text, "file", "-acpitable", _ACPI) for text in options.acpitable],
        "fw-cfg": [members(text, "name", "-fw_cfg") for text in options.fw_cfg],
        "option-roms": [
            members(text, "romfile", "-option-rom", {"bootindex": "number"}) for text in options.option_rom
        ],
    }
