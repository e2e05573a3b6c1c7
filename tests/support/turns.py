"""A learner's engine whose memory is given up between two updates."""

from __future__ import annotations

from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.rl.turns import LearnerMemory
from tests.support.models import small_config
from tests.support.training import run_steps, same, start, weights


def updates_with_a_break(context: ParallelContext, dtype: str) -> tuple[list[dict[str, float]], list[dict[str, float]], int]:
    """(metrics of four updates, metrics of the same with everything given up and taken back before the second and the fourth, bytes left in between). Raises
    AssertionError where the weights differ in the end."""
    kept, moved = start(context, small_config(dtype=dtype)), start(context, small_config(dtype=dtype))
    memory = LearnerMemory(moved, [], moves=True)
    curve, left = [], 0
    for step in range(4):
        if step % 2:
            memory.give()
            left += sum(parameter.untyped_storage().nbytes() for parameter in moved.chunks[0].parameters())
            left += sum(storage.nbytes() for lent in (memory._gradients, memory._states) for storage in lent._storages)
            memory.take_back()
        curve += run_steps(moved, step, step + 1, 4, context)
    straight = run_steps(kept, 0, 4, 4, context)
    assert same(weights(kept), weights(moved))
    return straight, curve, left
