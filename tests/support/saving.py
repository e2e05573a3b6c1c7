"""What a rank does in the tests of saves that go wrong: it is killed in the middle of one, or its disk is full."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import writing
from megatron_ext.checkpoint.dist import load_checkpoint
from megatron_ext.checkpoint.folder import latest_step
from megatron_ext.checkpoint.saver import open_saver
from megatron_ext.config.schema import ParallelConfig, RunConfig
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.training.stage_rank import train_rank
from tests.support.models import small_config
from tests.support.training import run_steps, start


def train_until_killed(
    rank: int, world_size: int, init_method: str, config: RunConfig, stage_dir: Path, victim: int, step: int, sign: str, after_s: float
) -> Any:
    """A pretraining rank. The victim sends itself SIGKILL `after_s` after the file `sign` appears in the draft of that step's checkpoint."""
    if rank == victim:
        threading.Thread(target=_die, args=(stage_dir / "checkpoints" / f"step_{step:06d}", sign, after_s), daemon=True).start()
    return train_rank(rank, world_size, init_method, config, "pretrain", stage_dir, None, None)


def _die(checkpoint: Path, sign: str, after_s: float) -> None:
    """A file of the draft may be seen only after the draft has been published."""
    draft = checkpoint.with_suffix(".tmp")
    while not (draft / sign).exists() and not checkpoint.exists():
        time.sleep(0.0005)
    time.sleep(after_s)
    os.kill(os.getpid(), signal.SIGKILL)


def fail_alone(rank: int, world_size: int, init_method: str, folder: Path) -> str:
    """Rank 1 fails in the middle of a save, between two exchanges, and cannot tell rank 0, which waits for it; what training is told."""
    with open_parallel(ParallelConfig(num_ranks=world_size), rank, world_size, init_method, 0) as context:
        engine = start(context)
        if rank == 1:
            writing.write_tensors = lambda *_: 1 // 0  # type: ignore[assignment]
        try:
            with open_saver(folder, 1, context, small_config(), asynchronous=True) as saver:
                saver.save(1, engine.chunks, engine.optimizer_state, {})
                while True:
                    run_steps(engine, 0, 1, 4, context)
                    saver.poll()
        except RuntimeError as error:
            return str(error)


def save_on_a_full_disk(rank: int, world_size: int, init_method: str, folder: Path) -> dict[str, Any]:
    """Saves step 1; then the operating system lets rank 1 write no file above 20 kB, and step 2 is saved beside training; then there is room again."""
    with open_parallel(ParallelConfig(num_ranks=world_size), rank, world_size, init_method, 0) as context:
        engine = start(context)
        with open_saver(folder, 1, context, small_config(), asynchronous=True) as saver:
            saver.save(1, engine.chunks, engine.optimizer_state, {})
            saver.wait()
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            saver.save(2, engine.chunks, engine.optimizer_state, {})
            told, polls = "", 0
            while not told:
                run_steps(engine, 0, 1, 4, context)
                try:
                    saver.poll()
                    polls += 1
                except CheckpointError as error:
                    told = str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            report = {"told": told, "polls": polls, "names": sorted(path.name for path in folder.iterdir())}
            again = load_checkpoint(folder, engine.chunks, engine.optimizer_state, context=context, model_config=small_config())
            saver.save(3, engine.chunks, engine.optimizer_state, {})
        return {**report, "loaded": again["step"], "latest": latest_step(folder)}
