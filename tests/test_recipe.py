from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.phases.machine import appearance, machine, monitor, parse
from vmm.cli import main
from vmm.cli_options import defines_machine
from vmm.cli_recipe import recipe_of
from vmm.cli_values import parse_size
from vmm.errors import NameTaken, OptionInvalid, RecipeInvalid, Unsupported, VmmError
from vmm.phases.catalog import COMMANDS, rank
from vmm.phases.start import Start
from vmm.recipe import MAX_BYTES, MAX_COMMANDS, Recipe, Step, replay

if TYPE_CHECKING:
    from pathlib import Path

NULL = {"type": "null", "data": {}}


def parsed(text: str) -> list[dict[str, Any]]:
    return Recipe.parse("r.json", text).to_json()


def refused(text: str) -> str:
    with pytest.raises(RecipeInvalid) as caught:
        Recipe.parse("r.json", text)
    return str(caught.value)


# --- the file ---------------------------------------------------------------------------------------------


def test_a_recipe_file_has_a_command_a_line() -> None:
    text = '{"execute": "machine-set", "arguments": {"smp": {"cpus": 2}}}\n{"execute": "accel-set"}\n'
    assert parsed(text) == [
        {"execute": "machine-set", "arguments": {"smp": {"cpus": 2}}},
        {"execute": "accel-set"},
    ]


@pytest.mark.parametrize(
    "text",
    [
        '{"execute":"a"}{"execute":"b"}',
        '{"execute":"a"} \t {"execute":"b"}',
        '\n\n{"execute":"a"}\r\n\r\n{"execute":"b"}\r\n',
        '# first\n{"execute":"a"}\n   # indented\n{"execute":"b"}\n#last',
        '{\n "execute":\n# between the lines\n "a"}{"execute"\n:"b"}',
        '{"execute":"a","arguments":{}}{"execute":"b"}',
    ],
    ids=["side by side", "blanks", "empty lines", "comments", "spread over lines", "empty arguments"],
)
def test_a_recipe_file_may_be_written_freely(text: str) -> None:
    assert parsed(text) == [{"execute": "a"}, {"execute": "b"}]


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "  # nothing  \n\n   \t"])
def test_a_recipe_file_may_be_empty(text: str) -> None:
    assert parsed(text) == []


