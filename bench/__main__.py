"""`python -m bench`: measure, or print what has been measured."""

from __future__ import annotations

import argparse
import compileall
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from bench import documents
from bench.machines import ROOT, BenchFailed, find_qemu

LATEST: Final = ROOT / "bench" / "results" / "latest.json"

FIGURES: Final = (
    "pause", "row", "vcpus", "descriptors", "response", "exec", "start", "build", "latency", "roundtrips", "serial",
    "precopy", "switchover", "saves", "growth",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says, and return the exit status."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "figures", nargs="*", metavar="FIGURE", help=f"what to measure: {', '.join(FIGURES)} (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="one pair of each: shows that it works, and no more")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the results go (default: bench/results/latest.json; standard output for a part, or --quick)",
    )
    parser.add_argument("--table", action="store_true", help="measure nothing; print the README's table as Markdown")
    parser.add_argument(
        "--write", action="store_true", help="measure nothing; write the tables into README.md and docs/benchmarks.md"
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.figures) - set(FIGURES))
    if unknown:
        parser.error(f"there is no figure {unknown[0]!r}; there are {', '.join(FIGURES)}")
    if options.table or options.write:
        latest = json.loads(LATEST.read_text())
        if options.table:
            print(documents.readme_table(latest), end="")
        else:
            documents.write(latest)
        return 0
    output: Path | None = options.output
    if output is None and not options.quick and not options.figures:
        output = LATEST
    try:
        results = measure(options.figures or FIGURES, quick=options.quick)
    except BenchFailed as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 1
    text = re.sub(r"\s+(?=(-?\d[^\[\]\"]*)?\])", " ", json.dumps(results, indent=1)) + "\n"  # one line a series
    if output is None:
        print(text, end="")
    else:
        output.parent.mkdir(exist_ok=True)
        output.write_text(text)
        if set(documents.NEEDED) <= set(results):
            print(documents.readme_table(results), end="")
    return 0


def measure(figures: list[str] | tuple[str, ...], *, quick: bool) -> dict[str, Any]:
    """Measure `figures`; with `quick` one short pair of each. Returns JSON, one key a figure and the machine's own."""
    # Imported late: they import the package, whose bytecode has to be there first.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    compileall.compile_dir(ROOT / "vmm", quiet=1)
    from bench.build import measure_build
    from bench.host import Placements, describe
    from bench.latency import measure_latency
    from bench.migration import measure_growth, measure_precopy, measure_switchover
    from bench.pause import measure_pause
    from bench.roundtrips import measure_roundtrips
    from bench.saves import measure_saves
    from bench.serial import measure_serial
    from bench.start import measure_start
    from bench.updates import MANY, measure_descriptors, measure_exec, measure_response, measure_row, measure_vcpus

    qemu = find_qemu()
    placements = Placements.here()
    pairs = 1 if quick else 9
    seconds = 0.3 if quick else 3.0
    with tempfile.TemporaryDirectory(prefix="trio-vmm-bench-") as name:
        folder = Path(name)
        results: dict[str, Any] = {"quick": quick, "machine": describe(qemu)}
        if "start" in figures:
            _say("start")
            results["start"] = measure_start(1 if quick else 15, qemu, folder)
        if "build" in figures:
            _say("build")
            results["build"] = measure_build(1 if quick else 15, folder)
        if "latency" in figures:
            _say("latency")
            results["latency"] = measure_latency(pairs, folder)
        if "roundtrips" in figures:
            _say("roundtrips")
            client = build("roundtrips", folder)
            results["roundtrips"] = measure_roundtrips(pairs, seconds, qemu, client, placements, folder)
        if "serial" in figures:
            _say("serial")
            results["serial"] = measure_serial(pairs, seconds, qemu, folder)
        if "pause" in figures:
            _say("pause")
            floor = build("floor", folder)
            rounds = 1 if quick else 9
            results["pause"] = measure_pause(rounds, qemu, floor, placements, folder, resident=not quick)
        if "row" in figures:
            _say("row")
            results["row"] = measure_row(2 if quick else 1000, build("floor", folder), folder)
        if "vcpus" in figures:
            _say("vcpus")
            results["vcpus"] = measure_vcpus(1 if quick else 15, folder)
        if "descriptors" in figures:
            _say("descriptors")
            results["descriptors"] = measure_descriptors(1 if quick else 15, 100 if quick else MANY, folder)
        if "response" in figures:
            _say("response")
            results["response"] = measure_response(1 if quick else 9, folder)
        if "exec" in figures:
            _say("exec")
            results["exec"] = measure_exec(1 if quick else 15, folder)
        moves = 1 if quick else 7
        if "precopy" in figures:
            _say("precopy")
            results["precopy"] = measure_precopy(moves, qemu, folder, quick=quick)
        if "switchover" in figures:
            _say("switchover")
            results["switchover"] = measure_switchover(1 if quick else 15, qemu, folder, quick=quick)
        if "saves" in figures:
            _say("saves")
            results["saves"] = measure_saves(moves, qemu, folder, quick=quick)
        if "growth" in figures:
            _say("growth")
            results["growth"] = measure_growth(1 if quick else 3, folder, quick=quick)
    return results


def build(name: str, folder: Path) -> Path:
    """Compile the C program `name` of this package into `folder`."""
    program = folder / name
    source = ROOT / "bench" / f"{name}.c"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-pthread", "-o", str(program), str(source)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise BenchFailed("there is no C compiler (cc) in PATH") from error
    except subprocess.CalledProcessError as error:
        raise BenchFailed(f"{source.name} does not compile:\n{error.stderr}") from error
    return program


def _say(figure: str) -> None:
    print(f"measuring: {figure}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
