"""What a release wrote, whole: a recipe, a saved guest, and a live update of one, word by word.

`scripts/freeze_release.py` records it with the program as it is, into `tests/golden/released/VERSION`;
`test_released.py` has the present program read it all.
"""

from __future__ import annotations

import json
import lzma
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import pytest

import vmm
from tests.conformance.fingerprints import RELEASED
from tests.phases.copy_kit import outcome, parts, save, ticked
from tests.phases.test_overrides import channels, update
from vmm import hostio
from vmm.cpr.channel import CprChannel
from vmm.migration.ram_records import RamContent, RamExtents
from vmm.migration.stream import StreamReader, StreamWriter
from vmm.migration.stream_records import Header, Home, Recipe, Section
from vmm.phases.section_kinds import section_kinds

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from vmm.embedding import EmbeddedMachine

FOLDER: Final = "@FOLDER@"
"""Stands in the artefacts for the directory in which the machine has its files."""

SIZE: Final = 16 << 20

OF_THE_HOST: Final = frozenset({"xsave", "xcrs", "msrs", "tsc_offset", "tsc_deadline", "tsc_khz", "clock", "moment"})
"""Members of section `kvm` that only a host with the same processor, KVM and clocks could load."""


def recipe(folder: str) -> list[dict[str, Any]]:
    """Return the commands of a machine that has a section of each kind, and whose guest keeps its heartbeat."""
    backend = {"type": "file", "data": {"out": f"{folder}/serial"}}
    machine = {
        "memory": {"size": SIZE}, "kernel": "builtin:heartbeat", "append": "region=64K", "serial": ["serial0"],
    }  # fmt: skip
    return [
        {"execute": "chardev-add", "arguments": {"id": "serial0", "backend": backend}},
        {"execute": "machine-set", "arguments": machine},
        {"execute": "accel-set"},
        {"execute": "object-add", "arguments": {"qom-type": "rng-builtin", "id": "rng0"}},
        {"execute": "cpu-model-set"},
        {"execute": "device_add", "arguments": {"driver": "virtio-rng-device", "id": "rng", "rng": "rng0"}},
        {"execute": "finish-machine-init"},
        {"execute": "cont"},
    ]


@final
@attrs.frozen
class Said:
    """One message of a live update."""

    side: str
    kind: str
    body: dict[str, Any]
    descriptors: tuple[str, ...]

    def placed(self, folder: Path) -> dict[str, Any]:
        """Return the body with the machine's files in `folder`."""
        body: dict[str, Any] = json.loads(json.dumps(self.body).replace(FOLDER, str(folder)))
        return body


@final
@attrs.frozen
class Release:
    """The artefacts of one release."""

    version: str

    def __str__(self) -> str:
        return self.version

    def _path(self, name: str) -> Path:
        return RELEASED / self.version / name

    def bytes_of(self, name: str) -> bytes:
        """Return an artefact that is compressed."""
        return lzma.decompress(self._path(f"{name}.xz").read_bytes())

    def recipe(self, folder: Path) -> str:
        """Return the recipe's text, with the machine's files in `folder`."""
        return self._path("recipe").read_text().replace(FOLDER, str(folder))

    def conversation(self) -> list[Said]:
        """Return the messages of a live update, of both sides, as they were sent."""
        return [
            Said(said["side"], said["kind"], said["body"], tuple(said["descriptors"]))
            for said in json.loads(self._path("conversation.json").read_text())
        ]


def releases() -> list[Release]:
    """Return every release of which there are artefacts."""
    return [Release(path.name) for path in sorted(RELEASED.iterdir())]


