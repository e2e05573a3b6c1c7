"""CLVR's size is measured where it enters: zero at the start, and by hand on the model's own tensors."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.model.assembly import build_model
from megatron_ext.model.sight import Sight
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.clvr_metrics import RefinementSize, entropy_sums
from tests.support.models import IMAGE, open_gates, small_batch, small_config


def test_taps_add_nothing_at_initialisation_and_their_gates_are_shut(context: ParallelContext) -> None:
    model = build_model(small_config(), IMAGE, context)
    size = RefinementSize([model])
    model(small_batch())
    assert {name: value for name, value in size.metrics(context).items() if "entropy" not in name} == {
        f"clvr/tap{tap}/{name}": 0.0 for tap in (0, 1) for name in ("update_ratio", "gate")
    }


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


def test_the_entropy_is_one_where_a_tap_looks_everywhere_alike_and_zero_where_it_looks_at_one_token() -> None:
    """Two positions see four tokens, a third one sees two; keys that are all 0 tell none of them apart, a huge one takes all."""
    sight = Sight(torch.tensor([[0, 0, 2]]), torch.tensor([[4, 4, 4]]), torch.ones(1, 3, dtype=torch.bool))
    query, keys = torch.ones(3, 1, 2, 4), torch.zeros(1, 2, 4, 4)
    torch.testing.assert_close(entropy_sums(query, keys, sight), torch.tensor([6.0, 6.0], dtype=torch.float64))
    keys[:, :, 2] = 1e3
    torch.testing.assert_close(entropy_sums(query, keys, sight), torch.tensor([0.0, 6.0], dtype=torch.float64))
    nowhere = Sight(sight.from_BS, sight.from_BS, sight.inject_BS)
    assert entropy_sums(query, keys, nowhere).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["scalar", "channel", "dynamic"])
def test_gates_and_entropies_are_measured_once_a_step_whatever_their_kind(context: ParallelContext, kind: str) -> None:
    config = small_config(clvr=small_config().clvr.model_copy(update={"gate_kind": kind}))
    model = build_model(config, IMAGE, context)
    size = RefinementSize([model])
    for tap in model.decoder.taps:
        if kind == "dynamic":
            tap.gate.data[-1] = 0.5
    model(small_batch())
    found = size.metrics(context)
    assert found["clvr/tap0/gate"] == pytest.approx(0.4621 if kind == "dynamic" else 0.0, abs=1e-4)  # tanh(0.5)
    assert 0.1 < found["clvr/tap0/attention_entropy"] < 1
