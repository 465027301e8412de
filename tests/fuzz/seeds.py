"""Write the corpus: `python -m tests.fuzz.seeds`. What is there already stays: inputs that once were a finding, say."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, Final

from tests.cpr.peer import frame, packed
from tests.fuzz.channel_seeds import CHANNEL_SEEDS
from tests.fuzz.targets import CORPUS, RAM
from tests.migration.sample_stream import COMMANDS, build
from tests.phases.streams import Pages, records_of, stream_of
from vmm.hw.codec import Codecs
from vmm.kvm.page_file import checksum
from vmm.migration.ram_file_records import RamMapped, RamMappedSums
from vmm.migration.ram_records import RAW, ZERO, RamContent, RamExtents, RamPages, RamPass
from vmm.migration.stream import HEAD_SIZE, StreamWriter
from vmm.migration.stream_records import FORMAT_VERSION, PAGES_VERSION, PROCESSOR, PROCESSOR_VERSION, recipe_digest
from vmm.migration.terms import Terms
from vmm.phases.board import STATES

if TYPE_CHECKING:
    from collections.abc import Mapping

_PAGE: Final = 4096
_REQUESTS: Final[tuple[Mapping[str, Any], ...]] = (
    {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": 1},
    {"exec-oob": "migrate-pause", "id": [None, True, -1.5e3, "\u00e4\ud83d\ude00"]},
    {
        "execute": "machine-set",
        "arguments": {"memory": {"size": 1 << 30}, "smp": {"cpus": 2}, "kernel": "builtin:heartbeat"},
    },
    {"execute": "migrate", "arguments": {"channels": [{"channel-type": "main", "addr": {"transport": "socket"}}]}},
)


def _head(version: int = FORMAT_VERSION) -> StreamWriter:
    writer = StreamWriter("fuzz", recipe_digest(COMMANDS), version=version)
    writer.recipe(COMMANDS)
    writer.section(PROCESSOR, PROCESSOR_VERSION, {"leaves": bytes(range(64))})
    return writer


def _stream_headers() -> dict[str, bytes]:
    head = b"".join(_head().take())
    home = _head()
    home.home(COMMANDS)
    terms = _head(PAGES_VERSION)
    terms.terms(Terms(answers=True, id="0123456789abcdef" * 2, multifd=2, compression="zlib"))
    return {
        "terms": b"".join(terms.finish()),
        "sample": build(),
        "head": head,
        "home": b"".join(home.finish()),
        "bare": head[:80],
    }


def _device_sections() -> dict[str, bytes]:
    codecs, found = Codecs(), {}
    everything = StreamWriter("fuzz")
    for kind in STATES:
        name, version = kind.SCHEMA.name, kind.SCHEMA.version
        state: Any = codecs.of(kind).dump(kind())
        one = StreamWriter("fuzz")
        one.section(name, version, state)
        everything.section(name, version, state)
        found[name] = b"".join(one.finish())
    return {**found, "everything": b"".join(everything.finish())}


def _ram() -> dict[str, bytes]:
    content = StreamWriter("fuzz")
    content.ram_extents([(0, RAM)], in_stream=True)
    runs = ((0, _PAGE), (8 * _PAGE, 2 * _PAGE))
    content.ram_content(RamContent(runs, (b"a" * _PAGE, b"b" * 2 * _PAGE)))
    content.ram_content(RamContent(((RAM - _PAGE, _PAGE),), (b"c" * _PAGE,)))
    empty = StreamWriter("fuzz")
    empty.ram_extents([(0, RAM)], in_stream=True)
    return {"content": b"".join(content.finish()), "empty": b"".join(empty.finish()), **_pages()}


def _pages() -> dict[str, bytes]:
    head = records_of(b"".join(StreamWriter("fuzz").finish()))[:1]
    extents = RamExtents(((0, RAM),), in_stream=True)
    first = Pages.of((0, b"a" * _PAGE), (4 * _PAGE, b"b" * 2 * _PAGE))
    torn = Pages.of((4 * _PAGE, b"c" * _PAGE), checksum=1)
    zeros = Pages(RamPages(struct.pack("<IIQQII", 1, RAW, 0, 8 * _PAGE, 4, ZERO)), b"")
    whole = [*head, extents, RamPass(1), first, torn, zeros, RamPass(2), Pages.of((4 * _PAGE, b"d" * _PAGE))]
    return {"pages": stream_of(whole), "torn": stream_of([*head, extents, RamPass(1), torn])}


def _mapped() -> bytes:
    """Return a file with RAM at fixed places, closer together than a machine writes them."""
    pages = {0: b"a" * _PAGE, 5: b"b" * _PAGE, 6: b"c" * _PAGE}
    count = 16
    writer = _head(PAGES_VERSION)
    writer.terms(Terms())
    head = b"".join(writer.take())
    at = len(head) + HEAD_SIZE + len(RamMapped(((0, count * _PAGE),), 1 << 20, 1 << 21, 1 << 22, 1 << 30).payload())
    bitmap = sum(1 << page for page in pages).to_bytes(8, "little")
    sums = b"".join(struct.pack("<I", checksum(pages[page]) if page in pages else 0) for page in range(count))
    record = RamMapped(((0, count * _PAGE),), at, at + 8, at + 8 + len(sums), at + 8 + len(sums) + count * _PAGE)
    writer.ram_mapped(record)
    front = head + b"".join(writer.take()) + bitmap + sums
    content = b"".join(pages.get(page, bytes(_PAGE)) for page in range(count))
    writer.section("uart0", 1, {"lcr": 3})
    writer.ram_mapped_sums(RamMappedSums(len(pages), checksum(bitmap), checksum(sums)))
    return front + content + b"".join(writer.finish())


def _saved_files() -> dict[str, bytes]:
    return {"mapped": _mapped(), **_ram()}


def _cpr() -> dict[str, bytes]:
    hello = frame("hello", {"version": 1, "program": "fuzz", "side": "source"}, ["pidfd"])
    machine = frame("machine", {"recipe": list(COMMANDS), "name": "m"})
    return {
        "hello": hello,
        "messages": machine + frame("paused", {"running": True}) + frame("loaded"),
        "announced": frame("more", {"announced": 100}) + frame("more", {}, ["a"]) + machine,
        "refused": frame("refused", {"step": "ready", "reason": "no"}),
        "no-message": packed(b"[1, 2]") + packed(b"{}"),
    }


def _qmp() -> dict[str, bytes]:
    lines = [json.dumps(request).encode() + b"\r\n" for request in _REQUESTS]
    odd = rb"""{'execute': 'query-status', 'id': '\u00e9\n'} [1, [2, {"a": []}]] 12 true null "text" {"a": 1 "b"} }{ """
    return {"requests": b"".join(lines), "odd": odd, "no-ends": b'{"execute": "quit', **{
        f"request-{n}": line for n, line in enumerate(lines)
    }}  # fmt: skip


def main() -> None:
    """Write what is not there yet."""
    makers = {
        "stream-header": _stream_headers, "device-section": _device_sections, "ram": _ram,
        "saved-file": _saved_files, "cpr-channel": _cpr, "qmp": _qmp, **CHANNEL_SEEDS,
    }  # fmt: skip
    for target, make in makers.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, data in make().items():
            path = CORPUS / target / name
            if not path.exists():
                path.write_bytes(data)


if __name__ == "__main__":
    main()
