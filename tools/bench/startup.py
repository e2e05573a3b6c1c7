"""How long the command line takes to answer: `python tools/bench/startup.py`, results in docs/benchmarks/startup.md.

Elapsed and CPU time of fresh processes, in turns, medians; `python -c pass` is the floor, and the imports of pydantic and PyYAML are what checking a
configuration cannot do without. The first round, which compiles the sources, is not counted. Then a recipe is started anew, as a second `make rl` does
(everything is installed), and ended after its first training step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLI, BIG = ["-m", "megatron_ext.cli"], "examples/internvl3_5_30b_a3b"
PROGRAMS = {
    "python -c pass": ["-c", "pass"],
    "import pydantic, yaml": ["-c", "import pydantic, yaml; pydantic.BaseModel"],
    "megatron-ext --version": [*CLI, "--version"],
    "megatron-ext run examples/tiny.yaml --explain": [*CLI, "run", "examples/tiny.yaml", "--explain"],
    "megatron-ext run examples/tiny.yaml rl.steps=many (an error)": [*CLI, "run", "examples/tiny.yaml", "rl.steps=many"],
    "megatron-ext run examples/tiny.yaml --dry-run": [*CLI, "run", "examples/tiny.yaml", "--dry-run"],
    "megatron-ext plan .../sft.yaml --gpus 1024": [*CLI, "plan", f"{BIG}/sft.yaml", "--gpus", "1024"],
    "megatron-ext plan .../rl.yaml --gpus 1024": [*CLI, "plan", f"{BIG}/rl.yaml", "--gpus", "1024", "--gpu", "h200", "--response-tokens", "1500"],
}
RECIPE = "make rl, to its first training step"
RECIPE_TIMEOUT_S = 300.0
Took = tuple[float, float]
"""Seconds: elapsed, and of the processor."""


def once(arguments: Sequence[str], environment: dict[str, str]) -> Took:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, cwd=ROOT, env=environment)
    after, elapsed_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    return elapsed_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_step_s(environment: dict[str, str]) -> float:
    """Until the metrics of the first step of pretraining are on disk."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, *CLI, "run", "examples/tiny.yaml", f"output_dir={folder}", "pretrain.log_every=1"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            metrics = Path(folder) / "tiny" / "pretrain" / "metrics.jsonl"
            while not metrics.exists() or not metrics.stat().st_size:
                if process.poll() is not None or time.perf_counter() - began > RECIPE_TIMEOUT_S:
                    raise RuntimeError(f"no training step: exit code {process.poll()} after {time.perf_counter() - began:.0f} s")
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="programs whose name contains this, such as plan")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    programs = {name: arguments for name, arguments in PROGRAMS.items() if options.only in name}
    times: dict[str, list[Took]] = {name: [] for name in programs}
    found = {}
    with tempfile.TemporaryDirectory() as compiled:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment = {**kept, "PYTHONPYCACHEPREFIX": compiled}
        for number in range(1 + options.rounds):
            for name, arguments in programs.items():
                took = once(arguments, environment)
                times[name] += [took] if number else []
        print("| program | elapsed, s | CPU time, s |\n|---|---|---|")
        for name, taken in times.items():
            elapsed_s, cpu_s = (statistics.median(column) for column in zip(*taken, strict=True))
            found[name] = {"elapsed, s": elapsed_s, "CPU, s": cpu_s}
            print(f"| `{name}` | {elapsed_s:.2f} | {cpu_s:.2f} |", flush=True)
        if options.only in RECIPE:
            first, *later = [first_step_s(environment) for _ in range(3)]  # the first one fills the caches
            found[RECIPE] = {"elapsed, s": statistics.median(later), "first, s": first}
            print(f"| {RECIPE} | {found[RECIPE]['elapsed, s']:.1f} | |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
