"""Every figure of the README, side by side with the `qemu-system-x86_64` found on PATH: see docs/benchmarks.md.

`python -m bench` measures, and writes the results as JSON; `--table` prints the table that the JSON gives.
"""