def test_a_sharp_inside_a_line_is_no_comment() -> None:
    text = '{"execute": "machine-set", "arguments": {"append": "quiet # loud"}}'
    assert parsed(text)[0]["arguments"] == {"append": "quiet # loud"}


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_line(character: str) -> None:
    text = json.dumps({"execute": "machine-set", "arguments": {"name": f"a{character}#b"}}, ensure_ascii=False)
    assert parsed(text)[0]["arguments"] == {"name": f"a{character}#b"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "line 1: no JSON object: Expecting property name enclosed in double quotes"),
        ('{"execute": "a"}\nfoo', "line 2: no JSON object: Expecting value"),
        ('{"execute": "a"}\n\n# one\n{"execute" "b"}', "line 4: no JSON object: Expecting ':' delimiter"),
        ('{"execute":\n "a",\n', "line 3: no JSON object: Expecting property name enclosed in double quotes"),
        ('{"execute": "a\nb"}', "line 1: no JSON object: Invalid control character at"),
        ("[]", "line 1: a command must be a JSON object"),
        ('\n\n"quit"', "line 3: a command must be a JSON object"),
        ('{"execute": "a"} 7', "line 1: a command must be a JSON object"),
        ("{}", "line 1: member 'execute' with the command's name is missing"),
        ('{"execute": 5}', "line 1: member 'execute' with the command's name is missing"),
        ('{"exec-oob": "a"}', "line 1: member 'execute' with the command's name is missing"),
        ('{"execute": "a", "arguments": []}', "line 1: member 'arguments' must be an object"),
        ('{"execute": "a", "arguments": null}', "line 1: member 'arguments' must be an object"),
        (
            '{"execute": "a", "id": 1}',
            "line 1: member 'id' is unexpected; only execute and arguments are allowed",
        ),
        (
            '{"execute": "a", "exec-oob": "b"}',
            "line 1: member 'exec-oob' is unexpected; only execute and arguments are allowed",
        ),
        ('\n{"execute": "a", "arguments": {"x": NaN}}', "line 2: no command: a number that is none, or too long"),
        (
            '{"execute": "a", "arguments": {"x": -Infinity}}',
            "line 1: no command: a number that is none, or too long",
        ),
        ("1" * 5000, "line 1: no command: a number that is none, or too long"),
        ('{"a":' * 100_000, "line 1: no command: nested too deeply"),
        ("\n" + "[" * 100_000, "line 2: no command: nested too deeply"),
        (
            '{"execute": "a"}' * (MAX_COMMANDS + 1),
            "as a whole: 4097 commands are more than the 4096 admitted",
        ),
        (" " * (MAX_BYTES + 1), "as a whole: 4194305 characters are more than the 4194304 admitted"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_a_wrong_recipe_file_is_refused_with_the_line(text: str, reason: str) -> None:
    assert refused(text) == f"Recipe r.json, {reason}"


def test_the_limits_themselves_are_admitted() -> None:
    assert len(parsed('{"execute": "a"}' * MAX_COMMANDS)) == MAX_COMMANDS
    assert parsed('{"execute": "a"}' + " " * (MAX_BYTES - 16)) == [{"execute": "a"}]


@settings(deadline=None)
@given(st.text(max_size=200))
def test_whatever_a_file_says_it_is_read_or_refused(text: str) -> None:
    try:
        Recipe.parse("r.json", text)
    except RecipeInvalid as error:
        assert error.where.startswith("line ")  # noqa: PT017 - most texts are refused, not all


VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
STEPS = st.builds(
    Step, st.text(min_size=1, max_size=8), st.dictionaries(st.text(max_size=4), VALUES | st.lists(VALUES), max_size=3)
)


@settings(deadline=None)
@given(st.lists(STEPS, max_size=4))
def test_what_is_written_is_read_again(steps: list[Step]) -> None:
    recipe = Recipe("r.json", tuple(steps))
    assert Recipe.parse("r.json", str(recipe)) == recipe
    assert Recipe.from_json("r.json", recipe.to_json()) == recipe


# --- the recipe that travels ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        (None, "as a whole: it must be a list of commands"),
        ({"execute": "a"}, "as a whole: it must be a list of commands"),
        ([{"execute": "a"}] * 4097, "as a whole: 4097 commands are more than the 4096 admitted"),
        ([{"execute": "a"}, 5], "command 2: a command must be a JSON object"),
        ([{"execute": "a"}, {"arguments": {}}], "command 2: member 'execute' with the command's name is missing"),
        (
            [{"execute": "a", "id": 1}],
            "command 1: member 'id' is unexpected; only execute and arguments are allowed",
        ),
    ],
    ids=["none", "no list", "too many", "no object", "no name", "an id"],
)
def test_a_wrong_recipe_that_came_in_is_refused_with_the_command(requests: object, reason: str) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        Recipe.from_json("of the source", requests)
    assert str(caught.value) == f"Recipe of the source, {reason}"


# --- order ------------------------------------------------------------------------------------------------


def test_a_recipe_is_sorted_by_phase_and_stable_within() -> None:
    names = ["cont", "finish-machine-init", "accel-set", "object-add", "machine-set", "chardev-add", "cpu-model-set"]
    names += ["migrate-incoming", "stop", "chardev-add", "migrate-set-parameters", "migrate-set-capabilities", "quit"]
    steps = tuple(Step(name, {"n": number}) for number, name in enumerate(names))
    ordered = Recipe("r", steps).ordered(rank)
    assert ordered.source == "r"
    assert [(step.execute, step.arguments["n"]) for step in ordered] == [
        ("object-add", 3),
        ("chardev-add", 5),
        ("chardev-add", 9),
        ("migrate-set-parameters", 10),
        ("migrate-set-capabilities", 11),
        ("migrate-incoming", 7),
        ("machine-set", 4),
        ("accel-set", 2),
        ("cpu-model-set", 6),
        ("finish-machine-init", 1),
        ("cont", 0),
        ("stop", 8),
        ("quit", 12),
    ]


