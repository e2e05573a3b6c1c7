"""Losses, gradients and advantages equal those of TRL's trainers, called with the same numbers: whatever TRL has of what we have.

TRL's standard deviations get 1e-4 added, ours 1e-6. Rewards here differ by so much that neither counts.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from megatron_ext.rl.objective.advantage import group_advantages, multi_reward_advantages
from megatron_ext.rl.objective.divergence import kl_estimate
from megatron_ext.rl.objective.loss import LossSettings, policy_loss
from megatron_ext.rl.objective.mismatch import mismatch_weights
from tests.support.trl_trainers import scored, trainer

LONGEST, PROMPTS, SAMPLES = 9, 2, 3
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
LARGE = 1e6
"""The size of rewards beside which 1e-4 is nothing."""
NO_REWARDS = torch.zeros(PROMPTS * SAMPLES, 1, dtype=torch.float64)


def case(seed):
    """Log-probs now, before, at rollout (which TRL keeps in float32), of the reference; advantages; mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST, (PROMPTS * SAMPLES,), generator=generator)
    shape = (len(lengths), int(lengths.max()))

    def draw(scale):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    old = -draw(1.0).abs()
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return old + draw(0.4), old, (old + draw(0.4)).float().double(), old + draw(0.4), advantages, (torch.arange(shape[1]) < lengths[:, None]).long()


def theirs(drawn, **changes):
    new, old, _, reference, advantages, mask = drawn
    new = new.clone().requires_grad_()
    prompt = torch.ones(len(mask), 1).long()
    inputs = {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask, "completion_mask": mask, "advantages": advantages}
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": reference, "num_items_in_batch": mask.sum()}
    if changes.get("use_vllm"):
        inputs |= made_by(GRPOTrainer, drawn, NO_REWARDS, **{**changes, "beta": 0.0})
        inputs["advantages"] = advantages
    loss = GRPOTrainer._compute_loss(trainer(new, LONGEST, **changes), None, inputs)
    loss.backward()
    return loss.detach(), new.grad


def made_by(kind, drawn, rewards_RK, **changes):
    """Of the trainer `kind`: advantages, and weights for another engine."""
    _, old, rollout, _, _, mask = drawn
    made = scored(kind, old, rollout, mask, rewards_RK, SAMPLES, **changes)
    return {name: made[name] for name in ("advantages", "importance_sampling_ratio") if name in made}


def ours(drawn, **settings):
    new, old, rollout, reference, advantages, mask = drawn
    new = new.clone().requires_grad_()
    result = policy_loss(new, old, rollout, advantages, mask, LossSettings(**{"dual_clip": 1e9, "longest": LONGEST, **settings}), ref_logprobs_BS=reference)
    loss = result.loss_sum / result.divisor
    loss.backward()
    return loss.detach(), new.grad


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("trl", "settings"),
    [
        pytest.param({"loss_type": "grpo"}, {"aggregation": "seq_mean_token_mean"}, id="grpo"),
        pytest.param({"loss_type": "bnpo"}, {"aggregation": "token_mean"}, id="bnpo"),
        pytest.param({"loss_type": "dapo"}, {"aggregation": "token_mean"}, id="dapo"),
        pytest.param({"loss_type": "dr_grpo"}, {"aggregation": "seq_mean_token_sum_norm"}, id="dr_grpo"),
        pytest.param({"loss_type": "cispo", "epsilon_high": 1.3}, {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.3}, id="cispo"),
        pytest.param({"importance_sampling_level": "sequence"}, {"surrogate": "gspo", "aggregation": "seq_mean_token_mean"}, id="gspo"),
        pytest.param({"importance_sampling_level": "sequence", "loss_type": "dapo"}, {"surrogate": "gspo"}, id="gspo over tokens"),
        pytest.param(
            {"importance_sampling_level": "sequence", "loss_type": "dr_grpo", "beta": 0.3},
            {"surrogate": "gspo", "aggregation": "seq_mean_token_sum_norm", "kl_coeff": 0.3},
            id="gspo over a constant, k3",
        ),
        pytest.param({"loss_type": "dapo", "delta": 1.4}, {"dual_clip": 1.4}, id="dual clip"),
        *(
            pytest.param({"loss_type": loss_type, "beta": 0.3}, {"aggregation": aggregation, "kl_coeff": 0.3}, id=f"k3, {loss_type}")
            for loss_type, aggregation in (("grpo", "seq_mean_token_mean"), ("dapo", "token_mean"), ("dr_grpo", "seq_mean_token_sum_norm"))
        ),
        pytest.param(
            {"loss_type": "cispo", "epsilon_high": 1.3, "beta": 0.3},
            {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.3, "kl_coeff": 0.3},
            id="k3, cispo",
        ),
        *(
            pytest.param(
                {**loss, "beta": 0.3, "use_vllm": True, "vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": low}
                | {"vllm_importance_sampling_clip_max": 1.5},
                {**settings, "kl_coeff": 0.3, "correction": correction, "tis_cap": 1.5, "icepop_band": (0.8, 1.5)},
                id=f"{correction}, {loss['loss_type']}",
            )
            for mode, low, correction in (("token_truncate", None, "tis"), ("token_mask", 0.8, "icepop"))
            for loss, settings in (
                ({"loss_type": "dapo"}, {}),
                ({"loss_type": "grpo"}, {"aggregation": "seq_mean_token_mean"}),
                ({"loss_type": "cispo", "epsilon_high": 1.3}, {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.3}),
            )
        ),
    ],
)
def test_loss_and_gradient_are_those_of_trl(trl, settings, seed):
    drawn = case(seed)
    for mine, expected in zip(ours(drawn, **settings), theirs(drawn, **trl), strict=True):
        torch.testing.assert_close(mine, expected, **TOLERANCE)


