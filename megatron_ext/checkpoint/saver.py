"""Saves a run's checkpoints beside its training.

    training  --save(step)--> copy to host memory --> goes on               --save / poll / wait--> takes the outcome
                                    |                                              ^
    a thread                        +--> write (see writing.py): gather, files, digests, publish

Only the copy delays training. There is one save at a time: a later one waits for the former, and reuses its memory. What fails in the thread is raised by the
next `save`, `poll` or `wait`, on every rank; closing the saver waits too, so that nothing is lost without a word.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from megatron_ext.checkpoint.full_tensors import Model
from megatron_ext.checkpoint.optimizer_state import OptimizerState
from megatron_ext.checkpoint.writing import Hold, Snapshot, take_snapshot, write
from megatron_ext.config.schema import ModelConfig
from megatron_ext.errors import StoppedForRequeue
from megatron_ext.parallel.groups import ParallelContext, Twin, twin_groups

TIMEOUT_S = 1800.0
"""How long a rank waits for the others' files. A rank that dies is noticed at once."""
GRACE_S = 5.0
"""A failure that ranks told each other ends all their saves within moments; without, some may be waiting for one that has given up."""


@dataclass
class Saver:
    """Of one rank; made by `open_saver`. `hold` is None where training waits for every save."""

    folder: Path
    keep: int
    context: ParallelContext
    model_config: ModelConfig
    twin: Twin
    hold: Hold | None
    _pending: _Save | None = None

    @property
    def busy(self) -> bool:
        """Whether a save was begun whose outcome has not been taken."""
        return self._pending is not None

    def save(self, step: int, model: Model, optimizer: OptimizerState | None, state: dict[str, Any]) -> None:
        """Starts saving `folder/step_...`, once the former save is done; without `hold`, finishes it. `model` is bare: one model, or this rank's chunks.

        Raises what went wrong in the former save. Collective: every rank saves the same steps.
        """
        self.wait()
        snapshot = take_snapshot(step, model, optimizer, state, self.context, self.model_config, self.hold)
        if self.hold is None:
            write(snapshot, self.folder, self.keep, self.twin)
        else:
            self._pending = _Save(snapshot, self)
            self._pending.start()

    def poll(self) -> None:
        """Raises what went wrong in a save that has ended, without waiting for one that has not. Collective while a save is under way."""
        if self._pending is None:
            return
        alive = self._pending.is_alive()
        state = torch.tensor([not alive, alive or self._pending.error is None], dtype=torch.int32, device=self.context.device)
        if self.context.world_size > 1:
            dist.all_reduce(state, op=dist.ReduceOp.MIN)
        all_ended, none_failed = state.tolist()
        if none_failed and not all_ended:
            return
        name = self._pending.name
        self._pending.join(None if all_ended else GRACE_S)
        if not self._pending.is_alive():
            self.wait()
        if not none_failed:
            raise RuntimeError(f"another rank failed to save the {name}")

    def wait(self) -> None:
        """Returns once the checkpoint of the latest `save` is published. Raises what went wrong."""
        if self._pending is None:
            return
        self._pending.join()
        save, self._pending = self._pending, None
        if save.error is not None:
            raise save.error


class _Save(threading.Thread):
    """One save, beside training. A daemon: a second Ctrl-C does not wait for it, and what it leaves behind is a draft."""

    def __init__(self, snapshot: Snapshot, saver: Saver) -> None:
        super().__init__(name=f"checkpoint of step {snapshot.step}", daemon=True)
        self.error: BaseException | None = None
        self._snapshot, self._saver = snapshot, saver

    def run(self) -> None:
        saver = self._saver
        try:
            if saver.context.device.type == "cuda":
                torch.cuda.set_device(saver.context.device)
            write(self._snapshot, saver.folder, saver.keep, saver.twin)
        except BaseException as error:
            self.error = error


@contextmanager
def open_saver(folder: Path, keep: int, context: ParallelContext, model_config: ModelConfig, *, asynchronous: bool) -> Iterator[Saver]:
    """Collective. Waits, on the way out, for what is still being saved."""
    with ExitStack() as stack:
        twin = stack.enter_context(twin_groups(context, TIMEOUT_S))
        saver = Saver(folder, keep, context, model_config, twin, _host_copies(stack) if asynchronous else None)
        with waiting_for_saves(saver.wait, saver.wait):
            yield saver


@contextmanager
def waiting_for_saves(wait: Callable[[], None], wait_after_error: Callable[[], None]) -> Iterator[None]:
    """Waits, on the way out of the block, for what is still being saved. An error that ends the block stays the error, with a note if the save fails as well;
    a stop for requeue promises a checkpoint and does not outlive its failure. Ctrl-C does not wait.
    """
    try:
        yield
    except StoppedForRequeue:
        wait()
        raise
    except Exception as error:
        try:
            wait_after_error()
        except Exception as lost:
            error.add_note(f"The checkpoint that was being saved is lost: {lost}")
        raise
    wait()


def _host_copies(stack: ExitStack) -> Hold:
    """Copies to host memory that is kept from save to save, pinned where the tensors come from a GPU. A buffer that many tensors share is copied once."""
    cuda = torch.cuda.is_available()
    stager = DefaultStager(StagingOptions(use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda))
    stack.callback(stager.close)
    return stager.stage  # type: ignore[return-value]
