"""Answers that are compared as text."""

from __future__ import annotations

import math
import re

from megatron_ext.batch.rollout import Prompt
from megatron_ext.rl.rewards.final import boxed, final_answer
from megatron_ext.rl.rewards.suite import FORMAT_WEIGHT

_THINKS_THEN_ANSWERS = re.compile(r"\s*<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


def exact_match(prompt: Prompt, response: str) -> float:
    """1 where the final answer (`final.py`) is the prompt's, up to white space."""
    return float(final_answer(response).split() == final_answer(prompt.answer).split())


def boxed_reward(prompt: Prompt, response: str) -> dict[str, float]:
    r"""0.9 when what stands in the last \boxed{} is the prompt's answer, 0.1 for the form `<think>..</think> .. \boxed{}`: the weights of InternVL3.5's RL
    (its fork of verl, reward_score/geo3k.py). Numbers are compared by value, anything else as text without spaces, $ and \text{}; formulas are not worked out.
    """
    said, gold = boxed(response), boxed(prompt.answer) or prompt.answer
    correct = float(said is not None and same_text(said, gold))
    form = float(_THINKS_THEN_ANSWERS.fullmatch(response) is not None)
    return {"reward": (1 - FORMAT_WEIGHT) * correct + FORMAT_WEIGHT * form, "correct": correct, "format": form}


def same_text(said: str, gold: str) -> bool:
    said, gold = (_bare(text) for text in (said, gold))
    try:
        return math.isclose(float(said.replace(",", "")), float(gold.replace(",", "")), rel_tol=1e-6)
    except ValueError:
        return said == gold


def _bare(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"[\s$]|\\[,!;]", "", text).rstrip(".")
