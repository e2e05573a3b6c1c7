"""Layers of Qwen3-30B-A3B on one GPU, bfloat16: `python tools/bench/gpu.py [--layers 3] [--profile FILE]`, results in docs/benchmarks/gpu.md.

    training     forward, backward, clipping, Adam of 16384 tokens: tokens a second, and MFU against the product of two matrices that is timed beside it
    generation   a step that writes one token for each of 64 answers: milliseconds, and against what reading weights, keys and values once would take
                 at the rate of a copy that is timed beside it

The peer is transformers, with SDPA and its grouped_mm experts, on a model of the same shape whose weights are its own: random ones, as ours. It trains in
bfloat16 alone with torch's fused AdamW; ours keeps gradients, main weights and moments in float32. Sides run one after the other, since both do not fit.
Without Transformer Engine, flash-attn, Apex and CUDA graphs on either side.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exactness import Words
from interleave import machine

from megatron_ext.batch import NO_TILES, Prompt
from megatron_ext.config.schema import ClvrConfig, ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig, VisionConfig
from megatron_ext.config.sizes import count_parameters
from megatron_ext.data.collate import TokenBatch
from megatron_ext.device import session
from megatron_ext.inference.engine import Engine
from megatron_ext.model.assembly import build_model
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.parallel.planner.model_flops import yardstick_of
from megatron_ext.training.losses import NextToken
from megatron_ext.training.megatron_engine import build_engine
from megatron_ext.training.microbatches import microbatches
from megatron_ext.training.step import optimizer_step

VOCABULARY, ROWS, LENGTH = 151936, 4, 4096
ANSWERS, PROMPT, SHORT, LONG = 64, 512, 8, 72
ADAM = OptimizerConfig(lr=1e-5, min_lr=1e-5, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_grad=1.0)


@dataclass(frozen=True)
class Roof:
    """What this GPU reaches: FLOP/s of a bfloat16 product, bytes/s of a copy, read and written."""

    flops: float
    bytes: float


def shape(layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=layers,
        hidden_size=2048,
        num_attention_heads=32,
        num_query_groups=4,
        head_dim=128,
        num_experts=128,
        experts_per_token=8,
        expert_ffn_hidden_size=768,
        rope_theta=1e7,
        max_positions=8192,
        moe_balancing="none",
        dtype="bf16",
        vision=VisionConfig(enabled=False),
        clvr=ClvrConfig(enabled=False),
    )


def their_model(model: ModelConfig) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=model.vocab_size,
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        num_experts=model.num_experts,
        num_experts_per_tok=model.experts_per_token,
        moe_intermediate_size=model.expert_ffn_hidden_size,
        intermediate_size=model.ffn_hidden_size,
        norm_topk_prob=True,
        max_position_embeddings=model.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=False,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm")


def tokens_of(number: int, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(number).integers(8, VOCABULARY - 8, size=(rows, length)).astype(np.int32)


def seconds_of(call: Callable[[int], object], rounds: int, warm_up: int = 2) -> float:
    """Median seconds of `call(round)`, after the GPU has finished."""
    taken = []
    for number in range(warm_up + rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call(number)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[warm_up:])


def measured_roof() -> Roof:
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Roof(2 * 8192**3 / seconds_of(lambda _: left @ right, 10), 2 * source.numel() / seconds_of(lambda _: target.copy_(source), 10))


def our_step(model: ModelConfig, context: ParallelContext) -> Callable[[int], float]:
    engine = build_engine([build_model(model, -1, context)], ADAM, 1000, context)

    def step(number: int) -> float:
        tokens = tokens_of(number, ROWS, LENGTH)
        batch = TokenBatch(tokens, np.ones(tokens.shape, np.uint8), NO_TILES, np.full((ROWS, 1), -1, np.int32))
        return optimizer_step(engine, microbatches(batch, ROWS, 0, context.device), NextToken(), context)["loss"]

    return step


def their_step(model: ModelConfig) -> Callable[[int], float]:
    theirs = their_model(model).train()
    adam = torch.optim.AdamW(theirs.parameters(), ADAM.lr, (ADAM.beta1, ADAM.beta2), ADAM.eps, ADAM.weight_decay, fused=True)

    def step(number: int) -> float:
        tokens = torch.from_numpy(tokens_of(number, ROWS, LENGTH)).cuda().long()
        loss = theirs(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), ADAM.clip_grad)
        adam.step()
        adam.zero_grad()
        return float(loss.detach())

    return step


def our_answers(model: ModelConfig, context: ParallelContext) -> Callable[[int], object]:
    built = build_model(model, -1, context).eval()
    store_for_generation(built)
    prompts = [Prompt(str(number), "none", tokens, NO_TILES, "") for number, tokens in enumerate(tokens_of(0, ANSWERS, PROMPT))]

    def answer(new: int) -> object:
        engine = Engine(built, context, Words(VOCABULARY), RolloutConfig(max_new_tokens=new, batch_size=ANSWERS))
        return engine.generate(prompts, 1, seeds=lambda *_: 0, version=0, greedy=True)

    return answer


def their_answers(model: ModelConfig, cache: str) -> Callable[[int], object]:
    theirs = their_model(model).eval()
    tokens = torch.from_numpy(tokens_of(0, ANSWERS, PROMPT)).cuda().long()

    @torch.no_grad()
    def answer(new: int) -> object:
        kind = {"cache_implementation": cache, "disable_compile": True}
        return theirs.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new, min_new_tokens=new, **kind)

    return answer


def step_seconds(answer: Callable[[int], object], rounds: int) -> float:
    """Of one token for every answer: what LONG answers take more than SHORT ones."""
    short, long = (seconds_of(lambda _, new=new: answer(new), rounds, warm_up=1) for new in (SHORT, LONG))
    return (long - short) / (LONG - SHORT)


def read_bytes(model: ModelConfig) -> float:
    """Weights but for the embeddings, which are looked up, and keys and values of prompts and half-grown answers."""
    weights = count_parameters(model).total - model.vocab_size * model.hidden_size
    return 2 * weights + 2 * 2 * model.num_layers * model.num_query_groups * model.head_dim * ANSWERS * (PROMPT + (SHORT + LONG) / 2)


def free() -> None:
    """What the last side held."""
    gc.collect()
    torch.cuda.empty_cache()


def training(model: ModelConfig, roof: Roof, rounds: int, context: ParallelContext, profile: Path | None, sides: str) -> dict[str, float]:
    yardstick = yardstick_of(model, False, torch.cuda.get_device_name(), 1)
    assert yardstick is not None
    yardstick = replace(yardstick, peak_flops=roof.flops)
    print("| training | tokens/s | MFU | peak GiB |\n|---|---|---|---|")
    makers: dict[str, Callable[[], Callable[[int], float]]] = {"ours": lambda: our_step(model, context), "transformers": lambda: their_step(model)}
    found = {}
    for name, make in makers.items():
        if sides not in name:
            continue
        torch.cuda.reset_peak_memory_stats()
        seconds = one_step(make(), rounds, profile if name == "ours" else None)
        found[name] = ROWS * LENGTH / seconds
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"| {name} | {found[name]:,.0f} | {yardstick.mfu(ROWS, LENGTH, 0, seconds):.3f} | {peak:.1f} |", flush=True)
        free()
    return found


def one_step(step: Callable[[int], float], rounds: int, profile: Path | None) -> float:
    seconds = seconds_of(step, rounds)
    if profile is not None:
        write_profile(step, profile)
    return seconds


def generation(model: ModelConfig, roof: Roof, rounds: int, context: ParallelContext, profile: Path | None, sides: str) -> dict[str, float]:
    least = read_bytes(model) / roof.bytes
    print(f"\n| generation, {ANSWERS} answers | ms a token | share of the {least * 1e3:.2f} ms that reading takes |\n|---|---|---|")
    makers: dict[str, Callable[[], Callable[[int], object]]] = {
        "ours": lambda: our_answers(model, context),
        "transformers, dynamic": lambda: their_answers(model, "dynamic"),
        "transformers, static": lambda: their_answers(model, "static"),
    }
    found = {}
    for name, make in makers.items():
        if sides in name:
            found[name] = one_token(make(), rounds, profile if name == "ours" else None)
            print(f"| {name} | {found[name] * 1e3:.2f} | {least / found[name]:.2f} |", flush=True)
            free()
    return found


def one_token(answer: Callable[[int], object], rounds: int, profile: Path | None) -> float:
    if profile is not None:
        answer(SHORT)
        write_profile(lambda _: answer(SHORT), profile.with_suffix(".generation.txt"))
    return step_seconds(answer, rounds)


def write_profile(call: Callable[[int], object], file: Path) -> None:
    """Where a call's time goes, by kernel and by what Python asked for."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call(99)
        torch.cuda.synchronize()
    averages = recorded.key_averages()
    file.write_text("\n".join(averages.table(sort_by=by, row_limit=25, max_name_column_width=70) for by in ("self_cuda_time_total", "self_cpu_time_total")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["training", "generation"])
    parser.add_argument("--sides", default="", help="those whose name contains this")
    parser.add_argument("--profile", type=Path, help="where to write where the time of our step goes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU")
    model, roof = shape(options.layers), measured_roof()
    free()
    total = count_parameters(model).total / 1e9
    print(f"{machine()}, bfloat16, {options.layers} layers ({total:.2f}e9 parameters), {ROWS} x {LENGTH} tokens, median of {options.rounds}")
    print(f"product of two 8192 x 8192: {roof.flops / 1e12:.0f} TFLOP/s; copy: {roof.bytes / 1e12:.2f} TB/s\n")
    found: dict[str, Any] = {"tflops": roof.flops / 1e12, "tb_per_s": roof.bytes / 1e12}
    with tempfile.TemporaryDirectory() as folder, session(), open_parallel(ParallelConfig(), 0, 1, f"file://{Path(folder) / 'store'}", 0) as context:
        for part in (training, generation):
            if options.only in (None, part.__name__):
                found[part.__name__] = part(model, roof, options.rounds, context, options.profile, options.sides)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
