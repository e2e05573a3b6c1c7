"""What is kept of a step: its metrics, which `publish` writes and shows, and what its rollouts counted for. The rollouts themselves are in the bank by then.

stage_dir/metrics.jsonl                     one line a step
stage_dir/rollouts/advantages/*.parquet     the advantages of its rollouts (`bank/advantages.py`)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_ext.batch import FailedRollout, ScoredRollout
from megatron_ext.batch.images import distinct_bytes
from megatron_ext.observe.metrics_file import FAILED, STEP_S, TOKENS_PER_S, TOKENS_PER_S_PER_GPU
from megatron_ext.observe.observer import Report
from megatron_ext.observe.stopwatch import TIMING
from megatron_ext.rl.bank.bank import Bank
from megatron_ext.rl.loop import StepReport
from megatron_ext.rl.roles import Metrics
from megatron_ext.rl.sampling import differs, groups_of

ROLLOUTS = "rollouts"


class Recorder:
    """Publishes every step's metrics, and notes its advantages in the bank. `num_ranks`: processes of the run, for rates per process."""

    def __init__(self, bank: Bank, num_ranks: int) -> None:
        self._bank, self._num_ranks = bank, num_ranks
        self.last: Metrics = {}

    def __call__(self, report: StepReport, more: Metrics, publish: Report) -> None:
        self.last = {**rollout_metrics(report.scored, report.failed, report.set_aside), **report.metrics, **self._rates(report), **more}
        publish(report.step + 1, self.last)
        self._bank.note_advantages(report.step, report.scored, report.advantages_R)

    def _rates(self, report: StepReport) -> Metrics:
        tokens = sum(len(answer.rollout.prompt.tokens_S) + len(answer.rollout.response_T) for answer in [*report.scored, *report.set_aside])
        step_s = report.metrics[STEP_S]
        longest_s = max(report.metrics.get(TIMING + "rollouts_busy", 0.0), report.metrics[TIMING + "update"])
        return {TOKENS_PER_S: tokens / step_s, TOKENS_PER_S_PER_GPU: tokens / step_s / self._num_ranks, "perf/overlap": longest_s / step_s}


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
    metrics["image/bytes"] = float(distinct_bytes(answer.rollout.prompt for answer in scored))
    metrics["response_length/clip_ratio"] = float(np.mean([answer.rollout.finish == "length" for answer in scored]))
    metrics["rollout/failed_count"] = float(len(failed))
    metrics["rollout/failed_ratio"] = len(failed) / (len(failed) + len(scored))
    return metrics | {FAILED + reason: float(count) for reason, count in Counter(failure.reason for failure in failed).items()}


def _describe(name: str, values: Sequence[float], *statistics: str) -> Metrics:
    return {f"{name}/{statistic}": float(getattr(np.asarray(values, dtype=float), statistic)()) for statistic in statistics}
