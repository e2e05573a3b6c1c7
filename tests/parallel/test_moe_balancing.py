"""Balancing is the same however the model is laid out: losses, gradients, expert biases, drops; and biases travel with the weights.

What a rank drops is decided among the positions that it sees, so a capacity that bites is compared where every rank sees whole micro-batches (data, expert
and pipeline parallelism), and under tensor and context parallelism only where nothing is dropped.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.dist import load_checkpoint, save_checkpoint
from megatron_ext.checkpoint.full_tensors import digest, full_tensors
from megatron_ext.config.schema import ParallelConfig, RunConfig
from megatron_ext.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_ext.model.assembly import build_chunks, build_model
from megatron_ext.observe.metrics import read_metrics
from megatron_ext.observe.metrics_file import EP_RANK_LOAD
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.local import run_ranks
from megatron_ext.rl import run as rl
from tests.support.layouts import TAPS, Case, train
from tests.support.models import IMAGE, small_config
from tests.support.rl_run import rl_config

KINDS: dict[str, dict[str, Any]] = {
    "aux loss and z-loss": {"moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01},
    "sequence loss": {"moe_balancing": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
    "expert bias": {"moe_balancing": "none", "moe_score_function": "sigmoid", "moe_expert_bias": True, "moe_expert_bias_rate": 0.05},
    "small capacity": {"moe_capacity_factor": 0.75, "moe_drop_policy": "position"},
    "padded capacity": {"moe_capacity_factor": 0.75, "moe_pad_to_capacity": True},
    "large capacity": {"moe_capacity_factor": 4.0},
}
LAYOUTS = {
    "TP2": ParallelConfig(num_ranks=2, tp=2),
    "EP2": ParallelConfig(num_ranks=2, ep=2),
    "DP2": ParallelConfig(num_ranks=2),
    "PP2": ParallelConfig(num_ranks=2, pp=2),
    "CP2": ParallelConfig(num_ranks=2, cp=2),
    "recomputed": ParallelConfig(recompute="full", recompute_layers=2),
    "PP2 EP2, recomputed": ParallelConfig(num_ranks=4, pp=2, ep=2, recompute="full"),
    "TP2 CP2": ParallelConfig(num_ranks=4, tp=2, cp=2),
}
CASES = [
    ("aux loss and z-loss", "TP2", False),
    ("aux loss and z-loss", "PP2", False),
    ("sequence loss", "EP2", False),
    ("sequence loss", "CP2", True),
    ("sequence loss", "TP2", True),
    ("expert bias", "DP2", False),
    ("expert bias", "TP2", True),
    ("small capacity", "EP2", False),
    ("large capacity", "TP2", False),
]
"""Each kind in the layouts that could break it; the rest of the table is a journey."""
EVERY = [
    (kind, layout, False) for kind in ("aux loss and z-loss", "sequence loss", "expert bias") for layout in ("TP2", "EP2", "DP2", "PP2", "CP2", "recomputed")
]
EVERY += [("small capacity", layout, False) for layout in ("EP2", "DP2", "PP2", "recomputed")] + [("large capacity", "CP2", False)]
EVERY += [("sequence loss", "TP2 CP2", True), ("expert bias", "PP2 EP2, recomputed", True), ("padded capacity", "DP2", False)]
LONG = [pytest.param(*case, marks=pytest.mark.journey) for case in EVERY if case not in CASES]
PACKED_ALIKE = ("loss", "grad_norm", "moe/aux_loss", "moe/seq_aux_loss", "moe/z_loss", "moe/max_vio", "moe/load_entropy", "moe/expert_bias_max")


@cache
def one_rank(kind: str) -> dict[str, Any]:
    return run_ranks(train, 1, Case(ParallelConfig(), changes=KINDS[kind]), None, timeout_s=100)[0]


@pytest.mark.parametrize(("kind", "layout", "packed"), [*CASES, *LONG], ids=lambda value: {True: "packed", False: "padded"}.get(value, value))
def test_every_layout_balances_like_one_rank(kind: str, layout: str, packed: bool) -> None:
    """Two steps: metrics of each, gradients of the first, weights with biases after it."""
    expected = one_rank(kind)
    parallel = LAYOUTS[layout]
    ranks = run_ranks(train, parallel.num_ranks, Case(parallel, packed=packed, changes=KINDS[kind]), expected["start"], timeout_s=100)
    for rank in ranks:
        for ours, theirs in zip(rank["curve"], expected["curve"], strict=True):
            assert ours.keys() - {EP_RANK_LOAD} == theirs.keys()  # how even the ranks of the experts are depends on the layout
            for name in (name for name in theirs if name in PACKED_ALIKE or (name == "moe/dropped_frac" and not packed)):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-9), name
    for name, gradient in expected["gradients"].items():
        limit = 1e-4 if gradient.dim() == 0 else 1e-5  # a gate is one number, a sum of large terms that cancel: rounding is more of it
        assert (ranks[0]["gradients"][name] - gradient).norm() <= limit * gradient.norm().clamp(min=1e-12), name
    biases = [name for name in expected["weights"] if name.endswith("expert_bias")]
    assert len(biases) == (4 if kind == "expert bias" else 0)
    for name in biases:
        assert ranks[0]["weights"][name].equal(expected["weights"][name])
        steps = expected["weights"][name].abs() / 0.05  # after one update each bias has moved by its rate, or not at all
        assert steps.isclose(steps.round()).all() and steps.max().round() == 1


def test_a_capacity_that_holds_everyone_is_the_dropless_model_and_a_small_one_is_not() -> None:
    """E / K = 4: step by step the same losses as without a capacity."""
    dropless = run_ranks(train, 1, Case(ParallelConfig()), None, timeout_s=100)[0]["curve"]
    large, small = one_rank("large capacity")["curve"], one_rank("small capacity")["curve"]
    assert [step["loss"] for step in large] == pytest.approx([step["loss"] for step in dropless], rel=1e-5)
    assert all(step["moe/dropped_frac"] == 0 for step in large)
    assert all(0.05 < step["moe/dropped_frac"] < 0.9 for step in small)
    assert small[0]["loss"] != pytest.approx(dropless[0]["loss"], rel=1e-4)


def test_an_expert_bias_evens_the_load_without_a_loss() -> None:
    """Of the same weights and batches: twelve steps of a large rate against none."""
    biased = run_ranks(drift, 1, 0.05, timeout_s=100)[0]
    free = run_ranks(drift, 1, 0.0, timeout_s=100)[0]
    assert free[0] == pytest.approx(biased[0])
    assert sum(biased[-4:]) < 0.8 * sum(free[-4:])


def drift(rank: int, world_size: int, init_method: str, rate: float) -> list[float]:
    """`moe/max_vio` of every step."""
    from tests.support.training import run_steps, start

    with open_parallel(ParallelConfig(), rank, world_size, init_method, seed=0) as context:
        engine = start(context, small_config(**{**KINDS["expert bias"], "moe_expert_bias_rate": rate}))
        return [metrics["moe/max_vio"] for metrics in run_steps(engine, 0, 12, 8, context)]


RING = ["TP2", "EP2", "PP2", "one rank", "TP2"]


@pytest.mark.journey
def test_biases_are_saved_in_one_layout_and_loaded_in_another(tmp_path: Path) -> None:
    """The first sets them; each of the others loads what the one before has saved, and saves it for the next."""
    layouts = [LAYOUTS.get(name, ParallelConfig()) for name in RING]
    first, *others = [run_ranks(pass_biases_on, layout.num_ranks, layout, tmp_path / str(number), timeout_s=60) for number, layout in enumerate(layouts)]
    assert len([name for name in first[0] if name.endswith("expert_bias")]) == 4
    assert all(loaded == first[0] for ranks in others for loaded in ranks)


def biased_chunks(context: Any, seed: int) -> list[Any]:
    return build_chunks(small_config(num_layers=4, clvr=TAPS, **KINDS["expert bias"]), IMAGE, context, seed)


def pass_biases_on(rank: int, world_size: int, init_method: str, parallel: ParallelConfig, folder: Path) -> dict[str, str]:
    """Digests of the weights with which it saves in `folder`, whose name is a number: other weights at first, then those of the folder before."""
    number, before = int(folder.name), folder.with_name(str(int(folder.name) - 1))
    with open_parallel(parallel, rank, world_size, init_method, seed=0) as context:
        chunks = biased_chunks(context, seed=number)
        if number:
            load_checkpoint(before, chunks, context=context, model_config=chunks[0].model_config)
        else:
            for router in chunks[0].decoder.routers():
                router.expert_bias.copy_(torch.arange(8) * 0.1 * router.layer_number)
        save_checkpoint(folder, 1, chunks, None, {}, context, chunks[0].model_config, keep=1)
        return digest(full_tensors(chunks, context))


@pytest.mark.parametrize("replay_routes", [pytest.param(True, id="replayed", marks=pytest.mark.journey), pytest.param(False, id="routed live")])
def test_rollouts_get_the_biases_and_rl_leaves_them_as_they_were(replay_routes: bool, tmp_path: Path) -> None:
    """Live, learner and rollouts agree on log-probs only if both choose experts with the same biases; a capacity for training drops nothing in either."""
    config = rl_config(tmp_path, rollout=ParallelConfig(num_ranks=2, tp=2), replicas=1, replay_routes=replay_routes)
    model = config.model.model_copy(update={**KINDS["expert bias"], "moe_capacity_factor": 0.5})
    config = config.model_copy(update={"model": model})
    train_tokenizer(config.data, config.run_dir / "tokenizer", config.seed)
    run_ranks(save_biased_policy, 1, config, tmp_path / "sft", timeout_s=60)
    rl.run_rl(config, tmp_path / "rl", tmp_path / "sft", None)
    for record in read_metrics(tmp_path / "rl"):
        assert record["mismatch/logprob_abs_diff_max"] < 1e-4
        assert record["moe/expert_bias_max"] == pytest.approx(0.5)
        assert record["sync/digest_ok"] == 1
        assert "moe/dropped_frac" not in record


def save_biased_policy(rank: int, world_size: int, init_method: str, config: RunConfig, checkpoints: Path) -> None:
    with open_parallel(ParallelConfig(), rank, world_size, init_method, seed=0) as context:
        model = build_model(config.model, load_tokenizer(config.tokenizer_dir).image_id, context, seed=3)
        for router in model.decoder.routers():
            router.expert_bias.copy_(torch.tensor([-0.5, 0.0, 0.3, 0.5]))
        save_checkpoint(checkpoints, 1, model, None, {}, context, config.model, keep=1)
