"""Synchronous, one step off and asynchronous RL from one fine-tuned model: `python tools/bench/modes.py RUN_DIR`, results in docs/benchmarks/modes.md.

RUN_DIR is a finished run of examples/tiny.yaml, or one that has got as far as `discover`. Each mode is a run of its own over the same prompts, a learner and a
replica of one process each, one thread each: two processes, which is what this compares. Seconds are medians of a step without its first five; the reward is
the mean of the last ten steps, accuracy greedy on the validation split after the last step. A step's overlap is max(generation, update) / step, where
generation is what the replica worked.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from interleave import machine

from megatron_ext.observe.metrics_file import read_metrics

MODES = {
    "synchronous": {"rl.max_staleness": "0"},
    "one step off": {"rl.max_staleness": "1", "rl.mismatch_correction": "tis"},
    "asynchronous, 2 steps": {"rl.max_staleness": "2", "rl.mismatch_correction": "tis", "rl.partial_rollouts": "true"},
}
PARTS = ("tokenizer", "pretrain", "sft", "discover")
SETTLED, LAST = 5, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=1, help="seeds, whose numbers are averaged")
    parser.add_argument("--only", choices=MODES, help="one mode")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.field=value, for every mode")
    args = parser.parse_args()
    found = {}
    for mode, settings in MODES.items():
        if args.only in (None, mode):
            rounds = [numbers(train(mode, {**settings, "seed": str(seed)}, args), args.steps) for seed in range(args.rounds)]
            found[mode] = {name: statistics.mean(one[name] for one in rounds) for name in rounds[0]}
            print(row(mode, found[mode]), flush=True)
    print(f"\n{machine()}\n\n| mode | s a step | generation | update | overlap | staleness | reward | accuracy |\n|---|---|---|---|---|---|---|---|")
    print("\n".join(row(mode, values) for mode, values in found.items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def train(mode: str, settings: Mapping[str, str], args: argparse.Namespace) -> Path:
    """The stage folder of a run in this mode, from the same earlier stages."""
    name = f"modes-{mode.replace(' ', '-').replace(',', '')}"
    folder = args.run.parent / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for part in PARTS:
        shutil.copytree(args.run / part, folder / part)
    fixed = {"parallel.num_ranks": "1", "rollout.replicas": "1", "rl.fleet": "local", "rl.steps": str(args.steps), "rl.eval_every": str(args.steps)}
    words = [f"{field}={value}" for field, value in {**fixed, **settings}.items()]
    command = [sys.executable, "-m", "megatron_ext.cli", "rl", "examples/tiny.yaml", f"name={name}", f"output_dir={args.run.parent}", *words, *args.overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "rl"


def numbers(stage_dir: Path, steps: int) -> dict[str, float]:
    records = read_metrics(stage_dir)
    settled = records[SETTLED:-1]  # the last step has the validation behind it

    def median(name: str) -> float:
        return statistics.median(record[name] for record in settled)

    accuracy = [value for name, value in records[steps - 1].items() if name.startswith("val/val/")]
    return {
        "step": median("timing_s/step"),
        "generation": median("timing_s/rollouts_busy"),
        "update": median("timing_s/update"),
        "overlap": median("perf/overlap"),
        "staleness": median("staleness/mean") if "staleness/mean" in settled[0] else 0.0,
        "reward": statistics.mean(record["reward/mean"] for record in records[-LAST:]),
        "accuracy": statistics.mean(accuracy),
    }


def row(mode: str, values: Mapping[str, float]) -> str:
    seconds: Sequence[str] = [f"{values[name]:.2f}" for name in ("step", "generation", "update")]
    return f"| {mode} | {' | '.join(seconds)} | {values['overlap']:.2f} | {values['staleness']:.2f} | {values['reward']:.3f} | {values['accuracy']:.3f} |"


if __name__ == "__main__":
    main()
