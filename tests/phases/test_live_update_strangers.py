"""A live update with somebody at the other end who does not keep to the protocol."""

from __future__ import annotations

import array
import os
import socket
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import pytest
import trio

from tests.cpr.peer import HEADER, frame
from tests.phases.update_kit import Bench, Process, channels, due, holds, open_bench, outcome, settled
from vmm import host_sockets, hostio
from vmm.cpr.cell import Owner, OwnershipCell
from vmm.cpr.channel import CprChannel, Message
from vmm.cpr.frames import MAGIC
from vmm.errors import CprError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from vmm.qmp_client import QmpClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

RAM: Final = 16 << 20


async def garbage(channel: CprChannel) -> None:
    channel._sock.send(b"garbage!")


async def too_large(channel: CprChannel) -> None:
    channel._sock.send(HEADER.pack(MAGIC, 1 << 30))


async def nonsense(channel: CprChannel) -> None:
    await channel.send("nonsense", {})


async def close(channel: CprChannel) -> None:
    channel.close()


async def refuse(channel: CprChannel) -> None:
    await channel.send("refused", {"step": "dreaming", "reason": "no time"})


async def nameless_descriptor(channel: CprChannel) -> None:
    fd = array.array("i", [pipe()])
    channel._sock.sendmsg([frame("ready")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd)])
    os.close(fd[0])


# --- a destination ----------------------------------------------------------------------------------------------


@final
@attrs.define(eq=False)
class Stranger:
    """A destination that is the test itself."""

    channel: CprChannel
    main: socket.socket
    """Where it listens for the state."""
    machine: Message | None = None

    async def reach(self, stage: str) -> None:
        """Be honest up to `stage`: what the source sent last, and waits for an answer to."""
        if stage == "hello":
            return
        await self.channel.hello("a stranger")
        self.machine = await self.channel.receive("machine")
        if stage == "machine":
            return
        await self.channel.send("ready", {})
        (await self.channel.receive("paused")).close()
        if stage == "paused":
            return
        await self.channel.send("loaded", {})
        (await self.channel.receive("offered")).close()

    def cell(self) -> OwnershipCell:
        """Map the cell that the source sent."""
        assert self.machine is not None
        return OwnershipCell.adopt(self.machine.claim("owner"))


STEPS: Final = {"hello": "hello", "machine": "building", "paused": "loading", "offered": "handing over"}
"""What the source does while it waits for an answer."""
DUE: Final = {"hello": "hello", "machine": "ready", "paused": "loaded", "offered": "running"}
BY_SOURCE: Final = "Live update refused by the source at step '{step}': {reason}"

MISDEEDS: Final[tuple[tuple[str, Callable[[CprChannel], Awaitable[None]], str], ...]] = (
    *(
        (stage, deed, text.format(step=STEPS[stage], due=DUE[stage]))
        for stage in STEPS
        for deed, text in (
            (close, "The destination closed the channel at step '{step}'; the guest stays where it was"),
            (garbage, BY_SOURCE.format(step="{step}", reason="a frame begins with b'garb', not with b'TVCP'")),
            (
                too_large,
                BY_SOURCE.format(
                    step="{step}", reason="a frame of 1073741824 bytes is larger than the 8388608 admitted"
                ),
            ),
            (nonsense, BY_SOURCE.format(step="{step}", reason="message 'nonsense' came where {due} was due")),
            (refuse, "Live update refused by the destination at step 'dreaming': no time"),
            (nameless_descriptor, BY_SOURCE.format(step="{step}", reason="1 descriptors came without a name")),
        )
    ),
)


@asynccontextmanager
async def stranger(bench: Bench, client: QmpClient) -> AsyncGenerator[Stranger, None]:
    """Have the machine of `client` begin an update to us."""
    main, cpr = f"{bench.folder}/s-main", f"{bench.folder}/s-cpr"
    with host_sockets.listen_unix(main) as main_listener, host_sockets.listen_unix(cpr) as cpr_listener:
        await client.send("migrate", channels=channels(main, cpr))
        async with due("the source to connect"):
            await trio.lowlevel.wait_readable(cpr_listener)
        sock, _ = cpr_listener.accept()
        trio_sock = trio.socket.from_stdlib_socket(sock)
        with closing(CprChannel(trio_sock, side="destination", peer="source")) as channel:
            found = Stranger(channel, main_listener)
            yield found
            if found.machine is not None:
                found.machine.close()
        os.unlink(main)
        os.unlink(cpr)


