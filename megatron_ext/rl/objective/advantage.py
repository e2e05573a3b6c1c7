"""From rewards to advantages: how much better an answer is than the other answers to the same prompt, or to the prompts of the batch.

    grpo                    A = (R - mean) / (std + 1e-6), std with n - 1        DeepSeekMath, arXiv 2402.03300; verl `compute_grpo_outcome_advantage`
    dr_grpo                 A = R - mean                                         Dr. GRPO, arXiv 2503.20783; verl `norm_adv_by_std_in_grpo=False`
    rloo                    A = R - mean of the others                           RLOO, arXiv 2402.14740; verl `compute_rloo_outcome_advantage`
    reinforce_pp            A = whitened R                                       REINFORCE++, arXiv 2501.03262; verl `compute_reinforce_plus_plus_*`
    reinforce_pp_baseline   A = whitened (R - mean)
    gdpo                    A = W / (std W + 1e-6), W = sum_k w_k grpo(R_k)      GDPO, arXiv 2601.05242; TRL `normalize_then_sum`

Means are over the group; whitening and std W over the batch (where W has mean 0): whitened(x) = (x - mean x) / sqrt(var x + 1e-8), over all response tokens.
A group with one valid answer has nothing to compare with and gives 0 (verl keeps its reward there); only `reinforce_pp` does not compare within groups.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from megatron_ext.shapes import check_shape

EPSILON = 1e-6
WHITENING_EPSILON = 1e-8


def group_advantages(rewards_PG: np.ndarray, valid_PG: np.ndarray, kind: Literal["grpo", "dr_grpo", "rloo"] = "grpo") -> np.ndarray:
    """float64 [P, G]. Answers that are not valid (failed) take no part in the statistics and get 0; their rewards may hold anything, even nan."""
    check_shape("valid_PG", valid_PG, *rewards_PG.shape)
    valid_PG = valid_PG.astype(bool)
    rewards_PG = np.where(valid_PG, rewards_PG, 0.0).astype(np.float64)
    count_P1 = valid_PG.sum(axis=1, keepdims=True)
    centred_PG = np.where(valid_PG, rewards_PG - rewards_PG.sum(axis=1, keepdims=True) / np.maximum(count_P1, 1), 0.0)
    if kind == "grpo":
        variance_P1 = (centred_PG**2).sum(axis=1, keepdims=True) / np.maximum(count_P1 - 1, 1)
        centred_PG = centred_PG / (np.sqrt(variance_P1) + EPSILON)
    elif kind == "rloo":
        centred_PG = centred_PG * count_P1 / np.maximum(count_P1 - 1, 1)  # R - (n mean - R) / (n - 1)
    return np.where(alike(rewards_PG, valid_PG)[:, None], 0.0, centred_PG)


def batch_advantages(rewards_PG: np.ndarray, valid_PG: np.ndarray, tokens_PG: np.ndarray, *, baseline: bool) -> np.ndarray:
    """REINFORCE++, float64 [P, G]; `tokens_PG`: response tokens. With `baseline` the group's mean is taken off first."""
    check_shape("tokens_PG", tokens_PG, *rewards_PG.shape)
    valid_PG = valid_PG.astype(bool)
    values_PG = group_advantages(rewards_PG, valid_PG, "dr_grpo") if baseline else np.where(valid_PG, rewards_PG, 0.0)
    tokens_PG = np.where(valid_PG, tokens_PG, 0)
    total = tokens_PG.sum()
    centred_PG = values_PG - (values_PG * tokens_PG).sum() / max(total, 1)
    variance = (centred_PG**2 * tokens_PG).sum() / max(total - 1, 1)
    return np.where(valid_PG, centred_PG / np.sqrt(variance + WHITENING_EPSILON), 0.0)


def multi_reward_advantages(rewards_KPG: np.ndarray, weights_K: np.ndarray, valid_PG: np.ndarray) -> np.ndarray:
    """GDPO, float64 [P, G]: K named rewards, each normalised in its group, so that none drowns another's differences."""
    check_shape("weights_K", weights_K, len(rewards_KPG))
    valid_PG = valid_PG.astype(bool)
    summed_PG = sum(weight * group_advantages(rewards_PG, valid_PG) for weight, rewards_PG in zip(weights_K, rewards_KPG, strict=True))
    return summed_PG / (summed_PG[valid_PG].std(ddof=1) + EPSILON) if valid_PG.sum() > 1 else np.zeros(valid_PG.shape)


def alike(rewards_PG: np.ndarray, valid_PG: np.ndarray) -> np.ndarray:
    """bool [P]: groups whose valid answers all have the same reward (or of which at most one is valid): they teach nothing."""
    valid_PG = valid_PG.astype(bool)
    highest_P = np.where(valid_PG, rewards_PG, -np.inf).max(axis=1)
    lowest_P = np.where(valid_PG, rewards_PG, np.inf).min(axis=1)
    return np.asarray(highest_P <= lowest_P)
