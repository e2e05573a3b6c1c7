"""What ranks do in the tests of `run_ranks`. In a module of its own, because ranks import it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.errors import CheckpointError, ConfigError, StoppedForRequeue, UserError
from megatron_ext.parallel.groups import open_parallel


def describe(rank: int, world_size: int, init_method: str, *args: Any) -> dict[str, Any]:
    return {"rank": rank, "world_size": world_size, "args": args, "pid": os.getpid(), "threads": torch.get_num_threads(), "marker": os.environ.get("MARKER")}


def big_tensor(rank: int, world_size: int, init_method: str, numel: int) -> torch.Tensor:
    return torch.full((numel,), float(rank))


def summed_over_world(rank: int, world_size: int, init_method: str) -> float:
    with open_parallel(ParallelConfig(num_ranks=world_size), rank, world_size, init_method, seed=0) as context:
        total = torch.tensor(float(rank + 1))
        dist.all_reduce(total, group=context.pgs.dp)
        return float(total)


def raise_on_rank_one(rank: int, world_size: int, init_method: str, kind: str) -> None:
    """Rank 1 fails in the way asked for while the others wait for it in a collective, and would wait for two minutes."""
    with open_parallel(ParallelConfig(num_ranks=world_size), rank, world_size, init_method, seed=0):
        if rank == 1:
            fail(kind)
        dist.all_reduce(torch.zeros(1))


def fail(kind: str) -> None:
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {
        "error": ZeroDivisionError("one over nothing"),
        "user": CheckpointError("runs/x", "is damaged", "use another"),
        "config": ConfigError([UserError("a.b", "is wrong"), UserError("c.d", "too")]),
    }[kind]


def exit_quietly(rank: int, world_size: int, init_method: str) -> None:
    if rank == 1:
        sys.exit(3)


def returns_a_function(rank: int, world_size: int, init_method: str) -> Any:
    return lambda: None


def sleep(rank: int, world_size: int, init_method: str, folder: Path, seconds: float) -> None:
    """Leaves its own process id and that of a child it starts in `folder`; rank 0 returns at once."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(120)"])
    (folder / f"{rank}").write_text(f"{os.getpid()} {child.pid}")
    if rank:
        time.sleep(seconds)
    else:
        child.kill()
        child.wait()


def stop_when_told(rank: int, world_size: int, init_method: str, folder: Path) -> None:
    """Like a training loop: takes note of the signal, finishes its step (rank 0 takes longer), then stops for requeue."""
    told = []
    signal.signal(signal.SIGUSR1, lambda *_: told.append(True))
    (folder / f"{rank}").write_text("listening")
    while not told:
        time.sleep(0.01)
    time.sleep(0.3 if rank == 0 else 0.0)
    (folder / f"{rank}").write_text("stopped")
    raise StoppedForRequeue(f"rank {rank}")


def grid(rank: int, world_size: int, init_method: str, parallel: ParallelConfig) -> dict[str, Any]:
    """The members of this rank's groups."""
    with open_parallel(parallel, rank, world_size, init_method, seed=0) as context:
        groups = {name: dist.get_process_group_ranks(getattr(context.pgs, name)) for name in ("tp", "dp", "ep", "expt_tp", "expt_dp")}
        return {**groups, "threads": torch.get_num_threads()}