@asynccontextmanager
async def machine() -> AsyncGenerator[tuple[Bench, Process, QmpClient], None]:
    async with open_bench() as bench:
        console = bench.console()
        source = bench.machine(console)
        await console.beats(1)
        async with bench.session(source.qmp) as client:
            await client.execute("migrate-set-parameters", mode="cpr-transfer")
            await client.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
            yield bench, source, client
            await console.new_beats(2)
        assert source.said() == []


async def test_a_source_keeps_its_guest_whatever_the_destination_does() -> None:
    async with machine() as (bench, source, client):
        before = await settled(source.pid)
        for stage, misdeed, text in MISDEEDS:
            try:
                client.events.clear()
                async with due(f"{misdeed.__name__} at {stage}"), stranger(bench, client) as peer:
                    await peer.reach(stage)
                    await misdeed(peer.channel)
                    info = await outcome(client)
                assert (info["status"], info["error-desc"]) == ("failed", text)
                assert (await client.execute("query-status")) == {"running": True, "status": "running"}
            except BaseException as error:
                error.add_note(f"{misdeed.__name__} at {stage}")
                raise
        await holds(source.pid, before)


async def test_a_guest_is_not_paused_before_its_destination_is_ready() -> None:
    async with machine() as (bench, _, client), open_events(bench) as watcher:
        for stage in ("hello", "machine", "paused"):
            async with stranger(bench, client) as peer:
                await peer.reach(stage)
                await refuse(peer.channel)
                assert (await outcome(client))["status"] == "failed"
            seen = await watcher.names()
            assert seen == ([] if stage != "paused" else ["STOP", "RESUME"])


@final
class Watcher:
    """A second session, which sees all events."""

    def __init__(self, client: QmpClient) -> None:
        self._client = client

    async def names(self) -> list[str]:
        """Return the run-state events since the last call, in order."""
        await self._client.execute("query-status")
        seen = [event["event"] for event in self._client.events if event["event"] in ("STOP", "RESUME")]
        self._client.events.clear()
        return seen


@asynccontextmanager
async def open_events(bench: Bench) -> AsyncGenerator[Watcher, None]:
    async with bench.session(bench.qmp) as client:
        yield Watcher(client)


async def test_the_statuses_of_an_update_that_fails_are_told() -> None:
    async with machine() as (bench, _, client), bench.session(bench.qmp) as watcher:
        async with stranger(bench, client) as peer:
            await peer.reach("paused")
            await refuse(peer.channel)
            assert (await outcome(client))["status"] == "failed"
        await watcher.execute("query-status")
        seen = [event["data"]["status"] for event in watcher.events if event["event"] == "MIGRATION"]
        assert seen == ["setup", "active", "device", "failing", "failed"]


async def test_a_destination_that_lies_about_the_guest_does_not_get_it() -> None:
    async with machine() as (bench, _, client), stranger(bench, client) as peer:
        await peer.reach("offered")
        await peer.channel.send("running", {"resumed-ns": 1 << 4000})
        info = await outcome(client)
        assert info["error-desc"] == (
            "Live update refused by the source at step 'offered': "
            "it said that it runs the guest, and the ownership cell says OFFERED"
        )
        with closing(peer.cell()) as cell:
            assert cell.owner is Owner.SOURCE
            assert not cell.take()


async def test_a_guest_is_not_offered_in_a_cell_that_the_destination_wrote_to() -> None:
    async with machine() as (bench, _, client), stranger(bench, client) as peer:
        await peer.reach("paused")
        with closing(peer.cell()) as cell:
            os.pwrite(cell.fd, int(Owner.TAKEN).to_bytes(4, "little"), 0)
            await peer.channel.send("loaded", {"received-ns": 1 << 4000, "loaded-ns": -5})
            info = await outcome(client)
        assert info["error-desc"] == (
            "Live update refused by the source at step 'loaded': the destination wrote to the ownership cell unasked"
        )


