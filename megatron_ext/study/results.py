"""Everything that a study has found, from the files of its runs: scores, findings, learning curves. `study.json` holds it all.

runs that are done -> verdicts.jsonl -> scores by endpoint, arm, seed -> findings          metrics.jsonl of all -> curves
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config.study_schema import StudyConfig
from megatron_ext.durable import write_text
from megatron_ext.observe.metrics_file import read_metrics, series
from megatron_ext.study.outcomes import Scores, read_scores
from megatron_ext.study.registration import Registration
from megatron_ext.study.verdict import Finding, conclude

FILE = "study.json"
CURVES = (
    ("pretrain", "loss", "Pretraining: loss", "nats per token"),
    ("sft", "loss", "Fine-tuning: loss", "nats per token"),
    ("mpo", "mpo/accuracy", "Preferences: right answers above wrong ones", "share"),
    ("rl", "reward/correct/mean", "Reinforcement learning: sampled answers that are right", "share"),
    ("rl", "actor/entropy", "Reinforcement learning: policy entropy", "nats per token"),
    ("rl", "moe/max_vio", "Reinforcement learning: load of the experts", "max / mean - 1"),
)
"""Stage, metric, title, unit."""


@dataclass(frozen=True)
class RunFacts:
    """One run as the study sees it. `state` in words; `seconds`: of the stages that it did itself; `stages`: their names."""

    name: str
    arm: str
    seed: int
    state: str
    done: bool
    seconds: float
    folder: Path
    evaluation: Path
    stages: tuple[str, ...]


@dataclass(frozen=True)
class CurveSet:
    """One metric over the steps of a stage: arm -> seed -> (steps, values)."""

    title: str
    unit: str
    arms: dict[str, dict[int, tuple[list[float], list[float]]]]


@dataclass(frozen=True)
class Results:
    config: StudyConfig
    registration: Registration
    runs: tuple[RunFacts, ...]
    scores: dict[str, dict[str, dict[int, Scores]]]
    findings: tuple[Finding, ...]

    @property
    def deciding(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict is not None]

    @property
    def exploratory(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict is None]


def collect(config: StudyConfig, registration: Registration, runs: Sequence[RunFacts]) -> Results:
    """The results of the runs that are done."""
    scores: dict[str, dict[str, dict[int, Scores]]] = {endpoint: {arm: {} for arm in config.arms} for endpoint in config.endpoints}
    for run in runs:
        if run.done and run.arm in config.arms:
            for endpoint in config.endpoints:
                scores[endpoint][run.arm][run.seed] = read_scores(run.evaluation, endpoint)
    return Results(config, registration, tuple(runs), scores, tuple(conclude(config, scores)))


def by_arm(config: StudyConfig, scores: Mapping[str, Mapping[int, Scores]]) -> list[dict[str, Any]]:
    """Of one endpoint: arm, mean over seeds, standard deviation over seeds, and each seed's value; None where there is none yet."""
    rows = []
    for arm in config.arms:
        values = [scores[arm][seed].mean for seed in sorted(scores[arm])]
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows.append(
            {"arm": arm, "mean": float(np.mean(values)) if values else None, "sd": spread, "seeds": dict(zip(sorted(scores[arm]), values, strict=True))}
        )
    return rows


def curve_sets(config: StudyConfig, runs: Sequence[RunFacts]) -> list[CurveSet]:
    """The curves for which there are numbers, of stages that runs have done or do themselves."""
    found = []
    for stage, metric, title, unit in CURVES:
        arms: dict[str, dict[int, tuple[list[float], list[float]]]] = {arm: {} for arm in config.arms}
        for run in runs:
            if run.arm in arms and stage in run.stages:
                steps, values = series(read_metrics(run.folder / stage), metric)
                if len(steps) > 1:
                    arms[run.arm][run.seed] = steps, values
        if any(arms.values()):
            found.append(CurveSet(title, unit, {arm: lines for arm, lines in arms.items() if lines}))
    return found


def write_results(results: Results, folder: Path) -> Path:
    """`study.json`."""
    content = {
        "study": results.config.model_dump(mode="json"),
        "registration": {"digest": results.registration.digest, **asdict(results.registration)},
        "runs": [{**asdict(run), "folder": str(run.folder), "evaluation": str(run.evaluation)} for run in results.runs],
        "arms": {endpoint: by_arm(results.config, scores) for endpoint, scores in results.scores.items()},
        "findings": [finding.as_json() for finding in results.findings],
    }
    path = folder / FILE
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path
