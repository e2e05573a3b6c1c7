"""A whole training step, tokens a second, against transformers and megatron-core's local layers: `python tools/bench/training.py [--rounds 7]`, results in
docs/benchmarks/training.md.

A step is forward, backward, clipping to a norm of 1 and Adam. One process, one thread, float32. All sides start from the same weights (a random Hugging Face
checkpoint, converted), see the same batches in the same order, and must report the same losses. Steps are interleaved; times are CPU times of the process (the
machine may be shared), medians. transformers runs SDPA and its grouped_mm experts in the usual loop with torch's fused AdamW; megatron-core its local layer
specification, `SequentialMLP` experts and unfused attention, in its DDP and under its optimizer. MFU is against a product of two square matrices that is timed
between the steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from interleave import machine, medians

from megatron_ext.batch import NO_TILES
from megatron_ext.checkpoint.dist import load_checkpoint
from megatron_ext.checkpoint.hf.to_megatron import hf_to_megatron
from megatron_ext.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_ext.config.sizes import count_parameters
from megatron_ext.data.collate import TokenBatch
from megatron_ext.device import session
from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.parallel.planner.model_flops import yardstick_of
from megatron_ext.training.losses import NextToken
from megatron_ext.training.megatron_engine import build_engine
from megatron_ext.training.microbatches import microbatches
from megatron_ext.training.step import optimizer_step

PAD, VOCABULARY, SQUARE = 0, 4096, 1024
ADAM = OptimizerConfig(lr=1e-4, min_lr=1e-4, warmup_steps=0, schedule="constant", weight_decay=0.0, beta2=0.98, clip_grad=1.0)
LANGUAGE: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": VOCABULARY - 1,
    "tie_word_embeddings": False,
}
Step = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """`rows` x `length` tokens through layers of `experts` experts of size `ffn`, of which a token takes `topk`."""

    name: str
    experts: int
    topk: int
    ffn: int
    rows: int = 4
    length: int = 256


CASES = [
    Case("16 experts of 512, top 2", 16, 2, 512),
    Case("64 experts of 128, top 4", 64, 4, 128),
    Case("64 experts of 128, top 2", 64, 2, 128),
    Case("16 experts of 512, top 2, 2 x 1024 tokens", 16, 2, 512, 2, 1024),
]


def tokens_of(case: Case, number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(8, VOCABULARY - 8, size=(case.rows, case.length)).astype(np.int32)


def batches_of(case: Case) -> Iterator[torch.Tensor]:
    return (torch.from_numpy(tokens_of(case, number)).long() for number in itertools.count())


def checkpoint(case: Case, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(**LANGUAGE, num_experts=case.experts, num_experts_per_tok=case.topk, moe_intermediate_size=case.ffn)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def converted(source: Path, folder: Path, context: ParallelContext) -> VisionLanguageModel:
    """Without the losses that balance experts: the three would define them differently."""
    with redirect_stdout(StringIO()):
        described = hf_to_megatron(source, folder)
    model = build_model(described.model.model_copy(update={"moe_balancing": "none"}), -1, context)
    load_checkpoint(folder, model, context=context, model_config=described.model)
    return model


def ours(case: Case, model: VisionLanguageModel, context: ParallelContext) -> Step:
    engine = build_engine([model], ADAM, 1000, context)
    numbers = itertools.count()

    def step() -> float:
        tokens = tokens_of(case, next(numbers))
        batch = TokenBatch(tokens, np.ones(tokens.shape, np.uint8), NO_TILES, np.full((case.rows, 1), -1, np.int32))
        return optimizer_step(engine, microbatches(batch, case.rows, PAD, context.device), NextToken(), context)["loss"]

    return step


def transformers(case: Case, source: Path) -> Step:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa", experts_implementation="grouped_mm").train()
    adam = torch.optim.AdamW(model.parameters(), ADAM.lr, (ADAM.beta1, ADAM.beta2), ADAM.eps, ADAM.weight_decay, fused=True)
    batches = batches_of(case)

    def step() -> float:
        tokens = next(batches)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM.clip_grad)
        adam.step()
        adam.zero_grad()
        return float(loss)

    return step


def megatron_core(case: Case, weights: dict[str, torch.Tensor], model: ModelConfig, context: ParallelContext) -> Step:
    """What its own examples build: `GPTModel` over `get_gpt_layer_local_spec`, DDP, `get_megatron_optimizer`."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        moe_ffn_hidden_size=case.ffn,
        num_moe_experts=case.experts,
        moe_router_topk=case.topk,
        moe_router_load_balancing_type="none",
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    layers = get_gpt_layer_local_spec(case.experts, qk_layernorm=True, normalization="RMSNorm")
    lengths = {"vocab_size": VOCABULARY, "max_sequence_length": case.length}
    bare = GPTModel(config, layers, **lengths, position_embedding_type="rope", rotary_base=int(model.rope_theta), pg_collection=context.pgs)
    bare.load_state_dict(weights, strict=True)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), bare, pg_collection=context.pgs)
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=ADAM.lr,
        weight_decay=ADAM.weight_decay,
        adam_beta1=ADAM.beta1,
        adam_beta2=ADAM.beta2,
        adam_eps=ADAM.eps,
        clip_grad=ADAM.clip_grad,
    )
    optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=False, pg_collection=context.pgs)
    batches = batches_of(case)
    positions = torch.arange(case.length)[None].expand(case.rows, -1)
    hidden = torch.ones(1, 1, case.length, case.length, dtype=torch.bool).triu(1)

    def step() -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        tokens = next(batches)
        losses_BS = wrapped(tokens, positions, hidden, labels=tokens.roll(-1, 1))
        loss = losses_BS[:, :-1].mean()
        loss.backward()
        finalize_model_grads([wrapped], pg_collection=context.pgs)
        optimizer.step()
        return float(loss)

    return step


