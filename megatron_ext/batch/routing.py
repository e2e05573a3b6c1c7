"""Router decisions as data: which experts every token went to, and with which gates. Recorded at rollout, replayed by the learner, read by EARL."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from megatron_ext.shapes import check_shape


def expert_dtype(num_experts: int) -> np.dtype:
    """The smallest unsigned type that holds an expert id: 1 byte up to 256 experts, else 2."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


@dataclass(frozen=True)
class RouteTrace:
    """Routes of one sequence. `experts_SLK` uint8/uint16: the experts of position s in MoE layer l, in top-k ORDER; `gates_SLK` float16: their gates,
    which sum to 1
    over K. A position's row exists once its token was fed to the model, so a sequence of n tokens has n - 1 rows."""

    experts_SLK: np.ndarray
    gates_SLK: np.ndarray

    def __post_init__(self) -> None:
        check_shape("experts_SLK", self.experts_SLK, None, None, None)
        check_shape("gates_SLK", self.gates_SLK, *self.experts_SLK.shape)

    @property
    def nbytes(self) -> int:
        return self.experts_SLK.nbytes + self.gates_SLK.nbytes


def route_digest(experts_SLK: np.ndarray) -> str:
    """SHA-256 over the expert ids and their shape; the same for uint8 and wider integers, so rollout and learner can compare."""
    experts = np.ascontiguousarray(experts_SLK, dtype=np.int32)
    return hashlib.sha256(repr(experts.shape).encode() + experts.tobytes()).hexdigest()


def gate_mass(trace: RouteTrace, num_experts: int, start: int, stop: int) -> np.ndarray:
    """Mean gate mass float64 [L, E] over positions [start, stop): sums to 1 over E. Raises ValueError on an empty span.

    This is `P[n, l, e]`, the unit of expert-cluster discovery (`earl`).
    """
    if not 0 <= start < stop <= len(trace.experts_SLK):
        raise ValueError(f"span [{start}, {stop}) is empty or outside the {len(trace.experts_SLK)} recorded positions")
    experts = trace.experts_SLK[start:stop].astype(np.int64)
    num_tokens, num_layers, _ = experts.shape
    mass = np.zeros((num_layers, num_experts))
    layers = np.broadcast_to(np.arange(num_layers)[None, :, None], experts.shape)
    np.add.at(mass, (layers, experts), trace.gates_SLK[start:stop].astype(np.float64))
    return mass / num_tokens