async def record(folder: Path) -> dict[str, bytes]:
    """Have the present program write everything, with its machines' files in `folder`; return it by file name."""
    async with vmm.machine(recipe(str(folder))) as saved:
        await ticked(saved, 20)
        whole = await save(saved, folder / "saved")
        text = str(saved.recipe)
    async with vmm.machine() as destination, vmm.machine(recipe(str(folder))) as source:
        await ticked(source, 20)
        await destination.execute("migrate-incoming", channels=channels(folder))
        with overheard(source) as heard:
            info = await update(source, folder)
            assert info["status"] == "completed", info
            await outcome(destination)  # once the source has said its last word
        await ticked(destination, 40)
    said = [attrs.asdict(message) for message in heard.said]
    versions = {kind.name: kind.version for kind in section_kinds().values()}
    texts = {
        "recipe": text,
        "conversation.json": json.dumps(said, indent=1) + "\n",
        "sections.json": json.dumps(versions, indent=1, sort_keys=True) + "\n",
    }
    return {
        **{name: content.replace(str(folder), FOLDER).encode() for name, content in texts.items()},
        **{f"{name}.xz": lzma.compress(content) for name, content in
           (("saved", whole), ("state", heard.state), ("ram", heard.ram))},
    }  # fmt: skip


@final
@attrs.define
class Heard:
    """What went over in a live update."""

    said: list[Said] = attrs.Factory(list)
    state: bytes = b""
    """The state stream."""
    ram: bytes = b""
    """The guest's, when it stood."""


@contextmanager
def overheard(source: EmbeddedMachine) -> Iterator[Heard]:
    """Listen to both sides, which are in this process."""
    heard = Heard()
    send = CprChannel.send

    async def listening(
        channel: CprChannel, kind: str, body: Mapping[str, Any], descriptors: Mapping[str, int] | None = None
    ) -> None:
        heard.said.append(Said(channel.side, kind, dict(body), tuple(descriptors or ())))
        if kind == "paused":
            heard.ram = bytes(parts(source).memory.view(0, SIZE))
        await send(channel, kind, body, descriptors)

    def finish(writer: StreamWriter) -> list[bytes | memoryview]:
        buffers = ended(writer)
        heard.state = b"".join(buffers)  # The last one: those before are rehearsals.
        return buffers

    ended = StreamWriter.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CprChannel, "send", listening)
        patch.setattr(StreamWriter, "finish", finish)
        yield heard


def on_this_host(stream: bytes, here: Mapping[str, Any]) -> bytes:
    """Return a state stream whose section `kvm` has what is of a host from `here`, a section of this one."""
    reader = StreamReader()
    header, *records, _end = reader.feed(stream)
    assert reader.ended
    assert isinstance(header, Header)
    writer = StreamWriter(header.machine, header.recipe_digest)
    for found in records:
        match found:
            case Recipe():
                writer.recipe(found.commands)
            case Section():
                state = _mixed(found.state, here) if found.name == "kvm" else found.state
                writer.section(found.name, found.version, state)
            case RamExtents():
                writer.ram_extents(found.extents, in_stream=found.in_stream)
            case RamContent():
                writer.ram_content(found)
            case Home():
                writer.home(found.commands)
            case _:
                raise AssertionError(found)
    return b"".join(writer.finish())


def _mixed(state: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    def of_both(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        return {name: ours[name] if name in OF_THE_HOST else value for name, value in theirs.items()}

    vcpus = [of_both(theirs, ours) for theirs, ours in zip(state["vcpus"], here["vcpus"], strict=True)]
    return {"vcpus": vcpus, "chips": of_both(state["chips"], here["chips"])}


async def kvm_of_this_host(folder: Path) -> Mapping[str, Any]:
    """Return section `kvm` of a machine that has begun here, with its files in `folder`."""
    async with vmm.machine(recipe(str(folder))) as machine:
        await machine.execute("stop")
        return next(section.state for section in parts(machine).state.save() if section.name == "kvm")


def descriptor(name: str, folder: Path, ram: bytes) -> int:
    """Make what a source would send a descriptor of, by the descriptor's name. The caller owns it."""
    if name == "ram":
        fd = hostio.create_ram(len(ram), "ram")
        os.pwrite(fd, ram, 0)
        return fd
    if name.startswith("chardev/serial0/"):
        return hostio.open_output_file(str(folder / "serial"), append=True)
    raise AssertionError(f"what is descriptor {name!r}?")
