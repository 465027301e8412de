"""`trio-vmm migrate`: what its options stand for, what it shows and says, and its exit status."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

import vmm
from tests.phases.copy_kit import HANGS, Peer, commands, empty, goes_on, listening, status, ticked
from tests.phases.machine import connected, monitor
from tests.terminal import Screen
from vmm.cli_migrate import (
    MigrationCalledOff,
    MigrationFailed,
    MigrationUnclear,
    add_migrate_options,
    arguments_of,
    migrate,
    migrate_machine,
    report,
)
from vmm.cli_options import Parser
from vmm.cli_progress import Bar
from vmm.cli_watch import Interruption
from vmm.errors import OptionInvalid

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncGenerator, Sequence

    from vmm.cli_migrate import Outcome
    from vmm.embedding import EmbeddedMachine

ROOT: Final = Path(__file__).resolve().parent.parent
EVENTS: Final = {"capability": "events", "state": True}


def parse(*arguments: str) -> argparse.Namespace:
    parser = Parser("trio-vmm migrate", allow_abbrev=False)
    add_migrate_options(parser)
    return parser.parse_args(("--qmp", "q", *arguments))


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ((), {}),
        (("--bandwidth", "64"), {"parameters": {"max-bandwidth": 64 << 20}}),
        (("--bandwidth", "1G", "--downtime", "20"), {"parameters": {"max-bandwidth": 1 << 30, "downtime-limit": 20}}),
        (("--tls", "t0"), {"parameters": {"tls-creds": "t0"}}),
        (("--set", "multifd-channels=4", "--set", "multifd-compression=zstd"),
         {"parameters": {"multifd-channels": 4, "multifd-compression": "zstd"}}),
        (("--set", "max-bandwidth=1000", "--set", "xbzrle-cache-size=64M"),
         {"parameters": {"max-bandwidth": 1000, "xbzrle-cache-size": 64 << 20}}),
        (("--set", "cpu-throttle-tailslow=on", "--set", "tls-hostname=12"),
         {"parameters": {"cpu-throttle-tailslow": True, "tls-hostname": "12"}}),
        (("--set", 'cpr-exec-command=["a", "b"]', "--set", "x-new=7"),
         {"parameters": {"cpr-exec-command": ["a", "b"], "x-new": 7}}),
        (("--capability", "multifd", "--capability", "events"),
         {"capabilities": [EVENTS, {"capability": "multifd", "state": True}]}),
    ],
)  # fmt: skip
def test_options_are_arguments_of_the_command(options: tuple[str, ...], more: dict[str, Any]) -> None:
    expected = {"uri": "tcp:there:4444", "capabilities": [EVENTS], **more}
    assert arguments_of(parse(*options, "tcp:there:4444")) == expected


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--bandwidth", "fast"), "--bandwidth: 'fast' is not a size such as 512, 512M or 2G"),
        (("--downtime", "1.5"), "--downtime: '1.5' is not a number of milliseconds"),
        (("--set", "downtime-limit"), "--set: 'downtime-limit' is not of the form PARAMETER=VALUE"),
        (("--set", "downtime-limit=soon"),
         "--set downtime-limit: 'soon' is not a number, decimal or 0x and hexadecimal"),
        (("--set", "max-bandwidth=soon"), "--set max-bandwidth: 'soon' is not a size such as 512, 512M or 2G"),
        (("--set", "direct-io=yes"), "--set direct-io: 'yes' is not on or off"),
        (("--set", "cpr-exec-command=ls"),
         "--set cpr-exec-command: 'ls' is not JSON (Expecting value: line 1 column 1 (char 0))"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_named(options: tuple[str, ...], text: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        arguments_of(parse(*options, "tcp:there:4444"))
    assert str(caught.value) == text


def test_paths_begin_where_the_command_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uris = ("file:a,offset=0x1000", "unix:b", "unix:/b", "tcp:unix:1", "fd:c", "unix:")
    assert [arguments_of(parse(uri))["uri"] for uri in uris] == [
        f"file:{tmp_path}/a,offset=0x1000", f"unix:{tmp_path}/b", "unix:/b", "tcp:unix:1", "fd:c", "unix:",
    ]  # fmt: skip


# --- migrations -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def source(folder: Path) -> AsyncGenerator[EmbeddedMachine, None]:
    """Run a machine with a monitor at `folder / "qmp"`, whose guest ticks."""
    made = [{"execute": step.execute, "arguments": step.arguments} for step in monitor(folder / "qmp")]
    async with vmm.machine(made + commands()) as machine:
        await ticked(machine, 5)
        yield machine


@asynccontextmanager
async def asked(listener: trio.SocketListener) -> AsyncGenerator[Peer, None]:
    """Be the destination, which has been asked whether it is ready."""
    with trio.fail_after(HANGS):
        stream = await listener.accept()
    async with stream:
        peer = Peer(stream)
        await peer.invited()
        yield peer


async def moved(
    folder: Path, uri: str, *options: str, interruption: Interruption | None = None
) -> tuple[Outcome, list[str]]:
    """Migrate as these options say; return how it ended, and what was shown on a terminal."""
    shown = io.StringIO()
    with Bar(shown, terminal=True) as bar, trio.fail_after(HANGS):
        arguments = arguments_of(parse(*options, uri))
        result = await migrate(str(folder / "qmp"), arguments, interruption or Interruption(), bar)
    screen = Screen(80)
    screen.feed(shown.getvalue())
    assert screen.rows == []
    return result, screen.pictures


pytest_kvm = pytest.mark.kvm
leakless = pytest.mark.usefixtures("no_leaks")


@pytest_kvm
@leakless
async def test_the_guest_goes_and_it_is_told_how(tmp_path: Path) -> None:
    async with source(tmp_path) as here, empty() as there:
        uri = f"unix:{tmp_path}/main"
        await there.execute("migrate-incoming", uri=uri)
        result, pictures = await moved(tmp_path, uri, "--downtime", "500")
        assert result.info["status"] == "completed"
        assert any(picture.startswith("copying") for picture in pictures)
        # For this migration alone.
        assert (await here.execute("query-migrate-parameters"))["downtime-limit"] == 300
        assert not any(entry["state"] for entry in await here.execute("query-migrate-capabilities"))
        assert await status(here) == "postmigrate"
        await goes_on(there)


def test_the_report_tells_of_bytes_time_passes_and_the_pause() -> None:
    ram = {"transferred": 3 << 29, "dirty-sync-count": 3}
    assert report("tcp:a:1", {"ram": ram, "total-time": 1500, "downtime": 12}) == (
        "migrated: to tcp:a:1, 1.5 GiB in 1.5 s, 1.0 GiB/s in 3 passes\nthe guest's pause: 12 ms"
    )
    ram = {"transferred": 17, "dirty-sync-count": 1}
    assert report("file:/a", {"ram": ram, "total-time": 0, "downtime": 0}) == (
        "migrated: to file:/a, 17 B in 0.0 s in 1 pass\nthe guest's pause: 0 ms"
    )


@pytest_kvm
@leakless
async def test_what_cannot_be_is_told_with_where_the_guest_is(tmp_path: Path) -> None:
    async with source(tmp_path) as here:
        for options, text in (
            ((), "The migration failed, and the guest goes on here: migrate: Cannot connect to "),
            (("--set", "x-new=7"), "The migration failed, and the guest goes on here: migrate: "),
            (("--capability", "rdma-pin-all"), "The migration failed, and the guest goes on here: migrate: "),
        ):
            with pytest.raises(MigrationFailed) as caught:
                await moved(tmp_path, f"unix:{tmp_path}/nobody", *options)
            assert text.replace("migrate: ", "") in str(caught.value)
        await here.execute("stop")
        with pytest.raises(MigrationFailed) as caught:
            await moved(tmp_path, f"unix:{tmp_path}/nobody")
        assert str(caught.value).startswith("The migration failed, and the guest stays here, in run state paused: ")


@pytest_kvm
@leakless
async def test_a_refusal_of_the_destination_is_told(tmp_path: Path) -> None:
    async with source(tmp_path) as here, listening(tmp_path) as (uri, listener), trio.open_nursery() as nursery:

        async def refuse() -> None:
            async with asked(listener) as peer:
                await peer.say("refused", "it is full")

        nursery.start_soon(refuse)
        result, _ = await moved(tmp_path, uri)
        assert (result.info["status"], result.info["error-desc"]) == (
            "failed",
            "Refused by the destination: it is full",
        )
        assert result.where == "the guest goes on here"
        await goes_on(here)


@pytest_kvm
@leakless
async def test_an_interrupt_calls_it_off(tmp_path: Path) -> None:
    interruption = Interruption()
    async with source(tmp_path) as here, listening(tmp_path) as (uri, listener), trio.open_nursery() as nursery:

        async def interrupt() -> None:
            async with asked(listener) as peer:
                interruption.comes()
                await peer.ended()

        nursery.start_soon(interrupt)
        result, _ = await moved(tmp_path, uri, interruption=interruption)
        assert (result.info["status"], result.where) == ("cancelled", "the guest goes on here")
        await goes_on(here)


@pytest_kvm
@leakless
async def test_where_it_cannot_be_called_off_it_is_said_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vmm.qmp_client import CommandFailed, QmpClient

    interruption, shown = Interruption(), io.StringIO()
    interruption.comes()
    execute = QmpClient.execute

    async def refuse(self: QmpClient, command: str, /, **arguments: Any) -> Any:
        if command == "migrate_cancel":
            raise CommandFailed(command=command, error_class="GenericError", desc="it is too late")
        return await execute(self, command, **arguments)

    monkeypatch.setattr(QmpClient, "execute", refuse)
    async with source(tmp_path), empty() as there:
        uri = f"unix:{tmp_path}/main"
        await there.execute("migrate-incoming", uri=uri)
        with Bar(shown) as bar:
            result = await migrate(str(tmp_path / "qmp"), arguments_of(parse(uri)), interruption, bar)
    assert result.info["status"] == "completed"
    assert shown.getvalue() == "trio-vmm: it cannot be called off: it is too late\n"


@pytest_kvm
@leakless
async def test_a_machine_that_ends_meanwhile_leaves_the_outcome_open(tmp_path: Path) -> None:
    async with listening(tmp_path) as (uri, listener), source(tmp_path) as here, trio.open_nursery() as nursery:

        async def end() -> None:
            async with asked(listener):
                await here.execute("quit")

        nursery.start_soon(end)
        with pytest.raises(MigrationUnclear) as caught:
            await moved(tmp_path, uri)
    assert str(caught.value) == (
        f"The machine ended while its guest was being migrated; whether the guest is at {uri} is not known"
    )


# --- the command as a whole -------------------------------------------------------------------------------------


class Told:
    """What `migrate_machine` was given instead of a machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, status: str, number: int = 0, **more: Any) -> None:
        info = {"status": status, **{name.replace("_", "-"): value for name, value in more.items()}}

        async def pretend(monitor: str, arguments: object, interruption: Interruption, bar: Bar) -> Outcome:
            from vmm.cli_migrate import Outcome

            await trio.lowlevel.checkpoint()
            interruption.number = number
            return Outcome(info, "the guest goes on here")

        monkeypatch.setattr("vmm.cli_migrate.migrate", pretend)


