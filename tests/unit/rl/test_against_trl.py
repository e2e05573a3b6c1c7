"""Losses and gradients equal those of TRL's trainers, called with the same numbers. Needs the extra `trl` (pip install -e ".[trl]"); skipped without it."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from megatron_ext.rl.objective.loss import LossSettings, policy_loss

pytest.importorskip("trl", reason='TRL is not installed: pip install -e ".[trl]"')
GRPOTrainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
RLOOTrainer = pytest.importorskip("trl.trainer.rloo_trainer").RLOOTrainer

LONGEST = 9
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def case(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST, (6,), generator=generator)
    shape = (6, int(lengths.max()))

    def draw(scale):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    old = -draw(1.0).abs()
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    return old + draw(0.4), old, old + draw(0.4), old + draw(0.4), advantages, (torch.arange(shape[1]) < lengths[:, None]).long()


def trainer(logprobs, **changes):
    """What the trainers' `_compute_loss` reads of a trainer, with the given log-probs as the model's."""
    settings = {"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.28, "use_vllm": False, **changes}
    arguments = SimpleNamespace(delta=settings.pop("delta", None), use_bias_correction_kl=False, steps_per_generation=1)
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x)
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        model=SimpleNamespace(training=True),
        args=arguments,
        accelerator=accelerator,
        **settings,
    )


def theirs(drawn, **changes):
    new, old, rollout, reference, advantages, mask = drawn
    new = new.clone().requires_grad_()
    prompt = torch.ones(6, 1).long()
    inputs = {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask, "completion_mask": mask, "advantages": advantages}
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": reference, "num_items_in_batch": mask.sum()}
    inputs["importance_sampling_ratio"] = (old - rollout).exp().clamp(max=1.5)
    loss = GRPOTrainer._compute_loss(trainer(new, **changes), None, inputs)
    loss.backward()
    return loss.detach(), new.grad


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
        pytest.param({"loss_type": "dapo", "delta": 1.4}, {"dual_clip": 1.4}, id="dual clip"),
        pytest.param({"loss_type": "dapo", "beta": 0.3}, {"kl_coeff": 0.3}, id="k3"),
        pytest.param({"loss_type": "dapo", "beta": 0.3, "use_vllm": True}, {"kl_coeff": 0.3, "correction": "tis", "tis_cap": 1.5}, id="tis"),
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
    RLOOTrainer._compute_loss(trainer(live), None, {**inputs, "old_logps": (new * mask).sum(1)}).backward()
    _, gradient = ours((new, new, rollout, reference, advantages, mask), aggregation="seq_mean_token_sum")
    torch.testing.assert_close(gradient, live.grad, **TOLERANCE)
