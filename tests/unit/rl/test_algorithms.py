"""Every name that `rl.algorithm` knows, from rewards to loss and gradient: what the parts make together is the objective of the paper, written here in one
piece of plain arithmetic, as a function of the log-probs. Gradients by finite differences; to 1e-6."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import get_args

import numpy as np
import pytest
import torch

from megatron_ext.batch import NO_TILES, Prompt, Rollout, RouteTrace, ScoredRollout
from megatron_ext.config.algorithms import Algorithm
from megatron_ext.config.load import load_config
from megatron_ext.rl.credit import Credit
from megatron_ext.rl.objective.loss import policy_loss
from megatron_ext.rl.policy_step import loss_settings

LONGEST = 5
REWARDS = ((1.0, 0.0, 0.25), (0.0, 1.0, 1.0))
LENGTHS = ((2, 3, 5), (4, 1, 5))
KL = 0.1
EVERY = [(p, g) for p in range(2) for g in range(3)]


def drawn():
    """Log-probs now, before, of the reference, [p][g][t]."""
    rng = np.random.default_rng(3)
    old = [[(-rng.exponential(size=length)).tolist() for length in row] for row in LENGTHS]
    new, reference = ([[[value + 0.4 * rng.normal() for value in answer] for answer in row] for row in old] for _ in range(2))
    return new, old, reference


def grpo(new, old, _, now):
    """DeepSeekMath, equation 3, with DAPO's two bounds and its mean over tokens."""
    losses = []
    for p, g in EVERY:
        advantage = (REWARDS[p][g] - fmean(REWARDS[p])) / (stdev(REWARDS[p]) + 1e-6)
        losses += [clipped(math.exp(x - o), advantage) for x, o in zip(new[p][g], old[p][g], strict=True)]
    return fmean(losses)


def clipped(ratio, advantage, low=0.2, high=0.28):
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def dr_grpo(new, old, _, now):
    """No division by the spread of rewards, none by the length of answers."""
    total = 0.0
    for p, g in EVERY:
        advantage = REWARDS[p][g] - fmean(REWARDS[p])
        total += sum(clipped(math.exp(x - o), advantage) for x, o in zip(new[p][g], old[p][g], strict=True))
    return total / (len(EVERY) * LONGEST)


def gspo(new, old, _, now):
    """Equation 5: one ratio for an answer, the geometric mean of its tokens'."""
    losses = []
    for p, g in EVERY:
        ratio = math.exp(fmean(x - o for x, o in zip(new[p][g], old[p][g], strict=True)))
        losses.append(clipped(ratio, (REWARDS[p][g] - fmean(REWARDS[p])) / (stdev(REWARDS[p]) + 1e-6), 3e-4, 4e-4))
    return fmean(losses)


def dapo(new, old, _, now):
    """Equation 8 with equation 13: answers of more than 4 of 5 tokens lose up to 1."""
    losses = []
    for p, g in EVERY:
        shaped = [reward + min(0, 4 - length) / 1 for reward, length in zip(REWARDS[p], LENGTHS[p], strict=True)]
        advantage = (shaped[g] - fmean(shaped)) / (stdev(shaped) + 1e-6)
        losses += [clipped(math.exp(x - o), advantage) for x, o in zip(new[p][g], old[p][g], strict=True)]
    return fmean(losses)


def cispo(new, old, _, now):
    """MiniMax-M1, equation 4: log-probs, weighed by ratios that carry no gradient, cut at 5."""
    losses = []
    for p, g in EVERY:
        advantage = (REWARDS[p][g] - fmean(REWARDS[p])) / (stdev(REWARDS[p]) + 1e-6)
        losses += [-min(math.exp(n - o), 5) * advantage * x for x, n, o in zip(new[p][g], now[p][g], old[p][g], strict=True)]
    return fmean(losses)


def rloo(new, old, reference, now):
    """An answer against the mean of the others, after what it pays for its distance from the reference."""
    total = 0.0
    for p, g in EVERY:
        paid = [REWARDS[p][s] - KL * distance(old[p][s], reference[p][s]) for s in range(3)]
        advantage = paid[g] - (sum(paid) - paid[g]) / 2
        total += sum(clipped(math.exp(x - o), advantage) for x, o in zip(new[p][g], old[p][g], strict=True))
    return total / len(EVERY)


