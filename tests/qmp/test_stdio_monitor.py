"""Monitors over standard input and output, and over descriptors that the process was started with."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import pytest
import trio

from tests.qmp.kit import PATIENCE, TRIO_VMM, Done, environment, machine, trio_vmm
from vmm.qmp_client import qmp_over, qmp_session

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from vmm.qmp_client import QmpClient

pytestmark = pytest.mark.usefixtures("no_leaks")

NEGOTIATE: Final = b"{'execute': 'qmp_capabilities'}"
STATUS: Final = b"{'execute': 'query-status', 'id': 1}"
ANSWER: Final = {"return": {"running": False, "status": "prelaunch"}, "id": 1}


@final
@attrs.define(eq=False)
class Talk:
    """A process, and the pipes to its standard input and from its standard output."""

    process: trio.Process
    directory: Path
    lines: list[bytes] = attrs.Factory(list)
    _data: bytes = b""

    async def say(self, data: bytes) -> None:
        """Write to its standard input."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(data)

    async def hang_up(self) -> None:
        """Close its standard input."""
        assert self.process.stdin is not None
        await self.process.stdin.aclose()

    async def message(self) -> Any:
        """Read one message from its standard output; None at the end."""
        assert self.process.stdout is not None
        while b"\r\n" not in self._data:
            data = await self.process.stdout.receive_some()
            if not data:
                assert self._data == b""
                return None
            self._data += data
        line, _, self._data = self._data.partition(b"\r\n")
        return json.loads(line)

    async def reply(self) -> Any:
        """Read one message that is no event."""
        while "event" in (message := await self.message() or {}):
            pass
        return message

    async def begin(self) -> None:
        """Read the greeting and enter command mode."""
        assert "QMP" in await self.message()
        await self.say(NEGOTIATE)
        assert await self.reply() == {"return": {}}

    async def ended(self) -> tuple[int, str]:
        """Wait for the end; return the exit status and what it said on standard error."""
        return await self.process.wait(), (self.directory / "stderr").read_text()


@asynccontextmanager
async def talk(directory: Path, *options: str, **how: Any) -> AsyncGenerator[Talk, None]:
    """Run `trio-vmm run` with `options`, its standard input and output pipes unless `how` says otherwise."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, **how}
    with (directory / "stderr").open("wb") as err:
        process = await trio.lowlevel.open_process([TRIO_VMM, "run", *options], stderr=err, env=environment(), **pipes)
    try:
        with trio.fail_after(PATIENCE):
            yield Talk(process, directory)
    finally:
        if process.returncode is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()


async def begun(client: QmpClient) -> None:
    """Wait until the command line's recipe has been carried out: commands that may change something do."""
    await client.execute("migrate-set-capabilities", capabilities=[])


