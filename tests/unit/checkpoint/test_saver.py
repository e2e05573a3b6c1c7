"""Saving beside training, on one rank: what is saved, who waits for whom, and how a failure is told. Two ranks: tests/parallel/test_saving.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint import folder as files
from megatron_ext.checkpoint.saver import Saver, open_saver
from megatron_ext.errors import CheckpointError, StoppedForRequeue
from megatron_ext.model.assembly import build_model
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.megatron_engine import MegatronEngine, build_engine
from tests.support.models import IMAGE, small_config
from tests.support.training import ADAM, run_steps, start

MODEL = small_config()


@contextmanager
def opened(folder: Path, context: ParallelContext, keep: int = 2, asynchronous: bool = True) -> Iterator[Saver]:
    with open_saver(folder, keep, context, MODEL, asynchronous=asynchronous) as saver:
        yield saver


def save(saver: Saver, step: int, engine: MegatronEngine) -> None:
    saver.save(step, engine.chunks, engine.optimizer_state, {})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def held_back(monkeypatch: pytest.MonkeyPatch, function: str) -> Iterator[threading.Event]:
    """That step of every save waits for the event, which is set at the end at the latest."""
    go, real = threading.Event(), getattr(files, function)

    def wait(*arguments: object) -> object:
        assert go.wait(60)
        return real(*arguments)

    monkeypatch.setattr(files, function, wait)
    try:
        yield go
    finally:
        go.set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_of_the_moment_of_the_save_however_training_goes_on(
    context: ParallelContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Bit for bit what a save that training waits for would have written: weights, moments, master weights, random states."""
    model = build_model(small_config(dtype={torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]), IMAGE, context).to(dtype)
    engine = build_engine([model], ADAM, 10, context)
    run_steps(engine, 0, 2, 4, context)
    with opened(tmp_path / "before", context, asynchronous=False) as waiting:
        save(waiting, 2, engine)
    with opened(tmp_path / "beside", context) as beside:
        with held_back(monkeypatch, "prepare"):
            save(beside, 2, engine)
            run_steps(engine, 2, 4, 4, context)
            torch.rand(1)
        beside.wait()
    with opened(tmp_path / "after", context, asynchronous=False) as waiting:
        save(waiting, 2, engine)
    digests = {when: files.read_manifest(tmp_path / when / "step_000002") for when in ("before", "beside", "after")}
    for name in ("__0_0.distcp", "rng_0000.safetensors", "state.json"):
        assert digests["beside"][name] == digests["before"][name] != digests["after"][name], name


def test_the_latest_checkpoint_stays_until_the_next_is_whole(context: ParallelContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(context)
    with opened(tmp_path, context, keep=1) as saver:
        save(saver, 1, engine)
        saver.wait()
        assert not saver.busy
        with held_back(monkeypatch, "publish"):
            save(saver, 2, engine)
            saver.poll()
            assert saver.busy
            while not (tmp_path / "step_000002.tmp" / "state.json").exists():
                time.sleep(0.01)
            assert names(tmp_path) == ["latest", "step_000001", "step_000002.tmp"]
            assert files.latest_step(tmp_path) == 1
        saver.wait()
        assert names(tmp_path) == ["latest", "step_000002"]


def test_a_save_waits_for_the_one_before_and_the_end_for_the_last(context: ParallelContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(context)
    with opened(tmp_path, context) as saver, held_back(monkeypatch, "publish") as go:
        save(saver, 1, engine)
        threading.Timer(0.2, go.set).start()
        save(saver, 2, engine)
        assert go.is_set() and files.latest_step(tmp_path) == 1
    assert files.latest_step(tmp_path) == 2


def test_host_memory_is_kept_from_save_to_save_and_shared_buffers_are_copied_once(context: ParallelContext, tmp_path: Path) -> None:
    buffer = torch.arange(6.0)
    with opened(tmp_path, context) as saver:
        assert saver.hold is not None
        first = saver.hold({"left": buffer[:2], "right": [buffer[2:]]})
        buffer += 1
        assert first["right"][0].tolist() == [2, 3, 4, 5]
        second = saver.hold({"left": buffer[:2], "right": [buffer[2:]]})
    assert second["left"].tolist() == [1, 2]
    pointers = [tensors["left"].data_ptr() for tensors in (first, second)] + [second["right"][0].data_ptr() - 2 * 4]
    assert len(set(pointers)) == 1


def spoil(folder: Path) -> None:
    """The operating system will refuse the draft of step 2: a file that is no folder stands in its place."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step_000002.tmp").write_text("")


def test_a_failure_is_told_by_the_next_poll_save_or_wait_once_and_the_former_checkpoint_stays(context: ParallelContext, tmp_path: Path) -> None:
    engine = start(context)
    message = r"the checkpoint of step 2 could not be saved \(rank 0: .*.*step_000002.tmp.*it resumes from step 1, whose checkpoint is whole"
    with opened(tmp_path, context) as saver:
        save(saver, 1, engine)
        for told in (saver.wait, saver.poll, lambda: save(saver, 3, engine)):
            saver.wait()
            spoil(tmp_path)
            save(saver, 2, engine)
            assert saver._pending is not None
            saver._pending.join()
            with pytest.raises(CheckpointError, match=message):
                told()
        assert files.latest_step(tmp_path) == 1
        (tmp_path / "step_000002.tmp").unlink()
        save(saver, 3, engine)
    assert names(tmp_path) == ["latest", "step_000001", "step_000003"]


def test_a_failure_of_our_own_comes_with_its_traceback(context: ParallelContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "publish", lambda *_: 1 // 0)
    with (
        pytest.raises(RuntimeError, match=r"(?s)the checkpoint of step 2 in .* could not be saved.*Traceback.*ZeroDivisionError"),
        opened(tmp_path, context) as saver,
    ):
        save(saver, 2, start(context))
    assert names(tmp_path) == []


def test_the_end_tells_of_a_failed_save_whatever_ends_the_block(context: ParallelContext, tmp_path: Path) -> None:
    """A stop for requeue promises a checkpoint; an error stays the error, with a note."""
    engine = start(context)

    def block(end: BaseException | None) -> None:
        with opened(tmp_path, context) as saver:
            spoil(tmp_path)
            save(saver, 2, engine)
            if end is not None:
                raise end

    for end in (None, StoppedForRequeue("stopped")):
        with pytest.raises(CheckpointError, match="step 2 could not be saved"):
            block(end)
    with pytest.raises(ZeroDivisionError) as caught:
        block(ZeroDivisionError())
    assert "is lost" in caught.value.__notes__[0] and "step 2 could not be saved" in caught.value.__notes__[0]
