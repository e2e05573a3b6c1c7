"""Noise for routes that are drawn: like a token, a route depends on its row's seed and position, and on nothing else in the batch.

    g = -log(-log u):  the K largest of log p + g are a draw of K without replacement from p, in their order (Gumbel-top-k, arXiv 1903.06059)

One uniform number per (seed, position, layer, expert), from the hash of `sampling.uniforms`, made where the router computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

STREAM = 0x5851F42D4C957F2D
"""Turns a row's seed into that of its routes, whose numbers then say nothing of its tokens'."""


def gumbels(seeds_R: torch.Tensor, places_R: torch.Tensor, layers: Sequence[int], num_experts: int) -> torch.Tensor:
    """float32 [M, R, E] for M layers. `places_R`: how many tokens the answer has; both int64."""
    layers_M = torch.tensor(layers, dtype=torch.int64, device=seeds_R.device)
    rows_MR = _mixed(_mixed(seeds_R ^ STREAM, places_R)[None], layers_M[:, None])
    bits_MRE = _mixed(rows_MR[:, :, None], torch.arange(num_experts, device=seeds_R.device))
    uniform_MRE = (_shifted(bits_MRE, 11).double() + 0.5) * 2.0**-53  # never 0
    return (-(-uniform_MRE.log()).log()).float()


def _mixed(seeds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """splitmix64, in the two's complement that int64 wraps around in."""
    z = seeds + (counters + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, zeros moving in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)