def test_only_what_has_gone_is_a_success(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ram = {"transferred": 17, "dirty-sync-count": 0}
    Told(monkeypatch, "completed", signal.SIGINT, ram=ram, total_time=0, downtime=1)
    assert migrate_machine(parse("tcp:a:1")) == 0
    assert capsys.readouterr().out == "migrated: to tcp:a:1, 17 B in 0.0 s\nthe guest's pause: 1 ms\n"
    Told(monkeypatch, "cancelled", signal.SIGINT)
    assert migrate_machine(parse("--json", "tcp:a:1")) == 130
    assert capsys.readouterr() == (
        '{"status": "cancelled"}\n', "trio-vmm: The migration was interrupted: the guest goes on here\n"
    )  # fmt: skip
    Told(monkeypatch, "cancelled")
    with pytest.raises(MigrationCalledOff) as called_off:
        migrate_machine(parse("tcp:a:1"))
    assert str(called_off.value) == ("The migration was cancelled over another monitor session; the guest goes on here")
    Told(monkeypatch, "failed", error_desc="The reason")
    with pytest.raises(MigrationFailed) as failed:
        migrate_machine(parse("--json", "tcp:a:1"))
    assert str(failed.value) == "The migration failed, and the guest goes on here: The reason"
    assert json.loads(capsys.readouterr().out) == {"status": "failed", "error-desc": "The reason"}


@asynccontextmanager
async def typed(*arguments: str) -> AsyncGenerator[tuple[subprocess.Popen[bytes], trio.abc.ReceiveStream], None]:
    """Type `trio-vmm ARGUMENTS` on a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}
    with os.fdopen(theirs, "rb", buffering=0):
        process = subprocess.Popen(  # noqa: ASYNC220 - it is only started here
            [sys.executable, "-m", "vmm", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
            env=environment,
        )  # fmt: skip
    try:
        async with trio.lowlevel.FdStream(ours) as stream:
            yield process, stream
    finally:
        process.kill()
        process.wait()


async def read(stream: trio.abc.ReceiveStream, screen: Screen, until: Sequence[str] = ()) -> None:
    """Show what comes, until the last row has all of `until` in it; to the end if that is nothing."""
    rest = b""
    with trio.fail_after(HANGS):
        while not until or not all(part in "".join(screen.rows[-1:]) for part in until):
            try:
                data = await stream.receive_some(65536)
            except (trio.BrokenResourceError, OSError):  # EIO: nobody has the other end any more
                return
            rest += data
            whole = rest.rfind(b"\r\x1b[K") if not rest.endswith((b"m", b"K", b"\n")) else len(rest)
            if whole > 0:
                screen.feed(rest[:whole].decode())
                rest = rest[whole:]


@pytest_kvm
@leakless
async def test_on_a_terminal_ctrl_c_calls_it_off_and_the_line_is_gone(tmp_path: Path) -> None:
    screen = Screen(100)
    async with source(tmp_path) as here, listening(tmp_path) as (uri, listener):
        async with typed("migrate", "--qmp", str(tmp_path / "qmp"), uri) as (process, stream):
            async with asked(listener) as peer:
                await read(stream, screen, ["copying"])
                process.send_signal(signal.SIGINT)
                await peer.ended()
            await read(stream, screen)
            assert await trio.to_thread.run_sync(process.wait) == 130
        assert screen.rows == ["trio-vmm: The migration was interrupted: the guest goes on here"]
        await goes_on(here)
        async with connected(tmp_path / "qmp") as client:
            assert (await client.execute("query-migrate"))["status"] == "cancelled"


@pytest_kvm
@leakless
async def test_the_command_prints_what_it_did_or_json_of_it(tmp_path: Path) -> None:
    async with source(tmp_path) as here:
        for number, options in enumerate([(), ("--json",)]):
            target = tmp_path / f"state{number}"
            done = await trio.run_process(
                [sys.executable, "-m", "vmm", "migrate", "--qmp", str(tmp_path / "qmp"), *options, f"file:{target}"],
                capture_stdout=True, capture_stderr=True, cwd=ROOT,
            )  # fmt: skip
            assert done.stderr == b""
            assert target.stat().st_mode & 0o777 == 0o600
            if options:
                assert json.loads(done.stdout)["status"] == "completed"
            else:
                assert done.stdout.decode().startswith(f"migrated: to file:{target}, ")
            await here.execute("cont")
            await goes_on(here)
