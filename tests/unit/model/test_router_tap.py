"""Routes are recorded as they were taken and replayed as they are given; gradients still reach the router."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.parallel.groups import ParallelContext
from tests.support.models import IMAGE, small_batch, small_config


@pytest.fixture(scope="module")
def model(context: ParallelContext) -> VisionLanguageModel:
    return build_model(small_config(moe_aux_loss_coeff=0.0), IMAGE, context, seed=2)


def by_row(flat: torch.Tensor, rows: int = 3) -> torch.Tensor:
    return flat.unflatten(0, (-1, rows)).transpose(0, 1)


def test_recorded_routes_are_the_routers_own_top_k_in_order(model: VisionLanguageModel) -> None:
    """The router's logits, seen by a hook, give the same ids and softmax gates by hand."""
    logits: list[torch.Tensor] = []
    router = model.decoder.layers[1].mlp.router
    hook = router.register_forward_hook(lambda module, args, _: logits.append(module.gating(args[0])))
    with torch.no_grad(), model.router_tap.record() as routes:
        model(small_batch())
    hook.remove()
    values, ids = logits[0].flatten(0, 1).topk(2, dim=-1)
    assert torch.equal(routes.experts(72)[:, 1], ids)
    torch.testing.assert_close(routes.gates(72)[:, 1], values.softmax(-1))


def test_replaying_what_was_recorded_changes_nothing(model: VisionLanguageModel) -> None:
    batch = small_batch()
    with torch.no_grad(), model.router_tap.record() as recorded:
        live = model(batch)
    experts = by_row(recorded.experts(72))
    with torch.no_grad(), model.router_tap.replay(experts) as replayed:
        again = model(batch)
    assert torch.equal(live, again)
    assert torch.equal(by_row(replayed.experts(72)), experts)


def test_replayed_routes_are_obeyed_and_minus_one_is_routed_live(model: VisionLanguageModel) -> None:
    batch = small_batch()
    with torch.no_grad(), model.router_tap.record() as recorded:
        model(batch)
    live = by_row(recorded.experts(72))
    forced = torch.full_like(live, -1)
    forced[0, 5:9] = torch.tensor([6, 1])
    with torch.no_grad(), model.router_tap.replay(forced) as replayed:
        model(batch)
    used = by_row(replayed.experts(72))
    assert (used[0, 5:9] == torch.tensor([6, 1])).all()
    assert torch.equal(used[1:], live[1:]) and torch.equal(used[0, :5], live[0, :5])


def test_gradients_reach_the_router_through_replayed_routes(model: VisionLanguageModel) -> None:
    batch = small_batch()
    experts = torch.tensor([3, 4]).expand(3, 24, 3, 2)
    model.zero_grad()
    with model.router_tap.replay(experts):
        model(batch).square().mean().backward()
    gradient = model.decoder.layers[0].mlp.router.weight.grad
    assert gradient[3].abs().max() > 0 and gradient[0].abs().max() == 0


def test_routes_of_the_wrong_shape_are_refused(model: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match="2 layers, the model has 3"), model.router_tap.replay(torch.zeros(3, 24, 2, 2, dtype=torch.int64)):
        pass
    with pytest.raises(ValueError, match=r"shape \(69, 2\), the router sees \(72, 2\)"), model.router_tap.replay(torch.zeros(3, 23, 3, 2, dtype=torch.int64)):
        model(small_batch())


def test_routes_that_nobody_consumed_are_an_error(model: VisionLanguageModel) -> None:
    with pytest.raises(RuntimeError, match="consumed once per layer"), model.router_tap.replay(torch.zeros(3, 24, 3, 2, dtype=torch.int64)):
        pass


def test_two_listeners_at_once_are_refused_and_the_first_goes_on(model: VisionLanguageModel) -> None:
    with model.router_tap.record(), pytest.raises(RuntimeError, match="already being recorded"), model.router_tap.record():
        pass
    with model.router_tap.record() as routes, torch.no_grad():
        model(small_batch())
    assert routes.experts(72).shape == (72, 3, 2)
