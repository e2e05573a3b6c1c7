"""The routers' losses as pure functions, worked by hand and by their laws."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.rl.objective.router import cluster_mass, pathwise_loss, route_logprob, route_loss, router_kl

SCORES = st.lists(st.floats(-4, 4), min_size=4, max_size=4)


def logprobs(scores: list[float]) -> torch.Tensor:
    return torch.log_softmax(torch.tensor([scores], dtype=torch.float64), -1)


@settings(max_examples=30, deadline=None)
@given(SCORES, st.integers(1, 4))
def test_all_orders_of_experts_together_are_certain(scores: list[float], chosen: int) -> None:
    total = sum(float(route_logprob(logprobs(scores), torch.tensor([order])).exp()) for order in permutations(range(4), chosen))
    assert total == pytest.approx(1)


@settings(max_examples=30, deadline=None)
@given(SCORES, SCORES)
def test_the_distance_of_routers_is_never_negative_and_zero_of_itself(ours: list[float], theirs: list[float]) -> None:
    assert float(router_kl(logprobs(ours), logprobs(theirs))) >= -1e-12
    assert float(router_kl(logprobs(ours), logprobs(ours))) == 0


def test_pathwise_pulls_what_is_below_its_ceiling_by_its_weight() -> None:
    """Masses 0.6 and 0.2, ceilings 0.5, weights 2 and 3: -(2 * 0.5 + 3 * 0.2) = -1.6; the first has no gradient, the second -3."""
    mass_n = torch.tensor([0.6, 0.2], requires_grad=True)
    loss = pathwise_loss(mass_n, torch.tensor([0.5, 0.5]), torch.tensor([2.0, 3.0]))
    (gradient,) = torch.autograd.grad(loss, mass_n)
    assert loss.item() == pytest.approx(-1.6) and gradient.tolist() == [0, -3]


def test_the_mass_of_a_cluster_has_a_gradient_for_every_expert() -> None:
    """p = 1/2, 1/4, 1/4, cluster {1}: d p_1 / d logits = p_1 (e_1 - p) = (-1/8, 3/16, -1/16)."""
    scores = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    mass = cluster_mass(torch.log_softmax(scores, -1), torch.tensor([[False, True, False]]))
    (gradient,) = torch.autograd.grad(mass.sum(), scores)
    assert mass.item() == pytest.approx(0.25) and gradient[0].tolist() == pytest.approx([-1 / 8, 3 / 16, -1 / 16])


@pytest.mark.parametrize(("advantage", "ratio", "moves"), [(1.0, 1.05, True), (1.0, 1.2, False), (-1.0, 0.95, True), (-1.0, 0.8, False), (-1.0, 1.2, True)])
def test_a_route_stops_being_reinforced_at_its_bound(advantage: float, ratio: float, moves: bool) -> None:
    new = torch.tensor([ratio]).log().requires_grad_()
    loss = route_loss(new, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), 0.1)
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient.item() == pytest.approx(-advantage * ratio if moves else 0.0)