async def test_a_destination_without_a_main_channel_fails_the_update_before_the_pause() -> None:
    async with machine() as (bench, _, client), open_events(bench) as watcher, stranger(bench, client) as peer:
        await peer.reach("machine")
        peer.main.close()
        await peer.channel.send("ready", {})
        info = await outcome(client)
        assert info["error-desc"] == f"Cannot connect to {bench.folder}/s-main: Connection refused"
        assert await watcher.names() == []
        # And it is told.
        with pytest.raises(CprError) as caught:
            await peer.channel.receive("paused")
        assert str(caught.value) == f"Live update refused by the source at step 'building': {info['error-desc']}"


async def test_of_a_destination_that_goes_when_it_is_ready_it_is_told_that_it_went() -> None:
    async with machine() as (bench, _, client), stranger(bench, client) as there:
        await there.reach("machine")
        there.main.close()
        await there.channel.send("ready", {})
        there.channel.close()
        assert (await outcome(client))["error-desc"] == (
            "The destination closed the channel at step 'building'; the guest stays where it was"
        )


async def test_a_socket_that_cannot_pass_descriptors_is_no_cpr_channel() -> None:
    async with machine() as (bench, _, client):
        addr = {"transport": "socket", "type": "inet", "host": "127.0.0.1"}
        with socket.create_server(("127.0.0.1", 0)) as server:
            where = channels("/nowhere", "/nowhere")
            where[1]["addr"] = {**addr, "port": str(server.getsockname()[1])}
            with pytest.raises(Exception, match=r"must be a unix stream socket, to pass descriptors$"):
                await client.execute("migrate", channels=where)
        assert (await client.execute("query-status"))["running"]
        for path in ("/nowhere", str(bench.folder)):
            with pytest.raises(Exception, match=f"Cannot connect to {path}: "):
                await client.execute("migrate", channels=channels(path, path))
        assert (await client.execute("query-status"))["running"]


# --- a source ---------------------------------------------------------------------------------------------------

RECIPE: Final[list[dict[str, Any]]] = [
    {"execute": "machine-set", "arguments": {"memory": {"size": RAM}, "kernel": "builtin:heartbeat", "serial": []}},
    {"execute": "accel-set", "arguments": {"accel": "kvm"}},
    {"execute": "cpu-model-set", "arguments": {"model": "host"}},
    {"execute": "finish-machine-init"},
]


@final
@attrs.define(eq=False)
class Offer:
    """What a source that is the test itself says of its machine."""

    body: dict[str, Any] = attrs.Factory(lambda: {"recipe": RECIPE, "run-state": "running"})
    descriptors: dict[str, int] = attrs.Factory(dict)

    @classmethod
    def honest(cls) -> Offer:
        """An offer in order, but for what the caller then does to it."""
        with closing(OwnershipCell.create()) as cell:
            return cls(descriptors={"ram": hostio.create_ram(RAM, "ram"), "owner": os.dup(cell.fd)})

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self.descriptors.values():
            os.close(fd)

    def put(self, name: str, fd: int) -> None:
        """Replace or add a descriptor."""
        if name in self.descriptors:
            os.close(self.descriptors[name])
        self.descriptors[name] = fd


@asynccontextmanager
async def connected(bench: Bench, destination: Process) -> AsyncGenerator[CprChannel, None]:
    """Connect to a destination's CPR channel."""
    path = bench.channels(destination)[1]["addr"]["path"]
    sock = trio.socket.from_stdlib_socket(host_sockets.connect_unix(path))
    with closing(CprChannel(sock, side="source", peer="destination")) as channel:
        yield channel


async def told(channel: CprChannel) -> str:
    """Return what the destination says it refused for."""
    with pytest.raises(CprError) as caught:
        async with due("a refusal"):
            await channel.receive("ready")
    return str(caught.value)


def pipe() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


def without_owner(offer: Offer) -> None:
    os.close(offer.descriptors.pop("owner"))


def pipe_for_owner(offer: Offer) -> None:
    offer.put("owner", pipe())


def standard_error_to_read(offer: Offer) -> None:
    offer.put("stderr", pipe())


def unknown_run_state(offer: Offer) -> None:
    offer.body["run-state"] = "dreaming"


def no_recipe(offer: Offer) -> None:
    del offer.body["recipe"]