# --- stdio ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [("-qmp", "stdio"), ("-chardev", "stdio,id=c", "-mon", "chardev=c,mode=control"),
     ("-chardev", "stdio,id=c", "-qmp", "chardev:c"),
     ("--precreate", "-chardev", "stdio,id=c", "-object", "monitor-qmp,id=m,chardev=c")],
    ids=["qmp", "mon", "chardev", "object"],
)  # fmt: skip
async def test_a_monitor_on_stdio_greets_answers_and_says_nothing_else(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    async with talk(tmp_path, *options) as it:
        await it.begin()
        await it.say(STATUS + b"{'execute': 'no-such-cmd'}")
        assert await it.reply() == ANSWER
        assert (await it.reply())["error"]["class"] == "CommandNotFound"
        await it.say(b"{'execute': 'quit'}")
        assert await it.reply() == {"return": {}}
        messages = []
        while message := await it.message():
            messages.append(message)
        assert all("event" in message for message in messages)
        assert messages[-1]["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert await it.ended() == (0, "")


async def test_what_was_sent_before_the_end_of_input_is_answered_and_the_machine_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    async with talk(tmp_path, "-qmp", f"unix:{path}", "-qmp", "stdio") as it:
        await it.say(NEGOTIATE + STATUS)
        await it.hang_up()
        assert "QMP" in await it.message()
        assert await it.reply() == {"return": {}}
        assert await it.reply() == ANSWER
        async with qmp_session(str(path)) as other:
            while (await other.execute("query-monitors"))[1]["clients"]:
                await trio.lowlevel.checkpoint()
            assert await other.execute("query-status") == ANSWER["return"]
            await other.execute("quit")
        assert await it.ended() == (0, "")


async def test_a_reader_that_has_gone_is_survived(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ours, theirs = socket.socketpair()
    options = ("-qmp", "stdio", "-qmp", f"fd:{theirs.fileno()}")
    async with talk(tmp_path, *options, stdout=writing, pass_fds=(theirs.fileno(),)) as it:
        os.close(writing)
        theirs.close()
        async with qmp_over(ours, "the test's own socket") as other:
            while (await other.execute("query-monitors"))[0]["clients"]:
                await trio.lowlevel.checkpoint()
            await other.execute("quit")
        assert await it.ended() == (0, "")


async def test_input_may_be_nothing_and_output_a_file(tmp_path: Path) -> None:
    async with machine(tmp_path, "-qmp", "stdio") as m:
        await begun(m.qmp)
        found = {entry["id"]: entry for entry in await m.qmp.execute("query-monitors")}
        assert found["qmp_compat_monitor2"]["chardev"] == "compat_monitor2"
        done = await m.quit()
    assert (done.status, done.err) == (0, "")
    assert "QMP" in json.loads(done.out.splitlines()[0])


async def test_a_terminal_stays_as_it_was_and_carries_lines(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    async with talk(tmp_path, "-qmp", "stdio", stdin=slave, stdout=slave) as it:
        terminal = trio.lowlevel.FdStream(os.dup(master))
        async with terminal:
            seen = b""
            while b'{"QMP"' not in seen or not seen.endswith(b"\n"):
                seen += await terminal.receive_some()
            assert termios.tcgetattr(slave) == before
            await terminal.send_all(b"{'execute': 'qmp_capabilities'}\n")
            while b'{"return": {}}' not in seen:
                seen += await terminal.receive_some()
            it.process.send_signal(signal.SIGTERM)
            assert await it.ended() == (0, "")
        assert termios.tcgetattr(slave) == before
        assert os.get_blocking(slave)
    os.close(slave)
    os.close(master)


@pytest.mark.parametrize(
    ("options", "user"),
    [
        (("-qmp", "stdio", "-qmp", "stdio"), "command 3 (chardev-add): Chardev kind 'stdio' is in use by chardev "
         "'compat_monitor0'"),
        (("-qmp", "stdio", "-serial", "stdio", "-kernel", "builtin:heartbeat"), "command 3 (chardev-add): Chardev "
         "kind 'stdio' is in use by chardev 'compat_monitor0'"),
        (("-chardev", "stdio,id=c", "-mon", "c", "-mon", "c"), "command 3 (object-add): Chardev 'c' is in use by "
         "monitor mon0"),
        (("-chardev", "null,id=c", "-mon", "c"), "command 2 (object-add): Monitor over a chardev of kind 'null' is not "
         "supported here; a monitor needs a chardev of kind socket or stdio"),
        (("-mon", "c"), "command 1 (object-add): Chardev 'c' does not exist; there are: none"),
    ],
)  # fmt: skip
async def test_what_is_in_use_is_refused(options: tuple[str, ...], user: str) -> None:
    done = await trio_vmm("run", *options, stdin=subprocess.DEVNULL)
    # A monitor that is there already has greeted.
    assert (done.status, done.err) == (1, f"trio-vmm: Recipe of the command line, {user}\n")


async def test_after_its_monitor_a_chardev_on_stdio_is_of_no_use_and_says_so(tmp_path: Path) -> None:
    async with machine(tmp_path, "-qmp", "stdio") as m:
        await m.qmp.execute("object-del", id="qmp_compat_monitor2")
        reply = await m.raw()
        async with reply:
            await reply.negotiate()
            arguments = {"qom-type": "monitor-qmp", "id": "again", "chardev": "compat_monitor2"}
            answer = await reply.ask({"execute": "object-add", "arguments": arguments})
            assert answer["error"]["desc"] == (
                "Chardev 'compat_monitor2' is in use by the client of a monitor that has ended; make another"
            )
            assert await reply.ask({"execute": "chardev-remove", "arguments": {"id": "compat_monitor2"}}) == {
                "return": {}
            }
        assert (await m.quit()).status == 0


@pytest.mark.kvm
async def test_in_a_live_update_a_monitor_on_stdio_stays_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    guest = ("-kernel", "builtin:heartbeat", "-append", "region=64K pages=1", "-m", "16", "-serial", "null")
    async with talk(tmp_path, "-qmp", f"unix:{path}", "-qmp", "stdio", *guest) as it:
        await it.begin()
        while True:
            await it.say(STATUS)
            if (await it.reply())["return"]["running"]:
                break
        assert (await trio_vmm("update", "--qmp", path)).status == 0
        # `update` tells the old process to quit.
        while message := await it.message():
            last = message
        assert last["event"] == "SHUTDOWN"
        status, said = await it.ended()
        assert (status, said) == (0, "")
        async with qmp_session(str(path)) as successor:
            assert (await successor.execute("query-status"))["running"]
            labels = {entry["label"] for entry in await successor.execute("query-chardev")}
            assert {"compat_monitor0", "serial0"} <= labels
            assert "compat_monitor1" not in labels
            await successor.execute("quit")


# --- descriptors ------------------------------------------------------------------------------------------

QEMU_QMP = """
import asyncio, json, socket, sys
from qemu.qmp import QMPClient

async def main():
    client = QMPClient("by descriptor")
    await client.connect(socket.socket(fileno=int(sys.argv[1])))
    found = [await client.execute("query-status")]
    with client.listener("SHUTDOWN") as ending:
        await client.execute("quit")
        found.append((await ending.get())["data"]["reason"])
    try:
        await client.disconnect()
    except EOFError:
        pass
    print(json.dumps(found))

asyncio.run(main())
"""


async def test_qemu_qmp_drives_a_machine_over_a_pair_of_sockets_as_qemu_machine_passes_it(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    options = ("-display", "none", "-vga", "none", "-chardev", f"socket,id=mon,fd={theirs.fileno()}",
               "-mon", "chardev=mon,mode=control")  # fmt: skip
    async with talk(tmp_path, *options, pass_fds=(theirs.fileno(),)) as it:
        theirs.close()
        with ours:
            done = await trio.run_process(
                [sys.executable, "-c", QEMU_QMP, str(ours.fileno())], capture_stdout=True, pass_fds=(ours.fileno(),)
            )
        assert json.loads(done.stdout) == [ANSWER["return"], "host-qmp-quit"]
        assert await it.ended() == (0, "")


async def test_a_listening_socket_serves_many_and_stays_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "passed"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    options = ("-chardev", f"socket,id=mon,fd={listener.fileno()},server=on,wait=off", "-mon", "mon")
    async with talk(tmp_path, *options, pass_fds=(listener.fileno(),)) as it:
        listener.close()
        async with qmp_session(str(path)) as one, qmp_session(str(path)) as other:
            (entry,) = await one.execute("query-chardev")
            assert entry["filename"] == f"fd:{options[1].split('fd=')[1].split(',')[0]},server=on"
            await other.execute("quit")
        assert await it.ended() == (0, "")
    assert path.exists()


@pytest.mark.kvm
async def test_in_a_live_update_a_listening_socket_that_was_passed_goes_to_the_successor(tmp_path: Path) -> None:
    path = tmp_path / "passed"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    guest = ("-kernel", "builtin:heartbeat", "-append", "region=64K pages=1", "-m", "16", "-serial", "null")
    options = ("-chardev", f"socket,id=mon,fd={listener.fileno()},server=on,wait=off", "-mon", "mon", *guest)
    async with talk(tmp_path, *options, pass_fds=(listener.fileno(),)) as it:
        listener.close()
        async with qmp_session(str(path)) as client:
            while not (await client.execute("query-status"))["running"]:
                await trio.lowlevel.checkpoint()
        assert (await trio_vmm("update", "--qmp", path)).status == 0
        assert await it.ended() == (0, "")
        async with qmp_session(str(path)) as successor:
            assert (await successor.execute("query-status"))["running"]
            await successor.execute("quit")
    assert path.exists()


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        ("on", "Descriptor '{}' is a connected unix socket, not a listening unix socket or a listening tcp socket"),
        ("off", "Descriptor '{}' is a listening unix socket, not a connected unix socket or a connected tcp socket"),
    ],
)
async def test_a_descriptor_of_the_wrong_kind_is_refused(tmp_path: Path, server: str, reason: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "l"))
        listener.listen()
        fd = theirs.fileno() if server == "on" else listener.fileno()
        done = await trio_vmm("run", "-chardev", f"socket,id=c,fd={fd},server={server}", "-mon", "c", pass_fds=(fd,))
    said = f"trio-vmm: Recipe of the command line, command 1 (chardev-add): {reason.format(fd)}\n"
    assert done == Done(1, "", said)


async def test_a_client_can_send_a_socket_for_a_monitor(tmp_path: Path) -> None:
    async with machine(tmp_path) as m, await m.raw() as raw:
        await raw.negotiate()
        ours, theirs = socket.socketpair()
        with theirs:
            request = {"execute": "getfd", "arguments": {"fdname": "mine"}}
            socket.send_fds(raw.sock._sock, [json.dumps(request).encode()], [theirs.fileno()])  # type: ignore[attr-defined]
        assert await raw.reply() == {"return": {}}
        address = {"type": "fd", "data": {"str": "mine"}}

        def add(**data: Any) -> dict[str, Any]:
            backend = {"type": "socket", "data": {"addr": address, "wait": False, **data}}
            return {"execute": "chardev-add", "arguments": {"id": "sent", "backend": backend}}

        wrong = await raw.ask(add(server=True))
        assert (
            wrong["error"]["desc"]
            == "Descriptor 'mine' is a connected unix socket, not a listening unix socket or a listening tcp socket"
        )
        assert await raw.ask(add(server=False)) == {"return": {}}
        gone = await raw.ask(add(server=False) | {"id": 2})
        assert gone["error"]["desc"] == "Chardev 'sent' exists already; choose another name"
        made = {"qom-type": "monitor-qmp", "id": "m", "chardev": "sent"}
        assert await raw.ask({"execute": "object-add", "arguments": made}) == {"return": {}}
        async with qmp_over(ours, "the socket that was sent") as client:
            assert await client.execute("query-status") == ANSWER["return"]
        assert (await m.quit()).status == 0
