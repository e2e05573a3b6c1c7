"""The loop of the stages that learn from given examples: batch, step, metrics, checkpoint, stop.

    for step in start .. steps:
        batch(step)  ->  update  ->  metrics of all ranks every `log_every`  ->  checkpoint every `save_every`  ->  stop if asked

What a step trains on is a function of its number alone, so a resumed run continues as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_ext.config.schema import StageConfig
from megatron_ext.device import device_name
from megatron_ext.errors import StoppedForRequeue
from megatron_ext.observe.profiler import UNPROFILED, Profiler
from megatron_ext.observe.stopwatch import Stopwatch
from megatron_ext.observe.timeline import Track
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.planner.model_flops import yardstick_of
from megatron_ext.parallel.stopping import StopRequest
from megatron_ext.training.engine import Engine
from megatron_ext.training.ledger import Ledger
from megatron_ext.training.losses import Microbatch, NextToken
from megatron_ext.training.step import optimizer_step

Update = Callable[[Sequence[Microbatch], Callable[[str], None]], dict[str, float]]
"""An optimizer step on micro-batches, with its metrics; it tells the end of each of its phases. Collective."""
Report = Callable[[int, Mapping[str, float]], None]
"""Where the numbers of a step go. Called on every rank with equal numbers but for timings, which are its own."""


def train(
    engine: Engine,
    batch: Callable[[int], Sequence[Microbatch]],
    update: Update,
    config: StageConfig,
    context: ParallelContext,
    *,
    save: Callable[[int], None],
    poll: Callable[[], None] = lambda: None,
    report: Report,
    trace: Callable[[Sequence[Track]], None] = lambda tracks: None,
    profiler: Profiler = UNPROFILED,
    stop: StopRequest,
) -> dict[str, float]:
    """Trains from `engine.step` to `config.steps`; `batch(step)` gives this rank's microbatches. Returns the last metrics.

    `save` may return before the checkpoint is written; `poll`, called after every step, then raises what went wrong with it.
    `trace` gets, with every report and at the end, when each rank was in which phase. Raises StoppedForRequeue once a requested stop is agreed and the save of
    its checkpoint begun.
    """
    model = engine.chunks[0].model_config
    yardstick = yardstick_of(model, config.train_vision, device_name(context.device), context.parallel.threads_per_rank)
    ledger = Ledger(config.rows_each * config.global_batch, yardstick, context)
    last: dict[str, float] = {}
    if config.steps == 0:
        save(0)  # the next stage starts from this one's checkpoint, trained or not
    while (step := engine.step) < config.steps:
        clock = Stopwatch()
        with profiler.step():
            microbatches = batch(step)
            clock.lap("data")
            with ledger.working(clock):
                metrics = update(microbatches, clock.lap)
        ledger.add(metrics, clock)
        poll()
        step += 1
        if step % config.log_every == 0 or step == config.steps:
            last, tracks = ledger.report()
            report(step, last)
            trace(tracks)
            clock.lap("report")
        stopping = step < config.steps and stop.agreed(context)
        if stopping or step == config.steps or (config.save_every and step % config.save_every == 0):
            save(step)
            clock.lap("save")
        ledger.finished(step, clock)
        if stopping or step == config.steps:
            trace(ledger.tracks())
        if stopping:
            raise StoppedForRequeue(f"stopped after step {step} of {config.steps}: run again to resume")
    return last


def supervised(engine: Engine, context: ParallelContext) -> Update:
    """Learns the next token."""
    objective = NextToken()
    return lambda microbatches, lap: optimizer_step(engine, microbatches, objective, context, lap)
