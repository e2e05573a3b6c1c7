"""Runs of a study that nobody ran: folders with the files that a study reads, for given scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_ext.config.study_schema import StudyConfig
from megatron_ext.observe.results import write_verdicts
from megatron_ext.study.results import RunFacts

SKILLS = ("ocr", "count", "spatial", "color")


def fake_run(study: StudyConfig, arm: str, seed: int, effect: float, prompts: int = 40, steps: int = 60) -> RunFacts:
    """A run that answers each of its prompts rightly with a chance of the prompt's own plus the arm's effect and the seed's luck, and its learning curve."""
    folder = study.study_dir / arm / f"seed-{seed}"
    evaluation = folder / "evaluate" / "rl.json"
    easy_P = np.random.default_rng(1).uniform(0.2, 0.8, prompts * len(SKILLS))
    rng = np.random.default_rng([seed, sum(map(ord, arm))])
    right_P = np.clip(easy_P + effect + rng.normal(0, 0.01), 0, 1)
    samples_PG = rng.random((len(right_P), 8)) < right_P[:, None]
    skills = [SKILLS[at % len(SKILLS)] for at in range(len(right_P))]
    write_verdicts(evaluation.with_suffix(""), [(f"p/{at}", skills[at], bool(row[0]), row.tolist()) for at, row in enumerate(samples_PG)])
    learnt = 0.45 + (0.1 + effect) * (1 - np.exp(-np.arange(steps) / 20)) + rng.normal(0, 0.02, steps) + rng.normal(0, 0.01)
    lines = [json.dumps({"step": step + 1, "time": 0.0, "reward/correct/mean": float(value)}) for step, value in enumerate(learnt)]
    (folder / "rl").mkdir(parents=True, exist_ok=True)
    (folder / "rl" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "report.html").write_text("<p>a run</p>")
    return RunFacts(f"{arm}/seed-{seed}", arm, seed, "done", True, 300.0, folder, evaluation, ("rl", "evaluate-rl"))


def fake_study(folder: Path, effects: dict[str, float], seeds: tuple[int, ...] = (0, 1, 2, 3, 4), **changes: object) -> StudyConfig:
    arms = {arm: {} if number == 0 else {"rl.steps": number} for number, arm in enumerate(effects)}
    said = {"name": "fake", "output_dir": folder, "recipe": Path("examples/tiny.yaml"), "arms": arms, "baseline": next(iter(effects)), "seeds": seeds}
    return StudyConfig.model_validate({**said, "endpoint": "mean@8", "smallest_effect": 0.03, "bootstraps": 300, **changes})
