"""How a reward is found and read, and when it says that an answer is right.

A reward is a function `reward(prompt: Prompt, response: str)` that returns a number, or a dict of numbers with "reward" as the total. The configuration
names it by its dotted path `module:function` (`rl.reward`); `rl/rewards` holds several. In reinforcement learning it runs in processes of its own, which never
import torch; evaluation and discovery ask it whether an answer is right.
"""

from __future__ import annotations

import difflib
import importlib
import math
import numbers
import sys
from collections.abc import Callable, Mapping

import numpy as np

from megatron_ext.batch.rollout import Prompt
from megatron_ext.errors import UserError

RewardFunction = Callable[[Prompt, str], object]
_WHERE = "rl.reward"


def correctness(path: str, threshold: float) -> Callable[[Prompt, str], bool]:
    """Whether an answer is right by the reward `module:function`: where it gives a part named "correct", that is 1; otherwise its total reaches the threshold.
    An answer on which the reward fails is told and counts as wrong: a run of days does not end for it.

    Raises like `load_reward`.
    """
    reward = load_reward(path)

    def right(prompt: Prompt, response: str) -> bool:
        try:
            total, parts = read_reward(reward(prompt, response))
        except Exception as error:  # whatever a user's function raises
            print(f"{_WHERE} {path} failed on prompt {prompt.key!r}, whose answer counts as wrong: {error!r}", file=sys.stderr, flush=True)
            return False
        return is_right(total, parts, threshold)

    return right


def is_right(total: float, parts: Mapping[str, float], threshold: float) -> bool:
    """What a reward, read, says of its answer."""
    return parts["correct"] >= 1 if "correct" in parts else total >= threshold


class BadReward(Exception):
    """A reward function returned something that is no reward. `reason` is `reward_wrong_type` or `reward_not_finite`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def read_reward(value: object) -> tuple[float, dict[str, float]]:
    """The total and its named parts (without the total) of what a reward function returned. Raises BadReward."""
    if not isinstance(value, Mapping):
        return _number("the reward", value), {}
    if "reward" not in value:
        raise BadReward("reward_wrong_type", f"a dict without the key 'reward': its keys are {sorted(map(str, value))}")
    if not all(isinstance(name, str) for name in value):
        raise BadReward("reward_wrong_type", f"a dict whose keys are not all strings: {list(value)}")
    parts = {str(name): _number(f"the part {name!r}", part) for name, part in value.items()}
    return parts.pop("reward"), parts


def load_reward(path: str) -> RewardFunction:
    """The function behind `module:function`. Raises like `load_function`."""
    return load_function(path, _WHERE, "megatron_ext.rl.rewards:skill_reward", "reward(prompt, response)")


def load_function(path: str, where: str, example: str, form: str) -> Callable[..., object]:
    """The function behind `module:function`, which the field `where` names. Raises UserError when the path, the module or the function is not there, or it
    cannot be called."""
    module_name, colon, name = path.partition(":")
    if not (colon and module_name and name.isidentifier()):
        raise UserError(where, f"{path!r} is not of the form module:function", f"for example {example}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(where, f"importing {module_name!r} fails: {error}", "install what it imports") from error
        raise UserError(where, f"there is no module {error.name!r}", "start from the folder that holds it, or put that folder on PYTHONPATH") from None
    except Exception as error:
        raise UserError(where, f"importing {module_name!r} fails: {type(error).__name__}: {error}", "mend the module") from error
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, [other for other in vars(module) if callable(getattr(module, other))], n=1)
        raise UserError(where, f"module {module_name!r} has no {name!r}", f"did you mean {near[0]!r}?" if near else "name a function of the module")
    function = getattr(module, name)
    if not callable(function):
        raise UserError(where, f"{path!r} is a {type(function).__name__}, not a function", f"name a function {form}")
    return function


def _number(what: str, value: object) -> float:
    """bool, int, float and numpy scalars are numbers; strings, None, arrays and complex numbers are not."""
    if not isinstance(value, numbers.Real | np.bool_):
        raise BadReward("reward_wrong_type", f"{what} is a {type(value).__name__}: {value!r:.200}")
    number = float(value)
    if not math.isfinite(number):
        raise BadReward("reward_not_finite", f"{what} is {number}")
    return number
