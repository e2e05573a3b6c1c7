"""Which positions of a sequence belong to which skill.

Row s of a route trace is where token s was fed and token s + 1 decided. The rows of an answer are those that DECIDE its tokens: a prompt of P tokens and an
answer of T tokens give [P - 1, P + T - 1), which is not empty even for one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Span:
    """Positions [start, stop) whose routes are scored as this skill."""

    skill: str
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"span [{self.start}, {self.stop}) of {self.skill} is empty or negative")


def tag_spans(response_T: np.ndarray, first_row: int, tags: Mapping[str, tuple[int, int]]) -> list[Span]:
    """One span for every `<skill> .. </skill>` of the answer, the tag tokens excluded. `first_row` decides the first response token (`Rollout.response_rows`);
    `tags` gives the token ids (open, close) of each skill.

    A tag is closed by its own close token before any other tag opens; what is not closed, or empty, gives no span.
    """
    opens = {opening: skill for skill, (opening, _) in tags.items()}
    spans, skill, start = [], None, 0
    for index, token in enumerate(response_T.tolist()):
        if token in opens:
            skill, start = opens[token], index + 1
        elif skill is not None and token == tags[skill][1]:
            if index > start:
                spans.append(Span(skill, first_row + start, first_row + index))
            skill = None
    return spans
