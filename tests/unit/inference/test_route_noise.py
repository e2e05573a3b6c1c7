"""Routes that are drawn: their noise is reproducible, and what it makes of scores is a draw without replacement."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from megatron_ext.inference.route_noise import _mixed, gumbels
from megatron_ext.inference.sampling import uniforms
from megatron_ext.model.router_steering import _perturbed
from megatron_ext.rl.objective.router import route_logprob


def test_its_hash_is_that_of_the_tokens_random_numbers() -> None:
    seeds, places = np.array([1, 2**62 + 5, 77]), np.array([0, 3, 100])
    bits = _mixed(torch.from_numpy(seeds), torch.from_numpy(places)).numpy().astype(np.uint64)
    assert ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).tolist() == uniforms(seeds, places).tolist()


def test_a_row_s_noise_does_not_know_its_company_nor_which_other_layers_are_drawn() -> None:
    seeds, places = torch.tensor([5, 9, 11]), torch.tensor([2, 2, 7])
    whole = gumbels(seeds, places, (0, 3, 4), 8)
    assert torch.equal(gumbels(seeds[1:2], places[1:2], (3,), 8), whole[1:2, 1:2])
    assert len(whole.flatten().unique()) == whole.numel() and torch.isfinite(whole).all()


def test_orders_of_experts_come_as_often_as_they_are_likely() -> None:
    """Four experts with p = 0.5, 0.25, 0.15, 0.1: of 20,000 draws of two each order has its share, within four standard deviations."""
    draws, logits = 20_000, torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    noise = gumbels(torch.arange(draws), torch.zeros(draws, dtype=torch.int64), (1,), 4)[0]
    chosen = _perturbed(noise, 0, False)(logits.expand(draws, -1)).topk(2).indices
    for order in permutations(range(4), 2):
        likely = float(route_logprob(logits[None], torch.tensor([order]))[0].exp())
        share = float((chosen == torch.tensor(order)).all(1).float().mean())
        assert share == pytest.approx(likely, abs=4 * (likely * (1 - likely) / draws) ** 0.5)


def test_a_rank_takes_the_noise_of_its_own_rows_and_padding_has_none() -> None:
    """Five rows on two ranks of three: the last place of the second rank is padding."""
    noise, scores = torch.arange(10.0).reshape(5, 2), torch.zeros(3, 2)
    assert torch.equal(_perturbed(noise, 0, False)(scores), noise[:3])
    assert torch.equal(_perturbed(noise, 1, False)(scores), torch.cat([noise[3:], torch.zeros(1, 2)]))
    assert torch.equal(_perturbed(noise, 2, False)(scores), scores)


def test_scores_that_are_probabilities_are_drawn_by_their_logarithm() -> None:
    probabilities, noise = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.0, 1.0]])
    assert torch.allclose(_perturbed(noise, 0, True)(probabilities), probabilities.log() + noise)