def recipe_of_numbers(offer: Offer) -> None:
    offer.body["recipe"] = [1]


def unknown_command(offer: Offer) -> None:
    offer.body["recipe"] = [RECIPE[0], {"execute": "make-tea"}]


def command_of_a_monitor(offer: Offer) -> None:
    offer.body["recipe"] = [*RECIPE, {"execute": "quit"}]


def last_command_misshapen(offer: Offer) -> None:
    offer.body["recipe"] = [*RECIPE[:2], {"execute": "cpu-model-set", "arguments": {"model": 3}}, RECIPE[3]]


def two_machines(offer: Offer) -> None:
    offer.body["recipe"] = [RECIPE[0], *RECIPE]


def half_a_machine(offer: Offer) -> None:
    offer.body["recipe"] = RECIPE[:2]


def in_another_order(offer: Offer) -> None:
    offer.body["recipe"] = [RECIPE[1], RECIPE[0], *RECIPE[2:]]


def one_name_twice(offer: Offer) -> None:
    null = {"execute": "chardev-add", "arguments": {"id": "c", "backend": {"type": "null", "data": {}}}}
    offer.body["recipe"] = [null, null, *RECIPE]


def huge_memory(offer: Offer) -> None:
    offer.body["recipe"] = [{"execute": "machine-set", "arguments": {"memory": {"size": 1 << 60}}}, *RECIPE[1:]]


def a_million_commands(offer: Offer) -> None:
    offer.body["recipe"] = [0] * 1_000_000


def host_file(offer: Offer) -> None:
    offer.body["recipe"] = [{"execute": "machine-set", "arguments": {"kernel": "/etc/passwd"}}, *RECIPE[1:]]


