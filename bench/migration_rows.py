"""The rows of guests that are copied, in the README's table, and the table of what a GiB costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from bench.cells import markdown, ms, number, sides, span

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_WAYS: Final = {
    "unix": "over unix",
    "tcp": "over tcp",
    "multifd2": "over tcp, multifd with 2 channels",
    "multifd4": "over tcp, multifd with 4 channels",
}
_KINDS: Final = {"idle": "an idle guest", "dirty": "a guest that dirties 39 MiB/s"}


def migration_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield the rows of the figures that were measured: a name, ours, QEMU's, and their ratio."""
    for size, ways in results.get("precopy", {}).items():
        if size == "left_out":
            continue
        for way, both in ways.items():
            what = f"live migration of {size} {_WAYS[way]}"
            yield f"{what}, MiB/s", *sides(both, "mib_per_second", number)
            yield f"{what}, processor seconds per GiB, both processes", *sides(both, "cpu_per_gib", span)
    for kind, both in results.get("switchover", {}).items():
        what = f"live migration of 1 GiB, pause of {_KINDS[kind]}"
        yield f"{what}, STOP to RESUME", *sides(both, "pause_ms", ms)
        yield f"{what}, as the guest sees it", *sides(both, "guest_pause_ms", ms)
    saves = results.get("saves", {})
    if "ours" in saves:
        what = "guest of 4 GiB in a file on tmpfs"
        yield f"{what}, saved, GiB/s", *sides(saves, "save_gib_per_second", span)
        yield f"{what}, saved, processor seconds per GiB", *sides(saves, "save_cpu_per_gib", span)
        yield f"{what}, exec to its next tick, all of it loaded", *sides(saves, "whole_ms", ms)
        yield f"{what}, exec to its next tick, on demand; QEMU's all loaded", *sides(saves, "tick_ms", ms)
    if _sizes(results.get("growth", {})):
        sizes = _sizes(results["growth"])
        both = sizes[0], sizes[-1]
        cost, copy = (
            " and ".join(span(results["growth"][size][name]) for size in both)
            for name in ("cpu_per_gib", "copy_cpu_per_gib")
        )
        yield f"live migration over unix, processor seconds per GiB of {' and of '.join(both)}", cost, "", ""
        yield "the same, of a plain copy of as much memory (`pwrite`) on this machine", copy, "", ""


def growth_table(growth: Mapping[str, Any]) -> str:
    """Return what a GiB costs in guests of all sizes."""
    rows: list[tuple[str, ...]] = [
        (
            "live migration over unix, for each GiB",
            "seconds",
            "processor seconds, source",
            "destination",
            "plain copy",
        )
    ]
    for size in _sizes(growth):
        found = growth[size]
        names = ("seconds_per_gib", "source_cpu_per_gib", "destination_cpu_per_gib", "copy_cpu_per_gib")
        rows.append((f"a guest of {size}", *(span(found[name]) for name in names)))
    return markdown(rows)


def left_out(results: Mapping[str, Any]) -> list[str]:
    """Name the sizes that there was no memory for."""
    figures = {"precopy": "migrations of", "saves": "saves of", "growth": "what a GiB costs of"}
    return [f"{what} {size}" for name, what in figures.items() for size in results.get(name, {}).get("left_out", [])]


def pairs_of(results: Mapping[str, Any]) -> int:
    """Return how often each migration was measured; 0 if there was no memory for any."""
    ways = (ways for size, ways in results["precopy"].items() if size != "left_out")
    return max((len(both["ours"]["seconds"]["values"]) for way in ways for both in way.values()), default=0)


def pauses_of(results: Mapping[str, Any]) -> int:
    """Return how often each pause of a migration was measured."""
    return len(results["switchover"]["idle"]["ours"]["pause_ms"]["values"])


def _sizes(growth: Mapping[str, Any]) -> list[str]:
    return [name for name in growth if name != "left_out"]
