"""How far `plan` is off after calibration: `python tools/bench/plan.py [--runs DIR]`, results in docs/benchmarks/plan.md.

Trains one small model in thirteen configurations, one after another, in rounds, so that whatever else the machine does meets all of them; nothing else should
run. A run that is in DIR already is taken as it is. Then every layout is predicted from constants fitted to the runs of the other layouts: its rounds, batches
and recomputes are all left out together. Two ranks need two cores; on two idle ones it takes 7 minutes a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.parallel.planner.calibrate import Fitted, Run, fit, read_runs
from megatron_ext.parallel.planner.hardware import Gpu, find_gpu, read_gpus

CONFIG = """
seed: 0
model:
  preset: tiny
  num_layers: 4
  hidden_size: 128
  num_attention_heads: 8
  num_query_groups: 4
  num_experts: 16
  experts_per_token: 4
  expert_ffn_hidden_size: 128
  clvr: {taps: [[1, 2]]}
data: {kind: suite}
pretrain: {steps: 24, global_batch: 16, micro_batch: 4, log_every: 1, async_save: false, optimizer: {warmup_steps: 2}}
"""
TWO, EIGHT_ROWS = "parallel.num_ranks=2", "pretrain.micro_batch=8"
CONFIGURATIONS: dict[str, list[str]] = {
    "one_m4": [],
    "one_m8": [EIGHT_ROWS],
    "one_m4_b32": ["pretrain.global_batch=32"],
    "dp2": [TWO],
    "dp2_m8": [TWO, EIGHT_ROWS],
    "tp2": [TWO, "parallel.tp=2"],
    "tp2_m8": [TWO, "parallel.tp=2", EIGHT_ROWS],
    "ep2": [TWO, "parallel.ep=2"],
    "ep2_m8": [TWO, "parallel.ep=2", EIGHT_ROWS],
    "pp2": [TWO, "parallel.pp=2"],
    "cp2": [TWO, "parallel.cp=2"],
    "tp2ep2": [TWO, "parallel.tp=2", "parallel.ep=2"],
    "dp2_full": [TWO, "parallel.recompute=full"],
}
NAMES = {
    "one_m4": "one rank, 4 rows a micro-batch",
    "one_m8": "one rank, 8 rows",
    "one_m4_b32": "one rank, 4 rows, 32 a step",
    "dp2": "DP2, 4 rows",
    "dp2_m8": "DP2, 8 rows",
    "tp2": "TP2, 4 rows",
    "tp2_m8": "TP2, 8 rows",
    "ep2": "EP2, 4 rows",
    "ep2_m8": "EP2, 8 rows",
    "pp2": "PP2, 4 rows",
    "cp2": "CP2, 4 rows",
    "tp2ep2": "TP2 EP2, 4 rows",
    "dp2_full": "DP2, 4 rows, recompute full",
}


@dataclass(frozen=True)
class Compared:
    """One configuration: seconds of a step in each round, and what is predicted of it before calibration and from the other layouts."""

    name: str
    rounds_s: tuple[float, ...]
    before_s: float
    held_out_s: float

    @property
    def measured_s(self) -> float:
        return statistics.mean(self.rounds_s)

    @property
    def error(self) -> float:
        return self.held_out_s / self.measured_s - 1

    @property
    def errors(self) -> list[float]:
        """Against each round by itself."""
        return [self.held_out_s / seconds - 1 for seconds in self.rounds_s]


def measure(folder: Path, rounds: int) -> None:
    """Runs what `folder` does not hold yet."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "plan-bench.yaml"
    config.write_text(CONFIG.lstrip() + f"output_dir: {folder}\n", encoding="utf-8")
    for number in range(1, rounds + 1):
        for name, overrides in CONFIGURATIONS.items():
            run = f"{name}_r{number}"
            if not (folder / run / "pretrain" / "done.json").exists():
                print(f"round {number}: {name}", file=sys.stderr, flush=True)
                command = [sys.executable, "-m", "megatron_ext.cli", "run", str(config), "--until", "pretrain", f"name={run}", *overrides]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def compare(folder: Path, rounds: int, gpu: Gpu) -> tuple[Fitted, list[Compared]]:
    """All configurations against predictions from the other layouts."""
    runs: list[Run] = [run for name in CONFIGURATIONS for number in range(1, rounds + 1) for run in read_runs(folder / f"{name}_r{number}", gpu)]
    fitted = fit(runs, gpu)
    found = []
    for first, name in zip(range(0, len(runs), rounds), CONFIGURATIONS, strict=True):
        measured = fitted.runs[first : first + rounds]
        assert measured[0].held_out_s is not None
        found.append(Compared(name, tuple(run.measured_s for run in measured), runs[first].predicted_s(gpu), measured[0].held_out_s))
    return fitted, found


def table(found: list[Compared]) -> str:
    rows = ["| configuration | measured, by round | before calibration | held out | error |", "|---|---|---|---|---|"]
    for one in found:
        rounds = ", ".join(f"{seconds:.3f}" for seconds in one.rounds_s)
        rows.append(f"| {NAMES[one.name]} | {rounds} s | {one.before_s:.3f} s | {one.held_out_s:.3f} s | {one.error:+.0%} |")
    return "\n".join(rows)


def summary(found: list[Compared]) -> dict[str, float]:
    """Absolute errors: of configurations, their rounds' mean being the measurement, and of single rounds."""
    errors, single = [abs(one.error) for one in found], [abs(error) for one in found for error in one.errors]
    before = [abs(one.before_s / one.measured_s - 1) for one in found]
    return {
        "median": statistics.median(errors),
        "worst": max(errors),
        "median_of_rounds": statistics.median(single),
        "worst_of_rounds": max(single),
        "median_before": statistics.median(before),
        "worst_before": max(before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-plan"), metavar="DIR", help="where runs are, and where missing ones go (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    args = parser.parse_args()
    measure(args.runs, args.rounds)
    fitted, found = compare(args.runs, args.rounds, find_gpu("cpu-core", read_gpus()))
    told = summary(found)
    print(table(found))
    print(f"\nheld out: median {told['median']:.0%}, worst {told['worst']:.0%}; against single rounds {told['median_of_rounds']:.0%}, ", end="")
    print(f"{told['worst_of_rounds']:.0%}; before calibration {told['median_before']:.0%}, {told['worst_before']:.0%}\n\n{fitted.yaml()}")
    if args.json:
        cases = {NAMES[one.name]: {"measured, s": one.measured_s, "before, s": one.before_s, "held out, s": one.held_out_s} for one in found}
        args.json.write_text(json.dumps({**cases, "errors": told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
