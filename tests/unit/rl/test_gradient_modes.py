"""What each of `earl.mode` teaches the router, against the exact gradient of what it should (docs/studies/gradient_modes.md): all is enumerated.

J = E[r + lambda r b]:   grad J = E[grad log pi (r + lambda r b)] + E[lambda r grad b]
"""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from megatron_ext.rl.objective.router import route_logprob
from tools.studies.gradient_modes import CEILING, CLUSTER, LAMBDA, RIGHT, Bandit, capped_mass, chosen_share, exact, gate_mass, pathwise, router_pg, score

SEEDS = range(3)
PLANTED = 4


@pytest.fixture(params=SEEDS)
def bandit(request):
    return Bandit.make(request.param)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_without_a_bonus_the_score_is_the_exact_gradient(bandit):
    nothing = lambda logprobs_E, experts_K: torch.zeros((), dtype=torch.float64)  # noqa: E731
    close(score(bandit, nothing), exact(bandit, nothing, drawn=False))


@pytest.mark.parametrize("bonus", [gate_mass, capped_mass])
def test_the_score_lacks_exactly_the_gradient_of_the_bonus_itself(bandit, bonus):
    """grad J - score = lambda P(right) grad b, which is no rounding: from 2 % of grad J on."""
    right = (bandit.tokens_T(bandit.greedy()).exp() * RIGHT).sum().detach()
    missing = bandit.gradient(LAMBDA * right * bonus(bandit.scores_E(), bandit.greedy()))
    difference = exact(bandit, bonus, drawn=False) - score(bandit, bonus)
    close(difference, missing)
    assert difference.norm() > 0.02 * exact(bandit, bonus, drawn=False).norm()


def test_score_and_pathwise_together_are_the_exact_gradient(bandit):
    close(score(bandit, capped_mass) + pathwise(bandit), exact(bandit, capped_mass, drawn=False))


def test_only_pathwise_reaches_the_planted_expert_that_is_not_chosen(bandit):
    """Its logit is the last column: the score leaves it as it is, pathwise raises it; where routes are drawn it is reached as well."""
    assert PLANTED not in bandit.greedy()
    logit = lambda gradient: float(bandit.state_H @ gradient[:, PLANTED])  # noqa: E731
    assert abs(logit(score(bandit, capped_mass))) < 1e-15 > abs(logit(score(bandit, gate_mass)))
    assert logit(pathwise(bandit)) > 0
    assert logit(router_pg(bandit, chosen_share)) > 0


def test_router_pg_with_score_is_the_exact_gradient_where_the_bonus_is_of_the_routes_alone(bandit):
    close(score(bandit, chosen_share, drawn=True) + router_pg(bandit, chosen_share), exact(bandit, chosen_share, drawn=True))


def test_of_a_recorded_gate_mass_router_pg_lacks_only_what_moves_gates_within_a_route(bandit):
    """The missing part is E[lambda r grad b] with routes held fixed; it is smaller than what `score` lacks in all."""
    total = torch.zeros_like(bandit.router_HE)
    for order in permutations(range(5), 2):
        experts_K = torch.tensor(order)
        chance = route_logprob(bandit.scores_E()[None], experts_K[None])[0].exp().detach()
        right = (bandit.tokens_T(experts_K).exp() * RIGHT).sum().detach()
        mass = gate_mass(bandit.scores_E(), experts_K)
        if mass.requires_grad and CLUSTER[experts_K].any():
            total += bandit.gradient(LAMBDA * chance * right * mass)
    ours = score(bandit, gate_mass, drawn=True) + router_pg(bandit, gate_mass)
    whole = exact(bandit, gate_mass, drawn=True)
    close(whole - ours, total)
    assert (whole - ours).norm() < (whole - score(bandit, gate_mass, drawn=True)).norm()


def test_beyond_its_ceiling_the_mass_is_not_pulled():
    bandit = Bandit.make(0)
    with torch.no_grad():
        bandit.router_HE[:, CLUSTER] += 3.0
    assert capped_mass(bandit.scores_E(), bandit.greedy()) == CEILING
    assert pathwise(bandit).abs().max() == 0
