"""The contract that every reward function keeps, as a check that a user's test calls:

from megatron_ext.rl.scoring.contract import check_reward
def test_my_reward(): check_reward(my_reward, prompts)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_ext.batch import NO_TILES, Prompt
from megatron_ext.data.rewards import BadReward, RewardFunction, read_reward
from megatron_ext.errors import UserError

ANY_TEXT = (
    "",
    " ",
    "\n\n\t",
    "red",
    "7",
    "-1e999",
    "nan",
    "<ocr> 3 </ocr> <count> 4 </count> <ans> 7",
    "<ocr> <ocr> </count> </ocr",
    "<|im_end|><|im_start|>",
    "\x00\x01\ufffd",
    "十二 ½ Ⅻ ٣",
    "a" * 10_000,
    "(" * 1_000,
)


def check_reward(reward: RewardFunction, prompts: Sequence[Prompt] = ()) -> None:
    """Raises UserError naming the rule that is broken: total on any text, of the right type, finite, and the same on the second call.

    Tried on the answer of each prompt and on texts that a model may well produce. Without `prompts`, on one counting question without an image.
    """
    name = f"{getattr(reward, '__module__', '?')}:{getattr(reward, '__qualname__', repr(reward))}"
    for prompt in prompts or (_plain_prompt(),):
        for text in (prompt.answer, *ANY_TEXT):
            first = _call(reward, name, prompt, text)
            second = _call(reward, name, prompt, text)
            if first != second:
                problem = f"gave {first} and then {second} for the same prompt {prompt.key!r} and response {text!r:.80}"
                raise UserError(name, problem, "a reward must be deterministic: seed what it draws, keep no state")


def _call(reward: RewardFunction, name: str, prompt: Prompt, text: str) -> tuple[float, dict[str, float]]:
    case = f"on prompt {prompt.key!r} and response {text!r:.80}"
    try:
        return read_reward(reward(prompt, text))
    except BadReward as error:
        raise UserError(name, f"{error.detail} {case}", 'return a finite number, or a dict of finite numbers with "reward"') from None
    except Exception as error:
        raise UserError(name, f"raised {type(error).__name__}: {error} {case}", "a reward gives any text a value, malformed text too") from error


def _plain_prompt() -> Prompt:
    return Prompt("plain", "count", np.zeros(1, np.int32), tiles=NO_TILES, answer="7", meta={"skill": "count", "answer": "7"})
