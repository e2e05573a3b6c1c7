"""How an answer is given, whatever it says; and several rewards as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_ext.batch.rollout import Prompt
from megatron_ext.data.pieces import TURN_END
from megatron_ext.data.rewards import RewardFunction, read_reward
from megatron_ext.rl.rewards.final import THINK_END, boxed

_THINK = "<think>"
_MARKS = (_THINK, THINK_END, "<answer>", "</answer>")


def format_reward(prompt: Prompt, response: str) -> float:
    r"""1 for `<think>..</think>` followed by either `<answer>..</answer>` and nothing else, or a text with a \boxed{}; every mark once, nothing in it empty."""
    text = response.removesuffix(TURN_END).strip()
    opened, closed, *answer_marks = (text.count(mark) for mark in _MARKS)
    thought, _, answer = text.removeprefix(_THINK).partition(THINK_END)
    if (opened, closed) != (1, 1) or not text.startswith(_THINK) or not thought.strip():
        return 0.0
    answer = answer.strip()
    if answer_marks == [1, 1] and answer.startswith("<answer>") and answer.endswith("</answer>"):
        return float(bool(answer[len("<answer>") : -len("</answer>")].strip()))
    return float(answer_marks == [0, 0] and bool((boxed(answer) or "").strip()))


def length_within(words: int) -> Callable[[Prompt, str], float]:
    """The reward that is 1 up to so many words and falls linearly to 0 at twice as many. Tokens are counted by `rl.overlong_share`."""

    def within(prompt: Prompt, response: str) -> float:
        return min(1.0, max(0.0, 2.0 - len(response.split()) / words))

    return within


length = length_within(256)


def combine(parts: Mapping[str, tuple[RewardFunction, float]]) -> RewardFunction:
    """The weighted sum of several rewards, each under its name, as `rl.advantage=gdpo` and the metrics want them. A part named "correct" says which answers are
    right (`data/rewards.py`)."""

    def sum_of_parts(prompt: Prompt, response: str) -> dict[str, float]:
        values = {name: read_reward(reward(prompt, response))[0] for name, (reward, _) in parts.items()}
        return {"reward": sum(weight * values[name] for name, (_, weight) in parts.items()), **values}

    return sum_of_parts
