"""A recipe that came from elsewhere: what is admitted, what goes over it, and that nothing hostile gets further."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.phases.machine import bare
from vmm.capabilities import ADMIN, MayAdoptDescriptor, MayCreateBackend, MayQuery, Mint
from vmm.errors import DescriptorMissing, RecipeInvalid, ResourcesMissing, VmmError
from vmm.monitor.arguments import structure
from vmm.monitor.command import CommandTable
from vmm.nursery_tree import Tree
from vmm.phases.arriving import ADMITTED, Arriving, arrive
from vmm.phases.catalog import COMMANDS
from vmm.phases.commands_backends import ChardevAdd, chardev_add
from vmm.phases.host import Inheritance
from vmm.phases.host_resources import resources_of, socket_paths
from vmm.phases.overrides import Overrides
from vmm.phases.replay import SUCCESSOR
from vmm.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

FILE: dict[str, Any] = {"type": "file", "data": {"out": "/there"}}
SOCKET: dict[str, Any] = {
    "type": "socket",
    "data": {"addr": {"type": "unix", "data": {"path": "/there"}}, "server": True, "wait": False},
}
MACHINE: list[dict[str, Any]] = [
    {"execute": "chardev-add", "arguments": {"id": "serial0", "backend": FILE}},
    {"execute": "machine-set", "arguments": {"kernel": "/vmlinuz", "initrd": "/initrd", "serial": ["serial0"]}},
    {"execute": "accel-set"},
    {"execute": "cpu-model-set"},
    {"execute": "finish-machine-init"},
]


def table() -> CommandTable:
    return CommandTable(
        COMMANDS,
        Tree(lambda event, data: None),
        grant_of=lambda caller: ADMIN,
        hint=lambda kind, scope: "",
        record=lambda name, arguments: None,
    )


def arrived(
    steps: object = MACHINE, overrides: list[dict[str, Any]] | None = None, allowed: dict[str, str] | None = None
) -> Arriving:
    noted = Overrides()
    for step in overrides or []:
        noted.append(step["execute"], step.get("arguments", {}))
    return arrive(Recipe.from_json("of the source", steps), table(), noted.recipe(), allowed or {})


def step(arriving: Arriving, command: str) -> dict[str, Any]:
    (found,) = (step for step in arriving.recipe if step.execute == command)
    return dict(found.arguments)


def test_it_arrives_with_every_default_written_out() -> None:
    arriving = arrived()
    assert step(arriving, "accel-set") == {"accel": "kvm"}
    assert step(arriving, "machine-set")["memory"] == {"size": 128 << 20}
    assert {item.effect for item in arriving.differences} == {"identical"}


def test_members_of_a_decision_go_over_its_own_one_by_one() -> None:
    arriving = arrived(
        overrides=[
            {"execute": "machine-set", "arguments": {"name": "a", "append": "b"}},
            {"execute": "machine-set", "arguments": {"name": "c"}},
        ]
    )
    machine = step(arriving, "machine-set")
    assert (machine["name"], machine["append"], machine["kernel"]) == ("c", "b", "/vmlinuz")


def test_what_is_new_gets_its_place_in_the_order_of_the_phases() -> None:
    null = {"id": "extra", "backend": {"type": "null", "data": {}}}
    arriving = arrived(
        overrides=[
            {"execute": "object-add", "arguments": {"qom-type": "rng-builtin", "id": "r"}},
            {"execute": "chardev-add", "arguments": null},
        ]
    )
    assert [it.execute for it in arriving.recipe] == [
        *(
            "chardev-add",
            "chardev-add",
            "machine-set",
            "accel-set",
            "object-add",
            "cpu-model-set",
            "finish-machine-init",
        ),
    ]


def test_what_the_sender_gave_no_descriptor_for_is_listed_whole() -> None:
    arriving = arrived()
    with pytest.raises(ResourcesMissing) as caught:
        arriving.require_resources(["ram", "owner"])
    assert str(caught.value) == (
        "no descriptor came for chardev/serial0, kernel, initrd, and this host's own are allowed by name: "
        "-allow-resource chardev/serial0=PATH -allow-resource kernel=PATH -allow-resource initrd=PATH"
    )
    arriving.require_resources(["kernel", "initrd", "chardev/serial0/out"])


def test_what_is_allowed_has_its_path_here() -> None:
    allowed = {"kernel": "/here", "initrd": "", "chardev/serial0": "/log"}
    arriving = arrived(allowed=allowed)
    machine = step(arriving, "machine-set")
    assert (machine["kernel"], machine["initrd"]) == ("/here", "/initrd")
    assert step(arriving, "chardev-add")["backend"]["data"]["out"] == "/log"
    arriving.require_resources([])
    assert {item.effect for item in arriving.differences} == {"identical"}


def test_a_descriptor_number_stands_for_the_one_descriptor_of_a_resource() -> None:
    arriving = arrived(allowed={"kernel": "fd:7", "chardev/serial0": "fd:8"})
    assert arriving.given == {"kernel": 7, "chardev/serial0/out": 8}
    assert arriving.here == frozenset()
    arriving.require_resources(["initrd"])


def test_devices_without_a_name_are_as_many_as_were_said() -> None:
    device = {"execute": "device_add", "arguments": {"driver": "virtio-rng-device"}}
    steps = [*MACHINE[:-1], device, MACHINE[-1]]
    arriving = arrived(steps, overrides=[device, device])
    assert [it.execute for it in arriving.recipe].count("device_add") == 3


def test_a_socket_can_be_redirected_too() -> None:
    steps = [{"execute": "chardev-add", "arguments": {"id": "c", "backend": SOCKET}}, *MACHINE]
    arriving = arrived(steps, allowed={"chardev/c": "/here"})
    found = next(it for it in arriving.recipe if it.arguments.get("id") == "c")
    assert found.arguments["backend"]["data"]["addr"]["data"]["path"] == "/here"


def test_the_client_of_a_socket_may_have_hung_up() -> None:
    client = {"type": "socket", "data": {**SOCKET["data"], "server": False}}
    steps = [{"execute": "chardev-add", "arguments": {"id": "c", "backend": client}}, *MACHINE]
    arrived(steps).require_resources(["kernel", "initrd", "chardev/serial0/out"])


def test_a_built_in_kernel_is_no_resource_of_the_host() -> None:
    machine = Recipe.from_json("r", [{"execute": "machine-set", "arguments": {"kernel": "builtin:heartbeat"}}])
    assert [list(resources_of(it)) for it in machine] == [[]]


QTEST: dict[str, Any] = {"qom-type": "qtest", "id": "q", "chardev": "serial0"}


def test_the_log_of_a_qtest_is_a_file_of_the_host() -> None:
    steps = [MACHINE[0], {"execute": "object-add", "arguments": {**QTEST, "log": "/there"}}, *MACHINE[1:]]
    with pytest.raises(ResourcesMissing, match=r"^no descriptor came for monitor/q, and"):
        arrived(steps).require_resources(["kernel", "initrd", "chardev/serial0/out"])
    arrived(steps).require_resources(["kernel", "initrd", "chardev/serial0/out", "monitor/q/log"])
    assert step(arrived(steps, allowed={"monitor/q": "/here"}), "object-add")["log"] == "/here"
    assert arrived(steps, allowed={"monitor/q": "fd:7"}).given == {"monitor/q/log": 7}


@pytest.mark.parametrize("log", [{}, {"log": "none"}])
def test_a_qtest_without_a_log_needs_nothing_of_the_host(log: dict[str, str]) -> None:
    steps = [MACHINE[0], {"execute": "object-add", "arguments": {**QTEST, **log}}, *MACHINE[1:]]
    arrived(steps).require_resources(["kernel", "initrd", "chardev/serial0/out"])


def test_a_monitor_over_a_number_of_the_source_is_refused() -> None:
    """It could be that of the channel over which the recipe came: its sender would be a client of this machine."""
    monitor = {"execute": "object-add", "arguments": {"qom-type": "monitor-qmp", "id": "m", "fd": 5}}
    with pytest.raises(RecipeInvalid) as caught:
        arrived([monitor, *MACHINE])
    assert str(caught.value) == (
        "Recipe of the source, command 1 (object-add): "
        "fd: 5 is a descriptor of another process; a recipe's monitor has a chardev"
    )


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("object-add", {"qom-type": "rng-random", "id": "x/y", "filename": "/there"}),
        ("chardev-add", {"id": "x/y", "backend": FILE}),
    ],
)
def test_a_name_that_could_be_that_of_another_s_resource_is_refused(command: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        arrived([{"execute": command, "arguments": arguments}, *MACHINE], allowed={"object/x": "", "chardev/x": ""})
    assert str(caught.value) == (
        f"Recipe of the source, command 1 ({command}): "
        "id: 'x/y' has a '/', which parts the names of host resources; use other characters"
    )


def test_an_override_that_makes_no_machine_of_it_is_refused() -> None:
    with pytest.raises(RecipeInvalid, match=r"smp\.cpus: 99 is not a number of vCPUs from 1 to 8"):
        arrived(overrides=[{"execute": "machine-set", "arguments": {"smp": {"cpus": 99}}}])


def test_commands_that_can_be_noted_are_those_that_a_recipe_may_have_but_the_last() -> None:
    noted = {command.name for command in COMMANDS if command.overrides}
    assert noted == {command.name for command in COMMANDS} & set(ADMITTED) - {"finish-machine-init"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = """
