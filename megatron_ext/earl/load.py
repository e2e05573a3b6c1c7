"""How evenly tokens are spread over experts, and the guard that watches it while a bonus pays for some of them.

    max_vio      = max_e c_e / mean_e c_e - 1                     0: even; E / K - 1: one set of K experts takes all   (arXiv 2408.15664, MaxVio)
    load_entropy = -sum_e p_e ln p_e / ln E,  p_e = c_e / sum c   1: even; ln K / ln E: one set of K experts takes all

The guard compares each layer with what it was in the first step, on the answers themselves: with MaxVio beyond 1.5 times that, or an entropy a tenth lower, the
bonus and the routers' terms weigh half in this step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.batch.routing import RouteTrace

MOST_VIO = 1.5
LEAST_ENTROPY = 0.9
WEIGHT_UNDER_GUARD = 0.5


def max_vio(counts_LE: np.ndarray) -> np.ndarray:
    """[L]."""
    return np.asarray(counts_LE.max(1) / counts_LE.mean(1) - 1.0)


def load_entropy(counts_LE: np.ndarray) -> np.ndarray:
    """[L], as a share of ln E."""
    share_LE = counts_LE / counts_LE.sum(1, keepdims=True)
    logs_LE = np.log(np.where(share_LE > 0, share_LE, 1.0))
    return np.asarray(-(share_LE * logs_LE).sum(1) / math.log(counts_LE.shape[1]))


@dataclass(frozen=True)
class Load:
    """Of every layer with experts."""

    max_vio: tuple[float, ...]
    entropy: tuple[float, ...]

    @classmethod
    def of(cls, counts_LE: np.ndarray) -> Load:
        return cls(tuple(max_vio(counts_LE).tolist()), tuple(load_entropy(counts_LE).tolist()))


def expert_counts(traces: Sequence[RouteTrace], num_experts: int) -> np.ndarray:
    """int64 [L, E]: how many of the positions went to each expert."""
    experts_NLK = np.concatenate([trace.experts_SLK for trace in traces])
    num_layers = experts_NLK.shape[1]
    places_NLK = experts_NLK + num_experts * np.arange(num_layers)[None, :, None]
    return np.bincount(places_NLK.reshape(-1), minlength=num_layers * num_experts).reshape(num_layers, num_experts)


def collapsing(now: Load, first: Load) -> list[str]:
    """What the guard says of each layer that is beyond; empty while all is well."""
    said = []
    for layer, (vio, entropy, vio_0, entropy_0) in enumerate(zip(now.max_vio, now.entropy, first.max_vio, first.entropy, strict=True)):
        if vio > MOST_VIO * vio_0:
            said.append(f"layer {layer}: MaxVio {vio:.3g}, at first {vio_0:.3g}")
        elif entropy < LEAST_ENTROPY * entropy_0:
            said.append(f"layer {layer}: load entropy {entropy:.3g}, at first {entropy_0:.3g}")
    return said
