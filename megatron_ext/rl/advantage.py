"""From the rewards of a group to advantages: how much better an answer is than the other answers to the same prompt.

    grpo      A = (R - mean) / (std + 1e-6), std with n - 1        DeepSeekMath, arXiv 2402.03300; verl `compute_grpo_outcome_advantage`
    dr_grpo   A = R - mean                                         Dr. GRPO, arXiv 2503.20783; verl `norm_adv_by_std_in_grpo=False`

A group with one valid answer has nothing to compare with and gives 0 (verl keeps its reward there).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from megatron_ext.shapes import check_shape

EPSILON = 1e-6


def group_advantages(rewards_PG: np.ndarray, valid_PG: np.ndarray, algorithm: Literal["grpo", "dr_grpo"] = "grpo") -> np.ndarray:
    """float64 [P, G]. Answers that are not valid (failed) take no part in the statistics and get 0; their rewards may hold anything, even nan."""
    check_shape("valid_PG", valid_PG, *rewards_PG.shape)
    valid_PG = valid_PG.astype(bool)
    rewards_PG = np.where(valid_PG, rewards_PG, 0.0).astype(np.float64)
    count_P1 = valid_PG.sum(axis=1, keepdims=True)
    centred_PG = np.where(valid_PG, rewards_PG - rewards_PG.sum(axis=1, keepdims=True) / np.maximum(count_P1, 1), 0.0)
    if algorithm == "grpo":
        variance_P1 = (centred_PG**2).sum(axis=1, keepdims=True) / np.maximum(count_P1 - 1, 1)
        centred_PG = centred_PG / (np.sqrt(variance_P1) + EPSILON)
    return np.where(alike(rewards_PG, valid_PG)[:, None], 0.0, centred_PG)


def alike(rewards_PG: np.ndarray, valid_PG: np.ndarray) -> np.ndarray:
    """bool [P]: groups whose valid answers all have the same reward (or of which at most one is valid): they teach nothing. `reward/frac_zero_std_groups`."""
    valid_PG = valid_PG.astype(bool)
    highest_P = np.where(valid_PG, rewards_PG, -np.inf).max(axis=1)
    lowest_P = np.where(valid_PG, rewards_PG, np.inf).min(axis=1)
    return np.asarray(highest_P <= lowest_P)