def test_back_ends_of_devices_come_after_the_accelerator_and_other_objects_before_the_machine() -> None:
    types = ("rng-random", "monitor-qmp", "rng-builtin", "monitor-websocket", 7)
    steps = [Step("cpu-model-set"), Step("accel-set"), Step("machine-set")]
    steps += [Step("object-add", {"qom-type": name}) for name in types]
    ordered = Recipe("r", tuple(steps)).ordered(rank)
    assert [step.arguments.get("qom-type", step.execute) for step in ordered] == [
        *("monitor-qmp", "monitor-websocket", 7),
        *("machine-set", "accel-set", "rng-random", "rng-builtin", "cpu-model-set"),
    ]


def test_every_command_that_has_a_place_exists() -> None:
    names = {command.name for command in COMMANDS}
    last = rank(Step("no such command"))
    placed = {name for name in names if rank(Step(name)) < last}
    assert placed == {
        *("chardev-add", "object-add", "add-fd", "getfd", "migrate-set-capabilities", "migrate-set-parameters"),
        *("migrate-incoming", "machine-set", "x-exit-precreate", "accel-set", "cpu-model-set", "x-exit-preconfig"),
        *("netdev_add", "set-numa-node", "device_add", "finish-machine-init", "x-allow-difference", "x-allow-resource"),
    }


# --- replay -----------------------------------------------------------------------------------------------


async def test_each_command_is_begun_after_the_one_before_was_answered() -> None:
    log: list[str] = []

    async def execute(step: Step) -> None:
        log.append(f"begin {step.execute}")
        await trio.lowlevel.checkpoint()
        log.append(f"end {step.execute}")

    await replay(Recipe("r", (Step("a"), Step("b"))), execute)
    assert log == ["begin a", "end a", "begin b", "end b"]


async def test_the_first_command_that_fails_is_named_and_the_later_ones_are_not_begun() -> None:
    begun: list[str] = []

    async def execute(step: Step) -> None:
        await trio.lowlevel.checkpoint()
        begun.append(step.execute)
        if step.execute == "b":
            raise NameTaken(what="Chardev", name="serial0")

    with pytest.raises(RecipeInvalid) as caught:
        await replay(Recipe("of this test", (Step("a"), Step("b"), Step("c"))), execute)
    assert str(caught.value) == (
        "Recipe of this test, command 2 (b): Chardev 'serial0' exists already; choose another name"
    )
    assert isinstance(caught.value.__cause__, NameTaken)
    assert begun == ["a", "b"]


async def test_a_bug_in_a_command_is_not_taken_for_its_failure() -> None:
    async def execute(step: Step) -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await replay(Recipe("r", (Step("a"),)), execute)


# --- options ----------------------------------------------------------------------------------------------

SOCKET = {
    "type": "socket",
    "data": {"addr": {"type": "unix", "data": {"path": "/run/q"}}, "server": True, "wait": False},
}


def steps_of(*arguments: str) -> list[dict[str, Any]]:
    return recipe_of(parse(*arguments)).to_json()


def definition(*arguments: str) -> dict[str, Any]:
    (found,) = (step["arguments"] for step in steps_of(*arguments) if step["execute"] == "machine-set")
    return dict(found)


def test_a_kernel_makes_a_machine_that_runs() -> None:
    assert steps_of("-kernel", "vmlinuz") == [
        {"execute": "chardev-add", "arguments": {"id": "serial0", "backend": {"type": "stdio", "data": {}}}},
        {
            "execute": "machine-set",
            "arguments": {"type": "microvm", "kernel": "vmlinuz", "serial": ["serial0"]},
        },
        {"execute": "accel-set", "arguments": {"accel": "kvm"}},
        {"execute": "cpu-model-set", "arguments": {"model": "host"}},
        {"execute": "finish-machine-init"},
        {"execute": "cont"},
    ]


def test_no_option_makes_no_machine() -> None:
    assert steps_of() == []
    for arguments in ((), ("-display", "none"), ("-nographic",), ("-nodefaults",), ("-S",), ("-incoming", "defer")):
        assert not defines_machine(parse(*arguments)), arguments
        assert steps_of(*arguments) == []


