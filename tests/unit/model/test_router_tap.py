"""Routes are recorded as they were taken and replayed as they are given; gradients still reach the router."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.errors import UserError
from megatron_ext.model.assembly import VisionLanguageModel, build_model
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.parallel.stages import pipeline_stages
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


CLUSTER = [(0, 3), (0, 6), (2, 1)]


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": False}, {"moe_score_function": "sigmoid", "moe_expert_bias": True}], ids=["chosen", "all", "bias"])
def test_masked_experts_are_never_chosen_and_the_others_share_the_gates_as_ever(context: ParallelContext, changes: dict[str, object]) -> None:
    """By hand: the best two of the scores without experts 3 and 6, and gates that these two would have had."""
    model = build_model(small_config(moe_aux_loss_coeff=0.0, **changes), IMAGE, context, seed=2)
    router = model.decoder.layers[0].mlp.router
    logits_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    with model.router_tap.mask(CLUSTER):
        gates, experts = router.choose(logits_TE)
    allowed = [0, 1, 2, 4, 5, 7]
    expected = torch.tensor(allowed)[logits_TE[:, allowed].topk(2, dim=1).indices]
    assert torch.equal(experts, expected)
    chosen = logits_TE.gather(1, expected)
    if "moe_score_function" in changes:
        torch.testing.assert_close(gates, chosen.sigmoid() / chosen.sigmoid().sum(1, keepdim=True))
    else:
        torch.testing.assert_close(gates, chosen.softmax(1) if not changes else logits_TE.softmax(1).gather(1, expected))


def test_a_mask_holds_for_its_layers_alone_and_ends_with_its_block(model: VisionLanguageModel) -> None:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad(), model.router_tap.record() as routes:
            logits = model(small_batch())
        return logits, routes.experts(72)

    before, routes = run()
    with model.router_tap.mask([]):
        nothing, _ = run()
    with model.router_tap.mask(CLUSTER):
        masked, others = run()
    with pytest.raises(ZeroDivisionError), model.router_tap.mask(CLUSTER):
        _ = 1 / 0
    after, again = run()
    assert torch.equal(before, nothing) and torch.equal(before, after) and torch.equal(routes, again)
    assert not torch.equal(before, masked)
    for layer, gone in enumerate([{3, 6}, set(), {1}]):
        assert gone <= set(routes[:, layer].flatten().tolist()) and not gone & set(others[:, layer].flatten().tolist())


def test_a_mask_that_the_model_cannot_do_without_is_refused(model: VisionLanguageModel) -> None:
    seven = [(1, expert) for expert in range(7)]
    with pytest.raises(UserError, match=r"leaves 1 of 8 experts in layer 1, and a token needs 2; mask at most 6"), model.router_tap.mask(seven):
        pass
    with pytest.raises(UserError, match=r"names expert 8 of layer 0, and the model has 3 layers of 8 experts"), model.router_tap.mask([(0, 8)]):
        pass
    with model.router_tap.mask([(0, 1)]), pytest.raises(RuntimeError, match="already masked"), model.router_tap.mask([(0, 2)]):
        pass


def test_replayed_routes_are_obeyed_under_a_mask_and_what_is_live_is_masked(model: VisionLanguageModel) -> None:
    forced = torch.full((3, 24, 3, 2), -1)
    forced[0, 5:9] = torch.tensor([6, 3])
    with torch.no_grad(), model.router_tap.mask([(0, 3), (0, 6)]), model.router_tap.replay(forced) as routes:
        logits = model(small_batch())
    used = by_row(routes.experts(72))[:, :, 0]
    assert (used[0, 5:9] == torch.tensor([6, 3])).all() and torch.isfinite(logits).all()
    used[0, 5:9] = 0
    assert not set(used.flatten().tolist()) & {3, 6}


def test_layers_of_a_mask_count_over_the_whole_model_and_leave_out_dense_ones(context: ParallelContext) -> None:
    """Layer 0 is dense, so layer 1 of the routes is layer 2 of the model."""
    model = build_model(small_config(dense_layers=(0,)), IMAGE, context, seed=2)
    with model.router_tap.mask([(1, 4)]):
        assert masked_of(model) == [[], [4]]


def test_a_pipeline_stage_masks_its_own_layers(context: ParallelContext) -> None:
    """Layers 0 .. 3 on two stages; all are told the same."""
    config = small_config(num_layers=4)
    chunks = [VisionLanguageModel(config, IMAGE, context, stage) for stage in pipeline_stages(config, 2, 1, True)]
    for chunk, expected in zip(chunks, ([[], [4]], [[], [1, 2]]), strict=True):
        with chunk.router_tap.mask([(1, 4), (3, 1), (3, 2)]):
            assert masked_of(chunk) == expected


def masked_of(model: VisionLanguageModel) -> list[list[int]]:
    taps = [router.router_replay for router in model.decoder.routers()]
    return [[] if tap.masked_E is None else tap.masked_E.nonzero().flatten().tolist() for tap in taps]
