"""A destination that has something otherwise than its source: what it notes, what it reports, what it refuses."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

import vmm
from tests.phases.copy_kit import save
from tests.phases.machine import sockets_in
from vmm import host_sockets
from vmm.cpr.channel import CprChannel, Message
from vmm.errors import (
    CommandNotFound,
    DifferencesVisible,
    InvalidArguments,
    InvalidState,
    OptionInvalid,
    TokenNotGranted,
    VmmError,
)
from vmm.phases.incoming_port import IncomingPort

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

MEMORY: Final = {"size": 16 << 20}


def channels(folder: Path) -> list[dict[str, Any]]:
    return [
        {"channel-type": kind, "addr": {"transport": "socket", "type": "unix", "path": str(folder / kind)}}
        for kind in ("main", "cpr")
    ]


def guest(folder: Path, **options: Any) -> list[dict[str, Any]]:
    """A guest whose serial port is file `there`."""
    backend = {"type": "file", "data": {"out": str(folder / "there")}}
    machine = {"memory": MEMORY, "kernel": "builtin:heartbeat", "serial": ["serial0"], **options}
    return [
        {"execute": "chardev-add", "arguments": {"id": "serial0", "backend": backend}},
        {"execute": "machine-set", "arguments": machine},
        {"execute": "accel-set"},
        {"execute": "cpu-model-set"},
        {"execute": "finish-machine-init"},
        {"execute": "cont"},
    ]


async def update(source: EmbeddedMachine, folder: Path) -> dict[str, Any]:
    """Have the source hand over; return what `query-migrate` says at the end."""
    await source.execute("migrate-set-parameters", mode="cpr-transfer")
    await source.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    async with source.events() as events:
        await source.execute("migrate", channels=channels(folder))
        while (info := await source.execute("query-migrate"))["status"] not in ("completed", "failed"):
            await anext(events)
    return dict(info)


async def otherwise(machine: EmbeddedMachine) -> dict[str, str]:
    """Return the effect of each difference that is none of the identical ones."""
    found = await machine.execute("query-differences")
    return {item["name"]: item["effect"] for item in found if item["effect"] != "identical"}


async def test_an_empty_destination_becomes_the_machine(tmp_path: Path) -> None:
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        assert (await update(source, tmp_path))["status"] == "completed"
        assert destination.recipe.to_json() == source.recipe.to_json()
        assert await otherwise(destination) == {}
        assert {item["effect"] for item in await destination.execute("query-differences")} == {"identical"}


async def test_what_is_said_while_a_machine_is_awaited_is_laid_over_it(tmp_path: Path) -> None:
    here = str(tmp_path / "here")
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        await destination.execute("machine-set", name="successor")
        await destination.execute("machine-set", **{"reboot-action": "shutdown"})
        await destination.execute("chardev-add", id="serial0", backend={"type": "file", "data": {"out": here}})
        assert destination.path == "boot/precreate"
        assert not (tmp_path / "here").exists()
        assert (await update(source, tmp_path))["status"] == "completed"
        assert await destination.execute("query-name") == {"name": "successor"}
        assert await otherwise(destination) == {
            "machine-set.name": "host-only",
            "machine-set.reboot-action": "host-only",
            "chardev-add serial0": "host-only",
        }
        with trio.fail_after(20):
            while not (tmp_path / "here").stat().st_size:
                await trio.lowlevel.checkpoint()
        await destination.execute("stop")
    written = (tmp_path / "there").read_bytes() + (tmp_path / "here").read_bytes()
    beats = [line for line in written.split(b"\r\n") if line.startswith(b"heartbeat ")]
    assert [int(line.split()[1]) for line in beats[:-1]] == list(range(1, len(beats)))


async def test_a_socket_that_is_replaced_is_removed_once_the_guest_is_here(tmp_path: Path) -> None:
    def backend(name: str) -> dict[str, Any]:
        address = {"type": "unix", "data": {"path": str(tmp_path / name)}}
        return {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}

    recipe = guest(tmp_path)
    recipe[0] = {"execute": "chardev-add", "arguments": {"id": "serial0", "backend": backend("old")}}
    async with vmm.machine() as destination, vmm.machine(recipe) as source:
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        await destination.execute("chardev-add", id="serial0", backend=backend("new"))
        assert (tmp_path / "old").exists()
        assert (await update(source, tmp_path))["status"] == "completed"
        assert (tmp_path / "new").exists()
        client = await trio.open_unix_socket(str(tmp_path / "new"))
        assert await client.receive_some()
        await client.aclose()
        assert not (tmp_path / "old").exists()
    assert not (tmp_path / "new").exists()


async def test_an_override_is_taken_back_with_the_attempt_if_nothing_comes_of_it(tmp_path: Path) -> None:
    address = {"type": "unix", "data": {"path": str(tmp_path / "no" / "such" / "folder")}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    with pytest.RaisesGroup(pytest.RaisesExc(VmmError, match="Cannot listen on"), flatten_subgroups=True):
        async with vmm.machine() as destination:
            async with vmm.machine(guest(tmp_path)) as source:
                await destination.execute("migrate-incoming", channels=channels(tmp_path))
                await destination.execute("chardev-add", id="serial0", backend=backend)
                info = await update(source, tmp_path)
                assert info["status"] == "failed"
                assert "Cannot listen on" in info["error-desc"]
                assert (await source.execute("query-status"))["running"] is True
            await trio.sleep_forever()


async def test_what_the_guest_could_tell_is_refused_before_it_pauses(tmp_path: Path) -> None:
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        await destination.execute("machine-set", append="region=64K")
        async with source.events() as events:
            info = await update(source, tmp_path)
            assert info["error-desc"] == (
                "Live update refused by the destination at step 'describing': The guest would see that its machine is "
                "another one here: machine-set.append ('' there, 'region=64K' here); allow each by its name "
                "(x-allow-difference), or configure it as it is at the source"
            )
            with trio.move_on_after(0):
                async for event in events:
                    assert event["event"] != "STOP"
        assert await otherwise(destination) == {"machine-set.append": "guest-visible"}
        # The destination waits on, and the operator may allow it.
        await destination.execute("x-allow-difference", names=["machine-set.append"])
        assert (await update(source, tmp_path))["status"] == "completed"
        assert (await destination.execute("query-status"))["running"] is True


async def test_the_shape_of_the_state_cannot_be_allowed(tmp_path: Path) -> None:
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        with pytest.raises(OptionInvalid) as caught:
            await destination.execute("x-allow-difference", names=["machine-set.name", "machine-set.memory"])
        assert str(caught.value) == (
            "x-allow-difference: 'machine-set.memory' is not a difference that can be: the guest's state has its shape"
        )
        await destination.execute("machine-set", memory={"size": 32 << 20})
        info = await update(source, tmp_path)
        assert "machine-set.memory ({'size': 16777216} there, {'size': 33554432} here)" in info["error-desc"]


async def test_a_check_reports_and_leaves_both_sides_as_they_were(tmp_path: Path) -> None:
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        await destination.execute("machine-set", append="region=64K", name="n")
        before = await source.execute("query-migrate"), await source.execute("query-status")
        for _ in range(3):
            said = await source.execute("x-cpr-check", channels=channels(tmp_path))
            assert said["admitted"] is False
            assert "machine-set.append" in said["reason"]
            found = {item["name"]: item for item in said["differences"] if item["effect"] != "identical"}
            assert found == {
                "machine-set.append": {
                    "name": "machine-set.append", "effect": "guest-visible", "source": "", "here": "region=64K",
                },
                "machine-set.name": {"name": "machine-set.name", "effect": "host-only", "here": "n"},
            }  # fmt: skip
        await destination.execute("x-allow-difference", names=["machine-set.append"])
        assert (await source.execute("x-cpr-check", channels=channels(tmp_path)))["admitted"] is True
        assert (await source.execute("query-migrate"), await source.execute("query-status")) == before
        assert destination.path == "boot/precreate"
        assert (await update(source, tmp_path))["status"] == "completed"


async def test_a_check_of_nobody_says_so(tmp_path: Path) -> None:
    async with vmm.machine(guest(tmp_path)) as source:
        with pytest.raises(VmmError, match=r"Cannot connect to .*cpr: No such file"):
            await source.execute("x-cpr-check", channels=channels(tmp_path))
        with pytest.raises(
            VmmError, match="x-cpr-check: a destination is asked over its channel of type 'cpr'; give it"
        ):
            await source.execute("x-cpr-check", channels=channels(tmp_path)[:1])
        assert (await source.execute("query-status"))["running"] is True


async def test_an_abandoned_destination_makes_a_machine_of_its_own(tmp_path: Path) -> None:
    async with vmm.machine() as machine:
        await machine.execute("migrate-incoming", channels=channels(tmp_path))
        await machine.execute("machine-set", append="forgotten", kernel="builtin:heartbeat")
        with pytest.raises(InvalidState) as caught:
            await machine.execute("x-exit-precreate")
        assert "give the channel up (x-cpr-abandon)" in str(caught.value)
        await machine.execute("x-cpr-abandon")
        assert (await machine.execute("query-migrate"))["status"] == "cancelled"
        assert sockets_in(tmp_path) == []
        with pytest.raises(InvalidState, match="x-cpr-abandon is not possible when no CPR channel is awaited"):
            await machine.execute("x-cpr-abandon")
        await machine.execute("machine-set", memory=MEMORY)
        assert machine.phase == "machine-created"
        (step,) = (step for step in machine.recipe if step.execute == "machine-set")
        assert step.arguments["append"] == ""


async def test_an_abandoned_destination_can_await_another(tmp_path: Path) -> None:
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
        for _ in range(3):
            await destination.execute("migrate-incoming", channels=channels(tmp_path))
            await destination.execute("machine-set", memory={"size": 32 << 20})
            await destination.execute("x-cpr-abandon")
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        assert (await update(source, tmp_path))["status"] == "completed"
        assert await otherwise(destination) == {}


@pytest.mark.parametrize("what", ["machine", "check"])
async def test_what_has_come_by_the_time_of_an_abandonment_is_not_looked_at(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = CprChannel.receive
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source, trio.open_nursery() as nursery:

        async def receive_at_the_last_moment(self: CprChannel, *kinds: str) -> Message:
            message = await receive(self, *kinds)
            if message.kind == what:
                # In the tick in which the message has been read the channel is given up.
                port = destination._tree.view(IncomingPort)
                nursery.start_soon(destination.execute, "x-cpr-abandon")
                with trio.CancelScope(shield=True):
                    while port.awaits_cpr:
                        await trio.lowlevel.checkpoint()
            return message

        monkeypatch.setattr(CprChannel, "receive", receive_at_the_last_moment)
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        await destination.execute("machine-set", append="noted")
        if what == "check":
            with pytest.raises(VmmError, match="The destination closed the channel at step 'checking'"):
                await source.execute("x-cpr-check", channels=channels(tmp_path))
        else:
            info = await update(source, tmp_path)
            assert info["error-desc"].startswith("The destination closed the channel at step 'building'")
        assert await destination.execute("query-differences") == []
        await destination.execute("machine-set", memory=MEMORY)
        assert destination.phase == "machine-created"


async def test_what_was_allowed_for_one_guest_is_not_allowed_for_the_next(tmp_path: Path) -> None:
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
        await save(source, tmp_path / "state")
        await source.execute("cont")
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        await destination.execute("machine-set", append="region=64K")
        await destination.execute("x-allow-difference", names=["machine-set.append"])
        assert (await update(source, tmp_path))["status"] == "completed"
        with pytest.raises(DifferencesVisible, match=r"machine-set\.append"):
            await destination.execute("loadvm", name=str(tmp_path / "state"))


async def test_a_recipe_that_is_none_has_no_differences(tmp_path: Path) -> None:
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        assert (await source.execute("x-cpr-check", channels=channels(tmp_path)))["differences"]
        sock = trio.socket.from_stdlib_socket(host_sockets.connect_unix(str(tmp_path / "cpr")))
        with closing(CprChannel(sock, side="source", peer="destination")) as channel:
            await channel.hello("a test")
            await channel.send("check", {"recipe": 7})
            body = (await channel.receive("checked")).body
        assert body == {"reason": "Recipe of the source, as a whole: it must be a list of commands", "differences": []}
        assert await destination.execute("query-differences") == []


async def test_what_is_noted_must_have_the_right_form_and_be_one_that_makes_a_machine(tmp_path: Path) -> None:
    async with vmm.machine() as machine:
        with pytest.raises(TokenNotGranted):
            await machine.execute("accel-set")
        await machine.execute("migrate-incoming", channels=channels(tmp_path))
        await machine.execute("accel-set")
        with pytest.raises(InvalidArguments, match="'memory' must be an object"):
            await machine.execute("machine-set", memory=5)
        with pytest.raises(TokenNotGranted):
            await machine.execute("finish-machine-init")
        with pytest.raises(CommandNotFound):
            await machine.execute("make-tea")
        admitted = {it["name"]: it["admitted"] for it in await machine.execute("query-commands", extended=True)}
        assert {"machine-set", "accel-set", "cpu-model-set", "chardev-add"} <= {n for n, ok in admitted.items() if ok}
        assert not admitted["finish-machine-init"]
        noted = {it["name"] for it in await machine.execute("query-commands", extended=True) if it["noted"]}
        assert "accel-set" in noted
        assert "finish-machine-init" not in noted


async def test_a_kernel_is_replaced_by_an_allowed_one_only_where_none_was_sent(tmp_path: Path) -> None:
    """What the source gave a descriptor for is used; what it did not comes from this host if it was allowed."""
    image = tmp_path / "image"
    image.write_bytes(b"\xf4" * 512)
    recipe = guest(tmp_path, kernel=f"flat:{image}")
    async with vmm.machine() as destination, vmm.machine(recipe) as source:
        await destination.execute("x-allow-resource", name="kernel", path=str(tmp_path / "does not exist"))
        await destination.execute("x-allow-resource", name="chardev/serial0")
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        assert (await update(source, tmp_path))["status"] == "completed"
        assert await otherwise(destination) == {}


async def test_a_descriptor_that_the_operator_gave_stands_in_for_one_that_was_not_sent(tmp_path: Path) -> None:
    """A source with a built-in kernel sends none; where that is overridden by a file, its descriptor can be given."""
    image = tmp_path / "image"
    image.write_bytes(b"\xf4" * 512)
    with image.open("rb") as file:
        async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
            await destination.execute("x-allow-resource", name="kernel", fd=file.fileno())
            await destination.execute("migrate-incoming", channels=channels(tmp_path))
            await destination.execute("machine-set", kernel="flat:/nowhere")
            await destination.execute("x-allow-difference", names=["machine-set.kernel"])
            assert (await update(source, tmp_path))["status"] == "completed"
            await destination.execute("system_reset")


async def test_a_descriptor_that_is_not_open_is_named(tmp_path: Path) -> None:
    async with vmm.machine() as destination, vmm.machine(guest(tmp_path)) as source:
        with pytest.raises(OptionInvalid, match="x-allow-resource: 'kernel' is not clear: give path, fd or neither"):
            await destination.execute("x-allow-resource", name="kernel", path="/a", fd=3)
        with pytest.raises(OptionInvalid, match="x-allow-resource, fd: -1 is not the number of a descriptor"):
            await destination.execute("x-allow-resource", name="kernel", fd=-1)
        await destination.execute("x-allow-resource", name="kernel", fd=987)
        await destination.execute("migrate-incoming", channels=channels(tmp_path))
        await destination.execute("machine-set", kernel="flat:/nowhere")
        await destination.execute("x-allow-difference", names=["machine-set.kernel"])
        for _ in range(2):
            assert (
                "Cannot duplicate descriptor 987: Bad file descriptor" in (await update(source, tmp_path))["error-desc"]
            )
        assert (await source.execute("query-status"))["running"] is True
