"""A migration's own settings, and the job that it is: what holds while it lasts, and what is left of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import attrs
import pytest
import trio

from tests.phases.machine import Running, advance, bare, failure
from tests.phases.update_kit import Bench, channels, due, open_bench
from vmm import host_sockets
from vmm.capabilities import Grant, MayListen, MayOpenHostFile, MayQuery, MayStartMigration
from vmm.errors import MigrationRefused
from vmm.migration.capability_table import SUPPORTED

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.qmp_client import QmpClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

EVENTS: Final = [{"capability": "events", "state": True}]
SUCCESS: Final = ["created", "running", "waiting", "pending", "concluded"]


def statuses(running: Running, name: str) -> list[str]:
    """Return what the machine told of job `name`."""
    return [data["status"] for event, data in running.events() if event == "JOB_STATUS_CHANGE" and data["id"] == name]


async def settings(client: QmpClient) -> tuple[Any, Any]:
    """Return all settings of migrations."""
    return await client.execute("query-migrate-capabilities"), await client.execute("query-migrate-parameters")


async def concluded(client: QmpClient, name: str) -> dict[str, Any]:
    """Wait until job `name` has concluded, and return what `query-jobs` says of it."""
    async with due(f"the end of job {name}"):
        while True:
            (job,) = await client.execute("query-jobs")
            assert job["id"] == name
            if job["status"] == "concluded":
                return dict(job)
            await client.wait_event(lambda event: event["event"] == "JOB_STATUS_CHANGE")


# --- to the end -------------------------------------------------------------------------------------------


@pytest.fixture
async def bench() -> Any:
    """Yield a place for processes."""
    async with open_bench() as made:
        yield made


async def test_a_live_update_is_a_job_on_both_sides_with_settings_of_its_own(bench: Bench) -> None:
    console = bench.console()
    source = bench.machine(console)
    await console.beats(2)
    destination = bench.start()
    where = channels(f"{bench.folder}/main", f"{bench.folder}/cpr")
    async with bench.session(source.qmp) as s, bench.session(destination.qmp) as d:
        before = await settings(s)
        assert await settings(d) == before
        await d.execute(
            "migrate-incoming", channels=where, capabilities=EVENTS, parameters={"downtime-limit": 7}, job_id="in"
        )
        assert (await d.execute("query-migrate-parameters"))["downtime-limit"] == 7
        (waiting,) = await d.execute("query-jobs")
        assert waiting == {"id": "in", "type": "migrate", "status": "running", "current-progress": 0,
                           "total-progress": 1}  # fmt: skip
        await s.execute(
            "migrate", channels=where, capabilities=EVENTS, parameters={"mode": "cpr-transfer"}, job_id="out"
        )
        for client, name in ((s, "out"), (d, "in")):
            # The capability `events` held to the end.
            await client.wait_event(lambda event: event.get("data") == {"status": "completed"})
            job = await concluded(client, name)
            assert job == {"id": name, "type": "migrate", "status": "concluded", "current-progress": 1,
                           "total-progress": 1}  # fmt: skip
            assert (await client.execute("query-migrate"))["status"] == "completed"
            assert await settings(client) == before
            await client.execute("job-dismiss", id=name)
            assert await client.execute("query-jobs") == []
        await s.execute("quit")
        await console.new_beats(2)
        await d.execute("quit")


async def test_a_copy_into_a_file_is_a_job(tmp_path: Path) -> None:
    async with bare(tmp_path) as (running, client):
        await advance(client, "running")
        before = await settings(client)
        await client.execute("migrate", uri=f"file:{tmp_path}/state", parameters={"mode": "normal"}, job_id="save")
        job = await concluded(client, "save")
        assert job["current-progress"] == job["total-progress"] > 1 << 20
        assert statuses(running, "save") == SUCCESS
        assert await settings(client) == before


# --- not to the end ---------------------------------------------------------------------------------------


async def test_a_job_is_cancelled_and_says_so(tmp_path: Path) -> None:
    where = channels(str(tmp_path / "main"), str(tmp_path / "cpr"))
    with host_sockets.listen_unix(str(tmp_path / "cpr")):  # which says nothing
        async with bare(tmp_path) as (running, client):
            await advance(client, "running")
            before = await settings(client)
            await client.execute("migrate", channels=where, parameters={"mode": "cpr-transfer"}, job_id="out")
            assert (await client.execute("query-migrate-parameters"))["mode"] == "cpr-transfer"
            await client.execute("migrate-set-parameters", **{"max-bandwidth": 5})
            assert await failure(client, "job-dismiss", id="out") == (
                "job-dismiss of 'out' is not possible while it is running; "
                "wait until it has concluded, which event JOB_STATUS_CHANGE tells"
            )
            await client.execute("job-cancel", id="out")
            job = await concluded(client, "out")
            assert job["error"] == "The migration was cancelled"
            assert statuses(running, "out") == ["created", "running", "aborting", "concluded"]
            assert await failure(client, "job-cancel", id="out") == (
                "job-cancel of 'out' is not possible once it is concluded; job-dismiss forgets it"
            )
            # What was set while it lasted stays; what was for it alone does not.
            capabilities, parameters = before
            assert await settings(client) == (capabilities, {**parameters, "max-bandwidth": 5})


async def test_a_migration_that_fails_is_a_job_that_tells_why(tmp_path: Path) -> None:
    where = channels(str(tmp_path / "main"), str(tmp_path / "cpr"))
    async with bare(tmp_path) as (running, client):
        await advance(client, "running")
        before = await settings(client)
        with host_sockets.listen_unix(str(tmp_path / "cpr")) as listener:
            await client.execute("migrate", channels=where, parameters={"mode": "cpr-transfer"}, job_id="out")
            listener.accept()[0].close()
        job = await concluded(client, "out")
        assert job["error"] == (await client.execute("query-migrate"))["error-desc"]
        assert statuses(running, "out") == ["created", "running", "aborting", "concluded"]
        assert await settings(client) == before


async def test_a_command_that_fails_leaves_no_job_and_no_setting(tmp_path: Path) -> None:
    where = channels(str(tmp_path / "main"), str(tmp_path / "cpr"))
    async with bare(tmp_path) as (running, client):
        await advance(client, "running")
        before = await settings(client)
        said = await failure(client, "migrate", channels=where, parameters={"mode": "cpr-transfer"}, job_id="out")
        assert said == f"Cannot connect to {tmp_path}/cpr: No such file or directory"
        assert statuses(running, "out") == ["created", "null"]
        assert await client.execute("query-jobs") == []
        assert await settings(client) == before


WRONG: Final = [
    ({"capabilities": [*EVENTS, {"capability": "xbzrle", "state": True}]},
     "Migration capability 'xbzrle' is not supported here; "
     f"leave it off (those that can be on: {', '.join(sorted(SUPPORTED))})"),
    ({"capabilities": EVENTS, "parameters": {"downtime-limit": 9, "direct-io": True}},
     "Migration parameter 'direct-io' is not supported here; leave it at its default, False"),
    ({"capabilities": EVENTS, "parameters": {"downtime-limit": 2_000_001}},
     "Migration parameter downtime-limit: 2000001 is not an integer from 0 to 2000000 ms"),
    ({"capabilities": EVENTS, "parameters": {"downtime-limit": 9}, "job_id": "0"},
     "job-id: '0' is not a name: a letter, then letters, digits, '-', '_' and '.', at most 127 in all"),
]  # fmt: skip


@pytest.mark.parametrize(("inline", "reason"), WRONG, ids=[str(index) for index in range(len(WRONG))])
@pytest.mark.parametrize("command", ["migrate", "migrate-incoming"])
async def test_if_anything_is_wrong_all_of_it_is_refused(
    tmp_path: Path, command: str, inline: dict[str, Any], reason: str
) -> None:
    async with bare(tmp_path) as (running, client):
        if command == "migrate":
            await advance(client, "running")
        before = await settings(client)
        assert await failure(client, command, uri=f"unix:{tmp_path}/main", **inline) == reason
        assert await settings(client) == before
        assert await client.execute("query-jobs") == []
        assert await client.execute("query-migrate") == {}
        assert not [event for event, _ in running.events() if event in ("MIGRATION", "JOB_STATUS_CHANGE")]
        assert sorted(os.listdir(tmp_path)) == ["qmp"]


# --- incoming ---------------------------------------------------------------------------------------------


async def test_what_is_awaited_is_a_job_that_only_its_source_can_cancel(tmp_path: Path) -> None:
    where = channels(str(tmp_path / "main"), str(tmp_path / "cpr"))
    async with bare(tmp_path) as (running, client):
        before = await settings(client)
        await client.execute(
            "migrate-incoming", channels=where, parameters={"downtime-limit": 9}, job_id="in", capabilities=EVENTS
        )
        assert await failure(client, "job-cancel", id="in") == (
            "job-cancel of 'in' is not possible for what comes in; cancel it where it comes from; "
            "a live update that is only awaited is given up by x-cpr-abandon"
        )
        assert await failure(client, "migrate-incoming", channels=where, job_id="again") == (
            "migrate-incoming: channels are bound already; query-migrate shows them"
        )
        assert await failure(client, "migrate-incoming", channels=where, job_id="in") == (
            "Job 'in' exists already; choose another name"
        )
        await client.execute("x-cpr-abandon")
        assert (await concluded(client, "in"))["error"] == "The migration was cancelled"
        assert statuses(running, "in") == ["created", "running", "aborting", "concluded"]
        assert await settings(client) == before


async def test_an_address_that_cannot_be_bound_leaves_no_job(tmp_path: Path) -> None:
    async with bare(tmp_path) as (running, client):
        before = await settings(client)
        said = await failure(client, "migrate-incoming", uri=f"unix:{tmp_path}/none/main", job_id="in",
                             parameters={"downtime-limit": 9})  # fmt: skip
        assert said == f"Cannot listen on {tmp_path}/none/main: No such file or directory"
        assert statuses(running, "in") == ["created", "null"]
        assert await settings(client) == before


# --- tokens -----------------------------------------------------------------------------------------------


NARROW: Final = Grant("narrow", frozenset({MayQuery, MayStartMigration, MayListen, MayOpenHostFile}))


@attrs.frozen
class Narrow:
    """A caller that may start and await migrations, and not change their settings."""

    name: str = "narrow"
    grant: Grant = NARROW
    descriptors: dict[str, int] = attrs.Factory(dict)
    by_number: bool = False

    def take_descriptors(self) -> list[int]:
        """Return none."""
        return []


@pytest.mark.parametrize(
    ("inline", "token"),
    [({"capabilities": []}, "may-set-migration-cap"), ({"parameters": {}}, "may-set-migration-param")],
)
async def test_settings_of_a_migration_take_the_tokens_of_settings(
    tmp_path: Path, inline: dict[str, Any], token: str
) -> None:
    (member,) = inline
    async with bare(tmp_path) as (running, client):
        await advance(client, "running")
        arguments = {"uri": f"unix:{tmp_path}/main", **inline}
        with trio.fail_after(20), pytest.raises(MigrationRefused) as caught:
            await running.host.table.execute(Narrow(), "migrate", arguments)
        assert str(caught.value) == f"migrate: '{member}' takes {token}, which this session is not lent; leave it out"
