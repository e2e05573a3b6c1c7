"""What learning from rollouts of older weights needs. `config/rules.py` asks these with its own."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError


def staleness_rules(config: RunConfig) -> Iterator[UserError]:
    rl = config.rl
    if rl.max_staleness > 0 and rl.mismatch_correction == "none":
        yield UserError(
            "rl.mismatch_correction",
            f"none with rl.max_staleness = {rl.max_staleness}: rollouts of older weights would be learned from as if the present ones had sampled them",
            "use tis, icepop or sequence_mask, or rl.max_staleness=0",
        )
    if rl.partial_rollouts and rl.max_staleness == 0:
        yield UserError(
            "rl.partial_rollouts",
            "true with rl.max_staleness = 0: no answer is under way when a synchronous step brings new weights",
            "set rl.max_staleness to 1 or more, or rl.partial_rollouts=false",
        )
    yield from _bands(config)
    if rl.max_staleness == 0:
        yield from _without_effect(config)


def _bands(config: RunConfig) -> Iterator[UserError]:
    for field, example in (("icepop_band", "0.5 and 5"), ("sequence_band", "0.9 and 1.1")):
        low, high = getattr(config.rl, field)
        if not 0 <= low < 1 < high:
            yield UserError(f"rl.{field}", f"({low:g}, {high:g}) leaves out 1, the ratio of tokens on which both engines agree", f"use {example}, for example")


def _without_effect(config: RunConfig) -> Iterator[UserError]:
    """On-policy, rollout and learner may differ by no more than `max_logprob_diff`: a correction that begins beyond that never does anything."""
    rl = config.rl
    agreed = math.exp(rl.max_logprob_diff)
    cut = {"none": 0.0, "tis": rl.tis_cap, "icepop": _nearest(rl.icepop_band), "sequence_mask": min(rl.tis_cap, _nearest(rl.sequence_band))}
    if agreed < (least := cut[rl.mismatch_correction]):
        yield UserError(
            "rl.mismatch_correction",
            f"{rl.mismatch_correction} cuts weights beyond a factor of {least:g}, but rl.max_logprob_diff = {rl.max_logprob_diff:g} stops the run at "
            f"{agreed:g}",
            f"raise rl.max_logprob_diff above {math.log(least):.2g}, or leave the correction out",
        )


def _nearest(band: tuple[float, float]) -> float:
    """The factor from which on a weight may be outside."""
    low, high = band
    return min(high, 1 / low if low > 0 else high)
