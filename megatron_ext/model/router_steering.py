"""What goes beyond looking at routes: choosing experts by chance, and giving a router's scores a gradient of their own.

    with drawing(model.router_tap, noise):      the next expert is the one whose score and Gumbel noise are the most: experts in the order of a draw without
        decode(model, tokens, memory)           replacement from softmax(scores), arXiv 1903.06059; gates are made of scores without noise
    with pulling(model.router_tap, terms):      the gradient of terms[layer](log p, experts) joins that of the loss
        model(inputs)

A term hangs on the values that the router chose, as Megatron's balancing loss does on the gates: its gradient starts where theirs arrives, on whatever rank, in
whatever pipeline stage, and in a layer that is computed again only then. Its value is a part of this rank's loss SUM, divided with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_ext.model.router_tap import RouterTap, Steer

Term = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]
"""(log p [tokens, E], experts [tokens, K]) -> a loss, or None where there is nothing to pull. Called without gradients too, where a layer is run for the first
time of two."""


def log_softmax_of(scores_TE: torch.Tensor, are_probabilities: bool) -> torch.Tensor:
    """What a softmax router scores by, as log-probs in fp32: it may have taken the softmax already (`norm_topk_prob` false)."""
    scores_TE = scores_TE.float()
    return scores_TE.clamp(min=torch.finfo(torch.float32).tiny).log() if are_probabilities else torch.log_softmax(scores_TE, dim=-1)


@contextmanager
def pulling(tap: RouterTap, terms: Sequence[Term], are_probabilities: bool) -> Iterator[None]:
    """One term for each layer that is held here."""

    def steer(term: Term) -> Steer:
        def steered(scores_TE: torch.Tensor, experts_TK: torch.Tensor, values_TK: torch.Tensor) -> torch.Tensor:
            loss = term(log_softmax_of(scores_TE, are_probabilities), experts_TK)
            return values_TK if loss is None or not loss.requires_grad else MoEAuxLossAutoScaler.apply(values_TK, loss)

        return steered

    for layer_tap, term in zip(tap.taps, terms, strict=True):
        layer_tap.steer = steer(term)
    try:
        yield
    finally:
        for layer_tap in tap.taps:
            layer_tap.steer = None


@dataclass(frozen=True)
class Noise:
    """Gumbel noise of R rows in some layers: `noise_MRE`, for the layers `layers_M` (of those with experts), 0 where a row's routes are not drawn. Row r stands
    at the place r of the whole tensor-parallel group, of which this is rank `rank`."""

    layers_M: tuple[int, ...]
    noise_MRE: torch.Tensor
    rank: int = 0


@contextmanager
def drawing(tap: RouterTap, noise: Noise | None, are_probabilities: bool) -> Iterator[None]:
    """None, or no layers: routes are the most likely ones."""
    drawn = noise.layers_M if noise is not None else ()
    for place, layer in enumerate(drawn):
        assert noise is not None
        tap.taps[layer].draw = _perturbed(noise.noise_MRE[place], noise.rank, are_probabilities)
    try:
        yield
    finally:
        for layer in drawn:
            tap.taps[layer].draw = None


def _perturbed(noise_RE: torch.Tensor, rank: int, are_probabilities: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def draw(scores_TE: torch.Tensor) -> torch.Tensor:
        own_TE = noise_RE[rank * len(scores_TE) : (rank + 1) * len(scores_TE)]
        if not len(own_TE):
            return scores_TE
        ranked_TE = log_softmax_of(scores_TE, True) if are_probabilities else scores_TE.float()
        return torch.cat([ranked_TE[: len(own_TE)] + own_TE, ranked_TE[len(own_TE) :]])

    return draw
