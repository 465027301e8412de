"""The same requests to QEMU and to this VMM: same classes of errors, same members of replies, or a reason why not.

Words are nobody's contract, and values differ as the machines do. The QEMU is whichever is installed; QEMU 7.2 is the
oldest that was compared.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from tests.qmp.kit import HALT, PATIENCE, Raw, flat_guest, machine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping
    from pathlib import Path

QEMU = shutil.which("qemu-system-x86_64") or ""

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not QEMU, reason="there is no qemu-system-x86_64 to compare with"),
]


@asynccontextmanager
async def qemu(directory: Path, machine_type: str = "microvm") -> AsyncGenerator[Raw, None]:
    """Run QEMU with a machine of two vCPUs that has not begun, and connect to its monitor."""
    with socket.socket(socket.AF_UNIX) as listener:
        path = str(directory / "qemu")
        listener.bind(path)
        listener.listen()
        command = [
            QEMU, "-M", machine_type, "-accel", "tcg", "-S", "-m", "64", "-smp", "2", "-nodefaults", "-display", "none",
            "-name", "guest=n", "-chardev", "null,id=s", "-serial", "chardev:s", "-qmp", f"unix:{path}",
        ]  # fmt: skip
        process = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL)
        try:
            with trio.fail_after(PATIENCE):
                await trio.lowlevel.wait_readable(listener)
                client, _ = listener.accept()
                async with Raw(trio.socket.from_stdlib_socket(client)) as raw:
                    yield raw
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


NULL: Final = {"type": "null", "data": {}}

REQUESTS: Final[tuple[tuple[str, Mapping[str, Any]], ...]] = (
    ("query-status", {}),
    ("query-version", {}),
    ("query-name", {}),
    ("query-uuid", {}),
    ("query-cpus-fast", {}),
    ("query-target", {}),
    ("query-kvm", {}),
    ("query-current-machine", {}),
    ("query-memory-size-summary", {}),
    ("query-memory-size-summary", {"x": 1}),
    ("set-numa-node", {"type": "node"}),
    ("set-numa-node", {"type": "no-such"}),
    ("query-chardev", {}),
    ("query-fdsets", {}),
    ("query-migrate", {}),
    ("query-migrate-capabilities", {}),
    ("query-migrate-parameters", {}),
    ("query-dirty-rate", {}),
    ("calc-dirty-rate", {}),
    ("calc-dirty-rate", {"calc-time": 0}),
    ("calc-dirty-rate", {"calc-time": 1, "mode": "no-such"}),
    ("query-commands", {}),
    ("migrate_cancel", {}),
    ("migrate-continue", {"state": "pre-switchover"}),
    ("migrate-start-postcopy", {}),
    ("migrate-pause", {}),
    ("migrate-recover", {}),
    # Run control.
    ("stop", {}),
    ("cont", {}),
    ("cont", {}),
    ("query-status", {}),
    ("system_reset", {}),
    ("stop", {}),
    ("query-status", {}),
    # Chardevs.
    ("chardev-add", {"id": "t", "backend": NULL}),
    ("chardev-add", {"id": "t", "backend": NULL}),
    ("chardev-add", {"id": "u", "backend": {"type": "pty", "data": {}}}),
    ("chardev-add", {"id": "v", "backend": {"type": "file", "data": {"out": "/none/f"}}}),
    ("chardev-add", {"id": "w", "backend": {"type": "no-such-kind", "data": {}}}),
    ("chardev-remove", {"id": "t"}),
    ("chardev-remove", {"id": "t"}),
    ("chardev-remove", {"id": "s"}),
    ("object-del", {"id": "none"}),
    ("object-add", {"qom-type": "no-such-type", "id": "o"}),
    # Descriptors.
    ("getfd", {"fdname": "a"}),
    ("getfd", {}),
    ("closefd", {"fdname": "a"}),
    ("add-fd", {}),
    ("remove-fd", {"fdset-id": 1}),
    # Migration.
    ("migrate", {}),
    ("migrate", {"uri": "no-such-scheme:1"}),
    ("migrate", {"uri": 1}),
    ("migrate-incoming", {"uri": "unix:/none/x"}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "no-such", "state": True}]}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "events"}]}),
    ("migrate-set-capabilities", {}),
    ("migrate-set-parameters", {"downtime-limit": 100}),
    ("migrate-set-parameters", {"downtime-limit": -1}),
    ("migrate-set-parameters", {"downtime-limit": 99_999_999}),
    ("migrate-set-parameters", {"downtime-limit": "x"}),
    ("migrate-set-parameters", {"no-such": 1}),
    ("migrate-set-parameters", {"multifd-channels": 0}),
    # What is wrong with any command.
    ("no-such-cmd", {}),
    ("query-status", {"x": 1}),
    ("x-exit-preconfig", {}),
    ("qmp_capabilities", {}),
    ("quit", {}),
)

CAPABILITIES_GONE: Final = frozenset({"zero-blocks", "compress", "block"})
"""Migration capabilities of QEMU 7.2 that later releases have dropped."""

CAPABILITIES_NEW: Final = frozenset({"switchover-ack", "dirty-limit", "mapped-ram"})
"""Migration capabilities of later releases."""

ONLY_QEMU: Final = MappingProxyType(
    {
        "query-status": {"singlestep"},  # gone in QEMU 9
        "query-migrate-parameters": {
            # gone in QEMU 9.1, with the compression and block migration they belong to
            "block-incremental", "compress-level", "compress-threads", "compress-wait-thread", "decompress-threads",
        },
    }
)  # fmt: skip
ONLY_HERE: Final = MappingProxyType(
    {
        "query-dirty-rate": {"calc-time-unit"},  # of QEMU 8.2
        "query-migrate-parameters": {
            # of releases after 7.2
            "avail-switchover-bandwidth", "cpr-exec-command", "direct-io", "mode", "multifd-qatzip-level",
            "vcpu-dirty-limit", "x-rdma-chunk-size", "x-vcpu-dirty-limit-period", "zero-page-detection",
            *("migrate-sessions", "x-keep-source", "x-restore-on-demand"),  # extensions
        },
    }
)  # fmt: skip


def shape(value: Any) -> Any:
    """Return what a reply looks like: the members of objects, a list's first element, the types of scalars."""
    if isinstance(value, dict):
        return {key: shape(member) for key, member in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


async def test_replies_have_the_shapes_and_errors_the_classes_of_qemus(tmp_path: Path) -> None:
    options = ("-S", "-m", "64", "-smp", "2", "-nodefaults", "-name", "guest=n", "-chardev", "null,id=s")
    kernel = ("-kernel", flat_guest(tmp_path, HALT), "-serial", "chardev:s")
    async with machine(tmp_path, *options, *kernel) as m, qemu(tmp_path) as theirs, await m.raw() as ours:
        await m.until_phase("running")
        greetings = [await client.message() for client in (theirs, ours)]
        assert shape(greetings[0]) == shape(greetings[1])
        for client in (theirs, ours):
            assert await client.ask({"execute": "qmp_capabilities"}) == {"return": {}}
        for name, arguments in REQUESTS:
            request = {"execute": name, "arguments": dict(arguments), "id": name}
            their, our = await theirs.ask(request), await ours.ask(request)
            assert set(their) == set(our), (request, their, our)
            if "error" in their:
                assert their["error"]["class"] == our["error"]["class"], (request, their, our)
                continue
            their_shape, our_shape = shape(their["return"]), shape(our["return"])
            for member in ONLY_QEMU.get(name, ()):
                their_shape.pop(member, None)
            for member in ONLY_HERE.get(name, ()):
                if member not in their_shape:  # of a newer QEMU
                    our_shape.pop(member, None)
            assert their_shape == our_shape, (request, their, our)
            compare_values(name, their["return"], our["return"])


def compare_values(name: str, theirs: Any, ours: Any) -> None:
    """Compare what has to be the same in both."""
    match name:
        case "query-status":
            assert (theirs["status"], theirs["running"]) == (ours["status"], ours["running"])
        case "query-target" | "query-current-machine" | "query-memory-size-summary":
            assert theirs == ours
        case "query-name" | "query-uuid" | "query-fdsets" | "query-migrate":
            assert theirs == ours
        case "query-chardev":
            kinds = [{info["label"]: info["frontend-open"] for info in each} for each in (theirs, ours)]
            # The test's own monitor is a descriptor here, and no chardev.
            assert kinds[0] == kinds[1]
            assert next(info for info in ours if info["label"] == "s") in theirs
        case "query-cpus-fast":
            # Threads are there from the beginning in QEMU, here while the guest runs; paths are opaque to clients.
            alike = ("cpu-index", "props", "target")
            assert [{key: cpu[key] for key in alike} for cpu in theirs] == [
                {key: cpu[key] for key in alike} for cpu in ours
            ]
        case "query-migrate-capabilities":
            assert {entry["capability"] for entry in theirs} - CAPABILITIES_GONE - CAPABILITIES_NEW == {
                entry["capability"] for entry in ours
            } - CAPABILITIES_NEW
        case "query-migrate-parameters":
            later = {"multifd-compression", "zero-page-detection"}
            common = (theirs.keys() & ours.keys()) - later
            assert {key: theirs[key] for key in common} == {key: ours[key] for key in common}
        case "query-commands":
            here = {info["name"] for info in ours} - {info["name"] for info in theirs}
            assert here - LATER_COMMANDS == EXTENSIONS


EXTENSIONS: Final = frozenset(
    {
        "accel-set", "cpu-model-set", "finish-machine-init", "machine-set", "query-machine-phase", "query-monitors",
        "query-nursery-tree", "x-exit-precreate", "loadvm", "query-differences", "x-allow-difference", "x-cpr-abandon",
        "x-cpr-check", "x-cpr-undo", "x-cpr-forget", "x-allow-resource", "x-query-snapshots",
    }
)  # fmt: skip
"""The commands that QEMU has not."""


LATER_COMMANDS: Final = frozenset({"query-accelerators"})
"""Commands of releases after QEMU 7.2."""

LATER_FEATURES: Final = frozenset(
    {
        "amd-psfd", "amx-complex", "amx-fp16", "auto-ibrs", "avx-ifma", "avx-ne-convert", "avx-vnni-int16",
        "avx-vnni-int8", "bhi-ctrl", "btc-no", "cmpccxadd", "ddpd-u", "flush-l1d", "fred", "fs-gs-base-ns", "fsrc",
        "fsrs", "fzrm", "intel-psfd", "ipred-ctrl", "lam", "lfence-always-serializing", "lkgs", "mcdt-no",
        "no-nested-data-bp", "null-sel-clr-base", "overflow-recov", "prefetchiti", "rrsba-ctrl", "sha512", "sm3", "sm4",
        "stibp-always-on", "succor", "vnmi", "wrmsrns",
    }
)  # fmt: skip
"""CPU features that have names in releases after QEMU 7.2."""


async def test_facts_about_machines_and_cpus_have_the_shapes_of_qemus(tmp_path: Path) -> None:
    options = ("-m", "64", "-smp", "2", "-serial", "null", "-kernel", flat_guest(tmp_path, HALT))
    # QEMU's microvm has no places for vCPUs to list.
    async with machine(tmp_path, *options) as m, qemu(tmp_path, "q35") as theirs, await m.raw() as ours:
        await m.until_phase("running")

        async def both(command: str, **arguments: Any) -> tuple[Any, Any]:
            request = {"execute": command, "arguments": arguments}
            replies = [await client.ask(request) for client in (theirs, ours)]
            assert [set(reply) for reply in replies] == [{"return"}] * 2, replies
            return replies[0]["return"], replies[1]["return"]

        for client in (theirs, ours):
            await client.negotiate()
        their, our = await both("query-hotpluggable-cpus")
        assert shape(their) == shape(our)
        assert [place["props"] for place in their] == [place["props"] for place in our]
        their, our = await both("query-machines")
        (microvm,) = (info for info in their if info["name"] == "microvm")
        (default,) = (info for info in their if info.get("is-default"))
        expected = shape({**microvm, "is-default": default["is-default"]})
        del expected["default-ram-id"]  # optional; there is no memory back end that could have it
        assert shape({key: our[0][key] for key in our[0] if key != "acpi" or "acpi" in microvm}) == expected
        their, our = await both("query-cpu-definitions")
        kinds = [{info["name"]: shape({**info, "unavailable-features": []}) for info in each} for each in (their, our)]
        assert {name: kinds[0][name] for name in kinds[1]} == kinds[1]
        for kind, name in (("full", "max"), ("static", "base")):
            their, our = await both("query-cpu-model-expansion", type=kind, model={"name": "max"})
            assert (their["model"]["name"], our["model"]["name"]) == (name, name)
            unknown = our["model"]["props"].keys() - their["model"]["props"].keys()
            if kind == "full":
                assert unknown <= LATER_FEATURES
            assert all(
                isinstance(their["model"]["props"].get(prop, True), bool) and isinstance(value, bool)
                for prop, value in our["model"]["props"].items()
            )


async def test_what_qemu_cannot_read_is_not_read_here(tmp_path: Path) -> None:
    """Malformed messages: one error without an id each, and the next message is understood."""
    messages = (b"{]\n", b"{\xff", b"{\x01", b"%p", b"null\n", b"{}", b"{'execute': true}", b"[1]",
                b"{'execute': 'stop', 'arguments': []}", b"{'execute': 'stop', 'x': 1}",
                b"{'execute': 'no-such-cmd', 'id': 1}")  # fmt: skip
    async with machine(tmp_path) as m, qemu(tmp_path) as theirs, await m.raw() as ours:
        for client in (theirs, ours):
            await client.negotiate()
        for message in messages:
            replies = [await client.ask(message) for client in (theirs, ours)]
            described = [
                (sorted(reply), reply["error"]["class"], sorted(reply["error"]), reply.get("id")) for reply in replies
            ]
            assert described[0] == described[1], (message, json.dumps(replies))
            for client in (theirs, ours):
                assert (await client.ask(b" {'execute': 'query-name', 'id': 2}"))["id"] == 2, message
