"""How a stage is doing, in words: what an operator wants to see at a glance, and what should worry them. Numbers in, words out; nothing is printed here.

metrics of a report -> Health.update -> rows: (label, words)      for the panel on a terminal
                                     -> line: a few words         for a line of a log file
                                     -> warnings, kept to the end of the stage, each with the steps at which it was seen
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megatron_ext.observe.metrics_file import (
    BAD_SAMPLES,
    EP_RANK_LOAD,
    FAILED,
    MFU,
    PEAK_MEMORY,
    PEAK_MEMORY_RANK,
    PEAK_MEMORY_SHARE,
    SLOWEST_OVER_MEAN,
    SLOWEST_RANK,
    STEP_S,
    TOKENS_PER_S,
    TOKENS_PER_S_PER_GPU,
)
from megatron_ext.observe.progress import short_number
from megatron_ext.observe.stopwatch import TIMING

SLOW, FULL = 1.2, 0.95
"""From where the slowest rank, as a multiple of the mean rank, and the fullest GPU are worth a warning."""
SUPERVISED_PHASES, RL_PHASES = ("data", "forward_backward", "optimizer", "save"), ("generate", "reward", "advantages", "update", "sync", "save", "evaluate")
"""They follow each other; what else is timed is a part of one of them."""
_TREND, _BARS = 24, "▁▂▃▄▅▆▇█"
_LENGTH = "response_length/mean"
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Warned:
    """The latest words of a warning, and the reports in which it came up."""

    words: str
    first_step: int
    last_step: int
    times: int = 1

    def __str__(self) -> str:
        seen = f"step {self.first_step}" if self.times == 1 else f"{self.times} reports, steps {self.first_step} to {self.last_step}"
        return f"{self.words} ({seen})"


class Health:
    """Of one stage. `goal`: the metric that it is about, and its short name."""

    def __init__(self, goal: tuple[str, str]) -> None:
        self._goal, self._name = goal
        self._trend = deque[float](maxlen=_TREND)
        self._failed: Counter[str] = Counter()
        self.metrics: Metrics = {}
        self.warnings: dict[str, Warned] = {}

    def update(self, step: int, metrics: Metrics) -> list[str]:
        """Takes a report. Returns the warnings that are new."""
        self.metrics = metrics
        self._trend.append(metrics[self._goal])
        self._failed.update({name.removeprefix(FAILED): int(count) for name, count in metrics.items() if name.startswith(FAILED)})
        worries = dict(worries_of(metrics))
        new = [words for kind, words in worries.items() if kind not in self.warnings]
        for kind, words in worries.items():
            before = self.warnings.get(kind)
            self.warnings[kind] = Warned(words, step, step) if before is None else replace(before, words=words, last_step=step, times=before.times + 1)
        return new

    def line(self) -> str:
        """The goal and the speed; MFU on GPUs, the slowest rank where it is slow."""
        m = self.metrics
        if not m:
            return ""
        words = [f"{self._name} {short_number(m[self._goal])}", f"tokens/s {short_number(m[TOKENS_PER_S])}"]
        if MFU in m and PEAK_MEMORY_SHARE in m:
            words.append(f"mfu {m[MFU]:.0%}")
        if m.get(SLOWEST_OVER_MEAN, 1.0) > SLOW:
            words.append(f"slowest rank {m[SLOWEST_RANK]:.0f} ({m[SLOWEST_OVER_MEAN]:.2f}x)")
        return "  ".join(words)

    def rows(self) -> list[tuple[str, str]]:
        """Labels and words of what the latest report knows."""
        m = self.metrics
        if not m:
            return []
        goal = (self._name, f"{short_number(m[self._goal])}  {sparkline(self._trend)}".rstrip())
        found = [goal, *((label, tell(m)) for label, tell in _ROWS), ("rollouts", self._rollouts())]
        return [(label, words) for label, words in found if words]

    def _rollouts(self) -> str:
        if _LENGTH not in self.metrics:
            return ""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self._failed.most_common())
        return f"{self.metrics[_LENGTH]:.1f} tokens an answer; failed so far: {reasons or 'none'}"


def worries_of(m: Metrics) -> Iterator[tuple[str, str]]:
    """Kinds and words of what should worry an operator."""
    if m.get(SLOWEST_OVER_MEAN, 1.0) > SLOW:
        yield "slowest", f"{_rank(m, SLOWEST_RANK)} needs {m[SLOWEST_OVER_MEAN]:.2f} times as long as the mean rank, and all wait for it"
    if m.get(PEAK_MEMORY_SHARE, 0.0) > FULL:
        yield "memory", f"{_rank(m, PEAK_MEMORY_RANK)} has filled {m[PEAK_MEMORY_SHARE]:.0%} of its GPU's memory"
    if bad := m.get(BAD_SAMPLES, 0.0):
        yield "bad samples", f"conversations that could not be read were left out: {bad:.0f} so far, named above"
    for name, count in m.items():
        if name.startswith(FAILED) and count:
            yield name, f"rollouts failed: {name.removeprefix(FAILED)} ({count:.0f} in the latest such step)"


def sparkline(values: deque[float]) -> str:
    """The values between their lowest and their highest.

    >>> sparkline(deque([0.0, 1.0, 0.5]))
    '▁█▅'
    """
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    span = high / 2 - low / 2 or 1.0  # halves: what lies between the largest numbers has no float
    return "".join(_BARS[round((value / 2 - low / 2) / span * (len(_BARS) - 1))] for value in finite)


def phases_of(metrics: Metrics) -> dict[str, float]:
    """Seconds of the phases that follow each other in a step; those that took no time are left out."""
    names = RL_PHASES if _is_rl(metrics) else SUPERVISED_PHASES
    return {name: metrics[TIMING + name] for name in names if metrics.get(TIMING + name)}


def _is_rl(m: Metrics) -> bool:
    return TIMING + "generate" in m


def _rank(m: Metrics, name: str) -> str:
    """In RL ranks are measured where they learn."""
    return f"{'learner rank' if _is_rl(m) else 'rank'} {m[name]:.0f}"


def _speed(m: Metrics) -> str:
    words = [f"{short_number(m[TOKENS_PER_S])} tokens/s, {short_number(m[TOKENS_PER_S_PER_GPU])} a rank"]
    words += [f"MFU {m[MFU]:.1%}{' of the learner as it learns' if _is_rl(m) else ''}"] if MFU in m else []
    return "; ".join([*words, f"{short_number(m[STEP_S])} s a step"])


def _memory(m: Metrics) -> str:
    share = f", {m[PEAK_MEMORY_SHARE]:.0%} of its GPU" if PEAK_MEMORY_SHARE in m else ""
    return f"{m[PEAK_MEMORY] / 2**30:.2f} GiB at most, on {_rank(m, PEAK_MEMORY_RANK)}{share}"


def _ranks(m: Metrics) -> str:
    return f"slowest: {_rank(m, SLOWEST_RANK)}, {m[SLOWEST_OVER_MEAN]:.2f} times the mean"


def _experts(m: Metrics) -> str:
    words = [f"fullest expert {1 + m['moe/max_vio']:.2f} times the mean"] if "moe/max_vio" in m else []
    return "; ".join([*words, *([f"busiest EP rank {m[EP_RANK_LOAD]:.2f} times"] if EP_RANK_LOAD in m else [])])


def _seconds(m: Metrics) -> str:
    return "  ".join(f"{name} {short_number(seconds)}" for name, seconds in phases_of(m).items())


def _policy(m: Metrics) -> str:
    known = {"mismatch": "mismatch/logprob_abs_diff_max", "KL of the update": "actor/ppo_kl", "KL to the start": "actor/kl_ref", "entropy": "actor/entropy"}
    return "  ".join(f"{words} {short_number(m[name])}" for words, name in known.items() if name in m)


_ROWS = (
    ("speed", _speed),
    ("seconds", _seconds),
    ("memory", _memory),
    ("ranks", _ranks),
    ("experts", _experts),
    ("policy", _policy),
)
