"""A stage that learns from given examples, `pretrain`, `sft` or `mpo`, from a configuration to a folder that holds its result.

    stage_dir/  config.yaml   metrics.jsonl   events.out.tfevents...   checkpoints/step_.../

This is the command's side: it writes the configuration, has the ranks called and waits, and never imports torch. What a rank does is in `stage_rank.py`.
Running a stage again continues it, or does nothing once it is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_ext.config.schema import RunConfig
from megatron_ext.parallel.launch import LocalRanks, Ranks
from megatron_ext.parallel.stopping import STOP_SIGNALS
from megatron_ext.training.stage_names import Stage

LOCAL = LocalRanks()


def run_supervised(
    config: RunConfig, stage: Stage, stage_dir: Path, init_from: Path | None, ranks: Ranks = LOCAL, stop_file: Path | None = None
) -> dict[str, float]:
    """Trains the stage, by default with this machine's processes as ranks. The tokenizer is read from `config.tokenizer_dir`.

    `init_from` is a checkpoint (or a folder of them) whose weights the stage starts from, and to which `mpo` compares; unset: random weights. Returns the last
    metrics and `step`.
    Raises StoppedForRequeue, after its checkpoint, when a signal stopped it or `stop_file` appeared.
    """
    if ranks.lead:
        stage_dir.mkdir(parents=True, exist_ok=True)
        (stage_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    arguments = (config, stage, stage_dir, init_from, stop_file)
    threads = config.parallel.threads_per_rank
    return dict(ranks.run(_train_rank, config.parallel.num_ranks, *arguments, threads_per_rank=threads, forward_signals=STOP_SIGNALS))


def _train_rank(*arguments: Any) -> dict[str, float]:
    """Imports what a rank needs only where it runs."""
    from megatron_ext.training.stage_rank import train_rank

    return train_rank(*arguments)
