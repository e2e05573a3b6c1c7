"""Model FLOPs, by the planner's formulas and by counting the products that torch really computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from megatron_ext.config.schema import ClvrConfig, ModelConfig, ParallelConfig, VisionConfig
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.planner.hardware import read_gpus
from megatron_ext.parallel.planner.model_flops import Yardstick, yardstick_of
from megatron_ext.training.losses import NextToken
from megatron_ext.training.microbatches import microbatches
from megatron_ext.training.step import optimizer_step
from tests.support.models import small_config
from tests.support.training import LENGTH, PAD, start, token_batch

ROWS, TILE_TOKENS = 4, 16
ONE_TAP = ClvrConfig(taps=((0, 1),), num_heads=4, num_kv_heads=2, head_dim=8)
CASES: dict[str, dict[str, Any]] = {
    "experts": {"experts_kernel": "sequential"},
    "a dense layer among experts": {"experts_kernel": "sequential", "dense_layers": (0,)},
    "dense": {"num_experts": 0},
}


def flops(yardstick: Yardstick, rows: float, tokens: float, tiles: float) -> float:
    """Against a peak of 1 FLOP/s, for a second."""
    return replace(yardstick, peak_flops=1.0).mfu(rows, tokens, tiles, 1.0)


def known(model: ModelConfig, train_vision: bool = True, name: str = "cpu", threads: int = 1) -> Yardstick:
    yardstick = yardstick_of(model, train_vision, name, threads)
    assert yardstick is not None
    return yardstick


@pytest.mark.parametrize("name", CASES)
def test_a_step_has_the_products_that_torch_counts_and_the_scores_that_it_does_not_count(name: str, tmp_path: Path) -> None:
    """torch counts products with weights. Scores by hand, forward and twice that backward: a causal half in 3 layers of width 64; in the ViT of width 32 all
    pairs of 17 tokens; in the tap of width 32 every position sees 16."""
    model = small_config(hidden_size=64, head_dim=16, clvr=ONE_TAP, **CASES[name])
    batch = token_batch(0, ROWS)
    full = replace(batch, tokens_BS=np.where(batch.tokens_BS == PAD, 9, batch.tokens_BS))
    with open_parallel(ParallelConfig(), 0, 1, f"file://{tmp_path}/store", seed=0) as context:
        state = start(context, model)
        with FlopCounterMode(display=False) as counter:
            optimizer_step(state, microbatches(full, ROWS, PAD, context.device), NextToken(), context)
    positions = ROWS * LENGTH
    scores = 3 * 4 * (3 * positions * LENGTH / 2 * 64 + ROWS * 17**2 * 32 + positions * TILE_TOKENS * 32)
    assert flops(known(model), ROWS, LENGTH, 1) - scores == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_text_alone_costs_six_operations_a_parameter_and_token_and_the_scores() -> None:
    """A layer of 64 x (64 + 2 x 32 + 64) and 3 x 64 x 128 weights, twice, and an output layer of 64 x 256; embeddings are looked up."""
    model = ModelConfig(num_layers=2, num_experts=0, vision=VisionConfig(enabled=False), clvr=ClvrConfig(enabled=False))
    weights = 2 * (64 * (64 + 2 * 32 + 64) + 3 * 64 * 128) + 64 * 256
    assert flops(known(model), 5, 40, 0) == pytest.approx(5 * 40 * (6 * weights + 2 * 12 * 20 * 64))


def test_a_frozen_encoder_costs_its_forward_pass_alone() -> None:
    model = small_config()
    pictures = [flops(known(model, trains), 1, 24, 1) - flops(known(model, trains), 1, 24, 0) for trains in (True, False)]
    encoder = 2 * (17 * 2 * (4 * 32**2 + 2 * 32 * 48) + 4 * 17**2 * 32 + 2 * 17 * 3 * 16 * 32)
    assert pictures[0] - pictures[1] == pytest.approx(encoder)


def test_half_a_tile_a_row_costs_half_a_tile() -> None:
    yardstick = known(small_config())
    none, half, one = (flops(yardstick, 1, 24, tiles) for tiles in (0, 0.5, 1))
    assert half == pytest.approx((none + one) / 2) and none < one


def test_the_peak_is_that_of_the_device_and_of_a_cpu_that_of_its_threads() -> None:
    assert known(small_config(dtype="bf16"), name="NVIDIA H200", threads=4).peak_flops == 989e12
    assert known(small_config(), threads=3).peak_flops == 3 * known(small_config()).peak_flops


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090", ""])
def test_a_device_that_nobody_has_described_has_no_mfu(name: str) -> None:
    assert yardstick_of(small_config(), True, name, 1) is None


def test_no_two_types_go_by_the_same_name() -> None:
    names = [name for gpu in read_gpus().values() for name in gpu.torch_names]
    assert len(names) == len(set(names))