def square_product() -> Step:
    """What the machine's own matrix products reach."""
    left, right = torch.randn(SQUARE, SQUARE), torch.randn(SQUARE, SQUARE)

    def multiply() -> float:
        for _ in range(8):
            left @ right
        return 0.0

    return multiply


def measure(case: Case, rounds: int, context: ParallelContext) -> dict[str, float]:
    """Tokens a CPU second of each side, MFU of each side, and the rate of matrix products in GFLOP/s."""
    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint(case, Path(folder) / "hf")
        model = converted(source, Path(folder) / "ours", context)
        weights = {name: value.clone() for name, value in model.state_dict().items() if value is not None}
        sides = {
            "ours": ours(case, model, context),
            "transformers": transformers(case, source),
            "megatron-core": megatron_core(case, weights, model.model_config, context),
            "product": square_product(),
        }
        seconds = medians(sides, rounds, agree, warm_up=2)
    rate = 8 * 2 * SQUARE**3 / seconds.pop("product")
    yardstick = yardstick_of(model.model_config, False, "cpu", 1)
    assert yardstick is not None
    yardstick = replace(yardstick, peak_flops=rate)
    tokens = {name: case.rows * case.length / value for name, value in seconds.items()}
    return tokens | {f"MFU, {name}": yardstick.mfu(case.rows, case.length, 0, value) for name, value in seconds.items()} | {"GFLOP/s": rate / 1e9}


def agree(losses: dict[str, float]) -> None:
    said = [loss for name, loss in losses.items() if name != "product"]
    assert max(said) - min(said) < 2e-3, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, float32, median of {options.rounds} steps\n")
    print(
        "| case | parameters | ours, tokens/s | transformers | megatron-core | ours / transformers | ours / megatron-core | MFU | of theirs | GEMM, GFLOP/s |"
    )
    print(f"|{'---|' * 10}")
    found = {}
    with tempfile.TemporaryDirectory() as folder, session(), open_parallel(ParallelConfig(), 0, 1, f"file://{Path(folder) / 'store'}", 0) as context:
        for case in CASES:
            if options.only in case.name:
                found[case.name] = measured = measure(case, options.rounds, context)
                print(row(case, measured), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def row(case: Case, found: dict[str, float]) -> str:
    mine, hugging, megatron = (found[name] for name in ("ours", "transformers", "megatron-core"))
    size = ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=4,
        hidden_size=256,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=64,
        num_experts=case.experts,
        experts_per_token=case.topk,
        expert_ffn_hidden_size=case.ffn,
    )
    millions = count_parameters(size).total / 1e6
    theirs = f"{found['MFU, transformers']:.2f}, {found['MFU, megatron-core']:.2f}"
    rates = f"{mine:.0f} | {hugging:.0f} | {megatron:.0f} | **{mine / hugging:.2f}** | **{mine / megatron:.2f}**"
    return f"| {case.name} | {millions:.1f} M | {rates} | {found['MFU, ours']:.2f} | {theirs} | {found['GFLOP/s']:.0f} |"


if __name__ == "__main__":
    main()
