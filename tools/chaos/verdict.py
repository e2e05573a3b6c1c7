"""What a disturbed run is held against: its own bank, and the run that nothing disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_ext.checkpoint.dist import load_checkpoint
from megatron_ext.checkpoint.full_tensors import digest, full_tensors
from megatron_ext.config.schema import ParallelConfig, RunConfig
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.model.assembly import build_model
from megatron_ext.observe.metrics_file import read_metrics
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.rl.bank.bank import open_bank

LUCK = ("timing_s", "perf", "fleet", "sync", "time")
"""Metrics that the clock and the fate of processes decide."""


def objections(config: RunConfig, undisturbed: Path, disturbed: Path) -> Iterator[str]:
    """What is wrong with the disturbed run; nothing, where all is well. Both are stage folders of the same configuration."""
    account = open_bank(disturbed / "rollouts").account()
    wanted = config.rl.steps * config.rl.prompts_per_step
    if len(account.trained) != wanted or account.waiting or account.lost:
        yield f"of {wanted} groups {len(account.trained)} were trained on, {len(account.waiting)} wait and {len(account.lost)} are lost"
    for ours, theirs in zip(read_metrics(disturbed), read_metrics(undisturbed), strict=True):
        differing = [name for name in theirs if not name.startswith(LUCK) and ours.get(name) != theirs[name]]
        if differing:
            yield f"step {theirs['step']:.0f} differs in {', '.join(f'{name} ({ours.get(name)} for {theirs[name]})' for name in differing[:3])}"
    ours, theirs = (_weights(config, folder) for folder in (disturbed, undisturbed))
    differing = [name for name in theirs if ours.get(name) != theirs[name]]
    if differing:
        yield f"{len(differing)} of {len(theirs)} tensors differ at the end, {differing[0]} for one"


def _weights(config: RunConfig, stage_dir: Path) -> dict[str, str]:
    with open_parallel(ParallelConfig(), 0, 1, f"file://{stage_dir}/verdict.store", 0) as context:
        tokenizer = load_tokenizer(config.tokenizer_dir)
        model = build_model(config.model, tokenizer.image_id, context, markers=tokenizer.markers)
        load_checkpoint(stage_dir / "checkpoints", [model], context=context, model_config=config.model)
        return digest(full_tensors([model], context))
