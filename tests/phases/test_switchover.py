"""What comes between the passes over RAM and the guest's new life: a wait, a word of the destination, a cancel."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from tests.phases.copy_kit import (
    Peer,
    destination_peer,
    empty,
    goes_on,
    in_status,
    listening,
    outcome,
    started,
    status,
)
from vmm.errors import VmmError
from vmm.phases import copy_plan

if TYPE_CHECKING:
    from pathlib import Path

GONE: Final = "The destination closed the connection; the guest goes on in the source"

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]


def capable(*names: str) -> list[dict[str, Any]]:
    """Return migration capabilities to be on."""
    return [{"capability": name, "state": True} for name in names]


def refusal_of(text: str) -> pytest.RaisesExc[VmmError]:
    """Expect an error that begins so."""
    return pytest.raises(VmmError, match=f"^{re.escape(text)}")


async def test_a_migration_waits_with_its_guest_stopped_until_it_is_told_to_go_on(tmp_path: Path) -> None:
    async with started() as source, empty() as destination, source.events() as events:
        uri = f"unix:{tmp_path / 'main'}"
        await destination.execute("migrate-incoming", uri=uri)
        await source.execute("migrate", uri=uri, capabilities=capable("pause-before-switchover", "events"))
        await outcome(source, "pre-switchover")
        assert await status(source) == "finish-migrate"
        assert await status(destination) == "inmigrate"
        with refusal_of("migrate-continue: state: 'device' is not pre-switchover, the only state in which a migration"):
            await source.execute("migrate-continue", state="device")
        await source.execute("migrate-continue", state="pre-switchover")
        assert (await outcome(source))["status"] == "completed"
        await in_status(destination, "running")
        await goes_on(destination)
        await source.execute("quit")
        told = [event["data"] for event in [event async for event in events] if event["event"].startswith("MIGRATION")]
    states = [data["status"] for data in told if "status" in data]
    assert states == ["setup", "active", "pre-switchover", "device", "completed"]
    passes = [data["pass"] for data in told if "pass" in data]
    assert passes == list(range(1, len(passes) + 1))
    assert len(passes) >= 2


async def test_a_migration_that_waits_is_cancelled_and_the_guest_goes_on(tmp_path: Path) -> None:
    async with started() as source, empty() as destination:
        uri = f"unix:{tmp_path / 'main'}"
        await destination.execute("migrate-incoming", uri=uri, exit_on_error=False)
        await source.execute("migrate", uri=uri, capabilities=capable("pause-before-switchover"))
        await outcome(source, "pre-switchover")
        await source.execute("migrate_cancel")
        assert (await outcome(source))["status"] == "cancelled"
        await goes_on(source)


@pytest.mark.parametrize("says_why", [False, True])
async def test_a_destination_that_goes_while_the_migration_waits_is_noticed(*, says_why: bool, tmp_path: Path) -> None:
    async with started() as source:
        async with listening(tmp_path) as (uri, listener):
            await source.execute("migrate", uri=uri, capabilities=capable("pause-before-switchover"))
            async with await listener.accept() as stream:
                peer = Peer(stream)
                await peer.invite()
                await outcome(source, "pre-switchover")
                if says_why:
                    await peer.say("refused", "it is ended")
        info = await outcome(source)
        why = "Refused by the destination: it is ended" if says_why else GONE
        assert (info["status"], info["error-desc"]) == ("failed", why)
        await goes_on(source)


async def test_a_migration_is_cancelled_while_it_is_connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connecting = trio.Event()

    async def connect(address: object, *, within: float) -> None:
        connecting.set()
        await trio.sleep_forever()

    async with started() as source:
        with monkeypatch.context() as patch:
            patch.setattr(copy_plan, "connect_channel", connect)
            async with trio.open_nursery() as nursery:

                async def cancelled() -> None:
                    with refusal_of("The migration was cancelled by "):
                        await source.execute("migrate", uri="tcp:192.0.2.1:1")

                nursery.start_soon(cancelled)
                await connecting.wait()
                await source.execute("migrate_cancel")
        assert await status(source) == "running"
        assert await source.execute("query-migrate") == {}
        async with empty() as destination:
            uri = f"unix:{tmp_path / 'main'}"
            await destination.execute("migrate-incoming", uri=uri)
            await source.execute("migrate", uri=uri)
            assert (await outcome(source))["status"] == "completed"


async def test_a_migration_that_does_not_wait_is_not_told_to_go_on(tmp_path: Path) -> None:
    async with started() as source, destination_peer(source, tmp_path) as peer:
        await peer.invited()
        reason = "migrate-continue is not possible while the migration does not wait"
        with refusal_of(reason):
            await source.execute("migrate-continue", state="pre-switchover")


async def test_the_destination_says_that_the_guest_may_be_stopped(tmp_path: Path) -> None:
    async with started() as source:
        async with listening(tmp_path) as (uri, listener):
            await source.execute("migrate", uri=uri, capabilities=capable("return-path", "switchover-ack"))
            async with await listener.accept() as stream:
                peer = Peer(stream)
                await peer.invite()
                assert (await outcome(source, "active"))["ram"]["transferred"] == 0
                await peer.say("acknowledged")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(peer.ended)
                    await outcome(source, "device")
                    nursery.cancel_scope.cancel()
        await outcome(source, "failed")
    async with started() as source, empty() as destination:
        uri = f"unix:{tmp_path / 'main'}"
        await destination.execute("migrate-incoming", uri=uri)
        await source.execute("migrate", uri=uri, capabilities=capable("return-path", "switchover-ack"))
        assert (await outcome(source))["status"] == "completed"
        await in_status(destination, "running")


async def test_nobody_says_so_on_a_channel_of_one_direction(tmp_path: Path) -> None:
    async with started() as source:
        capabilities = capable("return-path", "switchover-ack")
        await source.execute("migrate", uri=f"file:{tmp_path}/state", capabilities=capabilities)
        info = await outcome(source)
        assert info["error-desc"] == (
            "migrate: with switchover-ack the destination says when the guest may be stopped, which cannot be heard on "
            "this channel; use a socket, or turn switchover-ack off"
        )
        await goes_on(source)
