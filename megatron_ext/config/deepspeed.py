"""DeepSpeed's JSON file: read, checked, filled in. Without torch and without DeepSpeed, so that a mistake is found before any rank starts.

    read_deepspeed(path)          every key is one that was measured to train like engine `megatron`; everything else is refused with its reason
    fill_deepspeed(settings, ..)  "auto" becomes the run's value: one source for learning rate, clipping and precision

DeepSpeed itself ignores unknown top-level keys and accepts a left-over "auto" in several places without a word; here both are errors. What is refused, and why,
is in decision 0008.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_ext.config.schema import OptimizerConfig
from megatron_ext.errors import ConfigError, UserError

Settings = dict[str, Any]
AUTO = "auto"

_FROM_THE_RUN = {
    "gradient_clipping": "optimizer.clip_grad of the stage",
    "bf16.enabled": "model.dtype",
    "optimizer.params.lr": "optimizer.lr of the stage",
    "optimizer.params.betas": "optimizer.beta1 and beta2 of the stage",
    "optimizer.params.eps": "optimizer.eps of the stage",
    "optimizer.params.weight_decay": "optimizer.weight_decay of the stage",
    "train_micro_batch_size_per_gpu": "micro_batch of the stage",
}
"""Values that have one source, the run's configuration: the file says "auto"."""

_FIXED = {
    "gradient_accumulation_steps": (1, "Megatron's schedule counts micro-batches; with both counting, gradients are divided twice"),
    "managed_gradient_accumulation": (False, "Megatron's schedule drives the micro-batches; with both counting, gradients are divided twice"),
    "communication_data_type": ("fp32", "gradients summed over ranks in bf16 change the loss within a few steps"),
    "data_types.grad_accum_dtype": ("fp32", "gradients accumulated in bf16 change the loss within a few steps"),
    "optimizer.type": ("AdamW", "other optimizers have not been compared with engine megatron"),
    "zero_optimization.reduce_scatter": (True, "DeepSpeed shards the gradients of experts in no other way"),
    "zero_optimization.contiguous_gradients": (True, "DeepSpeed shards the gradients of experts in no other way"),
}
"""Values that are right or wrong."""

_REFUSED = {
    "fp16": "has no place here: train in bf16 or fp32 (model.dtype)",
    "amp": "has no place here: train in bf16 or fp32 (model.dtype)",
    "torch_autocast": "has no place here: train in bf16 or fp32 (model.dtype)",
    "scheduler": "would be a second learning-rate schedule beside the stage's optimizer.schedule",
    "train_batch_size": "is the stage's global_batch, divided by the layout",
    "prescale_gradients": "would divide gradients twice",
    "gradient_predivide_factor": "would divide gradients twice",
    "tensor_parallel": "is AutoTP, which rewrites HuggingFace modules; this model is split by parallel.tp",
    "autotp_size": "is AutoTP, which rewrites HuggingFace modules; this model is split by parallel.tp",
    "expert_parallel": "is AutoEP, which rewrites HuggingFace modules; this model's experts are split by parallel.ep",
    "sequence_parallel_size": "is Ulysses, which hooks HuggingFace attention; this model's sequences are split by parallel.tp and parallel.cp",
    "data_parallel_size": "follows from parallel.num_ranks",
    "pipeline": "is DeepSpeed's own pipeline; stages are engine megatron's (parallel.pp)",
    "hybrid_engine": "generates with HuggingFace models only",
    "compile": "is DeepCompile, which knows nothing of expert groups",
    "checkpoint": "is DeepSpeed's own, which loses experts: this program writes the checkpoints",
    "activation_checkpointing": "is parallel.recompute",
    "elasticity": "changes the batch behind the run's back",
    "zero_optimization.zero_hpz_partition_size": "takes consecutive ranks for one node and trains silently wrong under tensor parallelism",
    "zero_optimization.zero_quantized_weights": "(qwZ) has not been compared with engine megatron",
    "zero_optimization.zero_quantized_nontrainable_weights": "(qwZ) has not been compared with engine megatron",
    "zero_optimization.zero_quantized_gradients": "(qgZ) has not been compared with engine megatron",
    "zero_optimization.zenflow": "was seen to change the model before the first update",
    "zero_optimization.mics_shard_size": "shards over consecutive ranks, which are not the data-parallel ones under tensor parallelism",
    "zero_optimization.offload_optimizer.super_offload": "has not been tried with experts",
}
"""Keys that DeepSpeed has and this engine must not use."""

