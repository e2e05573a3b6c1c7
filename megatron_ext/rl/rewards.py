"""What an answer is worth: the rewards that come with the program. Your own is a function of the same form (`data/rewards.py`)."""

from __future__ import annotations

import math
import re

from megatron_ext.batch.rollout import Prompt
from megatron_ext.data.suite import check

PARTIAL_WEIGHT = 0.4
FORMAT_WEIGHT = 0.1
_THINKS_THEN_ANSWERS = re.compile(r"\s*<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


def skill_reward(prompt: Prompt, response: str) -> dict[str, float]:
    """1 exactly when the answer is fully correct. Otherwise 0 for a single skill, and for a composite at most 0.5:

    reward = 1[correct] + (1 - 1[correct]) (0.4 mean(sub-tasks solved) + 0.1 1[well formed])

    Of your own conversations: 1 when the answer is that of the file, up to white space.
    """
    verdict = check(prompt.meta, response)
    parts = verdict.parts if prompt.skill == "composite" else {}
    partial = math.fsum(parts.values()) / len(parts) if parts else 0.0
    well_formed = float(verdict.well_formed)
    if verdict.correct:
        total = 1.0
    else:
        total = PARTIAL_WEIGHT * partial + FORMAT_WEIGHT * well_formed if parts else 0.0
    return {"reward": total, "correct": float(verdict.correct), "partial": partial, "format": well_formed}


def boxed_reward(prompt: Prompt, response: str) -> dict[str, float]:
    r"""0.9 when what stands in the last \boxed{} is the prompt's answer, 0.1 for the form `<think>..</think> .. \boxed{}`: the weights of InternVL3.5's RL
    (its fork of verl, reward_score/geo3k.py). Numbers are compared by value, anything else as text without spaces, $ and \text{}; formulas are not worked out.
    """
    said, gold = boxed(response), boxed(prompt.answer) or prompt.answer
    correct = float(said is not None and _same(said, gold))
    form = float(_THINKS_THEN_ANSWERS.fullmatch(response) is not None)
    return {"reward": (1 - FORMAT_WEIGHT) * correct + FORMAT_WEIGHT * form, "correct": correct, "format": form}


def boxed(text: str) -> str | None:
    r"""What the last \boxed{} holds, braces inside it included; None where there is none, or it is not closed.

    >>> boxed(r"so \boxed{2} and \boxed{\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len(r"\boxed{") : position]
    return None


def _same(said: str, gold: str) -> bool:
    said, gold = (_bare(text) for text in (said, gold))
    try:
        return math.isclose(float(said.replace(",", "")), float(gold.replace(",", "")), rel_tol=1e-6)
    except ValueError:
        return said == gold


def _bare(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"[\s$]|\\[,!;]", "", text).rstrip(".")
