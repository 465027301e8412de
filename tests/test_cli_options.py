"""Every option of `trio-vmm run`: the command that it stands for, and what refuses it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.phases.machine import connected, machine, monitor, parse
from vmm.cli import main
from vmm.cli_machine import cpu_step, device_step, numa_steps, object_step
from vmm.cli_options import ABSENT, OPTIONS, Option, Parser, add_run_options
from vmm.cli_recipe import recipe_of
from vmm.errors import OptionInvalid, Unsupported, VmmError
from vmm.monitor.arguments import structure
from vmm.phases.catalog import COMMANDS, rank
from vmm.phases.start import Start
from vmm.recipe import Recipe, Step

if TYPE_CHECKING:
    from pathlib import Path

CPR = (
    '{"channel-type": "cpr", "addr": {"transport": "socket", "type": "unix", "path": "/run/cpr", "abstract": false, '
    '"tight": true}}'
)

EXAMPLES: dict[str, tuple[str, ...]] = {
    "-machine": ("-machine", "microvm,accel=kvm,aux-ram-share=on"),
    "-accel": ("-accel", "qtest"),
    "-cpu": ("-cpu", "host,avx2=off,+aes,-smep"),
    "-m": ("-m", "64"),
    "-smp": ("-smp", "2"),
    "-numa": ("-numa", "node,nodeid=0,cpus=0-1,memdev=m0"),
    "-name": ("-name", "guest1"),
    "-uuid": ("-uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
    "-rtc": ("-rtc", "base=utc,clock=host,driftfix=slew"),
    "-smbios": ("-smbios", "type=1,manufacturer=Acme,serial=0042"),
    "-acpitable": ("-acpitable", "sig=OEM1,rev=2,file=/tmp/table"),
    "-fw_cfg": ("-fw_cfg", "name=opt/org.example/a,string=b"),
    "-no-reboot": ("-no-reboot",),
    "-kernel": ("-kernel", "builtin:heartbeat"),
    "-initrd": ("-initrd", "i"),
    "-append": ("-append", "quiet"),
    "-boot": ("-boot", "order=c,menu=on,strict=off,splash-time=5"),
    "-option-rom": ("-option-rom", "/tmp/rom,bootindex=1"),
    "-serial": ("-serial", "null"),
    "-device": ("-device", "virtio-rng-device,id=rng0,max-bytes=1024,period=0x3e8"),
    "-netdev": ("-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no"),
    "-object": ("-object", "rng-random,id=r0,filename=/dev/urandom"),
    "-S": ("-S",),
    "-preconfig": ("--preconfig",),
    "-loadvm": ("-loadvm", "before"),
    "-allow-resource": ("-allow-resource", "kernel=/boot/vmlinuz"),
    "-allow-difference": ("-allow-difference", "machine-set.append"),
    "-chardev": ("-chardev", "null,id=c"),
    "-qmp": ("-qmp", "unix:/run/q"),
    "-mon": ("-chardev", "stdio,id=c", "-mon", "chardev=c,mode=control"),
    "-websocket": ("-websocket", "127.0.0.1:0,grant=observe"),
    "-qtest": ("-qtest", "unix:/run/t", "-qtest-log", "none"),
    "-qtest-log": ("-qtest", "stdio", "-qtest-log", "/tmp/log"),
    "-incoming": ("-incoming", "tcp:0:0"),
}
"""An example of each option that stands for a command."""


def requests(*arguments: str) -> list[dict[str, Any]]:
    return recipe_of(parse(*arguments)).ordered(rank).to_json()


def definition(*arguments: str) -> dict[str, Any]:
    (found,) = (step["arguments"] for step in requests(*arguments) if step["execute"] == "machine-set")
    return dict(found)


def refusal(*arguments: str) -> str:
    with pytest.raises((OptionInvalid, Unsupported)) as caught:
        recipe_of(parse(*arguments))
    return str(caught.value)


# --- the table --------------------------------------------------------------------------------------------


def test_the_parser_knows_what_the_table_has_and_nothing_else() -> None:
    parser = Parser("run", allow_abbrev=False)
    add_run_options(parser)
    known = {text for action in parser._actions for text in action.option_strings}
    table = {text for option in OPTIONS for text in (option.name, *option.also)}
    assert known - table == {
        *(
            "-h",
            "--help",
            "--x-cpr-stop-at",
            "--x-cpr-allow-uid",
            "--x-cpr-limits",
            "--x-cpr-caretaker",
            "--x-cpr-caretaker-of",
        ),
    }
    assert table <= known


def test_there_is_an_example_of_each_option_that_stands_for_a_command() -> None:
    assert EXAMPLES.keys() == {option.name for option in OPTIONS if option.command}


@pytest.mark.parametrize("text", ["-kern", "-preconf", "-mem-path", "-Sx", "-global", "-no-shutdown", "-pidfile",
                                  "-daemonize", "-action", "-readconfig"])  # fmt: skip
def test_what_is_no_whole_option_is_refused_by_name(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("-qmp", "unix:/run/q", text)
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"trio-vmm run: unrecognized arguments: {text}\n"


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.command], ids=lambda option: option.name)
def test_an_option_becomes_the_commands_that_the_table_names(option: Option) -> None:
    names = {step["execute"] for step in requests("-kernel", "k", *EXAMPLES[option.name])}
    if option.name == "-S":
        assert "cont" not in names
    elif option.name == "-preconfig":
        assert "cpu-model-set" not in names
    else:
        assert set(option.command.split(" and ")) <= names


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_recipe_of_an_option_is_the_recipe_of_its_recipe(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--print-recipe", "-kernel", "k", *EXAMPLES[name]]) == 0
    first = capsys.readouterr().out
    (tmp_path / "recipe").write_text(first)
    assert main(["run", "--print-recipe", "--recipe", str(tmp_path / "recipe")]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_commands_of_an_option_take_what_it_says(name: str) -> None:
    commands = {command.name: command for command in COMMANDS}
    for request in requests("-kernel", "k", *EXAMPLES[name]):
        structure(commands[request["execute"]].arguments or _Nothing, request.get("arguments", {}), "")


@attrs.frozen
class _Nothing:
    """The arguments of a command that has none."""


MANY = (
    *("-kernel", "builtin:heartbeat", "-m", "32", "-smp", "2", "-append", "region=64K", "-S", "-nodefaults"),
    *("-object", "rng-builtin,id=r0", "-device", "virtio-rng-device,id=d0,rng=r0,max-bytes=1024,period=1000"),
    *("-numa", "node,cpus=0,mem=16M", "-numa", "node,cpus=1,mem=16M", "-numa", "dist,src=0,dst=1,val=20"),
    *("-rtc", "base=2006-06-17T16:01:21", "-boot", "menu=off", "-machine", "microvm,accel=kvm", "-name", "many"),
)


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
async def test_a_machine_of_many_options_is_the_same_from_its_printed_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def made(recipe: Recipe) -> list[dict[str, Any]]:
        path = tmp_path / "q"
        start = Start(Recipe("of this test", (*monitor(path), *recipe)).ordered(rank))
        async with machine(start, path) as running, connected(path) as client:
            await client.execute("migrate-set-capabilities", capabilities=[])  # waits until the machine is made
            assert (await client.execute("query-machine-phase"))["path"].endswith("/running")
            return running.host.recorder.recipe().to_json()

    assert main(["run", "--print-recipe", *MANY]) == 0
    printed = Recipe.parse("printed", capsys.readouterr().out)
    assert await made(recipe_of(parse(*MANY))) == await made(printed)


# --- precreate --------------------------------------------------------------------------------------------

SHOWN: dict[str, object] = {"-S": True, "-preconfig": True, "-no-reboot": True}


@pytest.mark.parametrize(
    "option", [option for option in OPTIONS if not option.admitted], ids=lambda option: option.name
)
def test_precreate_refuses_an_option_and_names_the_command_that_replaces_it(option: Option) -> None:
    example = EXAMPLES[option.name]
    value: object = SHOWN.get(option.name) or ([example[-1]] if option.repeated else example[-1])
    assert refusal("--precreate", "-qmp", "unix:/run/q", *example) == (
        f"{option.name}: {value!r} is not possible with --precreate, which admits monitors only: send {option.command}"
    )


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.admitted], ids=lambda option: option.name)
def test_precreate_admits_monitors_and_what_says_nothing_about_the_machine(option: Option) -> None:
    example = EXAMPLES.get(option.name, (option.name,) if not option.metavar else (option.name, "none"))
    steps = requests("--precreate", *example)
    limit = rank(Step("machine-set"))
    assert all(rank(Step(step["execute"], step.get("arguments", {}))) < limit for step in steps)


def test_precreate_admits_objects_that_talk_and_no_others() -> None:
    talking = ("-object", "monitor-qmp,id=m,chardev=c", "-object", "qtest,id=t,chardev=d")
    assert [step["arguments"]["id"] for step in requests("--precreate", *talking)] == ["m", "t"]
    assert refusal("--precreate", *talking, "-object", '{"qom-type": "rng-builtin", "id": "r"}') == (
        '-object: [\'{"qom-type": "rng-builtin", "id": "r"}\'] is not possible with --precreate, '
        "which admits monitors only: send object-add"
    )


def test_precreate_refuses_a_recipe_that_goes_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe"
    file.write_text('{"execute": "chardev-add"}\n')
    assert main(["run", "--precreate", "--print-recipe", "--recipe", str(file)]) == 0
    file.write_text('{"execute": "chardev-add"}\n{"execute": "accel-set"}\n')
    assert main(["run", "--precreate", "--print-recipe", "--recipe", str(file)]) == 1
    assert capsys.readouterr().err == (
        f"trio-vmm: --recipe: '{file}' is not possible with --precreate: it has accel-set; send that over the monitor\n"
    )


# --- what options become ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "member", "value"),
    [
        (("-boot", "cd"), "boot", {"order": "cd"}),
        (("-boot", "menu=on,order=c"), "boot", {"menu": True, "order": "c"}),
        (("-boot", "reboot-timeout=-1"), "boot", {"reboot-timeout": -1}),
        (("-rtc", "utc"), "rtc", {"base": "utc"}),
        (("-rtc", "base=2006-06-17T16:01:21,clock=vm"), "rtc", {"base": "2006-06-17T16:01:21", "clock": "vm"}),
        (("-smbios", "type=1,uuid=x", "-smbios", "file=/tmp/s"), "smbios",
         [{"type": 1, "uuid": "x"}, {"file": "/tmp/s"}]),
        (("-smbios", "type=11,value=a,,b,value=c"), "smbios", [{"value": ["a,b", "c"], "type": 11}]),
        (("-smbios", "type=0,uefi=on"), "smbios", [{"type": 0, "uefi": True}]),
        (("-acpitable", "data=/tmp/a:/tmp/b,sig=SSDT"), "acpi-tables", [{"data": "/tmp/a:/tmp/b", "sig": "SSDT"}]),
        (("-fw_cfg", "opt/a,file=/tmp/f"), "fw-cfg", [{"name": "opt/a", "file": "/tmp/f"}]),
        (("-option-rom", "/tmp/a", "-option-rom", "romfile=/tmp/b,bootindex=2"), "option-roms",
         [{"romfile": "/tmp/a"}, {"romfile": "/tmp/b", "bootindex": 2}]),
        (("-machine", "accel=kvm"), "type", "microvm"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_an_option_is_a_member_of_machine_set(arguments: tuple[str, ...], member: str, value: object) -> None:
    assert definition(*arguments)[member] == value


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("node", {"type": "node"}),
        ("node,nodeid=1,cpus=0-1,cpus=3,mem=1G", {"type": "node", "nodeid": 1, "cpus": [0, 1, 3], "mem": 1 << 30}),
        ("type=node,memdev=5,initiator=0", {"type": "node", "memdev": "5", "initiator": 0}),
        ("dist,src=0,dst=1,val=20", {"type": "dist", "src": 0, "dst": 1, "val": 20}),
        ("cpu,node-id=0,socket-id=1,core-id=0,thread-id=0",
         {"type": "cpu", "node-id": 0, "socket-id": 1, "core-id": 0, "thread-id": 0}),
        ("hmat-lb,size=4", {"type": "hmat-lb", "size": "4"}),
    ],
)  # fmt: skip
def test_a_numa_option_is_set_numa_node(text: str, arguments: dict[str, object]) -> None:
    assert numa_steps([text]) == [Step("set-numa-node", arguments)]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("host", {"model": "host"}),
        ("host,avx2=off", {"model": "host", "props": {"avx2": False}}),
        ("max,+sse4.1,-aes,rtm", {"model": "max", "props": {"sse4.1": True, "aes": False, "rtm": True}}),
        ("host,x2apic=on,x2apic=off", {"model": "host", "props": {"x2apic": False}}),
    ],
)
def test_a_cpu_option_is_cpu_model_set(text: str, arguments: dict[str, object]) -> None:
    assert cpu_step(text) == Step("cpu-model-set", arguments)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("virtio-rng-device", {"driver": "virtio-rng-device"}),
        ("driver=d,id=5,bus=on,rng=7", {"driver": "d", "id": "5", "bus": "on", "rng": "7"}),
        ("d,max-bytes=1024,period=0x10", {"driver": "d", "max-bytes": 1024, "period": 16}),
        ("d,event_idx=off,packed=on,speed=-1", {"driver": "d", "event_idx": False, "packed": True, "speed": -1}),
        ("d,label=a,,b,size=1G", {"driver": "d", "label": "a,b", "size": "1G"}),
        ('{"driver": "d", "id": "a", "max-bytes": 5}', {"driver": "d", "id": "a", "max-bytes": 5}),
    ],
)
def test_a_device_option_is_device_add_with_typed_values(text: str, arguments: dict[str, object]) -> None:
    assert device_step(text) == Step("device_add", arguments)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("rng-random,id=0,filename=1", {"qom-type": "rng-random", "id": "0", "filename": "1"}),
        ("monitor-qmp,id=m,fd=7", {"qom-type": "monitor-qmp", "id": "m", "fd": 7}),
        (
            "monitor-websocket,id=w,addr.host=::1,addr.port=80",
            {"qom-type": "monitor-websocket", "id": "w", "addr": {"host": "::1", "port": "80"}},
        ),
        ('{"qom-type": "qtest", "chardev": "c"}', {"qom-type": "qtest", "chardev": "c"}),
        (
            "tls-creds-x509,id=t,dir=1,endpoint=server,verify-peer=off",
            {"qom-type": "tls-creds-x509", "id": "t", "dir": "1", "endpoint": "server", "verify-peer": False},
        ),
    ],
)
def test_an_object_option_is_object_add_with_typed_values(text: str, arguments: dict[str, object]) -> None:
    assert object_step(text) == Step("object-add", arguments)


def test_qtest_is_a_chardev_and_an_object_and_connects_as_its_drivers_expect() -> None:
    backend = {"addr": {"type": "unix", "data": {"path": "/run/t"}}, "server": False, "wait": False}
    made = {"execute": "object-add", "arguments": {"qom-type": "qtest", "id": "qtest", "chardev": "qtest"}}
    for text in ("unix:/run/t", "unix:path=/run/t", "unix:/run/t,server=off"):
        assert requests("-qtest", text) == [
            {"execute": "chardev-add", "arguments": {"id": "qtest", "backend": {"type": "socket", "data": backend}}},
            made,
        ]
    assert requests("-qtest", "unix:/run/t,server=on")[0]["arguments"]["backend"]["data"]["server"] is True
    assert requests("-qtest", "chardev:c", "-qtest-log", "none") == [
        {"execute": "object-add",
         "arguments": {"qom-type": "qtest", "id": "qtest", "chardev": "c", "log": "none"}},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "address", "more"),
    [
        ("tcp:h:5", {"host": "h", "port": "5"}, {"server": False}),
        ("tcp:h:5,server=on,wait=off", {"host": "h", "port": "5"}, {"server": True}),
        ("tcp::0,server,nowait,nodelay", {"host": "", "port": "0"}, {"server": True, "nodelay": True}),
        ("tcp:[::1]:5,server=on,to=9,ipv4=off,ipv6=on,numeric=on,keep-alive=on",
         {"host": "::1", "port": "5", "to": 9, "ipv4": False, "ipv6": True, "numeric": True, "keep-alive": True},
         {"server": True}),
    ],
)  # fmt: skip
def test_a_tcp_socket_is_a_socket_chardev_however_it_is_said(
    text: str, address: dict[str, object], more: dict[str, object]
) -> None:
    data = {"addr": {"type": "inet", "data": address}, "wait": False, **more}
    backend = {"type": "socket", "data": data}
    host, port = address["host"], address["port"]
    long = text.replace(f"tcp:[{host}]:{port}", f"socket,id=c,host={host},port={port}")
    long = long.replace(f"tcp:{host}:{port}", f"socket,id=c,host={host},port={port}").replace(",nowait", ",wait=off")
    for option in ("-serial", "-qmp", "-qtest"):
        made = [step for step in requests("-kernel", "k", option, text) if step["execute"] == "chardev-add"]
        assert backend in [step["arguments"]["backend"] for step in made]
    assert requests("-chardev", long)[0] == {"execute": "chardev-add", "arguments": {"id": "c", "backend": backend}}


def test_pipes_are_a_chardev() -> None:
    backend = {"type": "pipe", "data": {"device": "/run/p"}}
    assert requests("-chardev", "pipe,id=c,path=/run/p")[0]["arguments"] == {"id": "c", "backend": backend}
    made = [step for step in requests("-kernel", "k", "-serial", "pipe:/run/p") if step["execute"] == "chardev-add"]
    assert [step["arguments"]["backend"] for step in made] == [backend]
    assert refusal("-qmp", "pipe:/run/p").startswith("-qmp: 'pipe:/run/p' is not unix:PATH")


def test_a_monitor_may_be_over_any_chardev() -> None:
    assert requests("-mon", "c", "-mon", "chardev=d,mode=control,id=m") == [
        {"execute": "object-add", "arguments": {"qom-type": "monitor-qmp", "id": "mon0", "chardev": "c"}},
        {"execute": "object-add", "arguments": {"qom-type": "monitor-qmp", "id": "m", "chardev": "d"}},
    ]
    assert requests("-qmp", "stdio") == [
        {"execute": "chardev-add", "arguments": {"id": "compat_monitor0", "backend": {"type": "stdio", "data": {}}}},
        {"execute": "object-add",
         "arguments": {"qom-type": "monitor-qmp", "id": "qmp_compat_monitor0", "chardev": "compat_monitor0"}},
    ]  # fmt: skip
    data = {"addr": {"type": "fd", "data": {"str": "5"}}, "server": False, "wait": False}
    assert requests("-chardev", "socket,id=mon,fd=5") == [
        {"execute": "chardev-add", "arguments": {"id": "mon", "backend": {"type": "socket", "data": data}}}
    ]


@pytest.mark.parametrize("monitor", [("-qmp", "stdio"), ("-chardev", "stdio,id=c", "-mon", "c")])
def test_beside_a_monitor_on_stdio_no_serial_port_is_there_by_itself(monitor: tuple[str, ...]) -> None:
    assert definition("-kernel", "k", *monitor)["serial"] == []


@pytest.mark.parametrize("monitor", [("-qmp", "unix:/run/q"), ("-mon", "c"), ("-qmp", "stdio"), ("-qtest", "stdio")])
def test_a_monitor_and_nothing_else_implies_nodefaults(monitor: tuple[str, ...]) -> None:
    assert requests(*monitor) == requests("-nodefaults", *monitor)
    assert {step["execute"] for step in requests(*monitor)} <= {"chardev-add", "object-add"}


# --- incoming ---------------------------------------------------------------------------------------------

MAIN = {"channel-type": "main",
        "addr": {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "0"}}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["tcp:127.0.0.1:0", json.dumps(MAIN), "main,addr.transport=socket,addr.type=inet,addr.host=127.0.0.1,addr.port=0"],
)
@pytest.mark.parametrize("cpr_first", [False, True])
def test_incoming_channels_come_in_every_form_and_any_order(text: str, cpr_first: bool) -> None:
    pair = ["-incoming", CPR, "-incoming", text] if cpr_first else ["-incoming", text, "-incoming", CPR]
    (step,) = requests(*pair)
    channels = step["arguments"]["channels"]
    assert sorted(channels, key=lambda channel: str(channel["channel-type"])) == [json.loads(CPR), MAIN]
    assert requests("-incoming", text) == [{"execute": "migrate-incoming", "arguments": {"channels": [MAIN]}}]


def test_the_main_channel_alone_goes_with_a_machine() -> None:
    names = [step["execute"] for step in requests("-incoming", "tcp:127.0.0.1:0", "-kernel", "k", "-serial", "none")]
    assert names == ["migrate-incoming", "machine-set", "accel-set", "cpu-model-set", "finish-machine-init"]


def test_with_incoming_defer_the_machine_waits_for_migrate_incoming() -> None:
    names = [step["execute"] for step in requests("-incoming", "defer", "-kernel", "k", "-serial", "none")]
    assert names == ["machine-set", "accel-set", "cpu-model-set"]


def test_a_snapshot_takes_the_place_of_the_power_on_state() -> None:
    tail = [step["execute"] for step in requests("-kernel", "k", "-serial", "none", "-loadvm", "a")][3:]
    assert tail == ["loadvm"]
    assert requests("-kernel", "k", "-loadvm", "a")[-1] == {"execute": "loadvm", "arguments": {"name": "a"}}


def test_a_snapshot_without_a_machine_brings_its_own() -> None:
    address = {"transport": "file", "filename": "a", "offset": 0}
    assert requests("-loadvm", "a") == [
        {"execute": "migrate-incoming", "arguments": {"channels": [{"channel-type": "main", "addr": address}]}}
    ]


def test_what_an_incoming_machine_may_have_is_named() -> None:
    texts = ("kernel", "chardev/serial0=/tmp/a=b", "object/rng0=fd:7")
    assert requests(*(word for text in texts for word in ("-allow-resource", text))) == [
        {"execute": "x-allow-resource", "arguments": {"name": "kernel"}},
        {"execute": "x-allow-resource", "arguments": {"name": "chardev/serial0", "path": "/tmp/a=b"}},
        {"execute": "x-allow-resource", "arguments": {"name": "object/rng0", "fd": 7}},
    ]


def test_beside_a_cpr_channel_options_say_only_what_is_to_be_otherwise() -> None:
    incoming = ("-incoming", CPR, "-incoming", "tcp:0:0")
    assert [step["execute"] for step in requests(*incoming)] == ["migrate-incoming"]
    stated = ("-name", "b", "-cpu", "host,avx=off", "-device", "d,id=e", "-allow-difference", "cpu-model-set.props")
    allow, listen, *overrides = requests(*incoming, *stated)
    assert allow == {"execute": "x-allow-difference", "arguments": {"names": ["cpu-model-set.props"]}}
    assert listen["execute"] == "migrate-incoming"
    assert overrides == [
        {"execute": "machine-set", "arguments": {"name": "b"}},
        {"execute": "cpu-model-set", "arguments": {"model": "host", "props": {"avx": False}}},
        {"execute": "device_add", "arguments": {"driver": "d", "id": "e"}},
    ]
    machine, accel = requests(*incoming, "-machine", "microvm,accel=kvm")[1:]
    assert machine["arguments"] == {"type": "microvm"}
    assert accel == {"execute": "accel-set", "arguments": {"accel": "kvm"}}


def test_vcpus_may_have_rings_for_what_they_write() -> None:
    accel = next(step for step in requests("-accel", "kvm,dirty-ring-size=4096") if step["execute"] == "accel-set")
    assert accel["arguments"] == {"accel": "kvm", "dirty-ring-size": 4096}


# --- what cannot be ---------------------------------------------------------------------------------------

TCP = "[HOST]:PORT with a decimal port, and an IPv6 address in brackets"

REFUSED = [
    *((((name, "x"), f"{name[1:].capitalize()} 'x' is not supported here; there is none; "
        f"use {name} none or no option")) for name in ABSENT),
    (("-machine", "microvm,usb=on"),
     "Option of -machine 'usb' is not supported here; leave it out; there are type, accel and memory-backend"),
    (("-object", "memory-backend-memfd,id=m,size=16X"),
     "-object: size: '16X' is not a size such as 512, 512M or 2G"),
    (("-machine", "aux-ram-share=off"),
     "Option of -machine 'aux-ram-share=off' is not supported here; it is on, always"),
    (("-machine", "a,b"), "-machine: 'b' is not of the form key=value"),
    (("-machine", "accel=kvm", "-accel", "kvm"), "-accel: 'kvm' is not possible beside -machine accel=; give one"),
    (("-accel", "kvm,dirty-ring-size=many"), "-accel dirty-ring-size: 'many' is not a number, decimal or 0x and "
     "hexadecimal"),
    (("-accel", "kvm,kernel-irqchip=split"), "Option of -accel 'kernel-irqchip' is not supported here; leave it out"),
    (("-cpu", "host,level=5"),
     "-cpu: 'host,level=5' is not MODEL, then features as FEATURE=on, FEATURE=off, +FEATURE or -FEATURE"),
    (("-cpu", "host,"),
     "-cpu: 'host,' is not MODEL, then features as FEATURE=on, FEATURE=off, +FEATURE or -FEATURE"),
    (("-boot", "menu=yes"), "-boot: menu: 'yes' is not on or off"),
    (("-boot", "splash-time=soon"), "-boot: splash-time: 'soon' is not a number, decimal or 0x and hexadecimal"),
    (("-boot", "a.b=c"), "-boot: 'a.b' is not the name of a member"),
    (("-rtc", "base=utc,base=utc"), "-rtc: 'base' is not to be given twice"),
    (("-numa", "node,cpus=3-1"), "-numa: cpus: '3-1' is not numbers or ranges such as 0-3"),
    (("-numa", "node,cpus=0-99999999"), "-numa: cpus: '0-99999999' is not numbers or ranges such as 0-3"),
    (("-numa", "node,mem=much"), "-numa: mem: 'much' is not a size such as 512, 512M or 2G"),
    (("-numa", "dist,src=a"), "-numa: src: 'a' is not a number, decimal or 0x and hexadecimal"),
    (("-device", "d,id"), "-device: 'id' is not of the form key=value"),
    (("-device", "{"), "-device: '{' is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
     "(char 1))"),
    (("-object", '{"a": 1} x'), "-object: '{\"a\": 1} x' is not JSON (Extra data: line 1 column 10 (char 9))"),
    (("-mon", "mode=control"), "-mon: 'mode=control' is not complete: it needs chardev=ID"),
    (("-mon", "c,mode=readline"),
     "Monitor mode 'readline' is not supported here; there is control, which is QMP"),
    (("-mon", "c,pretty=on"), "Option of -mon 'pretty' is not supported here; leave it out"),
    (("-mon", "c,x=y"), "Option of -mon 'x' is not supported here; leave it out"),
    (("-chardev", "socket,id=c,fd=mon"), "-chardev: 'socket,id=c,fd=mon' is not possible: fd is the number of a "
     "socket that this process was started with"),
    (("-chardev", "socket,id=c,fd=3,path=/run/q"),
     "Option of chardev kind socket 'fd' is not supported here; leave it out"),
    (("-qmp", "chardev:"), "-qmp: 'chardev:' is not unix:PATH[,server=on][,wait=off], "
     "tcp:HOST:PORT[,server=on][,wait=off], stdio, chardev:ID or fd:N"),
    (("-qtest", "vc"), "-qtest: 'vc' is not unix:PATH[,server=on|off], tcp:HOST:PORT[,server=on], stdio or chardev:ID"),
    (("-serial", "tcp:h"), f"-serial: 'h' is not {TCP}"),
    (("-qmp", "tcp:h:http"), f"-qmp: 'h:http' is not {TCP}"),
    (("-serial", "tcp:::1:5"), f"-serial: '::1:5' is not {TCP}"),
    (("-serial", "tcp:h:5,port=6"), "-serial: 'h:5,port=6' is not possible: port is given twice"),
    (("-serial", "tcp:h:5,server=on,wait=on"), "-serial: 'h:5,server=on,wait=on' is not possible: use wait=off"),
    (("-serial", "tcp:h:5,nodelay=yes"), "-serial: 'h:5,nodelay=yes' is not possible: nodelay is on or off"),
    (("-serial", "tcp:h:5,ipv4=1"), "-serial: ipv4: '1' is not on or off"),
    (("-serial", "tcp:h:5,reconnect-ms=10"), "Option of tcp: 'reconnect-ms' is not supported here; leave it out; "
     "there are server, wait, nodelay, to, ipv4, ipv6, numeric, keep-alive"),
    (("-chardev", "socket,id=c,port=5,to=x"), "-chardev: to: 'x' is not a number, decimal or 0x and hexadecimal"),
    (("-chardev", "socket,id=c,host=h,path=/run/q"),
     "Option of chardev kind socket 'host' is not supported here; leave it out"),
    (("-chardev", "socket,id=c,host=h,port=5,telnet=on"),
     "Option of chardev kind socket 'telnet' is not supported here; leave it out"),
    (("-chardev", "socket,id=c,host=h,port=5,reconnect=1"),
     "Option of chardev kind socket 'reconnect' is not supported here; leave it out"),
    (("-chardev", "socket,id=c,path=/run/q,nodelay=on"),
     "Option of chardev kind socket 'nodelay' is not supported here; leave it out"),
    (("-qtest", "unix:"), "-qtest: '' is not a socket with a path"),
    (("-qtest-log", "none"), "-qtest-log: 'none' is not possible without -qtest"),
    (("-incoming", "defer", "-incoming", "tcp:0:0"), "-incoming: 'defer' is not possible beside a channel: "
     "name all of them by -incoming, or all by migrate-incoming"),
    (("-preconfig", "-kernel", "k", "-loadvm", "a"),
     "-loadvm: 'a' is not possible with --preconfig: send loadvm over the monitor"),
    (("-incoming", CPR, "-incoming", "tcp:0:0", "-serial", "pty"), "-serial: ['pty'] is not possible with -incoming "
     "with a cpr channel: the serial ports come from the source; send chardev-add with the id of one to replace what "
     "it writes to"),
    (("-incoming", CPR, "-incoming", "tcp:0:0", "-loadvm", "a"), "-loadvm: 'a' is not possible with -incoming with "
     "a cpr channel: the machine's state comes from the source"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "text"), REFUSED, ids=[" ".join(row[0])[:40] for row in REFUSED])
def test_an_option_that_cannot_be_is_refused_in_one_sentence(arguments: tuple[str, ...], text: str) -> None:
    assert refusal(*arguments) == text


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (("=/tmp/a",), "'=/tmp/a' is not of the form NAME, NAME=PATH or NAME=fd:N"),
        (("a=",), "'a=' is not of the form NAME, NAME=PATH or NAME=fd:N"),
        (("a=fd:x",), "'a=fd:x' is not of the form NAME, NAME=PATH or NAME=fd:N"),
        (("a=b", "a=c"), "'a=c' is not possible: a is named twice"),
    ],
)
def test_a_resource_that_is_named_wrongly_is_refused(texts: tuple[str, ...], reason: str) -> None:
    options = [word for text in texts for word in ("-allow-resource", text)]
    assert refusal(*options) == f"-allow-resource: {reason}"


@settings(deadline=None)
@given(st.sampled_from([option for option in OPTIONS if option.metavar]), st.text(max_size=40))
def test_whatever_an_option_says_it_is_commands_or_refused(option: Option, text: str) -> None:
    options = parse()
    setattr(options, option.attribute, [text] if option.repeated else text)
    try:
        recipe_of(options)
    except VmmError:
        return
