"""From the options of `trio-vmm run` to the recipe that they stand for."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final, Literal

from vmm.cli_options import ABSENT, OPTIONS, defines_machine, given
from vmm.errors import OptionInvalid, Unsupported
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

SOURCE: Final = "of the command line"

_FD: Final = re.compile(r"fd:\d{1,9}")
_TALKERS: Final = ("monitor-qmp", "monitor-websocket", "qtest")
"""Types of objects that are there before a machine, because somebody defines it through them."""


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the commands that `options` stand for, in the order of their phases.

    Raises:
        OptionInvalid, Unsupported: an option's value cannot be, or the option not in this start.
    """
    for name in ABSENT:
        value = getattr(options, name.removeprefix("-"))
        if value not in (None, "none"):
            what = name.removeprefix("-").capitalize()
            raise Unsupported(what=what, name=value, instead=f"there is none; use {name} none or no option")
    incoming = [_incoming_channel(text) for text in options.incoming if text != "defer"]
    awaits = any(channel.get("channel-type") == "cpr" for channel in incoming)
    deferred = "defer" in options.incoming
    if deferred and incoming:
        wanted = "possible beside a channel: name all of them by -incoming, or all by migrate-incoming"
        raise OptionInvalid(option="-incoming", value="defer", wanted=wanted)
    if options.precreate:
        _refuse_with_precreate(options)
    if awaits:
        _refuse_with_cpr(options)
    steps = _talking(options, f"@{os.getpid()}" if awaits else "")
    steps += _allowed_resources(options.allow_resource)
    if options.allow_difference:
        steps.append(Step("x-allow-difference", {"names": options.allow_difference}))
    if incoming:
        steps.append(Step("migrate-incoming", {"channels": incoming}))
    if awaits:
        steps += _overrides(options)
    elif defines_machine(options):
        steps += _machine(options, steps, "deferred" if deferred else "bound" if incoming else "")
    elif options.loadvm is not None:
        # Without a machine to load it into, what was saved brings its own.
        address = {"transport": "file", "filename": options.loadvm, "offset": 0}
        steps.append(Step("migrate-incoming", {"channels": [{"channel-type": "main", "addr": address}]}))
    return Recipe(SOURCE, tuple(steps))


def has_monitor(recipe: Recipe) -> bool:
    """Say whether somebody can go on with what `recipe` makes."""
    return any(step.execute == "object-add" and step.arguments.get("qom-type") in _TALKERS for step in recipe)


def _allowed_resources(texts: Sequence[str]) -> list[Step]:
    """Return the commands that `-allow-resource` stands for. Raises `OptionInvalid`."""
    steps: list[Step] = []
    named: set[str] = set()
    for text in texts:
        name, equals, where = text.partition("=")
        if not name or bool(equals) != bool(where) or (where.startswith("fd:") and not _FD.fullmatch(where)):
            raise OptionInvalid(option="-allow-resource", value=text, wanted="of the form NAME, NAME=PATH or NAME=fd:N")
        if name in named:
            raise OptionInvalid(option="-allow-resource", value=text, wanted=f"possible: {name} is named twice")
        named.add(name)
        member = {"fd": int(where[3:])} if where.startswith("fd:") else {"path": where} if where else {}
        steps.append(Step("x-allow-resource", {"name": name, **member}))
    return steps


def require_precreate(recipe: Recipe, path: str) -> None:
    """Refuse a recipe file that goes further than phase precreate. Raises `OptionInvalid`."""
    from vmm.phases.catalog import rank

    beyond = next((step for step in recipe if rank(step) >= rank(Step("machine-set"))), None)
    if beyond is not None:
        wanted = f"possible with --precreate: it has {beyond.execute}; send that over the monitor"
        raise OptionInvalid(option="--recipe", value=path, wanted=wanted)


def _talking(options: argparse.Namespace, suffix: str) -> list[Step]:
    """Return what makes chardevs, monitors and other objects.

    Args:
        suffix: ends the names of a destination's own, which must not take those that the source's have.
    """
    from vmm.cli_monitors import chardev_step, mon_step, qmp_steps, qtest_steps, websocket_step

    steps = [chardev_step(text) for text in options.chardev]
    for number, text in enumerate(options.qmp):
        steps += qmp_steps(text, f"compat_monitor{number}{suffix}")
    for number, text in enumerate(options.mon):
        steps.append(mon_step(text, f"mon{number}{suffix}"))
    for number, text in enumerate(options.websocket):
        steps.append(websocket_step(text, f"websocket{number}{suffix}"))
    if options.qtest is not None:
        steps += qtest_steps(options.qtest, options.qtest_log)
    elif options.qtest_log is not None:
        raise OptionInvalid(option="-qtest-log", value=options.qtest_log, wanted="possible without -qtest")
    if options.object:
        from vmm.cli_machine import object_step

        steps += [object_step(text) for text in options.object]
    return steps