def test_on_policy_rloo_has_the_gradient_of_trls_trainer():
    """TRL's ratio is of the whole answer; with the weights that answered, its gradient is that of the sum of log-probs."""
    new, _, rollout, reference, advantages, mask = case(0)
    live = new.clone().requires_grad_()
    inputs = {"prompt_ids": mask, "prompt_mask": mask, "completion_ids": mask, "completion_mask": mask, "advantages": advantages}
    RLOOTrainer._compute_loss(trainer(live, LONGEST), None, {**inputs, "old_logps": (new * mask).sum(1)}).backward()
    _, gradient = ours((new, new, rollout, reference, advantages, mask), aggregation="seq_mean_token_sum")
    torch.testing.assert_close(gradient, live.grad, **TOLERANCE)


def rewards(num_parts, seed=0):
    """[R, K]: every group of three differs; the answers of one failed, and TRL is told nan."""
    drawn = LARGE * torch.randn(PROMPTS * SAMPLES, num_parts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn[1] = torch.nan
    return drawn


def table(values_R):
    return values_R.numpy().reshape(PROMPTS, SAMPLES)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "trainer_type", "settings"),
    [("grpo", GRPOTrainer, {"scale_rewards": "group"}), ("dr_grpo", GRPOTrainer, {"scale_rewards": "none"}), ("rloo", RLOOTrainer, {})],
)
def test_advantages_within_a_group_are_those_of_trl(kind, trainer_type, settings, seed):
    given_RK = rewards(1, seed)
    expected_R = made_by(trainer_type, case(seed), given_RK, **settings)["advantages"]
    mine_PG = group_advantages(table(given_RK[:, 0]), np.isfinite(table(given_RK[:, 0])), kind)
    np.testing.assert_allclose(mine_PG, table(expected_R), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_gdpo_is_trls_normalize_then_sum(seed):
    """The last division is by a standard deviation near 1, to which TRL adds 1e-4: taken out again."""
    given_RK, weights = rewards(2, seed), torch.tensor([1.0, 0.3], dtype=torch.float64)
    expected_R = made_by(GRPOTrainer, case(seed), given_RK, multi_objective_aggregation="normalize_then_sum", weights=weights)["advantages"]
    valid_PG = np.isfinite(table(given_RK[:, 0]))
    mine_PG = multi_reward_advantages(np.stack([table(part_R) for part_R in given_RK.T]), weights.numpy(), valid_PG)
    summed_PG = sum(weight * group_advantages(table(part_R), valid_PG) for weight, part_R in zip(weights.numpy(), given_RK.T, strict=True))
    deviation = summed_PG[valid_PG].std(ddof=1)
    np.testing.assert_allclose(mine_PG * (deviation + 1e-6), table(expected_R) * (deviation + 1e-4), rtol=1e-6, atol=1e-6)


def test_a_kl_in_the_reward_is_that_of_trls_rloo():
    """k1, summed over an answer, off its reward before answers are compared."""
    drawn = case(1)
    _, old, _, reference, _, mask = drawn
    given_RK = rewards(1) / LARGE
    expected_R = made_by(RLOOTrainer, drawn, given_RK, reference=reference, beta=0.3)["advantages"]
    shaped_R = given_RK[:, 0] - 0.3 * (kl_estimate("k1", old, reference) * mask).sum(1)
    mine_PG = group_advantages(table(shaped_R), np.isfinite(table(shaped_R)), "rloo")
    np.testing.assert_allclose(mine_PG, table(expected_R), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("correction", "mode", "low"), [("tis", "token_truncate", None), ("icepop", "token_mask", 0.8)])
def test_weights_for_another_engine_are_those_of_trl(correction, mode, low):
    drawn = case(2)
    limits = {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": 1.5}
    expected = made_by(GRPOTrainer, drawn, NO_REWARDS, use_vllm=True, vllm_importance_sampling_mode=mode, **limits)["importance_sampling_ratio"]
    mask = drawn[-1].bool()
    log_weight_n = drawn[1][mask] - drawn[2][mask]
    mine_n, cut_n = mismatch_weights(correction, log_weight_n, log_weight_n, cap=1.5, band=(0.8, 1.5))
    assert 0 < cut_n.sum() < len(cut_n)
    torch.testing.assert_close(mine_n, expected[mask], **TOLERANCE)
