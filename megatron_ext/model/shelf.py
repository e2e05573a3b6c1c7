"""Keys and values of several layers in tensors with room to grow, whose rows stand side by side whoever leaves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each [rows, N_kv, length, D]."""


class Shelf:
    """Keys and values of some layers, [rows, N_kv, length, D], in tensors with room to spare: the first `rows` rows count."""

    def __init__(self) -> None:
        self.rows = 0
        self._pairs: dict[int, Pair] = {}

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for pair in self._pairs.values() for x in pair)

    def layers(self) -> list[int]:
        return list(self._pairs)

    def used(self, layer: int, length: int | None) -> Pair:
        keys, values = self._pairs[layer]
        return keys[: self.rows, :, :length], values[: self.rows, :, :length]

    def extend(self, layers: Mapping[int, Pair]) -> None:
        """Adds rows, with what they hold."""
        first = self.rows
        for layer, pair in layers.items():
            rows, _, length, _ = pair[0].shape
            held = self._pairs[layer][0].shape[2] if first else 0
            room = self.reserve(layer, first + rows, max(length, held), pair[0][:, :, 0])
            for whole, part in zip(room, pair, strict=True):
                whole[first : first + rows, :, :length] = part
            self.rows = first + rows

    def reserve(self, layer: int, rows: int, length: int, like_RND: torch.Tensor) -> Pair:
        """The layer's tensors, with room for so many rows of so many tokens, and where they must be made anew for no more than that. What is new holds zeros: a
        mask hides it, but it must be a number."""
        known = self._pairs.get(layer)
        if known is not None and known[0].shape[0] >= rows and known[0].shape[2] >= length:
            return known
        shape = rows, like_RND.shape[1], length, like_RND.shape[2]
        pair = like_RND.new_zeros(shape), like_RND.new_zeros(shape)
        for new, old in zip(pair, known or (), strict=False):
            kept = old[:rows, :, :length]
            new[: kept.shape[0], :, : kept.shape[2]] = kept
        self._pairs[layer] = pair
        return pair

    def arrange(self, kept: np.ndarray) -> None:
        """Row i holds what row `kept[i]` held; rows for which there is no room yet hold nothing."""
        self.rows = len(kept)
        for pair in self._pairs.values():
            moved = np.flatnonzero((kept != np.arange(len(kept))) & (kept < pair[0].shape[0]))
            target, source = torch.from_numpy(moved), torch.from_numpy(kept[moved])
            for x in pair:
                x[target] = x[source]


def filled(left: np.ndarray) -> np.ndarray:
    """Which place's content stands at each place once the last ones have filled the holes of those that left.

    >>> filled(np.array([False, True, False, True, False])).tolist()
    [0, 4, 2]
    """
    count = int((~left).sum())
    kept = np.arange(count)
    kept[left[:count]] = np.flatnonzero(~left[count:]) + count
    return kept
