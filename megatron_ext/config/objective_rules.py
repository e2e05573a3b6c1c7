"""Which parts of an objective cannot be together (`config/algorithms.py`), and which would be without effect."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError


def objective_rules(config: RunConfig) -> Iterator[UserError]:
    rl = config.rl
    if rl.clip_low >= 1 and rl.surrogate != "cispo":
        yield UserError("rl.clip_low", f"{rl.clip_low:g} would let a probability ratio fall to nothing", "use less than 1; 0.2 is usual")
    if rl.clip_low > 1 and rl.surrogate == "cispo":
        yield UserError("rl.clip_low", f"{rl.clip_low:g} makes the lower bound of ratios 1 - {rl.clip_low:g}, below 0", "use 1 for no lower bound")
    if rl.kl_coeff > 0 and rl.kl_estimator == "k1" and rl.kl_placement == "loss":
        yield UserError(
            "rl.kl_estimator",
            f"k1 with rl.kl_placement = loss has a gradient of mean zero: rl.kl_coeff = {rl.kl_coeff:g} would hold the policy nowhere",
            "use k2 or k3, or rl.kl_placement=reward",
        )
    yield from _named_rewards(config)


def _named_rewards(config: RunConfig) -> Iterator[UserError]:
    rl = config.rl
    if rl.advantage != "gdpo":
        if rl.reward_weights:
            yield UserError("rl.reward_weights", f"would be ignored: rl.advantage = {rl.advantage} takes the total", "set rl.advantage=gdpo, or remove them")
        return
    if not any(rl.reward_weights.values()):
        yield UserError("rl.reward_weights", "weighs no part of the reward, and rl.advantage = gdpo sees nothing else", "use {correct: 1, format: 0.2}, say")
    if rl.overlong_share > 0 or (rl.kl_coeff > 0 and rl.kl_placement == "reward"):
        yield UserError(
            "rl.advantage",
            f"gdpo takes named rewards, and rl.overlong_share = {rl.overlong_share:g} or a KL in the reward change their total alone",
            "give the reward a part for length, and use rl.kl_placement=loss",
        )
