"""The tables of README.md and docs/benchmarks.md, generated from the results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from bench.cells import digits, markdown, mib, ms, number, sides, span
from bench.chart import STAGES, pause_chart
from bench.machines import ROOT, BenchFailed
from bench.migration_rows import growth_table, left_out, migration_rows, pairs_of, pauses_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

BEGIN: Final = "<!-- python -m bench --write: begin -->"
END: Final = "<!-- python -m bench --write: end -->"

NEEDED: Final = ("pause", "start", "roundtrips", "serial")
"""Figures without which there is no table. Any other has its rows once it was measured."""

_PLACES: Final = {"unpinned": "on all CPUs", "one_cpu": "on one CPU"}
_ASKED: Final = {
    "waiting": "awaits a source",
    "building": "builds and maps a machine of 4 GiB",
    "loading": "loads a live update's state",
    "copying": "loads a copied machine with its RAM",
}
_KINDS: Final = {"monitor": "monitor only", "machine": "microvm, 128 MiB, stopped"}


def readme_table(results: Mapping[str, Any]) -> str:
    """Return the README's table: a row a figure, ours beside QEMU's."""
    machine = results["machine"]
    rows = [("", "trio-vmm", f"QEMU {_version(machine)}", "ratio")]
    pause, start = results["pause"], results["start"]
    qemus = _qemus_pause(pause, machine)
    for size, found in pause["ours"]["unpinned"].items():
        rows.append((f"live update, pause of a guest of {size}", ms(found["total"]), qemus, ""))
    for size, found in pause["ours"]["unpinned"].items():
        rows.append((f"the same as the guest sees it, {size}", ms(found["guest_pause"]), qemus, ""))
    rows.append(("the machine's own speed: the same in bare C", ms(pause["floor"]["unpinned"]["total"]), "", ""))
    rows += _updates(results)
    rows += migration_rows(results)
    for kind, what in _KINDS.items():
        rows.append((f"exec to the QMP greeting, {what}", *sides(start[kind], "greeting_ms", ms)))
        if kind == "monitor":
            rows.append(("of that, the interpreter with `import trio`", ms(start["import_trio"]["exec_ms"]), "", ""))
            rows.append(("of that, trio-vmm's own share", ms(start["own_share"]["greeting_ms"]), "", ""))
        rows.append((f"exec to the first answered command, {what}", *sides(start[kind], "answer_ms", ms)))
    rows.append((f"exec to a complete machine, {what}", *sides(start[kind], "complete_ms", ms)))
    for column, name in (("rss_mib", "resident memory"), ("private_mib", "private memory")):
        rows.append((f"{name}, {_KINDS['machine']}", *sides(start["machine"], column, mib)))
    if "build" in results:
        build = results["build"]
        what = "greeting to a guest that runs, built"
        rows.append((f"{what} by options", ms(build["options"]["running_ms"]), "", ""))
        beside = f"{digits(build['ratio']['median'])} times that by options"
        rows.append((f"{what} over QMP, command by command", ms(build["commands"]["running_ms"]), "", beside))
    for stage, what in _ASKED.items() if "latency" in results else ():
        found = results["latency"][stage]
        text = ", ".join(f"{digits(found[f'{name}_ms']['median'])}" for name in ("p50", "p99", "max"))
        none = "does not answer" if stage in ("waiting", "building") else ""
        rows.append((f"`query-status` of a destination that {what}: median, p99, longest", f"{text} ms", none, ""))
    for place, where in _PLACES.items():
        pair = results["roundtrips"][place]
        rows.append((f"`query-status` a second, client and server {where}", *sides(pair, "per_second", number)))
    for sink, where in (("file", "into a file"), ("socket", "to a socket")):
        rows.append(
            (f"serial output, bytes a second {where}", *sides(results["serial"][sink], "bytes_per_second", number))
        )
    return markdown(rows) + "\n" + _provenance(results)


def _updates(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield the rows of the figures of `bench/updates.py` that were measured."""
    if "row" in results:
        row = results["row"]
        what = f"{row['updates']:,} updates of one guest in a row"
        by_floor = f"{digits(row['ratio']['median'])} times bare C"
        yield f"{what}, pause", ms(row["pause"]["total"]), "", by_floor
        yield f"{what}, 99th percentile of 200", ms(row["p99"]), "", ""
        for name, unit in (("private_mib", "MiB private"), ("descriptors", "descriptors"), ("threads", "threads")):
            held = " to ".join(f"{row[when][name]:.1f}".removesuffix(".0") for when in ("first", "last"))
            yield f"{what}, what the first and the last process hold", f"{held} {unit}", "", ""
    for figure, first, second, what in (
        ("vcpus", "one", "eight", "pause with 8 vCPUs"),
        ("descriptors", "few", "many", "pause with {many:,} descriptors going over"),
    ):
        if figure in results:
            found = results[figure]
            beside = {"one": "with 1", "few": "with 10"}[first]
            what = what.format(**found.get("counts", {}))
            yield what, ms(found[second]["total"]), "", f"{digits(found['ratio']['median'])} times that {beside}"
    if "exec" in results:
        yield "live update by exec, both pauses", ms(results["exec"]["sum"]), "", ""
    if "response" in results:
        yield "`migrate` to RESUME, the successor waiting", ms(results["response"]["resume_ms"]), "", ""