_KNOWN = {
    "": [
        *("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "managed_gradient_accumulation", "gradient_clipping", "bf16", "data_types"),
        *("communication_data_type", "optimizer", "zero_optimization", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "comms_logger"),
    ],
    "bf16": ["enabled"],
    "data_types": ["grad_accum_dtype"],
    "optimizer": ["type", "params"],
    "optimizer.params": ["lr", "betas", "eps", "weight_decay", "torch_adam"],
    "zero_optimization": [
        *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "sub_group_size"),
        *("offload_optimizer", "offload_param", "leaf_module", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance", "memory_efficient_linear"),
    ],
    "zero_optimization.offload_optimizer": ["device", "pin_memory"],
    "zero_optimization.offload_param": ["device", "pin_memory"],
}
"""Keys by section; what stands below any other key is DeepSpeed's to check."""


def read_deepspeed(path: Path) -> Settings:
    """The file as it is. Raises ConfigError with everything that is wrong with it, each by its dotted key."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise ConfigError([UserError(str(path), f"cannot be read ({error.strerror})", "give a JSON file such as those of deepspeed_configs/")]) from None
    except ValueError as error:
        raise ConfigError([UserError(str(path), f"is not JSON ({error})", "start from a file of deepspeed_configs/")]) from None
    if not isinstance(settings, dict):
        raise ConfigError([UserError(str(path), "holds no JSON object", "start from a file of deepspeed_configs/")])
    if problems := [UserError(f"{key} ({path})", problem, remedy) for key, problem, remedy in _problems(settings)]:
        raise ConfigError(problems)
    return settings


def fill_deepspeed(settings: Settings, optimizer: OptimizerConfig, dtype: str) -> Settings:
    """`settings` of `read_deepspeed` with the run's values; no "auto" is left."""
    adam = settings["optimizer"]["params"]
    return {
        **settings,
        "train_micro_batch_size_per_gpu": 1,  # feeds DeepSpeed's own count of samples, which nobody reads
        "gradient_clipping": optimizer.clip_grad,
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                **adam,
                "lr": optimizer.lr,
                "betas": [optimizer.beta1, optimizer.beta2],
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
            },
        },
    }


def stage_of(settings: Settings) -> int:
    """The ZeRO stage."""
    return int(settings["zero_optimization"]["stage"])


Problem = tuple[str, str, str]


def _problems(settings: Settings) -> Iterator[Problem]:
    """(key, problem, remedy)."""
    yield from _keys(settings, "")
    values = dict(_leaves(settings, ""))
    for key, source in _FROM_THE_RUN.items():
        if _get(settings, key) != AUTO:
            yield key, f"is {_show(_get(settings, key))}, but its value comes from {source}", 'write "auto" here and the value there'
    for key, (value, reason) in _FIXED.items():
        if _get(settings, key) != value:
            yield key, f"is {_show(_get(settings, key))}: {reason}", f"write {json.dumps(value)}"
    for key, value in values.items():
        if value == AUTO and key not in _FROM_THE_RUN and key not in _FIXED:
            yield key, 'is "auto", which nothing here fills', "write a value, or leave the key out"
    yield from _zero(settings)


def _keys(section: Mapping[str, Any], prefix: str) -> Iterator[Problem]:
    known = _KNOWN[prefix]
    for key, value in section.items():
        dotted = f"{prefix}.{key}" if prefix else key
        if dotted in _REFUSED:
            yield dotted, _REFUSED[dotted], "remove it"
        elif key not in known:
            close = get_close_matches(key, known, n=1)
            yield dotted, "is not a key that engine deepspeed takes", f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
        elif dotted in _KNOWN:
            if isinstance(value, dict):
                yield from _keys(value, dotted)
            else:
                yield dotted, f"is {_show(value)}, but it is a section", "write an object"


def _zero(settings: Settings) -> Iterator[Problem]:
    stage, key = _get(settings, "zero_optimization.stage"), "zero_optimization.stage"
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        more = ": without ZeRO, DeepSpeed clips the experts of every rank by another norm" if stage == 0 else ""
        yield key, f"is {_show(stage)}{more}", "use 1, 2 or 3, or parallel.engine=megatron"
        return
    if stage == 1 and _get(settings, "zero_optimization.overlap_comm"):
        yield "zero_optimization.overlap_comm", "is true, which stage 1 cannot do under Megatron's schedule", "use stage 2, or remove it"
    if stage == 3 and (value := _get(settings, "zero_optimization.memory_efficient_linear")) is not False:
        what = "would replace torch.nn.functional.linear in the whole process by one that rounds otherwise"
        yield "zero_optimization.memory_efficient_linear", f"is {_show(value)}, which {what}", "write false"
    for name, least in (("offload_optimizer", 2), ("offload_param", 3)):
        dotted = f"zero_optimization.{name}"
        device = _get(settings, f"{dotted}.device")
        if _get(settings, dotted) is None:
            continue
        if device != "cpu":
            yield f"{dotted}.device", f"is {_show(device)}, which has not been tried", 'use "cpu"'
        if stage < least:
            yield dotted, f"is for stage {least}{' and 3' if least == 2 else ''}, this is stage {stage}", f"use stage {least}"
    if _get(settings, "zero_optimization.offload_param") is not None and _get(settings, "zero_optimization.offload_optimizer") is None:
        yield "zero_optimization.offload_param", "stands without offload_optimizer, which has not been tried", "offload both, or the optimizer alone"
    torch_adam = _get(settings, "optimizer.params.torch_adam")
    if _get(settings, "zero_optimization.offload_optimizer") is not None and torch_adam:
        yield "optimizer.params.torch_adam", "is true, but an offloaded optimizer runs DeepSpeed's own Adam on the CPU", "remove it"
    elif _get(settings, "zero_optimization.offload_optimizer") is None and torch_adam is not True:
        yield "optimizer.params.torch_adam", f"is {_show(torch_adam)}: DeepSpeed's own Adam for GPUs has not been compared with engine megatron", "write true"


def _get(settings: Mapping[str, Any], dotted: str) -> Any:
    """None where nothing stands."""
    value: Any = settings
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree


def _show(value: Any) -> str:
    return "missing" if value is None else json.dumps(value)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON keeps the last of two equal keys; here that is an error."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found