id backend type data out addr path kernel initrd memory size smp serial props qom-type filename chardev accel model
driver bus acpi-tables file server grant log fd
"""
KINDS = "file socket unix pty rng-random monitor-qmp qtest kvm host builtin:x"
KEYS = st.sampled_from(NAMES.split())
LIKELY = st.recursive(
    JSON | st.sampled_from(KINDS.split()),
    lambda inner: st.dictionaries(KEYS, inner, max_size=5) | st.lists(inner, max_size=3),
    max_leaves=12,
)
STEP = st.fixed_dictionaries({"execute": st.sampled_from([*ADMITTED, "quit"])}, optional={"arguments": LIKELY})


@given(st.lists(STEP | st.sampled_from(MACHINE), max_size=8) | JSON, st.booleans())
def test_nothing_hostile_raises_anything_but_a_refusal(steps: Any, whole: bool) -> None:
    # Anything else is a bug, and would fail this.
    with suppress(VmmError):
        arriving = arrived([*steps, *MACHINE] if whole and isinstance(steps, list) else steps)
        arriving.require_same_guest([])
        arriving.require_resources([])


OPEN: dict[str, Any] = {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": "5"}}, "wait": False}}


def test_a_socket_that_was_open_at_its_source_has_no_path_here() -> None:
    steps = [{"execute": "chardev-add", "arguments": {"id": "c", "backend": OPEN}}, *MACHINE]
    arriving = arrived(steps, allowed={"chardev/c": "/here"})
    found = next(it for it in arriving.recipe if it.arguments.get("id") == "c")
    assert found.arguments["backend"] == OPEN
    assert arrived(steps, allowed={"chardev/c": "fd:7"}).given == {"chardev/c/listener": 7}
    assert socket_paths(arriving.recipe) == {}


async def test_a_number_of_another_process_is_no_descriptor_of_this_one(tmp_path: Path) -> None:
    """Though its operator allowed the chardev by name: the number would be anything that this process has open."""
    async with bare(tmp_path) as (running, _):
        inheritance = Inheritance()
        inheritance.open_here(frozenset({"chardev/c"}), {})
        mint = Mint("a test")
        arguments = structure(ChardevAdd, {"id": "c", "backend": OPEN}, "chardev-add")
        assert isinstance(arguments, ChardevAdd)
        with pytest.raises(DescriptorMissing) as caught:
            await chardev_add(
                mint(MayCreateBackend, running.host.stores),
                mint(MayAdoptDescriptor, inheritance),
                SUCCESSOR,
                mint(MayQuery, running.tree),
                arguments,
            )
        assert str(caught.value) == "The source sent no descriptor named 'chardev/c'"
        assert "c" not in running.host.stores.chardevs
