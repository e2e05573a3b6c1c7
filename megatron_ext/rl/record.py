"""What is kept of a step: its metrics, which `publish` writes and shows, and its rollouts.

stage_dir/metrics.jsonl                     one line a step
stage_dir/rollouts/step_000012.jsonl.gz     one line a rollout: what was answered, what it earned, the seed and the version of the weights that made it
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ext.batch import FailedRollout, ScoredRollout
from megatron_ext.observe.metrics_file import FAILED, STEP_S, TOKENS_PER_S, TOKENS_PER_S_PER_GPU
from megatron_ext.observe.observer import Report
from megatron_ext.rl.loop import StepReport
from megatron_ext.rl.roles import Metrics
from megatron_ext.rl.sampling import differs, groups_of

ROLLOUTS = "rollouts"


class Recorder:
    """Publishes every step's metrics and writes its rollouts. `num_ranks`: processes of the run, for rates per process."""

    def __init__(self, stage_dir: Path, publish: Report, num_ranks: int) -> None:
        self._folder, self._publish, self._num_ranks = stage_dir / ROLLOUTS, publish, num_ranks
        self.last: Metrics = {}

    def __call__(self, report: StepReport, more: Metrics) -> None:
        finished = report.step + 1
        self.last = {**rollout_metrics(report.scored, report.failed, report.set_aside), **report.metrics, **self._rates(report), **more}
        self._publish(finished, self.last)
        write_rollouts(self._folder, finished, report)

    def _rates(self, report: StepReport) -> Metrics:
        tokens = sum(len(answer.rollout.prompt.tokens_S) + len(answer.rollout.response_T) for answer in [*report.scored, *report.set_aside])
        per_s = tokens / report.metrics[STEP_S]
        return {TOKENS_PER_S: per_s, TOKENS_PER_S_PER_GPU: per_s / self._num_ranks}


def rollout_metrics(kept: Sequence[ScoredRollout], failed: Sequence[FailedRollout], set_aside: Sequence[ScoredRollout] = ()) -> Metrics:
    """Rewards, lengths and failures of a step's rollouts, whether trained on or not."""
    scored = [*kept, *set_aside]
    groups = groups_of(scored)
    metrics = {"reward/frac_zero_std_groups": float(np.mean([not differs(rewards) for rewards in groups.values()]))}
    metrics |= {"sampling/groups": float(len(groups)), "sampling/groups_set_aside": float(len(groups_of(set_aside)))}
    metrics |= _describe("reward", [answer.reward for answer in scored], "mean", "std", "min", "max")
    for name in sorted({name for answer in scored for name in answer.rewards}):
        metrics |= _describe(f"reward/{name}", [answer.rewards[name] for answer in scored if name in answer.rewards], "mean", "std")
    for skill in sorted({answer.rollout.prompt.skill for answer in scored}):
        metrics |= _describe(f"reward/skill/{skill}", [answer.reward for answer in scored if answer.rollout.prompt.skill == skill], "mean")
    metrics |= _describe("response_length", [answer.rollout.num_sampled for answer in scored], "mean", "max")
    metrics |= _describe("prompt_length", [len(answer.rollout.prompt.tokens_S) for answer in scored], "mean", "max")
    metrics["image/bytes"] = float(sum(prompt.tiles.pixels_IHWC.nbytes for prompt in {id(a.rollout.prompt): a.rollout.prompt for a in scored}.values()))
    metrics["response_length/clip_ratio"] = float(np.mean([answer.rollout.finish == "length" for answer in scored]))
    metrics["rollout/failed_count"] = float(len(failed))
    metrics["rollout/failed_ratio"] = len(failed) / (len(failed) + len(scored))
    return metrics | {FAILED + reason: float(count) for reason, count in Counter(failure.reason for failure in failed).items()}


def write_rollouts(folder: Path, finished: int, report: StepReport) -> None:
    """One file a step, whole or not at all; a step that is run again replaces its file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [_scored_line(answer, float(advantage)) for answer, advantage in zip(report.scored, report.advantages_R, strict=True)]
    lines += [_scored_line(answer, None) for answer in report.set_aside]
    lines += [{"key": failure.prompt.key, "sample": failure.sample, "failed": failure.reason, "detail": failure.detail} for failure in report.failed]
    path = folder / f"step_{finished:06d}.jsonl.gz"
    draft = path.with_suffix(".partial")
    with gzip.open(draft, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    draft.replace(path)


def _scored_line(answer: ScoredRollout, advantage: float | None) -> dict[str, object]:
    """`advantage`: None of an answer that was not trained on."""
    rollout = answer.rollout
    return {
        "key": rollout.prompt.key,
        "sample": rollout.sample,
        "skill": rollout.prompt.skill,
        "answer": rollout.prompt.answer,
        "text": rollout.text,
        "finish": rollout.finish,
        "reward": answer.reward,
        "rewards": dict(answer.rewards),
        "advantage": None if advantage is None else round(advantage, 6),
        "seed": rollout.seed,
        "version": rollout.version,
    }


def _describe(name: str, values: Sequence[float], *statistics: str) -> Metrics:
    return {f"{name}/{statistic}": float(getattr(np.asarray(values, dtype=float), statistic)()) for statistic in statistics}
