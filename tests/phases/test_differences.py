"""What of two recipes differs, and who can tell."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.errors import DifferencesVisible
from vmm.phases.differences import FIXED, Difference, compare, visible
from vmm.recipe import Recipe

SERIAL = {"id": "serial0", "backend": {"type": "file", "data": {"out": "/a"}}}
MACHINE = {"type": "microvm", "memory": {"size": 16 << 20}, "append": "quiet", "serial": ["serial0"]}
RNG = {"driver": "virtio-rng-device", "id": "r", "bus": "virtio-mmio-bus.0", "rng": "rng0"}


def recipe(*steps: tuple[str, dict[str, Any]]) -> Recipe:
    return Recipe.from_json("of this test", [{"execute": name, "arguments": arguments} for name, arguments in steps])


def compared(name: str, source: dict[str, Any], here: dict[str, Any]) -> list[Difference]:
    found = compare(recipe((name, source)), recipe((name, here)))
    return [item for item in found if item.effect != "identical"]


def test_what_is_the_same_is_listed_as_identical_without_values() -> None:
    one = recipe(("chardev-add", SERIAL), ("machine-set", MACHINE), ("finish-machine-init", {}))
    assert compare(one, one) == tuple(
        Difference(name=name, effect="identical")
        for name in ("chardev-add serial0", *(f"machine-set.{member}" for member in MACHINE))
    )


@pytest.mark.parametrize(
    ("command", "source", "here", "name"),
    [
        ("machine-set", MACHINE | {"name": "a"}, MACHINE | {"name": "b"}, "machine-set.name"),
        ("machine-set", MACHINE, MACHINE | {"reboot-action": "shutdown"}, "machine-set.reboot-action"),
        ("machine-set", MACHINE, MACHINE | {"serial": ["other"]}, "machine-set.serial"),
        ("machine-set", MACHINE, MACHINE | {"rtc": {"base": "localtime"}}, "machine-set.rtc"),
        ("chardev-add", SERIAL, {"id": "serial0", "backend": {"type": "null"}}, "chardev-add serial0"),
        ("object-add", {"id": "m", "qom-type": "x"}, {"id": "m", "qom-type": "y"}, "object-add m"),
        ("device_add", RNG, RNG | {"rng": "rng1", "id": "other"}, "device_add virtio-mmio-bus.0"),
    ],
)
def test_what_is_the_hosts_business_is_host_only(
    command: str, source: dict[str, Any], here: dict[str, Any], name: str
) -> None:
    (found,) = compared(command, source, here)
    assert (found.name, found.effect) == (name, "host-only")
    assert visible([found]) == ()


@pytest.mark.parametrize(
    ("command", "source", "here", "name"),
    [
        ("machine-set", MACHINE, MACHINE | {"append": "loud"}, "machine-set.append"),
        ("machine-set", MACHINE, MACHINE | {"memory": {"size": 32 << 20}}, "machine-set.memory"),
        ("machine-set", MACHINE, MACHINE | {"serial": []}, "machine-set.serial"),
        ("machine-set", MACHINE, MACHINE | {"not-known-yet": 1}, "machine-set.not-known-yet"),
        ("cpu-model-set", {"model": "host"}, {"model": "host", "props": {"avx2": False}}, "cpu-model-set.props"),
        ("accel-set", {"accel": "kvm"}, {"accel": "qtest"}, "accel-set.accel"),
        ("device_add", RNG, RNG | {"driver": "virtio-net-device"}, "device_add virtio-mmio-bus.0"),
        ("set-numa-node", {"type": "node"}, {"type": "node", "nodeid": 1}, "set-numa-node 0"),
    ],
)
def test_all_else_is_visible_to_the_guest(
    command: str, source: dict[str, Any], here: dict[str, Any], name: str
) -> None:
    (found,) = compared(command, source, here)
    assert (found.name, found.effect) == (name, "guest-visible")
    assert visible([found]) == (found,)


def test_a_device_that_only_one_side_has_is_visible() -> None:
    (found,) = compare(recipe(), recipe(("device_add", RNG)))
    assert (found.name, found.effect, found.source) == ("device_add virtio-mmio-bus.0", "guest-visible", None)
    # There would be no state for it.
    assert visible([found], [found.name]) == (found,)


def test_what_is_allowed_by_name_is_not_refused() -> None:
    (found,) = compared("machine-set", MACHINE, MACHINE | {"append": "loud"})
    assert visible([found], ["machine-set.append"]) == ()
    assert visible([found], ["machine-set.initrd"]) == (found,)


def test_what_the_state_has_the_shape_of_cannot_be_allowed() -> None:
    (found,) = compared("machine-set", MACHINE, MACHINE | {"memory": {"size": 32 << 20}})
    assert found.name in FIXED
    assert visible([found], [found.name]) == (found,)


def test_a_difference_in_words() -> None:
    (found,) = compared("machine-set", MACHINE, {**MACHINE, "append": "x" * 100})
    assert found.describe() == f"machine-set.append ('quiet' there, '{'x' * 56}... here)"
    (found,) = compare(recipe(), recipe(("device_add", {"id": "r"} | {"bus": "b"})))
    assert found.describe() == "device_add b (nothing there, {'id': 'r', 'bus': 'b'} here)"


def test_the_refusal_names_each() -> None:
    error = DifferencesVisible(items=("a (1 there, 2 here)", "b (nothing there, 3 here)"))
    assert str(error) == (
        "The guest would see that its machine is another one here: a (1 there, 2 here); b (nothing there, 3 here); "
        "allow each by its name (x-allow-difference), or configure it as it is at the source"
    )