def host_socket(offer: Offer) -> None:
    address = {"type": "unix", "data": {"path": "/etc/socket"}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    offer.body["recipe"] = [{"execute": "chardev-add", "arguments": {"id": "c", "backend": backend}}, *RECIPE]


def log_of_a_qtest(offer: Offer) -> None:
    qtest = {"qom-type": "qtest", "id": "q", "chardev": "c", "log": "/etc/passwd"}
    offer.put("chardev/c/listener", pipe())
    host_socket(offer)
    offer.body["recipe"].insert(1, {"execute": "object-add", "arguments": qtest})


def monitor_over_the_channel(offer: Offer) -> None:
    monitor = {"qom-type": "monitor-qmp", "id": "m", "fd": 9}
    offer.body["recipe"] = [{"execute": "object-add", "arguments": monitor}, *RECIPE]


ADMITTED: Final = (
    "a recipe from elsewhere has only commands that make a machine: accel-set, chardev-add, cpu-model-set, device_add, "
    "finish-machine-init, machine-set, netdev_add, object-add, set-numa-node"
)

REFUSED_OFFERS: Final = (
    (without_owner, "The source sent no descriptor named 'owner'"),
    (pipe_for_owner, "Descriptor 'owner' is no file, not a sealed memfd of 4096 bytes"),
    (
        standard_error_to_read,
        "Descriptor 'stderr' is a pipe that was opened to be read, not something to write to",
    ),
    (unknown_run_state, "Recipe of the source, as a whole: run state 'dreaming' is none"),
    (no_recipe, "Recipe of the source, as a whole: it must be a list of commands"),
    (recipe_of_numbers, "Recipe of the source, command 1: a command must be a JSON object"),
    (unknown_command, f"Recipe of the source, command 2 (make-tea): {ADMITTED}"),
    (command_of_a_monitor, f"Recipe of the source, command {len(RECIPE) + 1} (quit): {ADMITTED}"),
    (
        last_command_misshapen,
        "Recipe of the source, command 3 (cpu-model-set): Command 'cpu-model-set': 'model' must be a string, not 3",
    ),
    (
        two_machines,
        "Recipe of the source, as a whole: it has machine-set 2 times; the recipe of a whole machine has it once",
    ),
    (
        half_a_machine,
        "Recipe of the source, as a whole: it has cpu-model-set 0 times; the recipe of a whole machine has it once",
    ),
    (
        in_another_order,
        "Recipe of the source, command 2 (machine-set): "
        "it comes before accel-set, not after it: a recipe has the order of the phases",
    ),
    (
        one_name_twice,
        "Recipe of the source, command 2 (chardev-add): 'chardev-add c' is there twice; a name is given once",
    ),
    (
        huge_memory,
        "Recipe of the source, command 1 (machine-set): "
        "memory.size: 1152921504606846976 is not a multiple of 4 KiB between 1 MiB and 1 TiB",
    ),
    (a_million_commands, "Recipe of the source, as a whole: 1000000 commands are more than the 4096 admitted"),
    (
        host_file,
        "no descriptor came for kernel, and this host's own are allowed by name: -allow-resource kernel=PATH",
    ),
    (
        host_socket,
        "no descriptor came for chardev/c, and this host's own are allowed by name: -allow-resource chardev/c=PATH",
    ),
    (
        log_of_a_qtest,
        "no descriptor came for monitor/q, and this host's own are allowed by name: -allow-resource monitor/q=PATH",
    ),
    (
        monitor_over_the_channel,
        "Recipe of the source, command 1 (object-add): "
        "fd: 9 is a descriptor of another process; a recipe's monitor has a chardev",
    ),
)


async def test_a_destination_refuses_a_source_that_breaks_the_protocol_and_waits_for_the_next() -> None:
    async with open_bench() as bench:
        destination = bench.destination()
        await bench.listening(destination)
        before = await settled(destination.pid)
        expected: list[str] = []
        for misdeed, text in (
            (close, "The source closed the channel at step 'hello'; nothing was taken over"),
            (
                garbage,
                "Live update refused by the destination at step 'hello': a frame begins with b'garb', not with b'TVCP'",
            ),
            (
                nonsense,
                "Live update refused by the destination at step 'hello': message 'nonsense' came where hello was due",
            ),
        ):
            async with connected(bench, destination) as channel:
                await misdeed(channel)
                expected.append(f"trio-vmm: {text}")
                await destination.says(expected[-1])
        async with connected(bench, destination) as channel:
            await channel.send("hello", {"version": 99, "program": "a later one", "side": "source"})
            (await channel.receive("hello")).close()
            reason = "the source speaks CPR protocol version 99, not 1; the older program is this one: update it first"
            text = f"Live update refused by the destination at step 'hello': {reason}"
            assert await told(channel) == text
            expected.append(f"trio-vmm: {text}")
        for change, reason in REFUSED_OFFERS:
            offer = Offer.honest()
            change(offer)
            with closing(offer):
                async with connected(bench, destination) as channel:
                    await channel.hello("a stranger")
                    await channel.send("machine", offer.body, offer.descriptors)
                    text = f"Live update refused by the destination at step 'describing': {reason}"
                    assert await told(channel) == text
                    expected.append(f"trio-vmm: {text}")
                    await destination.says(expected[-1])
        assert destination.said() == expected
        async with bench.session(destination.qmp) as client:
            assert (await client.execute("query-migrate"))["status"] == "setup"
        await holds(destination.pid, before)


IN_ACCEL_SET: Final = "Recipe of the source, command 2 (accel-set): "


def without_ram(offer: Offer) -> None:
    os.close(offer.descriptors.pop("ram"))


WANTED_RAM: Final = (
    "a memfd of 16777216 bytes or more, sealed against shrinking and not against writing, open to read and write"
)


def pipe_for_ram(offer: Offer) -> None:
    offer.put("ram", pipe())


def small_ram(offer: Offer) -> None:
    offer.put("ram", hostio.create_ram(4096, "ram"))


def extra_descriptor(offer: Offer) -> None:
    offer.put("surprise", pipe())


def chardev_of_a_pipe(offer: Offer) -> None:
    backend = {
        "type": "socket",
        "data": {"addr": {"type": "unix", "data": {"path": "/nowhere"}}, "server": True, "wait": False},
    }
    offer.body["recipe"] = [{"execute": "chardev-add", "arguments": {"id": "c", "backend": backend}}, *RECIPE]
    offer.put("chardev/c/listener", pipe())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_ram, IN_ACCEL_SET + "The source sent no descriptor named 'ram'"),
        (pipe_for_ram, IN_ACCEL_SET + f"Descriptor 'ram' is a pipe, not {WANTED_RAM}"),
        (small_ram, IN_ACCEL_SET + f"Descriptor 'ram' is 4096 bytes long, not {WANTED_RAM}"),
        (extra_descriptor, "Descriptors that nothing in the recipe asks for: surprise"),
        (
            chardev_of_a_pipe,
            "Recipe of the source, command 1 (chardev-add): "
            "Descriptor 'chardev/c/listener' is a pipe, not a listening unix socket",
        ),
    ],
)
async def test_a_destination_that_cannot_build_the_machine_says_so_to_both_and_ends(
    change: Callable[[Offer], None], reason: str
) -> None:
    async with open_bench() as bench:
        destination = bench.destination()
        await bench.listening(destination)
        offer = Offer.honest()
        change(offer)
        with closing(offer):
            async with connected(bench, destination) as channel:
                await channel.hello("a stranger")
                await channel.send("machine", offer.body, offer.descriptors)
                text = await told(channel)
                assert text == f"Live update refused by the destination at step 'building': {reason}"
        assert await destination.ended() == 1
        (line,) = destination.said()
        assert line == f"trio-vmm: {text.partition(': ')[2]}"
        assert not any(bench.is_there(where["addr"]["path"]) for where in bench.channels(destination))


