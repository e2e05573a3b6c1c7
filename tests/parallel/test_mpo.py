"""Mixed preference optimisation over ranks, and as the command runs it: every layout learns what one rank learns; a resumed stage ends bit for bit where it
would have."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.folder import read_manifest
from megatron_ext.config.schema import ClvrConfig, DataConfig, ModelConfig, MpoConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig, VisionConfig
from megatron_ext.data.tokenizer import train_tokenizer
from megatron_ext.errors import CheckpointError
from megatron_ext.observe.metrics import read_metrics
from megatron_ext.parallel.local import run_ranks
from megatron_ext.training.stage import run_supervised
from tests.support.pairs import learn

STEPS = 2


def ranks(parallel: ParallelConfig, micro: int = 2, packed: bool = False) -> Any:
    return run_ranks(learn, parallel.num_ranks, parallel, STEPS, micro, packed, timeout_s=60)


@cache
def on_one_rank() -> Any:
    return ranks(ParallelConfig())[0]


LAYOUTS = {
    "DP2": (ParallelConfig(num_ranks=2), False),
    "CP2": (ParallelConfig(num_ranks=2, cp=2), False),
    "CP2, packed": (ParallelConfig(num_ranks=2, cp=2), True),
    "PP2": (ParallelConfig(num_ranks=2, pp=2), False),
    "PP2 VPP2": (ParallelConfig(num_ranks=2, pp=2, vpp=2), False),
    "TP2 EP2": (ParallelConfig(num_ranks=2, tp=2, ep=2), False),
}


LONG = ("CP2", "PP2")
"""The like of which is among the others."""
CASES = [pytest.param(*layout, id=name, marks=[pytest.mark.journey] * (name in LONG)) for name, layout in LAYOUTS.items()]


@pytest.mark.parametrize(("parallel", "packed"), CASES)
def test_every_layout_learns_what_one_rank_learns(parallel: ParallelConfig, packed: bool) -> None:
    expected, weights = on_one_rank()
    found = ranks(parallel, packed=packed)
    for curve, _ in found:
        for ours, theirs in zip(curve, expected, strict=True):
            same = [name for name in theirs if name.startswith("mpo/") or name in ("loss", "lr", "data/tokens_per_row")]
            assert {name: ours[name] for name in same} == pytest.approx({name: theirs[name] for name in same}, rel=5e-4, abs=2e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-2, atol=2e-3, msg=name)


MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    head_dim=8,
    num_experts=4,
    expert_ffn_hidden_size=32,
    vision=VisionConfig(num_layers=1, hidden_size=32, num_attention_heads=2, ffn_hidden_size=32),
    clvr=ClvrConfig(taps=((0, 1),), head_dim=8),
)
STAGE = TrainConfig(steps=0, global_batch=4, micro_batch=2)
MPO = MpoConfig(steps=4, global_batch=4, micro_batch=1, log_every=1, save_every=2, keep=4, optimizer=OptimizerConfig(lr=1e-3, min_lr=0.0, warmup_steps=1))


def tensors(folder: Path) -> dict[str, str]:
    """Digests of the files that hold the last weights and moments."""
    manifest = read_manifest(folder / "checkpoints" / f"step_{MPO.steps:06d}")
    return {name: entry["sha256"] for name, entry in manifest.items() if name.endswith(".distcp")}


def numbers(folder: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if not name.startswith(("time", "timing_s/", "perf/"))} for record in read_metrics(folder)]


@pytest.mark.journey
def test_a_resumed_stage_ends_bit_for_bit_where_it_ended_before_and_knows_its_reference(tmp_path: Path) -> None:
    """Two data-parallel ranks. The running mean of rewards and the reference are part of what is resumed."""
    data = DataConfig(questions_per_image=2)
    config = RunConfig(name="run", output_dir=tmp_path, model=MODEL, data=data, parallel=ParallelConfig(num_ranks=2), sft=STAGE, mpo=MPO)
    train_tokenizer(data, config.tokenizer_dir, config.seed)
    start, stage = tmp_path / "sft", tmp_path / "mpo"
    run_supervised(config, "sft", start, None)
    run_supervised(config, "mpo", stage, start / "checkpoints")
    before, measured = tensors(stage), numbers(stage)
    assert {"mpo/dpo", "mpo/bco", "mpo/sft", "mpo/accuracy", "mpo/margin", "mpo/delta", "timing_s/ref"} <= read_metrics(stage)[-1].keys()
    assert measured[0]["mpo/delta"] == 0 != measured[-1]["mpo/delta"]
    (stage / "checkpoints" / "latest").write_text("step_000002\n")
    run_supervised(config, "mpo", stage, start / "checkpoints")
    assert tensors(stage) == before and numbers(stage) == measured
    (stage / "checkpoints" / "latest").write_text("step_000002\n")
    with pytest.raises(CheckpointError, match="is not the checkpoint that this stage began with"):
        run_supervised(config, "mpo", stage, stage / "checkpoints")
