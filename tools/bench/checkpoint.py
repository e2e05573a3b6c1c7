"""How long a checkpoint keeps training waiting: `python -m tools.bench.checkpoint`, from the root of the repository.

    each round:  step, save in the foreground, torch.save, save beside training (its stall, then steps until it is published)

Everything is measured in one run, interleaved, on one rank and on two data-parallel ranks, who share the writing. A round's time is that of the slowest rank;
the table shows medians over rounds. The first round, which allocates the host copies, is shown by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Timings = dict[str, float]
ROWS = {
    "asynchronous save: stall": "stall_s",
    "asynchronous save: until published, training beside": "published_s",
    "asynchronous save: training time lost, by the stall and by slower steps": "lost_s",
    "synchronous save": "synchronous_s",
    "torch.save of the same tensors, and fsync": "torch_save_s",
    "training step": "step_s",
}


def main() -> None:
    from megatron_ext.config.schema import ParallelConfig
    from megatron_ext.parallel.local import run_ranks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="measured after the first (default 9)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of data-parallel ranks (default 1 2)")
    parser.add_argument("--experts", type=int, default=16, help="experts of a layer, which set the size (default 16: 111 MB of weights)")
    parser.add_argument("--folder", type=Path, default=None, help="where to write checkpoints (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="where to write the medians, in seconds")
    arguments = parser.parse_args()
    found = {}
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            reports = run_ranks(measure, ranks, ParallelConfig(num_ranks=ranks), Path(folder), arguments.experts, arguments.rounds + 1, timeout_s=3600)
        rounds = [{name: max(report["rounds"][index][name] for report in reports) for name in ROWS.values()} for index in range(arguments.rounds + 1)]
        print(table({"ranks": ranks, "weight_bytes": reports[0]["weight_bytes"], "checkpoint_bytes": reports[0]["checkpoint_bytes"], "rounds": rounds}))
        found[f"{ranks} rank(s)"] = {title: statistics.median(each[name] for each in rounds[1:]) for title, name in ROWS.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def table(result: dict[str, Any]) -> str:
    first, *rounds = result["rounds"]
    middle = {name: statistics.median(each[name] for each in rounds) for name in ROWS.values()}
    sizes = f"{result['weight_bytes'] / 1e6:.0f} MB of weights, {result['checkpoint_bytes'] / 1e6:.0f} MB of checkpoint"
    lines = [f"{result['ranks']} rank(s), {sizes}, medians of {len(rounds)} rounds", "", "| | median | least | most | first |", "|---|---|---|---|---|"]
    for title, name in ROWS.items():
        values = [each[name] for each in rounds]
        lines.append(f"| {title} | {middle[name]:.3f} s | {min(values):.3f} s | {max(values):.3f} s | {first[name]:.3f} s |")
    share = statistics.median(each["stall_s"] / each["synchronous_s"] for each in rounds)
    return "\n".join([*lines, "", f"stall / synchronous save: {100 * share:.1f} % (median of the rounds' own ratios)", ""])


def measure(rank: int, world_size: int, init_method: str, parallel: Any, folder: Path, experts: int, rounds: int) -> dict[str, Any]:
    """One rank: a small mixture of experts with Adam, trained on the same batch over and over."""
    import numpy as np

    from megatron_ext.batch import NO_TILES
    from megatron_ext.checkpoint.saver import open_saver
    from megatron_ext.checkpoint.writing import take_snapshot
    from megatron_ext.config.schema import ModelConfig, OptimizerConfig
    from megatron_ext.data.collate import TokenBatch
    from megatron_ext.model.assembly import build_chunks
    from megatron_ext.parallel.groups import open_parallel
    from megatron_ext.training.losses import NextToken
    from megatron_ext.training.megatron_engine import build_engine
    from megatron_ext.training.microbatches import microbatches
    from megatron_ext.training.step import optimizer_step

    model = ModelConfig(num_layers=4, hidden_size=256, num_experts=experts, expert_ffn_hidden_size=512, vocab_size=4096)
    with open_parallel(parallel, rank, world_size, init_method, seed=0, timeout_s=600) as context:
        chunks = build_chunks(model, 5, context, seed=0)
        engine = build_engine(chunks, OptimizerConfig(), 10_000, context)
        tokens = np.random.default_rng(rank).integers(8, 4000, size=(2, 64)).astype(np.int32)
        text = TokenBatch(tokens, np.ones((2, 64), np.uint8), NO_TILES, np.full((2, 1), -1))
        batch = microbatches(text, 2, 0, context.device)

        def step() -> None:
            optimizer_step(engine, batch, NextToken(), context)

        measured = []
        with (
            open_saver(folder / "beside", 1, context, model, asynchronous=True) as beside,
            open_saver(folder / "waiting", 1, context, model, asynchronous=False) as waiting,
        ):
            step()
            for number in range(rounds):
                quiet = timed(context, lambda: [step() for _ in range(5)]) / 5
                synchronous = timed(context, waiting.save, number, chunks, engine.optimizer_state, {})
                plain = own(take_snapshot(number, chunks, engine.optimizer_state, {}, context, model).values, world_size, rank)
                plainly = timed(context, save_plainly, plain, folder / f"plain_{rank}.pt")
                del plain
                stall = timed(context, beside.save, number, chunks, engine.optimizer_state, {})
                began, steps = time.perf_counter(), 0
                while beside.busy:
                    step()
                    beside.poll()
                    steps += 1
                published = stall + time.perf_counter() - began
                measured.append(dict(zip(ROWS.values(), [stall, published, published - steps * quiet, synchronous, plainly, quiet], strict=True)))
        return {
            "rounds": measured,
            "weight_bytes": sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters()),
            "checkpoint_bytes": sum(path.stat().st_size for path in (folder / "waiting").glob("step_*/*")),
        }


def timed(context: Any, work: Callable[..., Any], *arguments: Any) -> float:
    """From when all ranks are ready."""
    import torch

    torch.distributed.barrier(context.pgs.dp_cp)
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def own(values: Any, world_size: int, rank: int) -> list[Any]:
    """Private copies of this rank's optimizer share and of its part of the weights, which ranks divide: each byte is written once, as in a checkpoint."""
    weights = list(values["model"].values())[rank::world_size]
    moments = [tensor for part in values["optimizer"].values() for tensors in part for tensor in tensors.values()]
    return [tensor.clone() for tensor in [*weights, *moments]]


def save_plainly(tensors: list[Any], path: Path) -> None:
    import torch

    with path.open("wb") as stream:
        torch.save(tensors, stream)
        stream.flush()
        os.fsync(stream.fileno())


if __name__ == "__main__":
    from tools.bench.checkpoint import main as run  # ranks import their function from a module that has a name

    run()
