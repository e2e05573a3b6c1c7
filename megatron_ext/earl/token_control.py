"""What the words alone explain: the mass that an answer would have if every token were routed as its id usually is.

An expert that follows one word is not a skill's expert only because the skill's answers use the word. `TokenTable` learns the usual gates of each token id
from the same answers and `expected` predicts the mass of an answer from its token ids; discovery subtracts that prediction.

    mean_v = mean over skills of the mean gates of id v in the skill's answers          (skill-balanced: a frequent skill does not own the id)
    expected gates of v = (n_v mean_v + kappa mean) / (n_v + kappa)                     (shrunken to the mean over all tokens; n_v: times v was seen)

Gates are float16, multiples of 2^-24, so that float64 adds up 2^29 of them without rounding: answers may come in any order.
"""

from __future__ import annotations

import numpy as np

from megatron_ext.batch.routing import RouteTrace
from megatron_ext.shapes import check_shape

_ALL = -1
"""Stands for every token id."""


class TokenTable:
    """Mean gates by token id, of all layers or some. Add every answer first, then ask for predictions. Takes 8 bytes for each expert, layer and (id, skill)."""

    def __init__(self, num_experts: int, kappa: float, layers: slice = slice(None)) -> None:
        self._num_experts, self._kappa, self._layers = num_experts, kappa, layers
        self._rows: dict[int, dict[str, int]] = {}
        self._sums_RLE = np.zeros((0, 0, num_experts))
        self._count_R = np.zeros(0, dtype=np.int64)
        self._first: list[int] = []
        self._shrunken: dict[int, np.ndarray] = {}

    def add(self, trace: RouteTrace, tokens_S: np.ndarray, start: int, stop: int, skill: str, order: int = 0) -> None:
        """Adds positions [start, stop) of an answer; `tokens_S[s]` is the token that was fed at position s. A mean over skills is rounded as if answers had
        come by ascending `order`."""
        check_shape("tokens_S", tokens_S, None)
        if len(tokens_S) < len(trace):
            raise ValueError(f"{len(trace)} routed positions but only {len(tokens_S)} tokens")
        self._shrunken.clear()
        span = trace.rows(start, stop)
        experts_TLK, gates_TLK = span.experts_SLK[:, self._layers], span.gates_SLK[:, self._layers].astype(np.float64)
        ids, which_T = np.unique(tokens_S[start:stop], return_inverse=True)
        row_V = np.array([self._row(int(token), skill, order, experts_TLK.shape[1]) for token in [*ids, _ALL]])
        layers_1L1 = np.arange(experts_TLK.shape[1])[None, :, None]
        for row_T in (row_V[which_T], np.full(len(which_T), row_V[-1])):
            np.add.at(self._sums_RLE, (row_T[:, None, None], layers_1L1, experts_TLK), gates_TLK)
            np.add.at(self._count_R, row_T, 1)

    def expected(self, tokens_T: np.ndarray) -> np.ndarray:
        """[L, E]: the mean over these tokens of the expected gates of their ids. Raises ValueError on an empty table or span."""
        if _ALL not in self._rows or len(tokens_T) == 0:
            raise ValueError("expected gates need at least one token and a table that has seen one")
        ids, counts = np.unique(tokens_T, return_counts=True)
        gates_VLE = np.stack([self._usual(int(token)) for token in ids])
        return np.asarray(np.tensordot(counts / len(tokens_T), gates_VLE, axes=1))

    def _usual(self, token: int) -> np.ndarray:
        if token not in self._rows:
            token = _ALL
        if token not in self._shrunken:
            mean_LE = self._balanced_mean(token)
            if token != _ALL:
                seen = int(self._count_R[list(self._rows[token].values())].sum())
                mean_LE = (seen * mean_LE + self._kappa * self._usual(_ALL)) / (seen + self._kappa)
            self._shrunken[token] = mean_LE
        return self._shrunken[token]

    def _balanced_mean(self, token: int) -> np.ndarray:
        rows = sorted(self._rows[token].values(), key=self._first.__getitem__)
        return np.asarray(np.mean([self._sums_RLE[row] / self._count_R[row] for row in rows], axis=0))

    def _row(self, token: int, skill: str, order: int, num_layers: int) -> int:
        """Where the sums of this id in this skill are; a new place if there is none."""
        by_skill = self._rows.setdefault(token, {})
        if skill not in by_skill:
            by_skill[skill] = len(self._first)
            self._first.append(order)
            if len(self._first) > len(self._sums_RLE):
                more = max(16, len(self._sums_RLE) // 2)
                held_RLE = self._sums_RLE.reshape(len(self._sums_RLE), num_layers, self._num_experts)
                self._sums_RLE = np.concatenate([held_RLE, np.zeros((more, num_layers, self._num_experts))])
                self._count_R = np.concatenate([self._count_R, np.zeros(more, dtype=np.int64)])
        row = by_skill[skill]
        self._first[row] = min(self._first[row], order)
        return row
