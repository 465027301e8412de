"""The options of `trio-vmm run`: one table, from which come the parser, what `--precreate` refuses, and the manual.

Options are QEMU's. Each stands for a command (`vmm.cli_recipe`); the command line does nothing that a client could not
do. What QEMU has and this VMM has not is refused by name; what is decided over the monitor has no option.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final, Literal, NoReturn, final

import attrs

if TYPE_CHECKING:
    from collections.abc import Mapping


@final
@attrs.frozen
class Option:
    """One option of `run`."""

    name: str
    """With one dash; `also` has other spellings."""
    group: Literal["machine", "boot", "devices", "monitors", "start"]
    help: str
    metavar: str = attrs.field(default="", kw_only=True)
    """What its value looks like; empty for an option without one."""
    also: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    dest: str = attrs.field(default="", kw_only=True)
    repeated: bool = attrs.field(default=False, kw_only=True)
    command: str = attrs.field(default="", kw_only=True)
    """The command, or commands, that it stands for, and that replace it where it is refused; empty if none do."""
    admitted: bool = attrs.field(default=False, kw_only=True)
    """Whether it goes with `--precreate`: a start in which a machine is defined over the monitor alone."""

    @property
    def attribute(self) -> str:
        """Where the parser puts the value: None, False or an empty list where the option was not given."""
        return self.dest or self.name.lstrip("-").replace("-", "_")

    @property
    def defines_machine(self) -> bool:
        """Whether it says what the machine is, so that there is one to be built."""
        return self.group != "start" and not self.admitted and self.name != "-object"


def _absent(name: str, what: str) -> Option:
    return Option(name, "devices", f"there is no {what}: none, as always", metavar="none", admitted=True)


ABSENT: Final = ("-display", "-vga", "-audio", "-monitor", "-parallel", "-net", "-nic")
"""Options that say that there is none of something; of these things this VMM has none."""

OPTIONS: Final = (
    Option("-machine", "machine", "machine type; there is microvm",
           metavar="[type=]TYPE[,accel=][,memory-backend=ID]", also=("-M",), command="machine-set"),
    Option("-accel", "machine", "accelerator: kvm, or qtest, which runs no guest", metavar="NAME[,dirty-ring-size=N]",
           command="accel-set"),
    Option("-cpu", "machine", "CPU model, and features on and off", metavar="MODEL[,FEATURE=on|off][,+F][,-F]",
           command="cpu-model-set"),
    Option("-m", "machine", "RAM, in MiB or with a suffix K, M, G, T (default 128)", metavar="[size=]SIZE",
           dest="memory", command="machine-set"),
    Option("-smp", "machine", "vCPUs, 1 to 8 (default 1)", metavar="[cpus=]N", command="machine-set"),
    Option("-numa", "machine", "a NUMA node, a distance, or a vCPU's place", metavar="node|dist|cpu[,...]",
           repeated=True, command="set-numa-node"),
    Option("-name", "machine", "the machine's name", metavar="[guest=]NAME", command="machine-set"),
    Option("-uuid", "machine", "the machine's UUID", metavar="UUID", command="machine-set"),
    Option("-rtc", "machine", "what the clock tells", metavar="[base=]BASE[,clock=][,driftfix=]",
           command="machine-set"),
    Option("-smbios", "machine", "an SMBIOS structure, or fields of one", metavar="type=N[,FIELD=VALUE]",
           repeated=True, command="machine-set"),
    Option("-acpitable", "machine", "one more ACPI table", metavar="[sig=...,]file=PATH", repeated=True,
           command="machine-set"),
    Option("-fw_cfg", "machine", "a file for firmware", metavar="[name=]NAME,file=PATH|string=TEXT",
           repeated=True, command="machine-set"),
    Option("-no-reboot", "machine", "end instead of resetting when the guest reboots", command="machine-set"),
    Option("-kernel", "boot", "a bzImage, an ELF file with a PVH note, flat:FILE, or builtin:heartbeat",
           metavar="FILE", command="machine-set"),
    Option("-initrd", "boot", "initial RAM disk", metavar="FILE", command="machine-set"),
    Option("-append", "boot", "kernel command line", metavar="TEXT", command="machine-set"),
    Option("-boot", "boot", "what firmware boots from", metavar="[order=]ORDER[,menu=on|off]", command="machine-set"),
    Option("-option-rom", "boot", "an option ROM", metavar="[romfile=]FILE[,bootindex=N]", repeated=True,
           command="machine-set"),
    Option("-serial", "devices", "null, none, stdio, pty, file:PATH, pipe:PATH, unix:PATH[,server=on], "
           "tcp:HOST:PORT[,server=on], chardev:ID",
           metavar="DEV", repeated=True, command="chardev-add and machine-set"),
    Option("-device", "devices", "a device, as JSON or with its properties", metavar="DRIVER[,id=ID][,PROP=VALUE]",
           repeated=True, command="device_add"),
    Option("-netdev", "devices", "a network back end: a tap, by its interface or an open descriptor",
           metavar="tap,id=ID,ifname=NAME|fd=N", repeated=True, command="netdev_add"),
    Option("-object", "devices", "an object: a monitor, RAM, a back end, qtest", metavar="TYPE,id=ID[,PROP=VALUE]",
           repeated=True, command="object-add"),
    Option("-nodefaults", "devices", "no serial port unless one is named", admitted=True),
    Option("-nographic", "devices", "accepted: there is no display to leave out", admitted=True),
    *(_absent(name, what) for name, what in zip(
        ABSENT,
        ("display", "graphics card", "sound", "HMP monitor", "parallel port", "network card", "network card"),
        strict=True,
    )),
    Option("-chardev", "monitors", "null, stdio, pty, file,path=, pipe,path=, socket,path=[,server=on], "
           "socket,host=,port=[,server=on], socket,fd=[,server=on]",
           metavar="KIND,id=ID[,...]", repeated=True, command="chardev-add", admitted=True),
    Option("-qmp", "monitors",
           "a monitor: unix:PATH, tcp:HOST:PORT[,server=on], stdio, chardev:ID, or fd:N (a connected socket)",
           metavar="DEV", repeated=True, command="chardev-add and object-add", admitted=True),
    Option("-mon", "monitors", "a monitor over a chardev", metavar="[chardev=]ID[,mode=control]", repeated=True,
           command="object-add", admitted=True),
    Option("-websocket", "monitors",
           "a monitor at 127.0.0.1 or [::1]: [,token-file=PATH][,grant=observe|operate|migrate|admin]; port 0: any",
           metavar="ADDR:PORT[,...]", repeated=True, command="object-add", admitted=True),
    Option("-qtest", "monitors", "who drives the machine in place of a guest: unix:PATH[,server=on], tcp:HOST:PORT"
           "[,server=on], stdio, chardev:ID",
           metavar="DEV", command="chardev-add and object-add", admitted=True),
    Option("-qtest-log", "monitors", "where what is said over -qtest is logged", metavar="FILE|none",
           command="object-add", admitted=True),
    Option("-S", "start", "complete the machine and leave it standing", dest="stopped",
           command="finish-machine-init without cont"),
    Option("-precreate", "start", "wait in phase precreate for commands", also=("--precreate",), admitted=True),
    Option("-preconfig", "start", "wait in phase preconfig for commands", also=("--preconfig",),
           command="accel-set, and go on when it is time"),
    Option("-incoming", "start", "await a migration or a live update: a URI, JSON, dotted keys, or defer; "
           "once for the main channel, once for cpr", metavar="CHANNEL", repeated=True, command="migrate-incoming",
           admitted=True),
    Option("-loadvm", "start", "begin with the state that migrate saved in a file; without a machine, with that one",
           metavar="PATH", command="loadvm"),
    Option("-allow-resource", "start", "let an incoming machine have this host resource under the name NAME",
           metavar="NAME[=PATH|fd:N]", repeated=True, command="x-allow-resource", admitted=True),
    Option("-allow-difference", "start", "let an incoming machine differ from its source's in NAME, though its guest "
           "could tell", metavar="NAME", repeated=True, command="x-allow-difference", admitted=True),
    Option("--recipe", "start", "carry out the commands in FILE, after those of the options", metavar="FILE",
           admitted=True),
    Option("--print-recipe", "start", "print the commands that the options stand for, and leave", admitted=True),
)  # fmt: skip

_GROUPS: Final[Mapping[str, str]] = {
    "machine": "machine", "boot": "what it boots", "devices": "devices", "monitors": "chardevs and monitors",
    "start": "start",
}  # fmt: skip


@final
class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are sentences on standard error, with exit status 1."""

    def error(self, message: str) -> NoReturn:
        """Print the error and leave."""
        self.exit(1, f"{self.prog}: {message}\n")

    def _get_option_tuples(self, option_string: str) -> list[tuple[argparse.Action, str, str | None]]:
        # Options are whole words. argparse would take -mem-path for -m with a value, and -kern for -kernel.
        return []


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    groups = {name: parser.add_argument_group(title) for name, title in _GROUPS.items()}
    for option in OPTIONS:
        add, names = groups[option.group].add_argument, (option.name, *option.also)
        if not option.metavar:
            add(*names, dest=option.attribute, action="store_true", help=option.help)
        elif option.repeated:
            add(*names, dest=option.attribute, action="append", default=[], metavar=option.metavar, help=option.help)
        else:
            add(*names, dest=option.attribute, metavar=option.metavar, help=option.help)
    parser.add_argument("--x-cpr-stop-at", default="", metavar="SIDE:STEP", help=argparse.SUPPRESS)
    parser.add_argument("--x-cpr-caretaker", default="", metavar="OPTIONS", help=argparse.SUPPRESS)
    parser.add_argument("--x-cpr-caretaker-of", type=int, default=0, metavar="PID", help=argparse.SUPPRESS)
    parser.add_argument(
        "--x-cpr-allow-uid", type=int, default=[], action="append", metavar="UID", help=argparse.SUPPRESS
    )
    parser.add_argument("--x-cpr-limits", default="", metavar="NAME=SECONDS,...", help=argparse.SUPPRESS)


def given(options: argparse.Namespace, option: Option) -> bool:
    """Say whether `option` was given."""
    return getattr(options, option.attribute) not in (None, False, [])


def defines_machine(options: argparse.Namespace) -> bool:
    """Say whether any option is about the machine itself."""
    return any(option.defines_machine and given(options, option) for option in OPTIONS)


def split(text: str) -> list[str]:
    """Split at commas; a doubled one stands for itself."""
    # The kernel ends arguments at a NUL, so no option holds one.
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
