"""A supervised stage, `pretrain` or `sft`, from a configuration to a folder that holds its result.

    stage_dir/  config.yaml   metrics.jsonl   events.out.tfevents...   checkpoints/step_.../

This is the driver's side: it writes the configuration, starts the ranks and waits, and never imports torch. What a rank does is in `stage_rank.py`.
Running a stage again continues it, or does nothing once it is done.
"""

from __future__ import annotations

import math
from pathlib import Path

import yaml

from megatron_ext.config.schema import RunConfig
from megatron_ext.parallel.local import run_ranks
from megatron_ext.training.stage_names import STOP_SIGNALS, Stage


def run_supervised(config: RunConfig, stage: Stage, stage_dir: Path, init_from: Path | None) -> dict[str, float]:
    """Trains the stage with this machine's processes as ranks. The tokenizer is read from `config.tokenizer_dir`.

    `init_from` is a checkpoint (or a folder of them) whose weights the stage starts from; unset: random weights. Returns the last metrics and `step`.
    Raises StoppedForRequeue when a signal stopped it, after its checkpoint.
    """
    stage_dir.mkdir(parents=True, exist_ok=True)
    (stage_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    parallel = config.parallel
    results = run_ranks(
        _train_rank,
        parallel.num_ranks,
        config,
        stage,
        stage_dir,
        init_from,
        timeout_s=math.inf,
        threads_per_rank=parallel.threads_per_rank,
        forward_signals=STOP_SIGNALS,
    )
    return dict(results[0])


def _train_rank(rank: int, world_size: int, init_method: str, config: RunConfig, stage: Stage, stage_dir: Path, init_from: Path | None) -> dict[str, float]:
    """Imports what a rank needs only where it runs."""
    from megatron_ext.training.stage_rank import train_rank

    return train_rank(rank, world_size, init_method, config, stage, stage_dir, init_from)
