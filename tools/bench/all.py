"""Every benchmark that compares with a peer, one after the other: `make bench`, or `python tools/bench/all.py [--only generation]`.

Each prints its own table and writes its numbers to FOLDER/<name>.json; at the end every bar that they are held against, reached or missed. A benchmark that
fails, or whose peer is not installed, is said so, and the rest go on. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from bars import HEAD, read, verdicts

HERE = Path(__file__).parent
SHARED = ("all", "bars", "interleave")
BY_ITSELF = {
    "discovery": "a quarter of an hour at full size, and no peer",
    "gpu": "wants a GPU with 60 GiB",
    "plan": "a quarter of an hour for predictions, which have no peer",
}
"""Run by their name alone."""
SHORT = {
    "checkpoint": ["--rounds", "3", "--ranks", "1"],
    "convert": ["--rounds", "3", "--experts", "64", "--shard-mb", "100"],
    "cross_entropy": ["--rounds", "5"],
    "data": ["--rounds", "3", "--megabytes", "16", "--shards", "4"],
    "experts": ["--rounds", "5"],
    "generation": ["--rounds", "3"],
    "grpo": ["--rounds", "3"],
    "refit": ["--rounds", "5"],
    "startup": ["--rounds", "3"],
}
"""What keeps a benchmark to a few minutes. Others choose for themselves."""


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in SHARED)


def chosen(only: str) -> list[str]:
    """Without `only`, those that have a peer."""
    return [name for name in names() if (only in name if only else name not in BY_ITSELF)]


def run(name: str, json: Path, rounds: int | None) -> str:
    """Runs one, which prints for itself. Empty, or why there are no numbers."""
    asked = SHORT.get(name, []) + ([] if rounds is None else ["--rounds", str(rounds)])
    json.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", f"tools.bench.{name}", *asked, "--json", str(json.resolve())]
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(command, cwd=HERE.parents[1], env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    return "" if ended.returncode == 0 and json.exists() else reason(ended.stderr, ended.returncode)


def reason(stderr: str, code: int) -> str:
    """
    >>> reason("Traceback ...\\nModuleNotFoundError: No module named 'trl.trainer'", 1)
    'trl is not installed'
    """
    missing = re.findall(r"No module named '([\w]+)", stderr)
    lines = [line for line in stderr.splitlines() if line.strip()]
    return f"{missing[-1]} is not installed" if missing else f"failed with exit code {code}: {lines[-1] if lines else 'it said nothing'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="benchmarks whose name contains this")
    parser.add_argument("--rounds", type=int, help="measured rounds of each (default: few)")
    parser.add_argument("--to", type=Path, default=Path("runs/bench"), metavar="FOLDER", help="where the numbers go (%(default)s)")
    parser.epilog = f"benchmarks: {', '.join(names())}\nonly by name: " + "; ".join(f"{name}, {why}" for name, why in BY_ITSELF.items())
    options = parser.parse_args()
    asked = chosen(options.only)
    if not asked:
        sys.exit(f"--only {options.only}: there is no such benchmark; there are {', '.join(names())}")
    options.to.mkdir(parents=True, exist_ok=True)
    without = {}
    for name in asked:
        print(f"\n## {name}\n", flush=True)
        if why := run(name, options.to / f"{name}.json", options.rounds):
            without[name] = why
            print(why, flush=True)
    told = [verdict for name in asked if name not in without for verdict in verdicts(name, read(options.to / f"{name}.json"))]
    print(f"\n## Bars\n\n{HEAD}\n" + "\n".join([*(verdict.row for verdict in told), *(f"| {name} | {why} | | | | |" for name, why in without.items())]))
    sys.exit(1 if without else 0)


if __name__ == "__main__":
    main()
