"""One optimizer step: the loss is a mean over all tokens, whatever the split, and nothing moves when a number is not finite."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ext.batch.metric import Metric
from megatron_ext.errors import UserError
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.losses import Microbatch, NextToken
from megatron_ext.training.megatron_engine import MegatronEngine
from megatron_ext.training.step import optimizer_step
from tests.support.models import small_config
from tests.support.training import own_microbatches, run_steps, same, start, weights


def gradients(state: MegatronEngine) -> dict[str, torch.Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in state.chunks[0].named_parameters()}


@pytest.mark.parametrize("rows", [4, 3, 2, 1])
def test_eight_rows_give_the_same_gradient_in_any_number_of_microbatches(context: ParallelContext, rows: int) -> None:
    """The rows have different numbers of targets, so a mean of means would differ. No auxiliary loss: it is a product of means over its microbatch."""
    model = small_config(moe_aux_loss_coeff=0.0)
    whole, split = start(context, model), start(context, model)
    one, many = run_steps(whole, 0, 1, 8, context)[0], run_steps(split, 0, 1, rows, context)[0]
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)
    assert one["num_tokens"] == many["num_tokens"]
    assert one["grad_norm"] == pytest.approx(many["grad_norm"], rel=1e-5)
    other = gradients(split)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_loss_is_torchs_cross_entropy_over_the_targets(context: ParallelContext) -> None:
    state = start(context)
    (batch,) = own_microbatches(0, 8, context)
    with torch.no_grad():
        total, count, _ = NextToken().loss(state.wrapped[0], batch, state.wrapped[0](batch.inputs))
    assert run_steps(state, 0, 1, 2, context)[0]["loss"] == pytest.approx(float(total / count), rel=1e-5)


def test_the_auxiliary_loss_weighs_its_coefficient_however_few_tokens_are_targets(context: ParallelContext) -> None:
    """With the main loss switched off, the router's gradient is that of coefficient * aux alone, with 8 targets as with all of them."""

    class WithoutMain(NextToken):
        def loss(self, model: Any, batch: Microbatch, output: torch.Tensor) -> Any:
            return 0.0 * output.sum(), batch.mask_BS.sum().to(torch.int32), {}

    def fewer(batch: Microbatch, num_targets: int) -> Microbatch:
        """The same rows with their first targets only."""
        kept_BS = (batch.mask_BS.flatten().cumsum(0) <= num_targets).view_as(batch.mask_BS) * batch.mask_BS
        return replace(batch, mask_BS=kept_BS, inputs=replace(batch.inputs, aux_weight=float(kept_BS.sum())))

    norms = []
    for num_targets in (8, 60):
        state = start(context, small_config(moe_aux_loss_coeff=0.1))
        norms.append(optimizer_step(state, [fewer(batch, num_targets) for batch in own_microbatches(0, 8, context)], WithoutMain(), context)["grad_norm"])
    assert norms[0] > 1e-3
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_reported(context: ParallelContext) -> None:
    state = start(context)
    (metrics,) = run_steps(state, 0, 1, 8, context)
    assert metrics["grad_norm"] > state.clip_grad
    squares = sum(float(p.grad.double().square().sum()) for part in state.optimizer.chained_optimizers for p in part.get_parameters())
    assert math.sqrt(squares) == pytest.approx(state.clip_grad, rel=1e-4)


def test_metrics_of_the_loss_function_are_merged_over_microbatches(context: ParallelContext) -> None:
    """Means by their counts, extremes as extremes: (1 + 6) / (1 + 2) and max(1, 2)."""
    parts = iter([(Metric(1.0, 1), Metric(1.0, 1, "max")), (Metric(6.0, 2), Metric(2.0, 1, "max"))])

    class WithParts(NextToken):
        def loss(self, model: Any, batch: Microbatch, output: torch.Tensor) -> Any:
            total, count, _ = super().loss(model, batch, output)
            return total, count, dict(zip(("mean", "peak"), next(parts), strict=True))

    metrics = optimizer_step(start(context), own_microbatches(0, 4, context), WithParts(), context)
    assert metrics["mean"] == pytest.approx(7 / 3)
    assert metrics["peak"] == 2.0


def test_router_metrics_describe_the_step_alone(context: ParallelContext) -> None:
    """What evaluation or another model routed in between does not enter."""
    first, second = start(context), start(context)
    expected = run_steps(first, 0, 1, 4, context)[0]
    (batch,) = own_microbatches(1, 8, context)
    with torch.no_grad():
        second.wrapped[0](batch.inputs)
    start(context).wrapped[0](batch.inputs)
    assert run_steps(second, 0, 1, 4, context)[0] == expected
    assert expected["moe/aux_loss"] == pytest.approx(1.0, abs=0.3)
    assert 0 <= expected["moe/max_vio"] <= 3
    assert 0 < expected["moe/load_entropy"] <= 1


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_changes_nothing(context: ParallelContext, scale: float) -> None:
    class Broken(NextToken):
        def loss(self, model: Any, batch: Microbatch, output: torch.Tensor) -> Any:
            total, count, metrics = super().loss(model, batch, output)
            return total * scale, count, metrics

    state = start(context)
    run_steps(state, 0, 1, 8, context)
    before = weights(state)
    with pytest.raises(UserError, match=rf"step 2: the loss is {scale}"):
        optimizer_step(state, own_microbatches(1, 8, context), Broken(), context)
    assert state.step == 1
    assert same(before, weights(state))
    assert math.isfinite(run_steps(state, 1, 2, 8, context)[0]["grad_norm"])


def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing(context: ParallelContext) -> None:
    """sqrt at 0: a finite loss with an infinite slope."""

    class Steep(NextToken):
        def loss(self, model: Any, batch: Microbatch, output: torch.Tensor) -> Any:
            total, count, metrics = super().loss(model, batch, output)
            return total + (total - total.detach()).sqrt(), count, metrics

    state = start(context)
    before = weights(state)
    with pytest.raises(UserError, match="step 1: the gradient norm is"):
        optimizer_step(state, own_microbatches(0, 8, context), Steep(), context)
    assert same(before, weights(state))