def reinforce_pp(new, old, reference, now):
    """Whitened over all tokens of the batch; the KL to the reference is in the reward."""
    paid = {(p, g): REWARDS[p][g] - KL * distance(old[p][g], reference[p][g]) for p, g in EVERY}
    tokens = [paid[p, g] for p, g in EVERY for _ in new[p][g]]
    losses = []
    for p, g in EVERY:
        advantage = (paid[p, g] - fmean(tokens)) / math.sqrt(stdev(tokens) ** 2 + 1e-8)
        losses += [clipped(math.exp(x - o), advantage) for x, o in zip(new[p][g], old[p][g], strict=True)]
    return fmean(losses)


def distance(old, reference):
    return sum(o - r for o, r in zip(old, reference, strict=True))


PAPERS = {"grpo": grpo, "dr_grpo": dr_grpo, "gspo": gspo, "dapo": dapo, "cispo": cispo, "rloo": rloo, "reinforce_pp": reinforce_pp}


def ours(name, new, old, reference, folder):
    """Loss, and its gradient [p][g][t] with respect to the log-probs."""
    pays = name in ("rloo", "reinforce_pp")
    kl = [f"rl.kl_coeff={KL}"] if pays else []
    config = load_config(None, [f"rl.algorithm={name}", f"rollout.max_new_tokens={LONGEST}", "rl.rollouts_per_prompt=3", *kl]).config
    answers = [scored(p, g) for p, g in EVERY]
    kl_R = np.array([distance(old[p][g], reference[p][g]) for p, g in EVERY])
    advantages_R, _ = Credit(config, None, {}, folder, reference_kl=(lambda _: kl_R) if pays else None)(answers, 0)
    new_BS, old_BS = padded(new).requires_grad_(), padded(old)
    mask = torch.arange(LONGEST) < torch.tensor(sum(LENGTHS, ()))[:, None]
    parts = policy_loss(new_BS, old_BS, old_BS, torch.from_numpy(advantages_R), mask, loss_settings(config))
    loss = parts.loss_sum / parts.divisor
    loss.backward()
    gradient = {(p, g): new_BS.grad[row, : LENGTHS[p][g]].tolist() for row, (p, g) in enumerate(EVERY)}
    return loss.item(), gradient


def scored(p, g):
    tokens, nothing = np.ones(LENGTHS[p][g], np.int32), RouteTrace(np.zeros((LENGTHS[p][g], 1, 1), np.uint8), np.zeros((LENGTHS[p][g], 1, 1), np.float16))
    prompt = Prompt(str(p), "ocr", np.array([5], np.int32), NO_TILES, "")
    logprobs, versions = np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.int32)
    return ScoredRollout(Rollout(prompt, g, 0, tokens, logprobs, versions, "stop", "", nothing), REWARDS[p][g], {})


def padded(values):
    rows = [values[p][g] + [0.0] * (LONGEST - LENGTHS[p][g]) for p, g in EVERY]
    return torch.tensor(rows, dtype=torch.float64)


def moved(values, place, by):
    p, g, t = place
    return [[[value + by * ((i, j, k) == (p, g, t)) for k, value in enumerate(answer)] for j, answer in enumerate(row)] for i, row in enumerate(values)]


@pytest.mark.parametrize("name", get_args(Algorithm))
def test_the_objective_is_that_of_its_paper(name, tmp_path):
    new, old, reference = drawn()
    paper = PAPERS[name]
    loss, gradient = ours(name, new, old, reference, tmp_path)
    assert loss == pytest.approx(paper(new, old, reference, new), abs=1e-6)
    for p, g in EVERY:
        for t in range(LENGTHS[p][g]):
            up, down = (paper(moved(new, (p, g, t), by), old, reference, new) for by in (1e-5, -1e-5))
            assert gradient[p, g][t] == pytest.approx((up - down) / 2e-5, abs=1e-6), (p, g, t)