def _machine(
    options: argparse.Namespace, talking: list[Step], incoming: Literal["", "bound", "deferred"]
) -> list[Step]:
    """Return what builds the machine, as far as it goes by itself.

    A guest that comes in, or is loaded, runs by itself if it ran where it was, unless there is a `-S`.
    """
    from vmm.cli_machine import accel_step, cpu_step, device_step, machine_step, netdev_step, numa_steps
    from vmm.cli_monitors import serial_steps, uses_stdio

    devices = options.serial
    if not devices and not options.nodefaults and not uses_stdio(talking):
        devices = ["stdio"]
    serial, steps = serial_steps(devices)
    steps += [machine_step(options, serial), accel_step(options), *numa_steps(options.numa)]
    if options.preconfig and options.cpu is not None:
        wanted = "possible with --preconfig: send cpu-model-set over the monitor"
        raise OptionInvalid(option="-cpu", value=options.cpu, wanted=wanted)
    if options.preconfig and options.loadvm is not None:
        wanted = "possible with --preconfig: send loadvm over the monitor"
        raise OptionInvalid(option="-loadvm", value=options.loadvm, wanted=wanted)
    steps += [netdev_step(text) for text in options.netdev]
    if not options.preconfig:
        steps.append(cpu_step(options.cpu))
    steps += [device_step(text) for text in options.device]
    if options.preconfig or incoming == "deferred":
        return steps
    if options.loadvm is not None:
        return [*steps, Step("loadvm", {"name": options.loadvm})]
    steps.append(Step("finish-machine-init"))
    if not (options.stopped or incoming):
        steps.append(Step("cont"))
    return steps


def _overrides(options: argparse.Namespace) -> list[Step]:
    """Return what is to be otherwise in the machine that comes: what was said and nothing more."""
    from vmm.cli_machine import accel_step, cpu_step, device_step, machine_step, names_accel, netdev_step, numa_steps

    stated = machine_step(options, ()).arguments.items()
    unsaid = {"serial"} | (set() if options.machine is not None else {"type"})
    machine = {member: value for member, value in stated if member not in unsaid}
    steps = [Step("machine-set", machine)] if machine else []
    if names_accel(options):
        steps.append(accel_step(options))
    steps += numa_steps(options.numa)
    steps += [netdev_step(text) for text in options.netdev]
    if options.cpu is not None:
        steps.append(cpu_step(options.cpu))
    return steps + [device_step(text) for text in options.device]


def _refuse_with_precreate(options: argparse.Namespace) -> None:
    """Refuse what a client says over the monitor in this start; the text names the command that says it."""
    for option in OPTIONS:
        values = getattr(options, option.attribute)
        if option.admitted or not given(options, option):
            continue
        if option.name == "-object":
            values = [text for text in values if _type_of(text) not in _TALKERS]
            if not values:
                continue
        wanted = f"possible with --precreate, which admits monitors only: send {option.command}"
        raise OptionInvalid(option=option.name, value=values, wanted=wanted)


def _refuse_with_cpr(options: argparse.Namespace) -> None:
    for name, instead in _NO_OVERRIDES.items():
        value = getattr(options, name.lstrip("-"))
        if value:
            wanted = f"possible with -incoming with a cpr channel: {instead}"
            raise OptionInvalid(option=name, value=value, wanted=wanted)


_NO_OVERRIDES: Final[Mapping[str, str]] = {
    "-serial": (
        "the serial ports come from the source; send chardev-add with the id of one to replace what it writes to"
    ),
    "-loadvm": "the machine's state comes from the source",
}


def _type_of(text: str) -> object:
    from vmm.cli_machine import object_step

    arguments: Mapping[str, object] = object_step(text).arguments
    return arguments.get("qom-type")


def _incoming_channel(text: str) -> dict[str, object]:
    from vmm.migration.channel import Channel

    return Channel.parse(text, "-incoming").to_json()
