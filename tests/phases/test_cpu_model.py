"""The choice of the CPU: what is asked for, refused, recorded, and then seen by a guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.hw.boot.images import bzimage
from tests.kvm.tiny import assemble
from tests.phases.machine import advance, bare, failure
from vmm.kvm.cpu_features import FEATURES
from vmm.qmp_client import CommandFailed

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.qmp_client import QmpClient

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("no_leaks")]

X2APIC_AS_STATUS = """
 mov eax, 1
 cpuid
 shr ecx, 21
 mov ax, cx
 and ax, 1
 mov dx, 0x501
 out dx, ax
stay: hlt
 jmp stay
"""


async def expansion(client: QmpClient, kind: str = "full", **model: Any) -> dict[str, bool]:
    found = await client.execute("query-cpu-model-expansion", type=kind, model={"name": "host", **model})
    props: dict[str, bool] = found["model"]["props"]
    return props


@pytest.mark.parametrize(("props", "seen"), [({}, 1), ({"x2apic": True}, 1), ({"x2apic": False}, 0)])
async def test_a_guest_has_the_features_that_were_chosen(tmp_path: Path, props: dict[str, bool], seen: int) -> None:
    guest = tmp_path / "guest.bin"
    guest.write_bytes(assemble(X2APIC_AS_STATUS, origin=0))
    async with bare(tmp_path) as (running, client):
        await client.execute("machine-set", kernel=f"flat:{guest}", memory={"size": 16 << 20})
        await client.execute("accel-set")
        await client.execute("cpu-model-set", props=props)
        await client.execute("cont")
        with trio.fail_after(20):
            await running.ended.wait()
    assert running.status == 2 * seen + 1


async def test_a_choice_that_fails_leaves_preconfig_as_it_was(tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"props": {"avx22": False}}, "props: 'avx22' is not a CPU feature; there are avx2, avx, "),
        ({"props": {"x2apic": "off"}}, "props.x2apic: 'off' is not true or false"),
        ({"props": {"apic": False}}, "props.apic: False is not possible: KVM shows it to a guest whose interrupt "),
        ({"props": {"pae": False, "lm": True}}, "props.lm: True is not possible without pae"),
    ]
    async with bare(tmp_path) as (running, client):
        await advance(client, "preconfig")
        before = running.events()
        for arguments, text in refused:
            assert (await failure(client, "cpu-model-set", **arguments)).startswith(text)
        for name in ("svm", "vmx", "intel-pt", "kvm-hint-dedicated"):
            with pytest.raises(CommandFailed) as caught:
                await client.execute("cpu-model-set", props={name: True})
            assert caught.value.error_class == "KVMMissingCap"
            assert caught.value.desc.startswith(f"CPU feature '{name}' cannot be switched on: ")
        assert running.events() == before
        assert [step.execute for step in running.host.recorder.recipe()][-1] == "accel-set"
        await client.execute("cpu-model-set", props={"x2apic": False})
        await client.execute("cont")


@pytest.mark.parametrize("arguments", [{"props": {"lm": False}}, {"props": {"pae": False}}, {"model": "base"}])
async def test_a_kernel_that_starts_in_64_bit_mode_needs_it(tmp_path: Path, arguments: dict[str, Any]) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bzimage())
    async with bare(tmp_path) as (_, client):
        await client.execute("machine-set", kernel=str(kernel), memory={"size": 64 << 20})
        await client.execute("accel-set")
        text = f"props.lm: False is not possible: {kernel} starts in 64-bit mode"
        assert await failure(client, "cpu-model-set", **arguments) == text
        await client.execute("cpu-model-set")


async def test_the_recipe_has_the_choice_as_it_was_resolved(tmp_path: Path) -> None:
    async with bare(tmp_path) as (running, client):
        await advance(client, "preconfig")
        await client.execute("cpu-model-set", props={"kvmclock": False, "lahf_lm": False, "sse3": False})
        step = running.host.recorder.recipe().steps[-1]
        assert step.execute == "cpu-model-set"
        assert step.arguments["model"] == "host"
        expected = {"kvmclock": False, "kvmclock-stable-bit": False, "lahf-lm": False, "pni": False}
        assert expected.items() <= dict(step.arguments["props"]).items()


async def test_an_expansion_tells_every_feature_and_what_props_change(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await advance(client, "preconfig")
        host = await expansion(client)
        assert host.keys() == FEATURES.keys()
        assert host["x2apic"]
        assert not host["vmx"]
        assert not host["svm"]
        less = await expansion(client, props={"x2apic": False})
        assert {name for name in host if host[name] != less[name]} == {"x2apic"}
        with pytest.raises(CommandFailed) as caught:
            await expansion(client, props={"vmx": True})
        assert caught.value.error_class == "KVMMissingCap"
        assert await expansion(client, name="base", props={"lm": True, "pae": True}) == {
            name: name in ("lm", "pae", "apic") for name in FEATURES
        }


async def test_a_static_expansion_is_what_cpu_model_set_takes(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        await advance(client, "preconfig")
        static = await client.execute("query-cpu-model-expansion", type="static", model={"name": "host"})
        assert static["model"]["name"] == "base"
        props = {name: on for name, on in static["model"]["props"].items() if on}
        assert await expansion(client, name="base", props=props) == await expansion(client)
        await client.execute("cpu-model-set", model="base", props=props)
        await client.execute("cont")
        assert (await client.execute("query-status"))["running"]


async def test_there_is_nothing_to_expand_before_kvm_is_open(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        for command in ("machine-set", "accel-set"):
            with pytest.raises(CommandFailed) as caught:
                await expansion(client)
            assert caught.value.error_class == "DeviceNotActive"
            assert caught.value.desc == "What KVM offers of the host's CPU is not there before phase preconfig"
            await client.execute(command)


async def test_the_models_can_be_listed_at_any_time(tmp_path: Path) -> None:
    async with bare(tmp_path) as (_, client):
        models = await client.execute("query-cpu-definitions")
        assert [model["name"] for model in models] == ["host", "max", "base"]
        assert models[0] == {
            "name": "host", "typename": "host-x86_64-cpu", "unavailable-features": [], "migration-safe": False,
            "static": False, "deprecated": False,
        }  # fmt: skip
