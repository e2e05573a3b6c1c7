"""What the words alone explain: the mass that an answer would have if every token were routed as its id usually is.

An expert that follows one word is not a skill's expert only because the skill's answers use the word. `TokenTable` learns the usual gates of each token id
from the same answers and `expected` predicts the mass of an answer from its token ids; discovery subtracts that prediction.

    mean_v = mean over skills of the mean gates of id v in the skill's answers          (skill-balanced: a frequent skill does not own the id)
    expected gates of v = (n_v mean_v + kappa mean) / (n_v + kappa)                     (shrunken to the mean over all tokens; n_v: times v was seen)
"""

from __future__ import annotations

import numpy as np

from megatron_ext.batch.routing import RouteTrace, gate_mass
from megatron_ext.shapes import check_shape


class TokenTable:
    """Mean gates by token id. Add every answer first, then ask for predictions."""

    def __init__(self, num_experts: int, kappa: float) -> None:
        self._num_experts, self._kappa = num_experts, kappa
        self._sums: dict[int, dict[str, tuple[np.ndarray, int]]] = {}
        self._all: dict[str, tuple[np.ndarray, int]] = {}

    def add(self, trace: RouteTrace, tokens_S: np.ndarray, start: int, stop: int, skill: str) -> None:
        """Adds positions [start, stop) of an answer; `tokens_S[s]` is the token that was fed at position s."""
        self._check(trace, tokens_S)
        for position in range(start, stop):
            gates_LE = gate_mass(trace, self._num_experts, position, position + 1)
            _accumulate(self._sums.setdefault(int(tokens_S[position]), {}), skill, gates_LE)
            _accumulate(self._all, skill, gates_LE)

    def expected(self, tokens_T: np.ndarray) -> np.ndarray:
        """[L, E]: the mean over these tokens of the expected gates of their ids. Raises ValueError on an empty table or span."""
        if not self._all or len(tokens_T) == 0:
            raise ValueError("expected gates need at least one token and a table that has seen one")
        overall_LE = _balanced_mean(self._all)
        ids, counts = np.unique(tokens_T, return_counts=True)
        gates_VLE = np.stack([self._shrunken(int(token), overall_LE) for token in ids])
        return np.asarray(np.tensordot(counts / len(tokens_T), gates_VLE, axes=1))

    def _shrunken(self, token: int, overall_LE: np.ndarray) -> np.ndarray:
        by_skill = self._sums.get(token)
        if by_skill is None:
            return overall_LE
        seen = sum(count for _, count in by_skill.values())
        return np.asarray((seen * _balanced_mean(by_skill) + self._kappa * overall_LE) / (seen + self._kappa))

    @staticmethod
    def _check(trace: RouteTrace, tokens_S: np.ndarray) -> None:
        check_shape("tokens_S", tokens_S, None)
        if len(tokens_S) < len(trace):
            raise ValueError(f"{len(trace)} routed positions but only {len(tokens_S)} tokens")


def _accumulate(sums: dict[str, tuple[np.ndarray, int]], skill: str, gates_LE: np.ndarray) -> None:
    total, count = sums.get(skill, (0.0, 0))
    sums[skill] = (total + gates_LE, count + 1)


def _balanced_mean(by_skill: dict[str, tuple[np.ndarray, int]]) -> np.ndarray:
    return np.asarray(np.mean([total / count for total, count in by_skill.values()], axis=0))
