"""`trio-vmm migrate`: move a running machine's guest, and watch it go."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

import attrs
import trio

from vmm.cli_progress import Bar, size
from vmm.cli_values import convert, guessed, parse_size
from vmm.cli_watch import Interrupted, Interruption, interruptible, outcome
from vmm.errors import OptionInvalid, VmmError
from vmm.qmp_client import CommandFailed, MonitorGone, qmp_session

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from vmm.qmp_client import QmpClient

_PATHS: Final = ("file", "unix")
"""Kinds of addresses that are paths: relative ones begin where the command is given, not where the machine runs."""

_WHAT: Final = "The migration"
_RUNNING: Final = "the guest goes on here"


@final
class MigrationFailed(VmmError):
    """The guest was not migrated."""

    text: ClassVar[str] = "The migration failed, and {where}: {reason}"
    where: str
    reason: str


@final
class MigrationUnclear(VmmError):
    """The machine ended, and nobody tells where its guest is."""

    text: ClassVar[str] = (
        "The machine ended while its guest was being migrated; whether the guest is at {uri} is not known"
    )
    uri: str


@final
class MigrationCalledOff(VmmError):
    """Somebody else has cancelled it."""

    text: ClassVar[str] = "The migration was cancelled over another monitor session; {where}"
    where: str


def add_migrate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `migrate`."""
    add = parser.add_argument
    add("--qmp", required=True, metavar="SOCK", help="the machine's QMP socket")
    add("--bandwidth", metavar="SIZE", help="at most so much per second: a number of MiB, or with a suffix K, M, G, T")
    add("--downtime", metavar="MS", help="the longest pause of the guest that is aimed at, in milliseconds")
    add("--set", action="append", default=[], metavar="PARAMETER=VALUE",
        help="a parameter of query-migrate-parameters, for this migration alone; may be repeated")  # fmt: skip
    add("--capability", action="append", default=[], metavar="NAME",
        help="a capability of query-migrate-capabilities, for this migration alone; may be repeated")  # fmt: skip
    add("--tls", metavar="CREDS", help="the machine's tls-creds object that the connection is secured with")
    add("--json", action="store_true", help="no progress; print what query-migrate says at the end")
    add("uri", metavar="URI", help="where to, as with the command migrate: tcp:HOST:PORT, unix:PATH, file:PATH, ...")


def migrate_machine(options: argparse.Namespace) -> int:
    """Migrate as `options` say, and return the exit status: 0 only if the guest has gone."""
    arguments = arguments_of(options)
    interruption = Interruption()
    try:
        with Bar.on_stderr(wanted=not options.json) as bar:
            result: Outcome = trio.run(_watched, options.qmp, arguments, interruption, bar)
    except Interrupted as error:
        return interruption.told(error)
    if options.json:
        print(json.dumps(result.info))
    match result.info["status"]:
        case "completed":
            if not options.json:
                print(report(arguments["uri"], result.info))
            return 0
        case "cancelled" if interruption.came:
            return interruption.told(Interrupted(what=_WHAT, outcome=result.where))
        case "cancelled":
            raise MigrationCalledOff(where=result.where)
    raise MigrationFailed(where=result.where, reason=result.info.get("error-desc", "it is not told why"))


async def _watched(monitor: str, arguments: Mapping[str, Any], interruption: Interruption, bar: Bar) -> Outcome:
    async def work() -> Outcome:
        return await migrate(monitor, arguments, interruption, bar)

    return await interruptible(_WHAT, work, interruption)


@final
@attrs.frozen
class Outcome:
    """How a migration ended."""

    info: dict[str, Any]
    """What `query-migrate` says."""
    where: str
    """In words, where the guest is if it has not gone."""


async def migrate(monitor: str, arguments: Mapping[str, Any], interruption: Interruption, bar: Bar) -> Outcome:
    """Migrate the guest of the machine whose monitor is at `monitor`, and show how far it is.

    Args:
        arguments: those of `migrate`.

    Raises:
        MigrationFailed, MigrationUnclear, VmmError: it has not begun, or the machine has ended.
    """
    async with qmp_session(monitor) as client:
        try:
            try:
                await client.execute("migrate", **arguments)
            except CommandFailed as error:
                raise MigrationFailed(where=await _where(client), reason=error.desc) from error
            info = await outcome(client, interruption, bar)
            return Outcome(info, _RUNNING if info["status"] == "completed" else await _where(client))
        except (CommandFailed, MonitorGone) as error:  # of which the first may come just before the other
            raise MigrationUnclear(uri=arguments["uri"]) from error


async def _where(client: QmpClient) -> str:
    try:
        status = (await client.execute("query-status"))["status"]
    except CommandFailed:  # its phase has ended just now, or there is no guest
        return "the guest stays here"
    return _RUNNING if status == "running" else f"the guest stays here, in run state {status}"


def report(uri: str, info: Mapping[str, Any]) -> str:
    """Say what has been done, for people."""
    ram, seconds = info["ram"], info["total-time"] / 1000
    speed = f", {size(round(ram['transferred'] / seconds))}/s" if seconds else ""
    passes = ram["dirty-sync-count"]
    over = f" in {passes} {'passes' if passes != 1 else 'pass'}" if passes else ""
    return (
        f"migrated: to {uri}, {size(ram['transferred'])} in {seconds:.1f} s{speed}{over}\n"
        f"the guest's pause: {info['downtime']} ms"
    )


# --- options ----------------------------------------------------------------------------------------------------


def arguments_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `migrate` that `options` stand for. Raises `OptionInvalid`."""
    parameters = dict(_parameter(text) for text in options.set)
    if options.bandwidth is not None:
        parameters["max-bandwidth"] = parse_size(options.bandwidth, "--bandwidth")
    if options.downtime is not None:
        if not re.fullmatch(r"\d{1,9}", options.downtime):
            raise OptionInvalid(option="--downtime", value=options.downtime, wanted="a number of milliseconds")
        parameters["downtime-limit"] = int(options.downtime)
    if options.tls is not None:
        parameters["tls-creds"] = options.tls
    # The event tells at once when it is over.
    capabilities = [{"capability": name, "state": True} for name in dict.fromkeys(("events", *options.capability))]
    more = {"parameters": parameters} if parameters else {}
    return {"uri": _from_here(options.uri), "capabilities": capabilities, **more}


def _parameter(text: str) -> tuple[str, Any]:
    """Return the name and the value that `--set` gives."""
    from vmm.migration.parameter_table import PARAMETERS  # only this option needs it

    name, equals, value = text.partition("=")
    if not name or not equals:
        raise OptionInvalid(option="--set", value=text, wanted="of the form PARAMETER=VALUE")
    known = next((parameter for parameter in PARAMETERS if parameter.name == name), None)
    option = f"--set {name}"
    if known is None:  # perhaps known to the machine, whose program may be another one
        return name, guessed(value, ())
    match known.kind:
        case "bool":
            return name, convert(value, "switch", option)
        case "int" if known.unit.startswith("bytes") and not value.isdigit():
            return name, parse_size(value, option)
        case "int":
            return name, convert(value, "number", option)
        case "str":
            return name, value
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise OptionInvalid(option=option, value=value, wanted=f"JSON ({error})") from error


def _from_here(uri: str) -> str:
    kind, colon, path = uri.partition(":")
    if kind not in _PATHS or not colon or not path or path.startswith("/"):
        return uri
    return f"{kind}:{os.path.join(os.getcwd(), path)}"