PAUSED: Final[dict[str, Any]] = {
    "running": True,
    "run-state": "running",
    "failure": "",
    "wishes": {"reset": False, "exit-status": None},
    "gone": [],
}


@pytest.mark.parametrize(
    ("kind", "changes", "state", "text"),
    [
        ("paused", {}, b"no state at all", None),
        ("paused", {}, b"", "State stream: it ends after 0 bytes; expected the preamble of 12 bytes"),
        (
            "nonsense",
            {},
            b"",
            "Live update refused by the destination at step 'loading': message 'nonsense' came where paused was due",
        ),
        (
            "refused",
            {"step": "saving", "reason": "KVM is tired"},
            b"",
            "Live update refused by the source at step 'saving': KVM is tired",
        ),
    ],
)
async def test_a_destination_that_cannot_load_the_state_says_so_and_ends(
    kind: str, changes: dict[str, Any], state: bytes, text: str | None
) -> None:
    async with open_bench() as bench:
        destination = bench.destination()
        await bench.listening(destination)
        main = bench.channels(destination)[0]["addr"]["path"]
        with closing(Offer.honest()) as offer:
            async with connected(bench, destination) as channel, due("the refusal"):
                await channel.hello("a stranger")
                await channel.send("machine", offer.body, offer.descriptors)
                (await channel.receive("ready")).close()
                with host_sockets.connect_unix(main) as sock:
                    await channel.send(kind, {**PAUSED, **changes})
                    if state:
                        sock.send(state)
                assert await destination.ended() == 1
        (line,) = destination.said()
        assert line == f"trio-vmm: {text}" if text is not None else line.startswith("trio-vmm: State stream: ")


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_destination_notices_the_end_of_a_source_that_never_sends_its_state(when: str) -> None:
    """It waits for the main channel then, and for nothing on it."""
    async with open_bench() as bench:
        destination = bench.destination()
        await bench.listening(destination)
        main = bench.channels(destination)[0]["addr"]["path"]
        with closing(Offer.honest()) as offer, host_sockets.unconnected_unix() as sock:
            async with connected(bench, destination) as channel, due("the end"):
                await channel.hello("a stranger")
                await channel.send("machine", offer.body, offer.descriptors)
                (await channel.receive("ready")).close()
                if when == "after":
                    sock.connect(main)
                    await channel.send("paused", PAUSED)
            assert await destination.ended() == 1
        assert destination.said() == [
            "trio-vmm: The source closed the channel at step 'loading'; nothing was taken over"
        ]


async def test_a_second_source_is_not_kept_waiting() -> None:
    async with open_bench() as bench:
        destination = bench.destination()
        await bench.listening(destination)
        with closing(Offer.honest()) as offer:
            async with connected(bench, destination) as channel, due("ready"):
                await channel.hello("a stranger")
                await channel.send("machine", offer.body, offer.descriptors)
                (await channel.receive("ready")).close()
                with pytest.raises(Exception, match="Cannot connect to"):
                    async with connected(bench, destination):
                        pass
            await destination.ended()
