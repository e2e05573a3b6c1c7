"""The loop's own duties: when it reports, saves and stops."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megatron_ext.config.schema import TrainConfig
from megatron_ext.errors import CheckpointError, StoppedForRequeue
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.stopping import StopRequest, stop_on_signals
from megatron_ext.training.ledger import Window
from megatron_ext.training.loop import supervised, train
from tests.support.training import own_microbatches, start


def run(context: ParallelContext, config: TrainConfig, stop: StopRequest, stop_before: int | None = None) -> tuple[list[int], list[int], list[int]]:
    """(steps whose batch was read, reported steps, saved steps); `stop_before` asks for a stop while that step's batch is read."""
    read: list[int] = []
    reported: list[int] = []
    saved: list[int] = []

    def batch(step: int) -> list:
        read.append(step)
        if step == stop_before:
            signal.raise_signal(signal.SIGTERM)
        return own_microbatches(step, 8, context)

    try:
        engine = start(context)
        train(engine, batch, supervised(engine, context), config, context, save=saved.append, report=lambda step, _: reported.append(step), stop=stop)
    except StoppedForRequeue:
        read.append(-1)
    return read, reported, saved


def test_it_reports_and_saves_as_often_as_asked_and_always_at_the_end(context: ParallelContext) -> None:
    read, reported, saved = run(context, TrainConfig(steps=5, global_batch=8, log_every=2, save_every=3), StopRequest())
    assert read == [0, 1, 2, 3, 4]
    assert reported == [2, 4, 5]
    assert saved == [3, 5]


def test_a_checkpoint_due_at_the_last_step_is_written_once(context: ParallelContext) -> None:
    assert run(context, TrainConfig(steps=4, global_batch=8, save_every=2), StopRequest())[2] == [2, 4]


def test_a_save_that_failed_beside_training_ends_the_run_at_the_next_step(context: ParallelContext) -> None:
    read: list[int] = []
    saved: list[int] = []

    def batch(step: int) -> list:
        read.append(step)
        return own_microbatches(step, 8, context)

    def poll() -> None:
        if saved:
            raise CheckpointError("checkpoints", f"the checkpoint of step {saved[0]} could not be saved")

    config = TrainConfig(steps=5, global_batch=8, save_every=2)
    engine = start(context)
    with pytest.raises(CheckpointError, match="step 2 could not be saved"):
        train(engine, batch, supervised(engine, context), config, context, save=saved.append, poll=poll, report=lambda *_: None, stop=StopRequest())
    assert (read, saved) == ([0, 1, 2], [2])


def test_a_stage_without_steps_trains_nothing_and_saves_its_start(context: ParallelContext) -> None:
    assert run(context, TrainConfig(steps=0, global_batch=8), StopRequest()) == ([], [], [0])


def test_a_signal_lets_the_step_finish_then_saves_and_stops(context: ParallelContext) -> None:
    with stop_on_signals() as stop:
        read, _, saved = run(context, TrainConfig(steps=5, global_batch=8), stop, stop_before=1)
    assert read == [0, 1, -1]
    assert saved == [2]


def test_a_file_that_appears_stops_after_the_step_like_a_signal(context: ParallelContext, tmp_path: Path) -> None:
    with stop_on_signals(tmp_path / "STOP") as stop:
        assert run(context, TrainConfig(steps=2, global_batch=8), stop)[2] == [2]
        (tmp_path / "STOP").touch()
        read, _, saved = run(context, TrainConfig(steps=5, global_batch=8), stop)
    assert read == [0, -1]
    assert saved == [1]


def test_a_signal_in_the_last_step_comes_too_late_to_stop(context: ParallelContext) -> None:
    with stop_on_signals() as stop:
        read, _, saved = run(context, TrainConfig(steps=2, global_batch=8), stop, stop_before=1)
    assert read == [0, 1]
    assert saved == [2]


def test_a_second_ctrl_c_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_reports_are_means_since_the_last_one_but_for_what_describes_a_moment() -> None:
    window = Window()
    for loss, lr in ((3.0, 0.1), (1.0, 0.2)):
        window.add({"loss": loss, "lr": lr})
    assert window.take() == {"loss": 2.0, "lr": 0.2}
    window.add({"loss": 5.0, "lr": 0.3})
    assert window.take() == {"loss": 5.0, "lr": 0.3}