def benchmarks_tables(results: Mapping[str, Any]) -> str:
    """Return what docs/benchmarks.md has beyond the README: the stages of a pause, and what a start consists of."""
    pause, start = results["pause"], results["start"]
    parts = []
    for place, where in _PLACES.items():
        sizes = pause["ours"][place]
        floor = pause["floor"][place]
        rows = [(f"both processes {where}, ms", *(f"{size}" for size in sizes), "bare C")]
        for stage in next(iter(sizes.values())):
            if stage not in STAGES:
                continue
            cells = (digits(found[stage]["median"]) for found in sizes.values())
            rows.append((STAGES[stage][0], *cells, digits(floor[stage]["median"]) if stage in floor else ""))
        for name, what in (
            ("total", "**pause, STOP to RESUME**"),
            ("guest_pause", "**pause as the guest sees it**"),
            ("guest_longest", "longest gap in the whole update"),
            ("calm_longest", "longest gap without an update"),
        ):
            cells = (span(found[name]) for found in sizes.values())
            rows.append((what, *cells, span(floor[name]) if name in floor else ""))
        cells = (span(found["whole_update"]) for found in sizes.values())
        rows.append(("whole update, from start of the successor to end of the old process", *cells, ""))
        parts.append(markdown(rows))
        names = list(sizes)
        growth = pause["largest_by_smallest"][place]
        parts.append(f"Pause at {names[-1]} by pause at {names[0]}, {where}: {span(growth)}.\n")
    rows = [("start", "exec to a sign of life", "resident", "private")]
    for key, what in (("interpreter", "the bare interpreter"), ("import_trio", "with `import trio`")):
        found = start[key]
        rows.append((what, ms(found["exec_ms"]), mib(found["rss_mib"]), mib(found["private_mib"])))
    for kind, what in _KINDS.items():
        for side, name in (("ours", "trio-vmm"), ("qemu", "QEMU")):
            if start[kind][side] is not None:
                found = start[kind][side]
                rows.append(
                    (f"{name}, {what}", ms(found["greeting_ms"]), mib(found["rss_mib"]), mib(found["private_mib"]))
                )
    parts.append(markdown(rows))
    if "growth" in results:
        parts.append(growth_table(results["growth"]))
    return "\n".join([*parts, _provenance(results)])


DOCUMENTS: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "README.md": readme_table,
    "docs/benchmarks.md": benchmarks_tables,
}


CHART: Final = ROOT / "docs" / "pause.svg"


def write(results: Mapping[str, Any]) -> None:
    """Put the tables into the documents, and the picture beside them."""
    CHART.write_text(pause_chart(results))
    for name, table in DOCUMENTS.items():
        path = ROOT / name
        before, _, after = split(path)
        path.write_text(f"{before}{BEGIN}\n{table(results)}{END}{after}")


def split(path: Path) -> tuple[str, str, str]:
    """Return what precedes a document's generated part, that part, and what follows it."""
    before, begin, rest = path.read_text().partition(BEGIN)
    table, end, after = rest.partition(END)
    if not (begin and end):
        raise BenchFailed(f"{path.name} has no place for the table: it needs the lines {BEGIN} and {END}")
    return before, table.removeprefix("\n"), after


def _provenance(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    sizes = [*results["pause"]["left_out"], *left_out(results)]
    no_room = f" Not enough memory was free for: {', '.join(sizes)}." if sizes else ""
    count = len(results["roundtrips"]["unpinned"]["ours"]["per_second"]["values"])
    moves = f"{pairs_of(results)} of migrations, " if "precopy" in results else ""
    moves += f"{pauses_of(results)} of their pauses, " if "switchover" in results else ""
    starts = len(results["start"]["own_share"]["greeting_ms"]["values"])
    updates = len(next(iter(results["pause"]["ours"]["unpinned"].values()))["total"]["values"])
    return (
        f"Medians (least to largest) of {updates} updates, {starts} starts, {moves}{count} pairs of the rest, in turn, "
        f"on {machine['date']}: {machine['cpus']} CPUs ({machine['cpu']}), {machine['memory_mib']} MiB, Linux "
        f"{machine['kernel']}, {machine['kvm']}, Python {machine['python']}, trio {machine['trio']}, "
        f"QEMU {machine['qemu'] or 'not there'}.{no_room}\n"
    )


def _qemus_pause(pause: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    if machine["qemu"] is None:
        return "not there"
    return "not measured" if pause["qemu_has"] else f"QEMU {_version(machine)} has no cpr-transfer"


def _version(machine: Mapping[str, Any]) -> str:
    return str(machine["qemu"]).split()[0] if machine["qemu"] else "(not there)"
