"""The benchmarks run, and the documents say what they found."""

from __future__ import annotations

import copy
import json
import os
import resource
import socket
import subprocess
import sys
from contextlib import closing
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.__main__ import FIGURES, LATEST
from bench.chart import QEMU, STAGES, pause_chart
from bench.documents import CHART, DOCUMENTS, NEEDED, benchmarks_tables, readme_table, split
from bench.machines import ROOT, BenchFailed, Monitor, memory_of
from bench.pool import PIECE_MIB, Pool
from bench.series import columns, ratio, summary
from bench.ticks import Bearing, Gap
from bench.updates import percentile, room_for


def latest() -> dict[str, Any]:
    """The committed results."""
    results: dict[str, Any] = json.loads(LATEST.read_text())
    return results


COLUMNS = (
    "mib_per_second", "cpu_per_gib", "pause_ms", "guest_pause_ms", "seconds_per_gib", "source_cpu_per_gib",
    "destination_cpu_per_gib", "save_gib_per_second", "save_cpu_per_gib", "whole_ms", "tick_ms", "seconds",
    "copy_cpu_per_gib",
)  # fmt: skip


def said(sock: socket.socket, *messages: dict[str, Any]) -> None:
    """Say lines of JSON."""
    sock.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in messages))


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Name what only one of two results has. None on either side (there is no QEMU) differs in nothing."""
    if one is None or other is None:
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{path}/{name}" for name in one.keys() ^ other.keys()]
        for name in one.keys() & other.keys():
            found += differences(one[name], other[name], f"{path}/{name}")
        return found
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return []
    return [] if type(one) is type(other) else [path]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_documents_table_is_what_the_committed_results_give(name: str) -> None:
    _before, table, _after = split(ROOT / name)
    assert table == DOCUMENTS[name](latest()), "run python -m bench --write"


def test_the_picture_of_the_pause_is_what_the_committed_results_give() -> None:
    assert CHART.read_text() == pause_chart(latest()), "run python -m bench --write"


def test_the_picture_is_one_and_shows_each_stage_of_each_size_beside_the_floor_and_qemu() -> None:
    picture = ElementTree.fromstring(pause_chart(latest()))
    bars = [bar.findtext("{*}title", "").partition(":")[0] for bar in picture.iter("{http://www.w3.org/2000/svg}rect")]
    pause = latest()["pause"]
    sizes = len(pause["ours"]["unpinned"])
    for stage, (name, _colour) in STAGES.items():
        assert bars.count(name) == sizes + (stage in pause["floor"]["unpinned"])
    assert bars.count("QEMU") == len(QEMU)
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "* Not of this run: cpr-transfer, STOP to RESUME, measured once on a machine of this kind." in texts


def test_figures_of_many_updates_have_their_rows_once_they_were_measured() -> None:
    results = latest()
    for figure in ("row", "vcpus", "descriptors", "response", "exec"):
        results.pop(figure, None)
    before = readme_table(results)
    totals = {"total": summary([2.0, 3.0])}
    holds = {"private_mib": 20.25, "descriptors": 30, "threads": 2}
    results |= {
        "row": {
            "updates": 1000, "pause": totals, "p99": summary([7.5]), "floor": totals, "ratio": summary([6.0]),
            "first": holds, "last": holds,
        },
        "vcpus": {"one": totals, "eight": totals, "ratio": summary([1.5])},
        "descriptors": {"few": totals, "many": totals, "ratio": summary([1.25]), "counts": {"few": 10, "many": 7500}},
        "response": {"resume_ms": summary([40.0]), "total": summary([2.0])},
        "exec": {"sum": summary([5.0])},
    }  # fmt: skip
    held = "1,000 updates of one guest in a row, what the first and the last process hold"
    rows = [line for line in readme_table(results).splitlines() if line not in before.splitlines()]
    assert rows == [
        "| 1,000 updates of one guest in a row, pause | 2.50 (2.00 to 3.00) ms | | 6.00 times bare C |",
        "| 1,000 updates of one guest in a row, 99th percentile of 200 | 7.50 (7.50 to 7.50) ms | | |",
        f"| {held} | 20.2 to 20.2 MiB private | | |",
        f"| {held} | 30 to 30 descriptors | | |",
        f"| {held} | 2 to 2 threads | | |",
        "| pause with 8 vCPUs | 2.50 (2.00 to 3.00) ms | | 1.50 times that with 1 |",
        "| pause with 7,500 descriptors going over | 2.50 (2.00 to 3.00) ms | | 1.25 times that with 10 |",
        "| live update by exec, both pauses | 5.00 (5.00 to 5.00) ms | | |",
        "| `migrate` to RESUME, the successor waiting | 40.0 (40.0 to 40.0) ms | | |",
    ]


def test_a_guest_whose_clock_is_slow_and_stood_meanwhile_is_put_on_the_hosts() -> None:
    def on_guest(host: float, stood: float) -> float:
        return (host - stood - 5000.0) / 1.002

    before, after, later = (
        Bearing(on_guest(host, stood), host - on_guest(host, stood))
        for host, stood in ((6000.0, 0.0), (7000.0, 3.0), (7500.0, 3.0))
    )
    drift = after.drift_to(later)
    assert before.on_host(on_guest(6800.0, 0.0), drift) == pytest.approx(6800.0)
    assert after.on_host(on_guest(6804.0, 3.0), drift) == pytest.approx(6804.0)


def test_figures_of_migrations_have_their_rows_once_they_were_measured() -> None:
    results = {name: latest()[name] for name in NEEDED} | {"machine": latest()["machine"]}
    before, tables = readme_table(results).splitlines(), benchmarks_tables(results).splitlines()
    ours, theirs = ({name: summary([value]) for name in COLUMNS} for value in (3.0, 2.0))
    both = {"ours": ours, "qemu": theirs, "ratio": {name: summary([1.5]) for name in COLUMNS}}
    alone = {"ours": ours, "qemu": None, "ratio": None}
    results |= {
        "precopy": {"left_out": ["4 GiB"], "1 GiB": {"unix": both, "tcp": alone}},
        "switchover": {"idle": both, "dirty": both},
        "saves": {"left_out": [], **both},
        "growth": {"left_out": [], "128 MiB": ours, "8 GiB": theirs},
    }
    what, file = "live migration of 1 GiB", "guest of 4 GiB in a file on tmpfs"
    three, two = "3.00 (3.00 to 3.00)", "2.00 (2.00 to 2.00)"
    *found, provenance = [line for line in readme_table(results).splitlines() if line not in before]
    assert " starts, 1 of migrations, 1 of their pauses, " in provenance
    assert provenance.endswith(" Not enough memory was free for: migrations of 4 GiB.")
    assert found == [
        f"| {what} over unix, MiB/s | 3 (3 to 3) | 2 (2 to 2) | 1.50 |",
        f"| {what} over unix, processor seconds per GiB, both processes | {three} | {two} | 1.50 |",
        f"| {what} over tcp, MiB/s | 3 (3 to 3) | not there | |",
        f"| {what} over tcp, processor seconds per GiB, both processes | {three} | not there | |",
        f"| {what}, pause of an idle guest, STOP to RESUME | {three} ms | {two} ms | 1.50 |",
        f"| {what}, pause of an idle guest, as the guest sees it | {three} ms | {two} ms | 1.50 |",
        f"| {what}, pause of a guest that dirties 39 MiB/s, STOP to RESUME | {three} ms | {two} ms | 1.50 |",
        f"| {what}, pause of a guest that dirties 39 MiB/s, as the guest sees it | {three} ms | {two} ms | 1.50 |",
        f"| {file}, saved, GiB/s | {three} | {two} | 1.50 |",
        f"| {file}, saved, processor seconds per GiB | {three} | {two} | 1.50 |",
        f"| {file}, exec to its next tick, all of it loaded | {three} ms | {two} ms | 1.50 |",
        f"| {file}, exec to its next tick, on demand; QEMU's all loaded | {three} ms | {two} ms | 1.50 |",
        f"| live migration over unix, processor seconds per GiB of 128 MiB and of 8 GiB | {three} and {two} | | |",
        f"| the same, of a plain copy of as much memory (`pwrite`) on this machine | {three} and {two} | | |",
    ]
    assert [line for line in benchmarks_tables(results).splitlines() if line not in tables][:-1] == [
        "| live migration over unix, for each GiB | seconds | processor seconds, source | destination | plain copy |",
        f"| a guest of 128 MiB | {three} | {three} | {three} | {three} |",
        f"| a guest of 8 GiB | {two} | {two} | {two} | {two} |",
    ]


def test_a_pool_holds_what_it_is_told_and_gives_it_back() -> None:
    with closing(Pool()) as pool:
        pool.hold(PIECE_MIB + 1)
        assert pool.mib == 2 * PIECE_MIB
        assert memory_of(os.getpid())["private_mib"] > 2 * PIECE_MIB
        pool.hold(PIECE_MIB)
        assert pool.mib == 2 * PIECE_MIB
        pool.free(1)
        assert pool.mib == PIECE_MIB
        with pytest.raises(BenchFailed, match=r"^10\d\d\d\d\d\d MiB more are needed than the \d+ MiB that are free$"):
            pool.hold(10_500_000)
        assert pool.mib == PIECE_MIB
    assert pool.mib == 0


def test_an_event_that_came_while_an_answer_was_awaited_is_found_again() -> None:
    ours, theirs = socket.socketpair()
    with theirs, ours:
        said(theirs, {"QMP": {}})
        monitor = Monitor(ours)
        events: list[dict[str, Any]] = [{"event": "STOP", "n": 1}, {"event": "MIGRATION"}, {"event": "STOP", "n": 2}]
        said(theirs, *events, {"return": 5}, {"event": "RESUME"})
        assert monitor.execute("query") == 5
        assert [monitor.wait_for(name) for name in ("RESUME", "MIGRATION", "STOP", "STOP")] == [
            {"event": "RESUME"}, events[1], events[0], events[2],
        ]  # fmt: skip
        said(theirs, {"error": {"desc": "no"}})
        with pytest.raises(BenchFailed, match=r"^query: no$"):
            monitor.execute("query")
        monitor.close()


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (1, 2), (50, 100), (99, 198), (99.5, 199), (100, 200)])
def test_a_percentile_is_one_of_the_values(percent: float, value: float) -> None:
    assert percentile([float(n) for n in range(200, 0, -1)], percent) == value


def test_more_descriptors_than_the_host_admits_are_not_measured() -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reason = rf"^{hard + 1025} descriptors are needed, and `ulimit -Hn` admits {hard}$"
    with pytest.raises(BenchFailed, match=reason), room_for(hard + 1):
        pass


def test_the_committed_results_are_of_a_whole_run() -> None:
    results = latest()
    assert not results["quick"]
    assert set(NEEDED) <= results.keys()


@pytest.mark.kvm
@pytest.mark.long
def test_quick_mode_measures_everything_that_a_whole_run_does() -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # as some machines have it; must not matter
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["quick"]
    assert set(FIGURES) <= results.keys()
    of_both = results.keys() & latest().keys()
    assert differences({name: results[name] for name in of_both}, latest()) == []
    assert readme_table(results) != readme_table(latest())


def test_an_unknown_figure_is_refused_by_name() -> None:
    done = subprocess.run([sys.executable, "-m", "bench", "speed"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith(
        "there is no figure 'speed'; there are pause, row, vcpus, descriptors, response, exec, start, build, "
        "latency, roundtrips, serial, precopy, switchover, saves, growth\n"
    )


def test_a_machine_without_qemu_has_ours_only() -> None:
    results = copy.deepcopy(latest())
    results["machine"]["qemu"] = None
    for pair in (*results["roundtrips"].values(), *results["serial"].values(), results["start"]["monitor"]):
        pair["qemu"] = pair["ratio"] = None
    results["start"]["machine"]["qemu"] = results["start"]["machine"]["ratio"] = None
    table = readme_table(results)
    assert "| | trio-vmm | QEMU (not there) | ratio |" in table
    assert "cpr-transfer" not in table
    assert "QEMU," not in benchmarks_tables(results)


@pytest.mark.parametrize(("has", "said"), [(False, "has no cpr-transfer"), (True, "| not measured |")])
def test_the_table_says_why_qemus_pause_is_not_there(has: bool, said: str) -> None:
    results = latest()
    results["machine"]["qemu"] = "99.1.2"
    results["pause"]["qemu_has"] = has
    assert said in readme_table(results)


def test_a_document_without_the_place_for_a_table_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "README.md"
    path.write_text("Nothing here.\n")
    with pytest.raises(BenchFailed, match=r"^README\.md has no place for the table: it needs the lines <!-- .* -->$"):
        split(path)


def test_a_summary_keeps_the_values_in_their_order() -> None:
    assert summary([3.0, 1.0, 2.0000001]) == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}


def test_ratios_are_taken_pair_by_pair() -> None:
    # The machine was ten times slower for the second pair; the ratio of the medians would be 1.1.
    assert ratio([1.0, 20.0, 2.0], [2.0, 40.0, 1.0])["values"] == [0.5, 0.5, 2.0]
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_columns_are_summed_up_one_by_one() -> None:
    found = columns([{"a": 1.0, "b": 5.0}, {"a": 3.0, "b": 7.0}])
    assert {name: column["median"] for name, column in found.items()} == {"a": 2.0, "b": 6.0}


def test_a_gap_is_as_long_as_from_its_begin_to_its_end() -> None:
    assert Gap(10.5, 12.0).length == 1.5
