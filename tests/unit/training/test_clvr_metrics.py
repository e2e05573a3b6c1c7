"""CLVR's size is measured where it enters: zero at the start, and by hand on the model's own tensors."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.model.assembly import build_model
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.clvr_metrics import RefinementSize
from tests.support.models import IMAGE, open_gates, small_batch, small_config


def test_taps_add_nothing_at_initialisation_and_their_gates_are_shut(context: ParallelContext) -> None:
    model = build_model(small_config(), IMAGE, context)
    size = RefinementSize([model])
    model(small_batch())
    assert size.metrics(context) == {f"clvr/tap{tap}/{name}": 0.0 for tap in (0, 1) for name in ("update_ratio", "gate")}


def test_the_ratio_is_that_of_root_mean_squares_over_all_forward_passes_since_the_reset(context: ParallelContext) -> None:
    model = build_model(small_config(), IMAGE, context)
    open_gates(model, 0.7)
    size = RefinementSize([model])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.decoder.injections[1].register_forward_hook(lambda module, inputs, output: seen.append(tuple(x.detach() for x in inputs)))
    model(small_batch(seed=3))
    size.reset()
    seen.clear()
    for seed in (0, 1):
        model(small_batch(seed=seed))
    with torch.no_grad():
        model(small_batch(seed=2))  # generation is not counted
    streams, refinements = (torch.cat([pair[side].flatten() for pair in seen[:2]]) for side in (0, 1))
    expected = float(refinements.square().mean().sqrt() / streams.square().mean().sqrt())
    found = size.metrics(context)
    assert found["clvr/tap1/update_ratio"] == pytest.approx(expected, rel=1e-5) and expected > 0.01
    assert found["clvr/tap1/gate"] == pytest.approx(0.604, abs=1e-3)