@pytest.mark.parametrize(
    ("arguments", "member", "value"),
    [
        (("-m", "512"), "memory", {"size": 512 << 20}),
        (("-m", "size=2G"), "memory", {"size": 2 << 30}),
        (("-smp", "2"), "smp", {"cpus": 2}),
        (("-smp", "cpus=4,cores=4,sockets=1"), "smp", {"cpus": 4, "cores": 4, "sockets": 1}),
        (("-name", "guest1"), "name", "guest1"),
        (("-name", "guest=guest1"), "name", "guest1"),
        (("-uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"), "uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
        (("-no-reboot",), "reboot-action", "shutdown"),
        (("-kernel", "builtin:heartbeat"), "kernel", "builtin:heartbeat"),
        (("-kernel", "k", "-initrd", "i"), "initrd", "i"),
        (("-append", "console=ttyS0 quiet"), "append", "console=ttyS0 quiet"),
        (("-machine", "type=microvm"), "type", "microvm"),
        (("-M", "q35"), "type", "q35"),
        (("-serial", "none"), "serial", []),
        (("-nodefaults", "-kernel", "k"), "serial", []),
        (("-serial", "null", "-serial", "chardev:com"), "serial", ["serial0", "com"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_an_option_is_a_member_of_machine_set(arguments: tuple[str, ...], member: str, value: object) -> None:
    assert definition(*arguments)[member] == value


@pytest.mark.parametrize(
    ("option", "command", "arguments"),
    [
        (("-accel", "kvm"), "accel-set", {"accel": "kvm"}),
        (("-accel", "accel=tcg"), "accel-set", {"accel": "tcg"}),
        (("-cpu", "max"), "cpu-model-set", {"model": "max"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_other_options_are_commands_of_their_own(option: tuple[str, ...], command: str, arguments: object) -> None:
    assert {"execute": command, "arguments": arguments} in steps_of("-kernel", "k", *option)


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("null", NULL),
        ("stdio", {"type": "stdio", "data": {}}),
        ("mon:stdio", {"type": "stdio", "data": {}}),
        ("pty", {"type": "pty", "data": {}}),
        ("file:/tmp/a b", {"type": "file", "data": {"out": "/tmp/a b"}}),
        ("unix:/run/q", SOCKET),
        ("unix:/run/q,server=on,wait=off", SOCKET),
        ("unix:/run/q,server,nowait", SOCKET),
        ("unix:/run/q,server=off", {"type": "socket", "data": {**SOCKET["data"], "server": False}}),  # type: ignore[dict-item]
    ],
)
def test_a_serial_port_is_a_chardev(device: str, backend: object) -> None:
    assert steps_of("-serial", device)[0] == {
        "execute": "chardev-add",
        "arguments": {"id": "serial0", "backend": backend},
    }


@pytest.mark.parametrize(
    ("text", "backend"),
    [
        ("null,id=c", NULL),
        ("pty,id=c", {"type": "pty", "data": {}}),
        ("stdio,id=c", {"type": "stdio", "data": {}}),
        ("stdio,id=c,signal=off", {"type": "stdio", "data": {"signal": False}}),
        ("file,id=c,path=/tmp/x", {"type": "file", "data": {"out": "/tmp/x"}}),
        ("file,path=/tmp/x,append=on,id=c", {"type": "file", "data": {"out": "/tmp/x", "append": True}}),
        ("file,path=/tmp/x,append=off,id=c", {"type": "file", "data": {"out": "/tmp/x", "append": False}}),
        ("socket,id=c,path=/run/q,server=on,wait=off", SOCKET),
        ("socket,id=c,path=/run/q,server", SOCKET),
        ("socket,id=c,path=/run/q", {"type": "socket", "data": {**SOCKET["data"], "server": False}}),  # type: ignore[dict-item]
    ],
)
def test_a_chardev_option_is_chardev_add(text: str, backend: object) -> None:
    assert steps_of("-chardev", text) == [{"execute": "chardev-add", "arguments": {"id": "c", "backend": backend}}]


def test_a_monitor_is_a_chardev_and_an_object() -> None:
    assert steps_of("-qmp", "unix:/run/q,server=on,wait=off") == [
        {"execute": "chardev-add", "arguments": {"id": "compat_monitor0", "backend": SOCKET}},
        {
            "execute": "object-add",
            "arguments": {"qom-type": "monitor-qmp", "id": "qmp_compat_monitor0", "chardev": "compat_monitor0"},
        },
    ]
    assert steps_of("-qmp", "fd:5", "-qmp", "chardev:c") == [
        {"execute": "object-add", "arguments": {"qom-type": "monitor-qmp", "id": "compat_monitor0", "fd": 5}},
        {"execute": "object-add", "arguments": {"qom-type": "monitor-qmp", "id": "compat_monitor1", "chardev": "c"}},
    ]


def test_chardevs_come_before_the_monitors_and_ports_that_name_them() -> None:
    names = [step["execute"] for step in steps_of("-serial", "chardev:c", "-qmp", "chardev:d", "-chardev", "null,id=c")]
    assert names[:3] == ["chardev-add", "object-add", "machine-set"]


def test_the_monitors_of_a_destination_have_names_of_their_own() -> None:
    channels = ("-incoming", "unix:/run/main", "-incoming", '{"channel-type": "cpr", "addr": {"transport": "socket",'
                ' "type": "unix", "path": "/run/cpr"}}')  # fmt: skip
    steps = steps_of("-qmp", "unix:/run/q", *channels)
    assert [step["arguments"].get("id") for step in steps[:2]] == [
        f"compat_monitor0@{os.getpid()}",
        f"qmp_compat_monitor0@{os.getpid()}",
    ]
    assert steps[2]["execute"] == "migrate-incoming"
    assert [channel["channel-type"] for channel in steps[2]["arguments"]["channels"]] == ["main", "cpr"]


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        ((), "cont"),
        (("-S",), "finish-machine-init"),
        (("-preconfig",), "accel-set"),
        (("--preconfig", "-S"), "accel-set"),
    ],
)
def test_how_far_a_machine_goes_by_itself(arguments: tuple[str, ...], last: str) -> None:
    assert steps_of("-kernel", "k", *arguments)[-1]["execute"] == last


REFUSED = [
    (("-display", "gtk"), "Display 'gtk' is not supported here; there is none; use -display none or no option"),
    (("-m", "lots"), "-m: 'lots' is not a size such as 512, 512M or 2G"),
    (("-m", ""), "-m: '' is not a size such as 512, 512M or 2G"),
    (("-m", "-5"), "-m: '-5' is not a size such as 512, 512M or 2G"),
    (("-m", "1.5G"), "-m: '1.5G' is not a size such as 512, 512M or 2G"),
    (("-m", "512,slots=2"), "-m: '512,slots=2' is not a size such as 512, 512M or 2G"),
    (("-m", "9" * 16), f"-m: '{'9' * 16}' is not a size such as 512, 512M or 2G"),
    (("-smp", "two"), "-smp: 'two' is not [cpus=]N with N a number of vCPUs from 1 to 8"),
    (("-smp", "2,dies=1"), "-smp: '2,dies=1' is not [cpus=]N with N a number of vCPUs from 1 to 8"),
    (("-smp", "cores=2,2"), "-smp: 'cores=2,2' is not [cpus=]N with N a number of vCPUs from 1 to 8"),
    (("-smp", "cpus=-1"), "-smp: 'cpus=-1' is not [cpus=]N with N a number of vCPUs from 1 to 8"),
    (("-smp", "9" * 5000), f"-smp: '{'9' * 5000}' is not [cpus=]N with N a number of vCPUs from 1 to 8"),
    (("-name", "a,debug-threads=on"), "-name: 'a,debug-threads=on' is not [guest=]NAME without further options"),
    (
        ("-serial", "vc"),
        "-serial: 'vc' is not null, stdio, pty, file:PATH, pipe:PATH, unix:PATH[,server=on], "
        "tcp:[HOST]:PORT[,server=on][,nodelay=on] or chardev:ID",
    ),
    (
        ("-serial", "file:"),
        "-serial: 'file:' is not null, stdio, pty, file:PATH, pipe:PATH, unix:PATH[,server=on], "
        "tcp:[HOST]:PORT[,server=on][,nodelay=on] or chardev:ID",
    ),
    (
        ("-serial", "null:x"),
        "-serial: 'null:x' is not null, stdio, pty, file:PATH, pipe:PATH, unix:PATH[,server=on], "
        "tcp:[HOST]:PORT[,server=on][,nodelay=on] or chardev:ID",
    ),
    (
        ("-serial", "unix:/run/q,wait=on"),
        "-serial: '/run/q,wait=on' is not possible: wait=on would hold up the monitor; use wait=off",
    ),
    (("-serial", "unix:/run/q,color=red"), "-serial: '/run/q,color=red' is not PATH[,server=on|off][,wait=off]"),
    (("-serial", "unix:,server=on"), "-serial: ',server=on' is not a socket with a path"),
    (("-qmp", "unix:"), "-qmp: '' is not a socket with a path"),
    (("-qmp", "unix:/run/q,server=maybe"), "-qmp: '/run/q,server=maybe' is not PATH[,server=on|off][,wait=off]"),
    (
        ("-qmp", "tcp:"),
        "-qmp: 'tcp:' is not unix:PATH[,server=on][,wait=off], "
        "tcp:HOST:PORT[,server=on][,wait=off], stdio, chardev:ID or fd:N",
    ),
    (
        ("-qmp", "fd:x"),
        "-qmp: 'fd:x' is not unix:PATH[,server=on][,wait=off], "
        "tcp:HOST:PORT[,server=on][,wait=off], stdio, chardev:ID or fd:N",
    ),
    (("-chardev", "null"), "-chardev: 'null' is not complete: it needs id=NAME"),
    (("-chardev", "null,id="), "-chardev: 'null,id=' is not complete: it needs id=NAME"),
    (("-chardev", "file,id=c"), "-chardev: 'file,id=c' is not complete: it needs path=PATH"),
    (("-chardev", "socket,id=c"), "-chardev: 'socket,id=c' is not complete: it needs path=PATH, port=N or fd=N"),
    (
        ("-chardev", "file,id=c,path=x,append=yes"),
        "-chardev: 'file,id=c,path=x,append=yes' is not possible: append is on or off",
    ),
    (
        ("-chardev", "socket,id=c,path=x,server=true"),
        "-chardev: 'socket,id=c,path=x,server=true' is not possible: server is on or off",
    ),
    (
        ("-chardev", "socket,id=c,path=x,wait=on"),
        "-chardev: 'socket,id=c,path=x,wait=on' is not possible: use wait=off",
    ),
    (
        ("-chardev", "vc,id=c"),
        "Chardev kind 'vc' is not supported here; there are file, null, pipe, pty, socket, stdio",
    ),
    (
        ("-chardev", "null,id=c,logfile=x"),
        "Option of chardev kind null 'logfile' is not supported here; leave it out",
    ),
    (
        ("-preconfig", "-cpu", "host"),
        "-cpu: 'host' is not possible with --preconfig: send cpu-model-set over the monitor",
    ),
    *(
        (
            ("-precreate", *option),
            f"{shown} is not possible with --precreate, which admits monitors only: send {instead}",
        )
        for option, shown, instead in [
            (("-kernel", "k"), "-kernel: 'k'", "machine-set"),
            (("-initrd", "i"), "-initrd: 'i'", "machine-set"),
            (("-append", "a"), "-append: 'a'", "machine-set"),
            (("-m", "64"), "-m: '64'", "machine-set"),
            (("-smp", "2"), "-smp: '2'", "machine-set"),
            (("-name", "n"), "-name: 'n'", "machine-set"),
            (("-uuid", "u"), "-uuid: 'u'", "machine-set"),
            (("-machine", "microvm"), "-machine: 'microvm'", "machine-set"),
            (("-no-reboot",), "-no-reboot: True", "machine-set"),
            (("-cpu", "host"), "-cpu: 'host'", "cpu-model-set"),
            (("-accel", "kvm"), "-accel: 'kvm'", "accel-set"),
            (("-serial", "null"), "-serial: ['null']", "chardev-add and machine-set"),
        ]
    ),
]


@pytest.mark.parametrize(("arguments", "text"), REFUSED, ids=[" ".join(row[0])[:40] for row in REFUSED])
def test_an_option_that_cannot_be_is_refused_in_one_sentence(arguments: tuple[str, ...], text: str) -> None:
    with pytest.raises((OptionInvalid, Unsupported)) as caught:
        # With "=", an option's value may begin with a dash.
        recipe_of(parse(*_joined(arguments)))
    assert str(caught.value) == text


def _joined(arguments: tuple[str, ...]) -> list[str]:
    return [arguments[0] + "=" + arguments[1], *arguments[2:]] if arguments[1:2] in (("-5",),) else list(arguments)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1", 1 << 20), ("512b", 512), ("64K", 64 << 10), ("16m", 16 << 20), ("2G", 2 << 30), ("1T", 1 << 40)],
)
def test_a_size_is_in_mebibytes_or_has_a_suffix(text: str, size: int) -> None:
    assert parse_size(text, "-m") == size


@settings(deadline=None)
@given(st.lists(st.text(max_size=30), max_size=4))
def test_whatever_a_chardev_option_says_it_is_a_command_or_refused(parts: list[str]) -> None:
    options = parse()
    options.chardev = [",".join(parts)]
    try:
        (step,) = recipe_of(options)
    except VmmError:
        return
    assert step.execute == "chardev-add"


# --- what is printed is what is replayed ------------------------------------------------------------------

ARGUMENTS = (
    *("-kernel", "builtin:heartbeat", "-m", "16", "-S", "-name", "g1", "-serial", "chardev:com"),
    *("-chardev", "null,id=com"),
)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["run", "--print-recipe", *arguments]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def test_print_recipe_is_sorted_and_carries_nothing_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "recipe"
    file.write_text('{"execute": "cont"}\n{"execute": "chardev-add", "arguments": {"id": "late", "backend": {}}}\n')
    lines = printed(capsys, "-qmp", f"unix:{tmp_path}/q", *ARGUMENTS, "--recipe", str(file)).splitlines()
    assert [json.loads(line)["execute"] for line in lines] == [
        *("chardev-add", "chardev-add", "object-add", "chardev-add", "machine-set", "accel-set", "cpu-model-set"),
        *("finish-machine-init", "cont"),
    ]
    assert json.loads(lines[3])["arguments"]["id"] == "late"
    assert sorted(os.listdir(tmp_path)) == ["recipe"]


def test_a_printed_recipe_prints_the_same_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = printed(capsys, "-qmp", "unix:/run/q", *ARGUMENTS)
    file = tmp_path / "recipe"
    file.write_text(f"# as printed\n{first}")
    assert printed(capsys, "--recipe", str(file)) == first


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
async def test_what_is_printed_is_what_is_replayed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The machine's own recipe, which it keeps for a live update, begins with the printed commands."""
    path = tmp_path / "q"
    shown = Recipe.parse("printed", printed(capsys, "-qmp", f"unix:{path}", *ARGUMENTS))
    options = parse("-qmp", f"unix:{path}", *ARGUMENTS)
    async with machine(Start(recipe_of(options).ordered(rank)), path) as running:
        await appearance(path)
        with trio.fail_after(20):
            while running.tree.reserved_for is not None:
                await trio.lowlevel.checkpoint()
        recorded = running.host.recorder.recipe().to_json()
    expected = shown.to_json()
    assert [step["execute"] for step in recorded] == [step["execute"] for step in expected]
    for mine, theirs in zip(recorded, expected, strict=True):
        given_, kept = theirs.get("arguments", {}), mine.get("arguments", {})
        assert {name: kept[name] for name in given_ if name not in ("memory", "smp")} == {
            name: value for name, value in given_.items() if name not in ("memory", "smp")
        }


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
async def test_a_machine_made_of_its_own_recipe_is_the_same(tmp_path: Path) -> None:
    async def recipe_after(start: Start, path: Path) -> list[dict[str, Any]]:
        async with machine(start, path) as running:
            with trio.fail_after(20):
                while running.tree.reserved_for is not None:
                    await trio.lowlevel.checkpoint()
            return running.host.recorder.recipe().to_json()

    path = tmp_path / "q"
    steps = (*monitor(path), *recipe_of(parse(*ARGUMENTS)))
    first = await recipe_after(Start(Recipe("given", steps).ordered(rank)), path)
    second = await recipe_after(Start(Recipe.from_json("its own", first)), path)
    assert second == first


def test_a_recipe_file_larger_than_admitted_is_not_read_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe"
    with file.open("wb") as out:
        out.truncate(1 << 40)
    assert main(["run", "--recipe", str(file)]) == 1
    assert capsys.readouterr().err == (
        f"trio-vmm: Recipe {file}, as a whole: 4194305 characters are more than the 4194304 admitted\n"
    )
