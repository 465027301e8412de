"""`trio-vmm stream dump` and `trio-vmm stream diff`."""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.migration.sample_stream import COMMANDS, build
from tests.phases.copy_kit import goes_on, outcome, save, started
from tests.phases.streams import Pages, records_of, stream_of
from vmm.cli import main
from vmm.guests.heartbeat import HEADER_ADDRESS
from vmm.kvm.page_file import checksum
from vmm.migration.packing import packing
from vmm.migration.ram_file_records import RamMapped, RamMappedSums
from vmm.migration.ram_records import RamAbsent, RamContent, RamExtents, RamPages, RamPass
from vmm.migration.stream import HEAD_SIZE, StreamWriter
from vmm.migration.stream_records import Section

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; return status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main(["stream", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


Said = Any  # the fixture's type, which pytest does not tell


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def stream(*more: Any, extents: int = MIB) -> bytes:
    """Return a stream of pages, with `more` records behind its extents."""
    writer = StreamWriter("small")
    head = records_of(b"".join(writer.finish()))[:1]
    section = Section("uart0", 3, {"lcr": 3, "fifo": [b"ab"], "long": bytes(100)})
    return stream_of([*head, section, RamExtents(((0, extents),), in_stream=True), *more])


# --- dump -------------------------------------------------------------------------------------------------


def test_a_stream_is_shown_with_recipe_state_and_ram(said: Said, tmp_path: Path) -> None:
    status, out, err = said("dump", put(tmp_path, "sample", build()))
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "stream    format version 1, 627 bytes, 7 records; all checksums are right",
        "machine   sample-vm",
        "recipe    2 commands",
        '            machine-set {"memory": 16777216, "smp": {"cpus": 1}, "type": "microvm"}',
        "            finish-machine-init",
        "section   cpu0, version 1",
        "            mp-state: 18446744073709551615",
        "            regs: 000102030405060708090a0b0c0d0e0f1011121314151617",
        "            tsc-offset: -9223372036854775808",
        "            xsave: no bytes",
        "section   uart0, version 3",
        "            fifo[0]: 6162",
        "            fifo[1]: no bytes",
        "            fifo[2]: 63",
        "            lcr: 3",
        "            line.level: true",
        '            line.name: "tty\u00e9"',
        "            line.since: null",
        "section   empty, version 0",
        "RAM       was handed over in shared memory",
        "            extent 0x0 to 0x9ffff, 655360 bytes",
        "            extent 0x100000 to 0xffffff, 15728640 bytes",
    ]


def test_nothing_in_a_file_is_a_command_to_the_terminal(said: Said, tmp_path: Path) -> None:
    one = put(tmp_path, "one", b"".join(StreamWriter("a\x1b[2J\x9b1m\u202e").finish()))
    two = put(tmp_path, "two", b"".join(StreamWriter("b\x07").finish()))
    assert said("dump", one)[1].splitlines()[1] == "machine   a\\x1b[2J\\x9b1m\\u202e"
    assert said("diff", one, two)[1].splitlines()[0] == "machine: a\\x1b[2J\\x9b1m\\u202e | b\\x07"


def test_nor_is_anything_in_its_json(said: Said, tmp_path: Path) -> None:
    name = "a\x1b[2J\x9b1m\u202e\x7f\u00e9"
    out = said("dump", "--json", put(tmp_path, "one", b"".join(StreamWriter(name).finish())))[1]
    assert json.loads(out)["machine"] == name
    assert all(sign.isprintable() or sign == "\n" for sign in out)
    assert '"a\\u001b[2J\\u009b1m\\u202e\\u007f\u00e9"' in out


def test_as_json_all_of_it_is_there(said: Said, tmp_path: Path) -> None:
    pages = Pages.of((8 * PAGE, b"a" * PAGE), (10 * PAGE, b"b" * 2 * PAGE))
    status, out, _ = said("dump", "--json", put(tmp_path, "s", stream(RamPass(1), pages, RamPass(2))))
    found = json.loads(out)
    assert status == 0
    assert found["sections"] == [
        {
            "name": "uart0", "version": 3,
            "state": {"fifo": [{"$hex": "6162"}], "lcr": 3, "long": {"$hex": "00" * 100}},
        }
    ]  # fmt: skip
    ram = found["ram"]
    assert (ram["where"], ram["extents"]) == ("stream", [[0, MIB]])
    assert (ram["runs"], ram["pages"]) == ([[8 * PAGE, PAGE], [10 * PAGE, 2 * PAGE]], 3)
    assert (ram["passes"], ram["sent"], ram["unverified"]) == (2, 3, 0)
    assert (found["format"], found["machine"], found["recipe"]) == (2, "small", None)


def test_the_last_content_of_a_page_counts(said: Said, tmp_path: Path) -> None:
    first, again = Pages.of((0, b"a" * PAGE), (PAGE, b"b" * PAGE)), Pages.of((PAGE, b"c" * PAGE))
    zero = Pages(RamPages(struct.pack("<IIQ", 1, 0, 0) + struct.pack("<QII", 0, 1, 1)), b"")
    one = put(tmp_path, "one", stream(first, again, zero))
    two = put(tmp_path, "two", stream(Pages.of((PAGE, b"c" * PAGE))))
    assert said("diff", one, two) == (0, "", "")


def test_a_page_that_was_written_while_it_was_sent_must_come_again(said: Said, tmp_path: Path) -> None:
    torn = Pages.of((3 * PAGE, b"a" * PAGE), checksum=1)
    status, _, err = said("dump", put(tmp_path, "bad", stream(torn)))
    assert status == 2
    assert "the page of RAM 0x3000, which does not come again, at offset " in err
    assert said("dump", put(tmp_path, "good", stream(torn, Pages.of((3 * PAGE, b"b" * PAGE)))))[0] == 0
    zero = Pages(RamPages(struct.pack("<IIQ", 1, 0, 0) + struct.pack("<QII", 0, 100, 1)), b"")
    assert said("dump", put(tmp_path, "zero", stream(torn, zero)))[0] == 0


def packed(method: int, content: bytes, pages: int = 1) -> Pages:
    """Return pages that are packed, as if each were one of a's."""
    record = Pages.of((0, b"a" * PAGE * pages)).record
    return Pages(RamPages(struct.pack("<IIQ", 1, method, len(content)) + record.table[16:]), content)


@pytest.mark.parametrize("name", ["zlib", "zstd"])
def test_packed_pages_are_unpacked(said: Said, tmp_path: Path, name: str) -> None:
    if name == "zstd":
        pytest.importorskip("zstandard")
    way = packing(name)
    assert way is not None
    good = put(tmp_path, "good", stream(packed(way.method, way.pack(b"a" * PAGE))))
    assert said("dump", good)[0] == 0
    for content in (b"no such bytes", way.pack(bytes(100 * PAGE))):
        status, _, err = said("dump", put(tmp_path, "bad", stream(packed(way.method, content))))
        assert status == 2
        assert "the pages of RAM at offset " in err
        assert f"packed with {name} are not {PAGE} bytes, or damaged" in err


def test_where_pages_cannot_be_unpacked_they_are_counted(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    status, out, _ = said("dump", put(tmp_path, "zstd", stream(packed(2, b"of another kind"))))
    assert status == 0
    assert "1 of them are packed by zstd, which this host cannot unpack" in out


def test_pages_that_come_by_postcopy_are_counted(said: Said, tmp_path: Path) -> None:
    torn = Pages.of((3 * PAGE, b"a" * PAGE), checksum=1)
    absent = RamAbsent((0b1101).to_bytes(32, "little"))
    status, out, _ = said("dump", put(tmp_path, "s", stream(torn, absent)))
    assert status == 0
    assert "3 pages come only after its end, by postcopy" in out


def test_many_runs_are_counted_and_few_are_shown_to_people(said: Said, tmp_path: Path) -> None:
    runs = [(2 * n * PAGE, b"x" * PAGE) for n in range(25)]
    _, out, _ = said("dump", put(tmp_path, "s", stream(Pages.of(*runs))))
    assert "25 pages are not zero, in 25 runs; digest " in out
    assert out.endswith("and 5 more runs\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "it ends after "),
        (lambda data: b"PNG" + data[3:], "it begins with "),
        (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], "record 1 at offset 39: "),
        (lambda data: data + b"x", "it goes on after its end record"),
        (lambda data: b"", "it ends after 0 bytes; expected the preamble"),
    ],
)
def test_a_damaged_file_is_refused_with_record_and_offset(
    said: Said, tmp_path: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    status, out, err = said("dump", put(tmp_path, "bad", damage(stream(Pages.of((0, b"a" * PAGE))))))
    assert (status, out) == (2, "")
    assert err.startswith("trio-vmm stream: ")
    assert words in err


def test_pages_outside_of_the_extents_are_refused(said: Said, tmp_path: Path) -> None:
    status, _, err = said("dump", put(tmp_path, "bad", stream(Pages.of((MIB - PAGE, b"a" * 2 * PAGE)))))
    assert status == 2
    assert f"are for {2 * PAGE} bytes at 0xff000, outside its extents" in err


def test_a_file_that_is_not_there_is_an_error(said: Said, tmp_path: Path) -> None:
    assert said("dump", tmp_path / "none") == (
        2, "", f"trio-vmm stream: Cannot read {tmp_path}/none: No such file or directory\n",
    )  # fmt: skip


def test_a_stream_may_begin_anywhere_in_its_file(said: Said, tmp_path: Path) -> None:
    path = put(tmp_path, "s", bytes(4096) + build())
    assert said("dump", "--offset", 4096, path)[0] == 0
    assert said("dump", path)[0] == 2


# --- diff -------------------------------------------------------------------------------------------------


def test_what_differs_is_told_by_its_path(said: Said, tmp_path: Path) -> None:
    writer = StreamWriter("other-vm", bytes(range(32)))
    writer.recipe([COMMANDS[0], {"execute": "cont"}])
    writer.section("cpu0", 2, {"regs": bytes(range(24)), "tsc-offset": 5, "mp-state": (1 << 64) - 1, "new": None})
    writer.section("empty", 0, {})
    writer.ram_extents([(0, MIB)], in_stream=True)
    writer.ram_content(RamContent(((0, PAGE),), (b"a" * PAGE,)))
    one, two = put(tmp_path, "one", build()), put(tmp_path, "two", b"".join(writer.finish()))
    status, out, err = said("diff", one, two)
    assert (status, err) == (1, "")
    assert out.splitlines() == [
        "machine: sample-vm | other-vm",
        "recipe: finish-machine-init | cont",
        "section cpu0: version 1 | 2",
        "section cpu0: tsc-offset: -9223372036854775808 | 5",
        "section cpu0: xsave: no bytes | -",
        "section cpu0: new: - | null",
        "section uart0: there | missing",
        "RAM: extents 655360 bytes at 0x0, 15728640 bytes at 0x100000 | 1048576 bytes at 0x0",
        out.splitlines()[-1],
    ]
    assert out.splitlines()[-1].startswith("RAM: page 0x0: zero | 0x")


def test_many_pages_that_differ_are_counted(said: Said, tmp_path: Path) -> None:
    one = put(tmp_path, "one", stream(Pages.of((0, b"a" * 30 * PAGE))))
    two = put(tmp_path, "two", stream(Pages.of((0, b"b" * 30 * PAGE))))
    lines = said("diff", one, two)[1].splitlines()
    assert (len(lines), lines[-1]) == (21, "RAM: 10 more pages")


def test_a_damaged_file_is_no_difference(said: Said, tmp_path: Path) -> None:
    status, out, err = said("diff", put(tmp_path, "one", build()), put(tmp_path, "two", build()[:-1]))
    assert (status, out) == (2, "")
    assert "it ends after " in err


# --- files that machines have written ---------------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
async def test_a_guest_is_the_same_whichever_way_it_was_saved(said: Said, tmp_path: Path) -> None:
    async with started() as source:
        await source.execute("stop")
        await save(source, tmp_path / "pages")
        await source.execute("cont")
        await goes_on(source)
        await source.execute("stop")
        capability = {"capability": "mapped-ram", "state": True}
        await source.execute("migrate-set-capabilities", capabilities=[capability])
        await source.execute("migrate", uri=f"file:{tmp_path}/mapped")
        assert (await outcome(source))["status"] == "completed"
    for name, where in (("pages", "stream"), ("mapped", "places")):
        status, out, err = said("dump", "--json", tmp_path / name)
        assert (status, err) == (0, "")
        found = json.loads(out)
        assert {section["name"] for section in found["sections"]} >= {"processor", "pause", "kvm"}
        assert "machine-set" in [step["execute"] for step in found["recipe"]]
        assert (found["ram"]["where"], found["ram"]["extents"]) == (where, [[0, 16 * MIB]])
        assert any(at <= HEADER_ADDRESS < at + size for at, size in found["ram"]["runs"])
        assert said("diff", tmp_path / name, tmp_path / name) == (0, "", "")
    # It has run in between: but what never changes is the same, and pages are told one by one.
    status, out, _ = said("diff", tmp_path / "pages", tmp_path / "mapped")
    assert status == 1
    assert f"RAM: page {HEADER_ADDRESS:#x}: 0x" in out
    assert "recipe" not in out


@pytest.mark.kvm
@pytest.mark.usefixtures("no_leaks")
async def test_a_damaged_page_or_table_of_a_map_is_found(said: Said, tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    async with started() as source:
        capability = {"capability": "mapped-ram", "state": True}
        await source.execute("migrate-set-capabilities", capabilities=[capability])
        await source.execute("migrate", uri=f"file:{path}")
        assert (await outcome(source))["status"] == "completed"
    data = bytearray(await trio.Path(path).read_bytes())
    record = next(record for record in mapped_records(bytes(data)) if isinstance(record, RamMapped))
    for place, words in (
        (record.area + HEADER_ADDRESS, f"the page of RAM {HEADER_ADDRESS:#x} at offset {record.area + HEADER_ADDRESS}"),
        (record.bitmap, f"the bitmap of RAM at offset {record.bitmap} is damaged"),
        (record.sums, f"the table of checksums at offset {record.sums} is damaged"),
    ):
        bad = bytearray(data)
        bad[place] ^= 1
        status, _, err = said("dump", put(tmp_path, "bad", bytes(bad)))
        assert status == 2
        assert words in err
    status, _, err = said("dump", put(tmp_path, "short", bytes(data[: record.area + PAGE])))
    assert status == 2
    assert "it ends " in err


def sparse(path: Path, size: int, *pages: int) -> RamMapped:
    """Write a file that claims so much RAM at fixed places, of which none is there: `pages` are in its bitmap."""
    writer = StreamWriter("large")
    head = b"".join(writer.take())
    record = RamMapped.after(len(head) + HEAD_SIZE, ((0, size),), 0)
    writer.ram_mapped(record)
    head += b"".join(writer.take())
    bitmap = bytearray(record.bitmap_size)
    for page in pages:
        bitmap[page // 8] |= 1 << page % 8
    sums = 0
    for _ in range(0, 4 * record.pages, 1 << 20):
        sums = checksum(bytes(1 << 20), sums)
    writer.ram_mapped_sums(RamMappedSums(len(pages), checksum(bytes(bitmap)), sums))
    with open(path, "wb") as file:
        file.write(head)
        if pages:
            file.seek(record.bitmap)
            file.write(bitmap)
        file.seek(record.onward)
        file.write(b"".join(writer.finish()))
    return record


def test_of_a_sparse_file_only_what_is_there_is_read(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    pread = os.pread

    def noting(fd: int, size: int, at: int) -> bytes:
        read.append(size)
        return pread(fd, size, at)

    monkeypatch.setattr(os, "pread", noting)
    path = tmp_path / "sparse"
    sparse(path, 64 << 30)
    status, out, err = said("dump", path)
    assert (status, err) == (0, "")
    assert "0 pages are not zero, in 0 runs" in out
    assert sum(read) < 8 << 20
    record = sparse(path, 64 << 30, 5, 77)
    status, _, err = said("dump", path)
    assert status == 2
    assert f"the page of RAM 0x5000 at offset {record.area + 0x5000} is in its bitmap, and a hole in the file" in err
    assert sum(read) < 16 << 20
    # A page that is there before one that is not.
    with open(path, "r+b") as file:
        file.seek(record.area + 5 * PAGE)
        file.write(bytes(PAGE))
    status, _, err = said("dump", path)
    assert status == 2
    assert f"the page of RAM 0x5000 at offset {record.area + 0x5000} is damaged" in err
    # Where nobody knows of holes all of it is read.
    sparse(path, 1 << 30)
    monkeypatch.setattr(os, "lseek", no_holes(os.lseek))
    assert said("dump", path)[0] == 0


def no_holes(lseek: Callable[[int, int, int], int]) -> Callable[[int, int, int], int]:
    """Return the call as a file system has it that knows of no holes."""

    def seek(fd: int, at: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return lseek(fd, at, whence)

    return seek


def mapped_records(data: bytes) -> list[Any]:
    """Return the records of a file up to its map."""
    from vmm.migration.stream import StreamReader

    return list(StreamReader(seekable=True).feed(data[: 16 * PAGE]))


def test_help_names_both(said: Said, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        said("--help")
    out = capsys.readouterr().out
    assert "dump" in out
    assert "diff" in out
