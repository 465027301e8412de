"""The benchmarks run, and the documents say what they found."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from bench.__main__ import FIGURES, LATEST
from bench.documents import DOCUMENTS, NEEDED, benchmarks_tables, readme_table, split
from bench.machines import ROOT, BenchFailed
from bench.series import columns, ratio, summary
from bench.ticks import Gap


def latest() -> dict[str, Any]:
    """The committed results."""
    results: dict[str, Any] = json.loads(LATEST.read_text())
    return results


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


def test_the_committed_results_are_of_a_whole_run() -> None:
    results = latest()
    assert not results["quick"]
    assert set(NEEDED) <= results.keys()


@pytest.mark.kvm
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
        "there is no figure 'speed'; there are pause, start, build, latency, roundtrips, serial\n"
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
