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
    which sum to 1 over K. A position's row exists once its token was fed to the model, so a sequence of n tokens has n - 1 rows."""

    experts_SLK: np.ndarray
    gates_SLK: np.ndarray

    def __post_init__(self) -> None:
        check_shape("experts_SLK", self.experts_SLK, None, None, None)
        check_shape("gates_SLK", self.gates_SLK, *self.experts_SLK.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Positions, MoE layers, experts of a token."""
        return self.experts_SLK.shape

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return self.experts_SLK.nbytes + self.gates_SLK.nbytes

    def rows(self, start: int, stop: int) -> RouteTrace:
        """Those of positions [start, stop), not copied where they lie together."""
        whole = (start, stop) == (0, len(self))
        return self if whole else RouteTrace(self.experts_SLK[start:stop], self.gates_SLK[start:stop])


class ContinuedRoutes(RouteTrace):
    """Routes of a prompt, one object for all answers to it, and of an answer behind it: in memory and in a message the prompt's are once. `experts_SLK` and
    `gates_SLK` are joined at every look: ask for `rows` where a part will do."""

    def __init__(self, prompt: RouteTrace, own: RouteTrace) -> None:
        check_shape("own.experts_SLK", own.experts_SLK, None, *prompt.shape[1:])
        object.__setattr__(self, "prompt", prompt)
        object.__setattr__(self, "own", own)

    prompt: RouteTrace
    own: RouteTrace

    @property
    def experts_SLK(self) -> np.ndarray:
        return np.concatenate([self.prompt.experts_SLK, self.own.experts_SLK])

    @property
    def gates_SLK(self) -> np.ndarray:
        return np.concatenate([self.prompt.gates_SLK, self.own.gates_SLK])

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.prompt) + len(self.own), *self.prompt.shape[1:]

    @property
    def nbytes(self) -> int:
        return self.prompt.nbytes + self.own.nbytes

    def rows(self, start: int, stop: int) -> RouteTrace:
        split = len(self.prompt)
        if stop <= split:
            return self.prompt.rows(start, stop)
        if start >= split:
            return self.own.rows(start - split, stop - split)
        return ContinuedRoutes(self.prompt.rows(start, split), self.own.rows(0, stop - split))


def route_digest(experts_SLK: np.ndarray) -> str:
    """SHA-256 over the expert ids and their shape; the same for uint8 and wider integers, so rollout and learner can compare."""
    experts = np.ascontiguousarray(experts_SLK, dtype=np.int32)
    return hashlib.sha256(repr(experts.shape).encode() + experts.tobytes()).hexdigest()


def gate_mass(trace: RouteTrace, num_experts: int, start: int, stop: int) -> np.ndarray:
    """Mean gate mass float64 [L, E] over positions [start, stop): sums to 1 over E. Raises ValueError on an empty span.

    This is `P[n, l, e]`, the unit of expert-cluster discovery (`earl`).
    """
    if not 0 <= start < stop <= len(trace):
        raise ValueError(f"span [{start}, {stop}) is empty or outside the {len(trace)} recorded positions")
    return _mean_mass(trace.rows(start, stop), num_experts)


def gate_mass_at(trace: RouteTrace, num_experts: int, chosen_S: np.ndarray) -> np.ndarray:
    """`gate_mass` over positions that need not lie together: `chosen_S` bool, of the first positions. nan where none is chosen."""
    first = trace.rows(0, len(chosen_S))
    if not chosen_S.any():
        return np.full((trace.shape[1], num_experts), np.nan)
    return _mean_mass(RouteTrace(first.experts_SLK[chosen_S], first.gates_SLK[chosen_S]), num_experts)


def _mean_mass(span: RouteTrace, num_experts: int) -> np.ndarray:
    experts = span.experts_SLK.astype(np.int64)
    num_tokens, num_layers, _ = experts.shape
    mass = np.zeros((num_layers, num_experts))
    layers = np.broadcast_to(np.arange(num_layers)[None, :, None], experts.shape)
    np.add.at(mass, (layers, experts), span.gates_SLK.astype(np.float64))
    return mass / num_tokens
