"""Does a cluster's share of the routing tell an answer that is right in its steps from one that is right by luck?

    python tools/studies/lucky_steps.py runs/earl-outcome          the table of docs/studies/earl_outcome.md

Reads the answers of a finished study's runs back from their banks. Of every prompt that has right answers of both kinds: the mean mass of those whose steps are
all right, minus that of those with a wrong step. It is what the EARL bonus has to go by where the outcome alone is rewarded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_ext.config.load import load_config
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.earl.bonus import EarlBonus
from megatron_ext.earl.files import read_clusters
from megatron_ext.rl.bank.bank import open_bank
from megatron_ext.rl.goals import spans_of

Group = list[tuple[float, bool]]
"""Of the right answers to one prompt: the mass, and whether every step is right."""


def groups(study: Path, arm: str, seed: int, every: int) -> Iterator[Group]:
    """Of every `every`-th step of a run."""
    run, shared = study / arm / f"seed-{seed}", study / "shared" / f"seed-{seed}"
    config = load_config(run / "config.yaml", []).config
    tags = load_tokenizer(shared / "tokenizer").tag_ids
    mass = EarlBonus(read_clusters(shared / "discover" / "expert_clusters.json", config.model), config.earl, {}).mass_of_spans
    bank = open_bank(run / "rl" / "rollouts")
    for draw in range(0, config.rl.steps, every):
        found: dict[str, Group] = {}
        for answer in bank.drawn(draw).scored:
            if answer.reward >= config.earl.correct_threshold:
                spent = mass(answer.rollout.routes, spans_of(answer.rollout, config.earl.subtask, tags))
                if np.isfinite(spent):
                    found.setdefault(answer.rollout.prompt.key, []).append((spent, answer.rewards["steps"] == 1))
        yield from found.values()


def difference_of(found: Group) -> float | None:
    """Mass of answers with right steps minus that of the lucky ones, in the mean; None where one of the two is missing.

    >>> difference_of([(0.5, True), (0.25, False), (0.75, False)])
    0.0
    """
    by_kind = {kind: [mass for mass, steps in found if steps == kind] for kind in (True, False)}
    return float(np.mean(by_kind[True]) - np.mean(by_kind[False])) if by_kind[True] and by_kind[False] else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("--arm", default="no-bonus", help="whose answers (default no-bonus: nothing has paid for mass there)")
    parser.add_argument("--every", type=int, default=7, help="read one step of so many (default 7)")
    args = parser.parse_args()
    print("| seed | prompts with both | right steps minus lucky | positive | spread in a group |\n|---|---|---|---|---|")
    for seed in sorted(int(folder.name.removeprefix("seed-")) for folder in (args.study / args.arm).glob("seed-*")):
        of_seed = list(groups(args.study, args.arm, seed, args.every))
        diffs = np.array([difference for group in of_seed if (difference := difference_of(group)) is not None])
        spread = np.mean([np.std([mass for mass, _ in group], ddof=1) for group in of_seed if len(group) > 1])
        error = diffs.std(ddof=1) / np.sqrt(len(diffs))
        print(f"| {seed} | {len(diffs)} | {diffs.mean():+.4f} +- {error:.4f} | {(diffs > 0).mean():.2f} | {spread:.4f} |", flush=True)


if __name__ == "__main__":
    main()
