"""The bars of docs/benchmarks, as data: which number of which benchmark is held against which, and what it must reach.

A benchmark's JSON is {case: {side: number}}. Case and peers are patterns; of several peers the best (the largest number) counts, and without a peer the number
itself is held against the bar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

Found = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Bar:
    """Of `script`: `ours` over `peers` is at least, or at `most`, `bound`."""

    script: str
    case: str
    ours: str
    peers: str
    bound: float
    most: bool = False

    def reached(self, ratio: float) -> bool:
        return ratio <= self.bound if self.most else ratio >= self.bound


@dataclass(frozen=True)
class Verdict:
    """One case against one bar; without a ratio the case has not the sides."""

    bar: Bar
    case: str
    ratio: float

    @property
    def row(self) -> str:
        bar, sign = self.bar, "<=" if self.bar.most else ">="
        what = f"{bar.ours} / {bar.peers}" if bar.peers else bar.ours
        return f"| {bar.script} | {self.case} | {what} | {self.ratio:.3g} | {sign} {bar.bound:g} | {'reached' if bar.reached(self.ratio) else 'missed'} |"


HEAD = "| benchmark | case | what | is | bar | |\n|---|---|---|---|---|---|"
BARS = (
    Bar("training", "*", "ours", "transformers", 1.15),
    Bar("training", "64 experts*", "ours", "megatron-core", 1.5),
    Bar("training", "16 experts*", "ours", "megatron-core", 1.3),
    Bar("training", "* experts of *, top ?", "MFU, ours", "", 0.65),
    Bar("generation", "*, 1 prompt", "ours", "transformers*", 2.0),
    Bar("generation", "*, 8 prompts", "ours", "transformers*", 1.8),
    Bar("generation", "*, 32 prompts", "ours", "transformers*", 1.5),
    Bar("generation", "* x 8, an image each", "ours", "transformers*", 3.0),
    Bar("grpo", "*", "ours", "TRL*", 2.0),
    Bar("refit", "in one process*", "refit", "memcpy", 0.5),
    Bar("refit", "between processes*", "refit", "gloo", 0.6),
    Bar("clvr", "a training step*", "three taps", "none", 1.08, most=True),
    Bar("clvr", "a decode step*", "three taps", "none", 1.06, most=True),
    Bar("clvr", "routes*", "recorded", "not recorded", 1.01, most=True),
    Bar("clvr", "bonus and advantages*", "share of a step", "", 0.01, most=True),
    Bar("checkpoint", "*", "asynchronous save: stall", "synchronous save", 0.1, most=True),
    Bar("startup", "*plan * 1024*", "elapsed, s", "", 1.0, most=True),
    Bar("startup", "*--explain", "elapsed, s", "", 0.5, most=True),
    Bar("startup", "make rl*first training step", "elapsed, s", "", 30.0, most=True),
)
"""What the project set itself. What has no bar is only printed by its benchmark."""


def verdicts(script: str, found: Found, bars: Sequence[Bar] = BARS) -> list[Verdict]:
    """Of what a benchmark found: every case against the bars that are about it.

    >>> bar = Bar("speed", "*", "ours", "theirs*", 2.0)
    >>> [(one.case, one.ratio, one.bar.reached(one.ratio)) for one in verdicts("speed", {"a": {"ours": 6.0, "theirs, slow": 2.0, "theirs, fast": 4.0}}, [bar])]
    [('a', 1.5, False)]
    """
    told = []
    for bar in (bar for bar in bars if bar.script == script):
        for case, sides in found.items():
            peers = [number for side, number in sides.items() if fnmatchcase(side, bar.peers)] if bar.peers else [1.0]
            if fnmatchcase(case, bar.case) and bar.ours in sides and peers:
                told.append(Verdict(bar, case, sides[bar.ours] / max(peers)))
    return told


def read(path: Path) -> Found:
    found: Found = json.loads(path.read_text(encoding="utf-8"))
    return found
