"""The update over runs of gradients moves weights as Megatron's own walk over parameters does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.megatron_engine import MegatronEngine
from megatron_ext.training.update import RUN_NUMEL, merged
from tests.support.models import small_config
from tests.support.training import ADAM, run_steps, start


class Walking(MegatronEngine):
    """Norm, clipping and Adam as Megatron's optimizer does them."""

    def gradient_norm(self) -> float:
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    @torch.no_grad()
    def update(self, norm: float) -> None:
        if norm > self.clip_grad:
            for part in self.optimizer.chained_optimizers:
                torch._foreach_mul_([parameter.grad for parameter in part.get_parameters()], self.clip_grad / (norm + 1e-6))
        self.scheduler.step(1)
        self.optimizer.step_with_ready_grads()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("clip_grad", [0.01, 1e9])
def test_norms_and_weights_are_those_of_megatrons_walk_over_parameters(context: ParallelContext, dtype: str, clip_grad: float) -> None:
    """Adam's epsilon is large: it would magnify the rounding of gradients that are zero."""
    found = []
    for kind in (Walking, MegatronEngine):
        engine = start(context, small_config(dtype=dtype), optimizer=ADAM.model_copy(update={"clip_grad": clip_grad, "eps": 1e-3}))
        curve = run_steps(kind(**{name: getattr(engine, name) for name in engine.__dataclass_fields__}), 0, 3, 4, context)
        found.append((curve, dict(engine.chunks[0].named_parameters())))
    (expected, theirs), (got, ours) = found
    assert [step["grad_norm"] for step in got] == pytest.approx([step["grad_norm"] for step in expected], rel=1e-5)
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-5 if dtype == "fp32" else 2**-7, atol=1e-6, msg=name)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.data())
def test_runs_hold_every_number_once_whatever_the_order(sizes: list[int], data: st.DataObject) -> None:
    parts = list(torch.arange(float(sum(sizes))).split(sizes))
    kept = [part for part in parts if data.draw(st.booleans())]
    runs = merged(data.draw(st.permutations(kept)))
    assert torch.cat([torch.empty(0), *runs]).tolist() == torch.cat([torch.empty(0), *kept]).tolist()
    assert len(runs) <= len(kept) and all(len(run) <= RUN_NUMEL["cpu"] for run in runs)


def test_long_runs_are_cut_and_share_their_memory_with_what_they_are_made_of() -> None:
    most = RUN_NUMEL["cpu"]
    whole = torch.zeros(2 * most + 3)
    runs = merged(whole.split(1000))
    assert [len(run) for run in runs] == [most, most, 3]
    whole.fill_(2.0)
    assert all(bool((run == 2).all()) for run in runs)


def test_where_buffers_lie_in_memory_does_not_change_the_order_of_the_sum() -> None:
    """Else two processes with the same gradients would have norms that differ in their last digit: a run that was resumed would not be the one that was not."""
    buffers = sorted([torch.empty(8) for _ in range(6)], key=torch.Tensor.data_ptr)
    for order in (buffers, buffers[::-1], buffers[3:] + buffers[:3]):
        for number, buffer in enumerate(order):
            buffer.copy_(torch.arange(8.0) + 10 * number)
        assert [run.tolist() for run in merged([piece for buffer in order for piece in buffer.split(3)])] == [buffer.tolist() for buffer in order]
