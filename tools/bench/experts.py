"""A training step of our model with each kernel of the experts: `python tools/bench/experts.py [--rounds 9]`, results in docs/benchmarks/experts.md.

One process, one thread, float32. All kernels train the same model from the same weights on the same batches; their steps are interleaved, so that whatever
else the machine does meets all of them. Times are CPU times of the process (the machine may be shared), of a whole step: forward, backward, Adam.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from interleave import machine, medians

from megatron_ext.batch import NO_TILES
from megatron_ext.config.schema import ClvrConfig, ModelConfig, OptimizerConfig, ParallelConfig, VisionConfig
from megatron_ext.config.sizes import count_parameters
from megatron_ext.data.collate import TokenBatch
from megatron_ext.model.assembly import build_model
from megatron_ext.parallel.groups import ParallelContext, open_parallel
from megatron_ext.training.engine import Engine
from megatron_ext.training.losses import NextToken
from megatron_ext.training.megatron_engine import build_engine
from megatron_ext.training.microbatches import microbatches
from megatron_ext.training.step import optimizer_step

ROWS, LENGTH, IMAGE, PAD = 4, 256, 5, 0
KERNELS = ("sequential", "in_place", "grouped_mm")
VISION = VisionConfig(image_size=16, patch_size=8, num_layers=1, hidden_size=32, num_attention_heads=2, ffn_hidden_size=32)
SIZES: dict[str, dict[str, Any]] = {
    "16 experts, top 2": {"num_experts": 16, "experts_per_token": 2, "expert_ffn_hidden_size": 512},
    "64 experts, top 4": {"num_experts": 64, "experts_per_token": 4, "expert_ffn_hidden_size": 128},
    "8 experts of examples/tiny.yaml, top 2": {"num_experts": 8, "experts_per_token": 2, "expert_ffn_hidden_size": 64, "hidden_size": 64, "head_dim": 16},
    "64 tiny experts, top 4": {"num_experts": 64, "experts_per_token": 4, "expert_ffn_hidden_size": 64, "hidden_size": 64, "head_dim": 16},
    "64 small experts, top 4": {"num_experts": 64, "experts_per_token": 4, "expert_ffn_hidden_size": 128, "hidden_size": 128, "head_dim": 32},
}


def model_of(sizes: dict[str, Any], kernel: str) -> ModelConfig:
    settings = {"vocab_size": 4096, "num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 64, **sizes}
    return ModelConfig(**settings, experts_kernel=kernel, vision=VISION, clvr=ClvrConfig(enabled=False))  # type: ignore[arg-type]


def batch_of(step: int) -> TokenBatch:
    tokens = np.random.default_rng(step).integers(8, 4000, size=(ROWS, LENGTH)).astype(np.int32)
    return TokenBatch(tokens, np.ones((ROWS, LENGTH), np.uint8), NO_TILES, np.full((ROWS, 1), -1, np.int32))


def measure(sizes: dict[str, Any], rounds: int, context: ParallelContext) -> dict[str, float]:
    """Median CPU seconds of a step by kernel; the losses must agree."""
    engines = {kernel: build_engine([build_model(model_of(sizes, kernel), IMAGE, context)], OptimizerConfig(), 1000, context) for kernel in KERNELS}
    return medians({kernel: stepper(engine, context) for kernel, engine in engines.items()}, rounds, agree, warm_up=2)


def stepper(engine: Engine, context: ParallelContext) -> Callable[[], float]:
    """Trains another step, and returns its loss."""
    steps = itertools.count()

    def step() -> float:
        batches = microbatches(batch_of(next(steps)), ROWS, PAD, context.device)
        return optimizer_step(engine, batches, NextToken(), context)["loss"]

    return step


def agree(losses: dict[str, float]) -> None:
    assert max(losses.values()) - min(losses.values()) < 1e-2, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    told = {}
    print(f"{machine()}, float32, {ROWS} x {LENGTH} tokens, median of {options.rounds} steps\n")
    print(f"| model | parameters | {' | '.join(f'{kernel}, s' for kernel in KERNELS)} | {' | '.join(f'{KERNELS[0]} / {kernel}' for kernel in KERNELS[1:])} |")
    print(f"|{'---|' * (2 * len(KERNELS) + 1)}")
    with tempfile.TemporaryDirectory() as folder, open_parallel(ParallelConfig(), 0, 1, f"file://{Path(folder) / 'store'}", 0) as context:
        for name, sizes in SIZES.items():
            if options.only not in name:
                continue
            told[name] = found = measure(sizes, options.rounds, context)
            total = count_parameters(model_of(sizes, KERNELS[0])).total / 1e6
            ratios = [f"{found[KERNELS[0]] / found[kernel]:.2f}" for kernel in KERNELS[1:]]
            print(f"| {name} | {total:.1f} M | {' | '.join(f'{found[kernel]:.3f}' for kernel in KERNELS)} | {' | '.join(ratios)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
