"""What an objective is made of, and the names for usual choices of the parts. `rl.algorithm` picks a name; each part may be set by itself.

    task reward -> shaping (overlong answers, KL) -> advantage -> surrogate (ratio, clip, correction for another engine) + KL -> aggregation

The formulas stand where they are computed: `rl/{shaping,advantage,surrogates,divergence,mismatch,aggregation}.py`.
"""

from __future__ import annotations

from typing import Any, Literal

Algorithm = Literal["grpo", "dr_grpo", "gspo", "dapo", "cispo", "rloo", "reinforce_pp"]
Advantage = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gdpo"]
Surrogate = Literal["clip", "gspo", "cispo"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
KlEstimator = Literal["k1", "k2", "k3"]
KlPlacement = Literal["loss", "reward"]
Correction = Literal["none", "tis", "icepop", "sequence_mask"]

# The schema's defaults are GRPO's parts, with the token mean and the wider upper bound that DAPO brought.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    # arXiv 2503.20783
    "dr_grpo": {"advantage": "dr_grpo", "aggregation": "seq_mean_token_sum_norm"},
    # arXiv 2507.18071, which gives these bounds for the ratio of a whole answer
    "gspo": {"surrogate": "gspo", "aggregation": "seq_mean_token_mean", "clip_low": 3e-4, "clip_high": 4e-4},
    # arXiv 2503.14476: the last 4096 of 20480 tokens cost reward
    "dapo": {"dynamic_sampling": 4, "overlong_share": 0.2},
    # arXiv 2506.13585: no lower bound; the upper bound is the ratio 5 of arXiv 2510.13786
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    # arXiv 2402.14740
    "rloo": {"advantage": "rloo", "aggregation": "seq_mean_token_sum", "kl_estimator": "k1", "kl_placement": "reward"},
    # arXiv 2501.03262
    "reinforce_pp": {"advantage": "reinforce_pp", "kl_estimator": "k1", "kl_placement": "reward"},
}
