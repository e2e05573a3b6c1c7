"""What one rank of a stage that learns from given examples does: model, data, resume or start, loop, reports. Started by `stage.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.dist import latest_step, load_checkpoint
from megatron_ext.checkpoint.folder import CHECKPOINTS
from megatron_ext.checkpoint.saver import open_saver
from megatron_ext.config.schema import RunConfig, StageConfig, TrainConfig
from megatron_ext.data.pairs import PairStream
from megatron_ext.data.stream import TrainingStream
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.model.assembly import build_chunks
from megatron_ext.observe.observer import SILENT, StageObserver, observe_stage
from megatron_ext.observe.profiler import Profiler, profiled_ranks
from megatron_ext.parallel.groups import MeetingPoint, ParallelContext, open_parallel
from megatron_ext.parallel.stopping import stop_on_signals
from megatron_ext.training.engine import Engine
from megatron_ext.training.engines import start_engine
from megatron_ext.training.feed import Stream, open_feed
from megatron_ext.training.loop import Update, supervised, train
from megatron_ext.training.mpo import kept, open_preference
from megatron_ext.training.phases import TRAINING
from megatron_ext.training.stage_names import Stage
from megatron_ext.training.text_stream import TextStream


def train_rank(
    rank: int, world_size: int, meeting: MeetingPoint, config: RunConfig, stage: Stage, stage_dir: Path, init_from: Path | None, stop_file: Path | None
) -> dict[str, float]:
    """The stage on this rank. Returns the last metrics and `step`."""
    settings: StageConfig = getattr(config, stage)
    checkpoints = stage_dir / CHECKPOINTS
    with (
        stop_on_signals(stop_file) as stop,
        _observer(rank, config, stage, stage_dir) as observer,
        open_parallel(config.parallel, rank, world_size, meeting, config.seed) as context,
    ):
        tokenizer = load_tokenizer(config.tokenizer_dir)
        engine, resumed = _resumed_or_started(config, settings, tokenizer, checkpoints, init_from, context)
        stream = _stream(config, stage, tokenizer, stage_dir, context)
        update, kept = _lesson(config, stage, engine, init_from, tokenizer, resumed, context)

        def save(step: int) -> None:
            engine.settle()
            saver.save(step, engine.chunks, engine.optimizer_state, {"stage": stage, **kept()})

        with (
            open_feed(stream, settings, tokenizer, config.seed, context) as feed,
            open_saver(checkpoints, settings.keep, context, config.model, asynchronous=settings.async_save) as saver,
            observer.steps(engine.step, ("loss", "loss")) as report,
            closing(_profiler(rank, config, stage_dir, settings.steps - engine.step)) as profiler,
        ):
            last = train(
                engine,
                lambda step: feed.microbatches(step),  # looked up at every step: a profile puts its name around it
                update,
                settings,
                context,
                save=save,
                poll=saver.poll,
                report=lambda step, metrics: report(step, {**metrics, **feed.metrics()}),
                trace=observer.trace,
                profiler=profiler,
                stop=stop,
            )
        return {**last, "step": float(engine.step)}


def _resumed_or_started(
    config: RunConfig, settings: StageConfig, tokenizer: Tokenizer, checkpoints: Path, init_from: Path | None, context: ParallelContext
) -> tuple[Engine, dict[str, Any]]:
    """The stage's own latest checkpoint comes first, with what the stage kept there; without one, the weights of `init_from`, or those drawn from the seed."""
    resume = latest_step(checkpoints) is not None
    chunks = build_chunks(config.model, tokenizer.image_id, context, config.seed, settings.train_vision, tokenizer.markers)
    if init_from is not None and not resume:
        load_checkpoint(init_from, chunks, context=context, model_config=config.model)
    engine = start_engine(chunks, settings.optimizer, settings.steps, context)
    if not resume:
        return engine, {}
    return engine, load_checkpoint(checkpoints, engine.chunks, engine.optimizer_state, context=context, model_config=config.model)


def _lesson(
    config: RunConfig, stage: Stage, engine: Engine, init_from: Path | None, tokenizer: Tokenizer, resumed: dict[str, Any], context: ParallelContext
) -> tuple[Update, Callable[[], dict[str, Any]]]:
    """What a step learns, and what it keeps in a checkpoint."""
    if stage != "mpo":
        return supervised(engine, context), dict
    assert init_from is not None
    preference, start = open_preference(config, engine, init_from, tokenizer, resumed, context), init_from
    return preference.update, lambda: kept(preference, start)


def _stream(config: RunConfig, stage: Stage, tokenizer: Tokenizer, stage_dir: Path, context: ParallelContext) -> Stream:
    """This rank's conversations, rows of text, or pairs of answers; the stages of one run read different ones."""
    common = {"dp_rank": context.dp_rank, "dp_size": context.layout.dp, "multiple_of": math.lcm(8, context.layout.length_multiple)}
    if stage == "mpo":
        return PairStream(config.mpo.pairs, config.data, config.model.vision, tokenizer, mix=config.mpo.mix, seed=config.seed, **common)
    settings: TrainConfig = getattr(config, stage)
    common["seed"] = 2 * config.seed + (stage == "sft")
    if settings.text:
        length, num_rows, cache = config.data.max_length, settings.steps * settings.global_batch, stage_dir / "text"
        return TextStream(settings.text, tokenizer, config.tokenizer_dir, cache, length=length, num_rows=num_rows, **common)
    return TrainingStream(config.data, config.model.vision, tokenizer, split="train", mix=settings.mix, **common)


def _observer(rank: int, config: RunConfig, stage: Stage, stage_dir: Path) -> AbstractContextManager[StageObserver]:
    """Rank 0 writes metrics and shows progress; the others do nothing."""
    return observe_stage(config.observe, config.name, stage, getattr(config, stage).steps, stage_dir) if rank == 0 else nullcontext(SILENT)


def _profiler(rank: int, config: RunConfig, stage_dir: Path, left: int) -> Profiler:
    chosen = rank in profiled_ranks(config.parallel.num_ranks, config.parallel.pp)
    return Profiler(stage_dir, f"rank {rank}", config.observe.profile * chosen, left, TRAINING)
