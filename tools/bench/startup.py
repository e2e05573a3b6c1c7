"""How long the command line takes to answer: `python tools/bench/startup.py`, results in docs/benchmarks/startup.md.

CPU time of a fresh process, interleaved, medians; `python -c pass` is the floor, and the imports of pydantic and PyYAML are what checking a
configuration cannot do without.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

PROGRAMS = {
    "python -c pass": ["-c", "pass"],
    "import pydantic, yaml": ["-c", "import pydantic, yaml; pydantic.BaseModel"],
    "megatron-ext --version": ["-m", "megatron_ext.cli", "--version"],
    "megatron-ext run examples/tiny.yaml --explain": ["-m", "megatron_ext.cli", "run", "examples/tiny.yaml", "--explain"],
    "megatron-ext run examples/tiny.yaml rl.steps=many (an error)": ["-m", "megatron_ext.cli", "run", "examples/tiny.yaml", "rl.steps=many"],
    "megatron-ext run examples/tiny.yaml --dry-run": ["-m", "megatron_ext.cli", "run", "examples/tiny.yaml", "--dry-run"],
}


def cpu_s(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(repeats):
        for name, arguments in PROGRAMS.items():
            times[name].append(cpu_s(arguments))
    print("| program | CPU time, s |\n|---|---|")
    for name, seconds in times.items():
        print(f"| `{name}` | {statistics.median(seconds):.2f} |")


if __name__ == "__main__":
    main()
