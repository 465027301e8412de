"""`trio-vmm run` as its users see it: what it says, its exit status, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.hw.boot.images import MIB, bzimage
from tests.qmp.kit import HALT, PULL_RESET, TRIO_VMM, Done, debug_exit, flat_guest, machine, trio_vmm

if TYPE_CHECKING:
    from pathlib import Path

CLI = "trio-vmm: Recipe of the command line, command"


async def refused(directory: Path, *arguments: str | Path) -> str:
    """Run `trio-vmm run` in `directory`, which must refuse in one sentence and leave nothing there; return it."""
    before = sorted(os.listdir(directory))
    done = await trio_vmm("run", *arguments, cwd=directory)
    assert (done.status, done.out) == (1, ""), done
    assert sorted(os.listdir(directory)) == before
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1, done.err
    return done.err.rstrip("\n")


# --- nothing to do ----------------------------------------------------------------------------------------


async def test_without_a_command_the_usage_is_printed() -> None:
    assert await trio_vmm() == Done(1, "", "usage: trio-vmm [-h] COMMAND ...\n")


@pytest.mark.parametrize("options", [(), ("-S",), ("--preconfig", "-nodefaults"), ("-incoming", "defer")])
async def test_without_a_monitor_or_a_machine_the_usage_is_printed(options: tuple[str, ...]) -> None:
    done = await trio_vmm("run", *options)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("usage: trio-vmm run [-h] ")
    assert done.err.endswith(
        "\ntrio-vmm run: nothing to run: give a monitor (-qmp unix:PATH) or a machine (-kernel FILE)\n"
    )


async def test_help_is_no_error() -> None:
    done = await trio_vmm("run", "--help")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("usage: trio-vmm run ")
    assert "x-cpr-stop-at" not in done.out


# --- options that cannot be -------------------------------------------------------------------------------

REFUSED = {
    # No such option, or no value.
    "-bogus": "trio-vmm: unrecognized arguments: -bogus",
    "extra": "trio-vmm: unrecognized arguments: extra",
    "-kernel": "trio-vmm run: argument -kernel: expected one argument",
    # QEMU has them, this VMM has not.
    "-machine q35 -kernel k": f"{CLI} 2 (machine-set): Machine type 'q35' is not supported here; "
    "the one there is is microvm",
    "-M pc -kernel k": f"{CLI} 2 (machine-set): Machine type 'pc' is not supported here; the one there is is microvm",
    "-accel tcg -kernel builtin:heartbeat": f"{CLI} 3 (accel-set): Accelerator 'tcg' is not supported here; "
    "there are kvm, and qtest for tests",
    "-display gtk -kernel k": "trio-vmm: Display 'gtk' is not supported here; "
    "there is none; use -display none or no option",
    "-chardev vc,id=a -qmp unix:q": "trio-vmm: Chardev kind 'vc' is not supported here; "
    "there are file, null, pipe, pty, socket, stdio",
    "-chardev socket,id=a,path=p,tls-creds=t -qmp unix:q": "trio-vmm: Option of chardev kind socket 'tls-creds' "
    "is not supported here; leave it out",
    # Sizes and counts.
    "-m abc -kernel k": "trio-vmm: -m: 'abc' is not a size such as 512, 512M or 2G",
    "-m -5 -kernel k": "trio-vmm: -m: '-5' is not a size such as 512, 512M or 2G",
    "-m 0 -kernel k": f"{CLI} 2 (machine-set): memory.size: 0 is not a multiple of 4 KiB between 1 MiB and 1 TiB",
    "-m 1048577M -kernel k": f"{CLI} 2 (machine-set): memory.size: 1099512676352 is not a multiple of 4 KiB "
    "between 1 MiB and 1 TiB",
    "-m 1048577b -kernel k": f"{CLI} 2 (machine-set): memory.size: 1048577 is not a multiple of 4 KiB "
    "between 1 MiB and 1 TiB",
    "-m 99999999T -kernel k": f"{CLI} 2 (machine-set): Command 'machine-set': 'memory.size' is "
    "109951161678088372224, outside -9223372036854775808 to 9223372036854775807 (int)",
    "-smp 0 -kernel k": f"{CLI} 2 (machine-set): smp.cpus: 0 is not a number of vCPUs from 1 to 8",
    "-smp 9 -kernel k": f"{CLI} 2 (machine-set): smp.cpus: 9 is not a number of vCPUs from 1 to 8",
    "-smp many -kernel k": "trio-vmm: -smp: 'many' is not [cpus=]N with N a number of vCPUs from 1 to 8",
    "-smp 2,maxcpus=4 -kernel k": f"{CLI} 2 (machine-set): smp.maxcpus: 4 is not 2, the only value with 2 vCPUs "
    "(one socket, a core each, no hot plug)",
    "-serial null -serial null -serial null -kernel k": f"{CLI} 4 (machine-set): serial: ['serial0', 'serial1', "
    "'serial2'] is not at most two chardevs (COM1 and COM2)",
    "-uuid 1 -kernel k": f"{CLI} 2 (machine-set): uuid: '1' is not a UUID such as "
    "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
    # What does not go together.
    "-m 64": "trio-vmm: nothing to boot: give -kernel FILE, or a monitor (-qmp unix:PATH) to go on with",
    "-initrd i -qmp unix:q": f"{CLI} 4 (machine-set): initrd: 'i' is not possible without a kernel",
    "-append a -qmp unix:q": f"{CLI} 4 (machine-set): append: 'a' is not possible without a kernel",
    "--precreate -kernel k": "trio-vmm: -kernel: 'k' is not possible with --precreate, which admits monitors only: "
    "send machine-set",
    "--preconfig -kernel k -cpu host": "trio-vmm: -cpu: 'host' is not possible with --preconfig: "
    "send cpu-model-set over the monitor",
    # Character devices and monitors.
    "-qmp tcp:localhost": "trio-vmm: -qmp: 'localhost' is not [HOST]:PORT with a decimal port, and an IPv6 address "
    "in brackets",
    "-qmp tcp:127.0.0.1:1": f"{CLI} 1 (chardev-add): Cannot connect to 127.0.0.1 port 1: Connection refused",
    "-qmp unix:q,wait=on": "trio-vmm: -qmp: 'q,wait=on' is not possible: wait=on would hold up the monitor; "
    "use wait=off",
    "-qmp fd:77": f"{CLI} 1 (object-add): Descriptor '77' is not open, not a connected unix socket",
    "-qmp unix:none/q": f"{CLI} 1 (chardev-add): Cannot listen on none/q: No such file or directory",
    "-qmp unix:f": f"{CLI} 1 (chardev-add): Cannot listen on f: it is a regular file, not a socket, and was left alone",
    f"-qmp unix:{'x' * 108}": f"{CLI} 1 (chardev-add): Cannot listen on {'x' * 108}: a socket path has at most 107 "
    "bytes, and this one has 108",
    "-qmp unix:q -qmp unix:q": f"{CLI} 3 (chardev-add): Cannot listen on q: another process answers there; "
    "stop it or choose another path",
    "-qmp unix:q -qmp chardev:c": f"{CLI} 3 (object-add): Chardev 'c' does not exist; there are: compat_monitor0",
    "-serial bogus -kernel k": "trio-vmm: -serial: 'bogus' is not null, stdio, pty, file:PATH, pipe:PATH, "
    "unix:PATH[,server=on], tcp:[HOST]:PORT[,server=on][,nodelay=on] or chardev:ID",
    "-serial chardev:c -kernel builtin:heartbeat": f"{CLI} 1 (machine-set): Chardev 'c' does not exist; "
    "there are: none",
    "-serial file:none/s -kernel k": f"{CLI} 1 (chardev-add): Cannot write none/s: No such file or directory",
    "-serial unix:none/s -kernel k": f"{CLI} 1 (chardev-add): Cannot listen on none/s: No such file or directory",
    "-chardev null -qmp unix:q": "trio-vmm: -chardev: 'null' is not complete: it needs id=NAME",
    "-chardev file,id=a -qmp unix:q": "trio-vmm: -chardev: 'file,id=a' is not complete: it needs path=PATH",
    "-chardev null,id=a -chardev null,id=a -qmp unix:q": f"{CLI} 2 (chardev-add): Chardev 'a' exists already; "
    "choose another name",
    # Recipes.
    "--recipe none": "trio-vmm: Cannot read none: No such file or directory",
    "--recipe .": "trio-vmm: Cannot read .: it is a directory, not a regular file",
    # Kernels.
    "-kernel none": f"{CLI} 2 (machine-set): Cannot read none: No such file or directory",
    "-kernel f": f"{CLI} 2 (machine-set): Cannot boot f: it is empty",
    "-kernel builtin:x": f"{CLI} 2 (machine-set): Cannot boot built-in guest 'x': there are heartbeat, deadline, "
    "chatter, dirtier",
    "-kernel k -initrd none": f"{CLI} 2 (machine-set): Cannot read none: No such file or directory",
}  # fmt: skip


@pytest.mark.parametrize("options", REFUSED)
async def test_what_cannot_be_is_refused_in_one_sentence(tmp_path: Path, options: str) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "k").write_bytes(bzimage())
    assert await refused(tmp_path, *options.split()) == REFUSED[options]


@pytest.mark.kvm
async def test_an_unknown_cpu_model_is_refused(tmp_path: Path) -> None:
    said = await refused(tmp_path, "-cpu", "qemu64", "-kernel", "builtin:heartbeat", "-serial", "null")
    assert said == (
        f"{CLI} 4 (cpu-model-set): CPU model 'qemu64' is not supported here; "
        "use host, which is all that this host's KVM offers, or base with the features that props names"
    )


# --- kernels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (
            b"no kernel\n" * 100,
            "it is neither a bzImage nor an ELF kernel; if it is a flat real-mode image, say flat:k",
        ),
        (bzimage()[:0x250], "it is truncated: 592 bytes do not hold a setup header"),
        (bzimage(payload=bytes(1600))[:-1], "it is truncated: its header promises 3136 bytes, the file has 3135"),
        (bzimage(version=0x210), "it speaks boot protocol 2.16, and 2.12 to 2.15 are known here"),
        (bzimage(xloadflags=0), "it has no 64-bit entry (XLF_KERNEL_64); a kernel built for x86-64 has one"),
        (
            bzimage(init_size=128 * MIB),
            "it needs RAM up to 0x8200000, and of 128 MiB what lies below 4 GiB ends at 0x8000000; "
            "give the machine at least 130 MiB",
        ),
    ],
    ids=["no kernel", "cut in its header", "cut in the kernel", "newer than known", "for 32 bits", "larger than RAM"],
)
async def test_a_kernel_that_cannot_be_booted_is_refused(tmp_path: Path, image: bytes, reason: str) -> None:
    (tmp_path / "k").write_bytes(image)
    said = await refused(tmp_path, "-kernel", "k", "-serial", "unix:s")
    assert said == f"{CLI} 2 (machine-set): Cannot boot k: {reason}"


async def test_an_initrd_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(bzimage())
    with (tmp_path / "i").open("wb") as file:
        file.truncate(41 * MIB)
    said = await refused(tmp_path, "-kernel", "k", "-initrd", "i", "-m", "64", "-serial", "null")
    assert said == (
        f"{CLI} 2 (machine-set): Cannot boot k: initrd i has 41 MiB, and of 64 MiB of RAM the kernel leaves it 40 MiB; "
        "give the machine at least 65 MiB"
    )


# --- /dev/kvm ---------------------------------------------------------------------------------------------

UNSHARE = shutil.which("unshare")
SETPRIV = shutil.which("setpriv")


def can_mount() -> bool:
    """Say whether a mount namespace of our own can be had."""
    script = "mount -t tmpfs none /dev"
    return bool(UNSHARE and SETPRIV) and not subprocess.run(["unshare", "-m", "sh", "-c", script], check=False,
                                                            capture_output=True).returncode  # fmt: skip


async def run_after(script: str, directory: Path, *command: str) -> Done:
    """Run `trio-vmm run` with a heartbeat in a mount namespace that `script` has changed."""
    options = "run -kernel builtin:heartbeat -serial unix:s -qmp unix:q"
    whole = f"{script} && exec {' '.join(command)} {TRIO_VMM} {options}"
    with trio.fail_after(60):
        done = await trio.run_process(
            ["unshare", "-m", "sh", "-c", whole], capture_stdout=True, capture_stderr=True, check=False, cwd=directory
        )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.skipif(not can_mount(), reason="mount namespaces take root, unshare and setpriv")
@pytest.mark.parametrize(
    ("script", "command", "reason"),
    [
        (
            "mount -t tmpfs none /dev",
            (),
            "it does not exist; load the module kvm_intel or kvm_amd, and enable virtualization in the firmware",
        ),
        (
            "touch other && chmod 0 other && mount --bind other /dev/kvm && rm -f other",
            ("setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search"),
            "uid 0 may not open it for reading and writing; add the user to the group that owns it (root, usually kvm) "
            "and log in again",
        ),
        (
            "mount --bind /dev/zero /dev/kvm",
            (),
            "it is not a KVM device; it must be the character device of KVM",
        ),
    ],
    ids=["missing", "no right to it", "not KVM"],
)
@pytest.mark.kvm
async def test_a_machine_without_kvm_is_refused(
    tmp_path: Path, script: str, command: tuple[str, ...], reason: str
) -> None:
    done = await run_after(script, tmp_path, *command)
    assert done == Done(1, "", f"{CLI} 5 (accel-set): Cannot use /dev/kvm: {reason}\n")
    assert os.listdir(tmp_path) == []


# --- sockets that are there already -----------------------------------------------------------------------


async def test_the_socket_of_a_live_process_is_left_to_it(tmp_path: Path) -> None:
    path = str(tmp_path / "q")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        assert await refused(tmp_path, "-qmp", "unix:q") == (
            f"{CLI} 1 (chardev-add): Cannot listen on q: another process answers there; stop it or choose another path"
        )
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)


async def test_the_socket_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "qmp"))
    async with machine(tmp_path) as m, m.session() as session:
        assert (await session.execute("query-status"))["status"] == "prelaunch"


async def test_a_second_process_leaves_the_first_one_its_socket(tmp_path: Path) -> None:
    async with machine(tmp_path) as m:
        assert "another process answers there" in await refused(tmp_path, "-qmp", f"unix:{m.path}")
        async with m.session() as session:
            await session.execute("query-status")


# --- recipes ----------------------------------------------------------------------------------------------


def recipe_file(directory: Path, *requests: dict[str, Any]) -> Path:
    path = directory / "recipe"
    path.write_text("# A comment.\n" + "".join(f"{json.dumps(request)}\n" for request in requests))
    return path


def chardev_add(name: str, **backend: Any) -> dict[str, Any]:
    return {"execute": "chardev-add", "arguments": {"id": name, "backend": backend}}


def unix_socket(path: str) -> dict[str, Any]:
    return {"addr": {"type": "unix", "data": {"path": path}}, "server": True, "wait": False}


async def test_a_recipe_whose_third_command_fails_leaves_nothing_of_the_first_two(tmp_path: Path) -> None:
    recipe = recipe_file(
        tmp_path,
        chardev_add("a", type="socket", data=unix_socket("s")),
        chardev_add("b", type="null", data={}),
        chardev_add("b", type="null", data={}),
        {"execute": "machine-set"},
    )
    assert await refused(tmp_path, "--recipe", "recipe") == (
        "trio-vmm: Recipe recipe, command 3 (chardev-add): Chardev 'b' exists already; choose another name"
    )
    assert recipe.exists()


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ("\n# x\n{'a': 1}\n", "line 3", "no JSON object: Expecting property name enclosed in double quotes"),
        ('{"execute": "a"}\n[1]\n', "line 2", "a command must be a JSON object"),
        ("{}", "line 1", "member 'execute' with the command's name is missing"),
        ('{"execute": "a", "arguments": 1}', "line 1", "member 'arguments' must be an object"),
        (
            '{"execute": "a", "id": 1}', "line 1",
            "member 'id' is unexpected; only execute and arguments are allowed",
        ),
        ('{"execute": "a"', "line 1", "no JSON object: Expecting ',' delimiter"),
        (
            '{"execute": "no-such-cmd"}', "command 1 (no-such-cmd)",
            "There is no command 'no-such-cmd'; query-commands lists those there are",
        ),
        (
            '{"execute": "cont"}', "command 1 (cont)",
            "Command 'cont' needs may-run-vcpus, which phase boot/precreate does not grant; phases that grant it: "
            "preconfig (reached by accel-set), devices (reached by cpu-model-set or x-exit-preconfig), "
            "incoming (reached by an incoming migration), running (reached by finish-machine-init or cont), "
            "postmigrate (reached by a migration that completed)",
        ),
    ],
)  # fmt: skip
async def test_a_recipe_that_is_wrong_is_refused_with_the_place(
    tmp_path: Path, text: str, where: str, reason: str
) -> None:
    (tmp_path / "recipe").write_text(text)
    assert await refused(tmp_path, "--recipe", "recipe") == f"trio-vmm: Recipe recipe, {where}: {reason}"


async def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe").write_bytes(b"\x7fELF\xff\xfe\0\0")
    assert await refused(tmp_path, "--recipe", "recipe") == (
        "trio-vmm: Recipe recipe, line 1: no JSON object: Expecting value"
    )


async def test_print_recipe_shows_the_options_as_commands_in_the_order_of_the_phases(tmp_path: Path) -> None:
    done = await trio_vmm(
        "run", "-S", "-kernel", "k", "-append", "a b", "-smp", "2", "-m", "1G", "-serial", "null", "-qmp", "unix:q",
        "-name", "guest=n", "-no-reboot", "--print-recipe", cwd=tmp_path,
    )  # fmt: skip
    assert (done.status, done.err) == (0, "")
    printed = [json.loads(line) for line in done.out.splitlines()]
    assert [request["execute"] for request in printed] == [
        "chardev-add", "object-add", "chardev-add", "machine-set", "accel-set", "cpu-model-set", "finish-machine-init",
    ]  # fmt: skip
    settings = next(request["arguments"] for request in printed if request["execute"] == "machine-set")
    assert settings == {
        "type": "microvm", "name": "n", "memory": {"size": 1 << 30}, "smp": {"cpus": 2}, "kernel": "k",
        "append": "a b", "reboot-action": "shutdown", "serial": ["serial0"],
    }  # fmt: skip
    assert os.listdir(tmp_path) == []


@pytest.mark.kvm
async def test_a_printed_recipe_makes_the_machine_that_it_was_printed_for(tmp_path: Path) -> None:
    kernel = flat_guest(tmp_path, HALT)
    printed = await trio_vmm("run", "-kernel", kernel, "-m", "2", "-smp", "2", "-serial", "null", "--print-recipe")
    (tmp_path / "recipe").write_text(printed.out)
    async with machine(tmp_path, "--recipe", tmp_path / "recipe") as m:
        await m.until_running()
        assert len(await m.qmp.execute("query-cpus-fast")) == 2


# --- the end ----------------------------------------------------------------------------------------------

GUESTS = [
    pytest.param((), id="no machine"),
    pytest.param(("-m", "2", "-smp", "2", "-serial", "null"), id="a machine", marks=pytest.mark.kvm),
]


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_ends_the_process_in_order(tmp_path: Path, number: int, guest: tuple[str, ...]) -> None:
    options = ("-kernel", flat_guest(tmp_path, HALT), *guest) if guest else ()
    async with machine(tmp_path, *options) as m, m.session() as other:
        if guest:
            await m.until_running()
        m.process.send_signal(number)
        for session in (m.qmp, other):
            event = await session.wait_event(lambda event: event["event"] == "SHUTDOWN")
            assert event["data"] == {"guest": False, "reason": "host-signal"}
        assert await m.ended() == Done(0, "", "")


async def test_quit_is_answered_then_shutdown_is_the_last_event(tmp_path: Path) -> None:
    async with machine(tmp_path) as m, await m.raw() as raw:
        await raw.negotiate()
        assert await raw.ask({"execute": "quit", "id": 7}) == {"return": {}, "id": 7}
        messages = []
        while message := await raw.message():
            messages.append(message)
        last = messages[-1]
        assert (last["event"], last["data"]) == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        assert await m.ended() == Done(0, "", "")


@pytest.mark.kvm
@pytest.mark.parametrize("value", [0, 1, 63])
async def test_the_debug_exit_port_makes_the_exit_status(tmp_path: Path, value: int) -> None:
    guest = flat_guest(tmp_path, debug_exit(value))
    assert await trio_vmm("run", "-kernel", guest, "-m", "2", "-serial", "null") == Done(value << 1 | 1, "", "")


@pytest.mark.kvm
async def test_with_no_reboot_a_reset_by_the_guest_is_the_end(tmp_path: Path) -> None:
    guest = flat_guest(tmp_path, PULL_RESET)
    async with machine(tmp_path, "-kernel", guest, "-m", "2", "-serial", "null", "-no-reboot") as m:
        assert await m.event("SHUTDOWN") == {"guest": True, "reason": "guest-reset"}
        assert await m.ended() == Done(0, "", "")


@pytest.mark.kvm
async def test_a_guest_that_resets_itself_begins_anew(tmp_path: Path) -> None:
    async with machine(tmp_path, "-kernel", flat_guest(tmp_path, PULL_RESET), "-m", "2", "-serial", "null") as m:
        for _ in range(3):
            assert await m.event("RESET") == {"guest": True, "reason": "guest-reset"}
        assert (await m.qmp.execute("query-status"))["status"] == "running"


# --- waiting for commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--precreate",), ("-precreate",), ("-nodefaults", "-nographic", "-S")])
async def test_a_monitor_and_nothing_to_boot_wait_in_precreate(tmp_path: Path, options: tuple[str, ...]) -> None:
    async with machine(tmp_path, *options) as m:
        assert await m.qmp.execute("query-machine-phase") == {"phase": "no-machine", "path": "boot/precreate"}
        assert await m.qmp.execute("query-status") == {"running": False, "status": "prelaunch"}


@pytest.mark.kvm
async def test_with_stopped_the_machine_is_complete_and_stands(tmp_path: Path) -> None:
    guest = flat_guest(tmp_path, debug_exit(1))
    async with machine(tmp_path, "-S", "-kernel", guest, "-m", "2", "-serial", "null") as m:
        await m.until_phase("running")
        assert await m.qmp.execute("query-status") == {"running": False, "status": "prelaunch"}
        await m.qmp.execute("cont")
        assert (await m.ended()).status == 3


# --- incoming ---------------------------------------------------------------------------------------------


async def test_a_port_that_the_host_chooses_is_told(tmp_path: Path) -> None:
    async with machine(tmp_path, "-incoming", "tcp:127.0.0.1:0") as m:
        await m.qmp.execute("migrate-set-capabilities", capabilities=[])  # waits until the recipe is carried out
        found = await m.qmp.execute("query-migrate")
        assert found["status"] == "setup"
        (address,) = found["socket-address"]
        assert (address["type"], address["host"]) == ("inet", "127.0.0.1")
        assert 0 < int(address["port"]) <= 0xFFFF
        assert (await m.quit()).status == 0


@pytest.mark.kvm
async def test_with_incoming_defer_a_machine_waits_until_it_is_told_where_its_guest_comes_in(tmp_path: Path) -> None:
    guest = ("-kernel", flat_guest(tmp_path, HALT), "-m", "2", "-serial", "null")
    async with machine(tmp_path, "-incoming", "defer", *guest) as m:
        await m.until_phase("devices")
        await m.qmp.execute("migrate-incoming", uri=f"unix:{tmp_path}/main")
        assert (await m.qmp.execute("query-status"))["status"] == "inmigrate"
        assert (await m.quit()).status == 0
    assert "main" not in os.listdir(tmp_path)


@pytest.mark.kvm
async def test_a_saved_guest_is_loaded_into_its_machine_or_brings_it(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    guest = ("-kernel", flat_guest(tmp_path, HALT), "-m", "2", "-serial", "null")
    async with machine(tmp_path, *guest) as m:
        await m.until_running()
        await m.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        await m.qmp.execute("migrate", uri=f"file:{saved}")
        await m.event("MIGRATION", lambda data: data["status"] == "completed")
        assert (await m.quit()).status == 0
    for options in ((*guest, "-loadvm", saved), ("-loadvm", saved, "-allow-resource", f"kernel={tmp_path}/guest.bin")):
        async with machine(tmp_path, *options) as m:
            await m.until_running()
            assert (await m.quit()).status == 0
