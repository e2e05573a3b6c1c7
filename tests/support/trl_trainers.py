"""TRL's trainers without a model, a data set or a text: what their methods read of a trainer, with numbers in the places of models."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch

ARGUMENTS = {
    "delta": None,
    "use_bias_correction_kl": False,
    "steps_per_generation": 1,
    "gradient_accumulation_steps": 2,  # not a multiple of the steps between generations: old log-probs are asked of the model
    "per_device_train_batch_size": 1,
    "gradient_checkpointing_kwargs": None,
}
ABSENT = ("environment_factories", "tools", "environments", "pad_to_multiple_of", "mask_truncated_completions", "log_multimodal")


def trainer(logprobs: torch.Tensor, longest: int, **changes: Any) -> SimpleNamespace:
    """For `_compute_loss` of the GRPO and RLOO trainers: the model's log-probs of the answers are `logprobs`."""
    arguments = SimpleNamespace(**{name: changes.pop(name, value) for name, value in ARGUMENTS.items()})
    settings = {"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.28, "use_vllm": False, **changes}
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=longest,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        args=arguments,
        accelerator=alone(),
        **settings,
    )


def alone() -> SimpleNamespace:
    """An accelerator of one process."""
    same = {name: lambda x, *_, **__: x for name in ("gather", "reduce", "gather_for_metrics")}
    return SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"), **same)


def scored(
    kind: Any, old: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, rewards_RK: torch.Tensor, samples: int, weights: Any = None, **changes: Any
) -> dict[str, torch.Tensor]:
    """What `_generate_and_score_completions` of a trainer class makes of answers [R, T] that are given: `advantages` and, with `use_vllm`, the weights
    `importance_sampling_ratio`. `reference`: log-probs of the reference model. The log-probs at rollout go through float32."""
    lengths = mask.sum(1).tolist()
    answers = [[1] * length for length in lengths]
    sampled = [row[:length].tolist() for row, length in zip(rollout, lengths, strict=True)]
    generated = {"GRPOTrainer": ([[1]] * len(mask), answers, None, answers, sampled, {}, None, None), "RLOOTrainer": ([[1]] * len(mask), answers, answers)}
    told = iter([old, changes.pop("reference", None)])
    names = [str(number) for number in range(rewards_RK.shape[1])]
    defaults = {"multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group", "normalize_advantages": False, "reward_clip_range": None}
    stand_in = trainer(old, 1, **{**defaults, **dict.fromkeys(ABSENT), **changes})
    stand_in._get_per_token_logps_and_entropies = lambda *_, **__: (next(told), None, None)
    stand_in._generate = lambda prompts: generated[kind.__name__]
    stand_in._calculate_rewards = lambda *_: rewards_RK
    stand_in._tokenizer = SimpleNamespace(pad_token_id=0)
    stand_in.num_iterations, stand_in.num_generations, stand_in.ref_model = 1, samples, stand_in.model
    stand_in.reward_funcs = stand_in.reward_func_names = names
    stand_in.reward_weights = torch.ones(len(names), dtype=torch.float64) if weights is None else weights
    stand_in._pending_extra_logs, stand_in._pending_metrics = {}, {}
    stand_in._logs = {"prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list), "extra": defaultdict(list)}
    return kind._generate_and_score_completions(stand_in, [{"prompt": ""}] * len(mask))
