"""Which rows of a step answer which prompt: what is stored once for a prompt is used by all of its answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Seats:
    """Which rows answer which prompt. `rows_PG` int64: the rows of prompt p, the missing ones filled with row 0; `seat_R` int64: the place of row r in it.
    `even`: the rows stand prompt by prompt, equally many for each, so that nothing has to move."""

    rows_PG: torch.Tensor
    seat_R: torch.Tensor
    even: bool

    @classmethod
    def of(cls, prompt_R: np.ndarray, num_prompts: int, device: torch.device) -> Seats:
        """`prompt_R`: the prompt of every row.

        >>> seats = Seats.of(np.array([1, 0, 1]), 2, torch.device("cpu"))
        >>> seats.rows_PG.tolist(), seats.seat_R.tolist()
        ([[1, 0], [0, 2]], [2, 0, 3])
        """
        order, counts = np.argsort(prompt_R, kind="stable"), np.bincount(prompt_R, minlength=num_prompts)
        most = int(counts.max(initial=0))
        prompts = prompt_R[order]
        within = np.arange(len(order)) - (np.cumsum(counts) - counts)[prompts]
        rows_PG, seat_R = np.zeros((num_prompts, most), np.int64), np.zeros(len(order), np.int64)
        rows_PG[prompts, within] = order
        seat_R[order] = prompts * most + within
        even = np.array_equal(rows_PG.ravel(), np.arange(len(order)))
        return cls(torch.from_numpy(rows_PG).to(device), torch.from_numpy(seat_R).to(device), even)

    def by_prompt(self, x_R: torch.Tensor) -> torch.Tensor:
        """[R, ...] -> [P, G, ...]."""
        return x_R.unflatten(0, self.rows_PG.shape) if self.even else x_R[self.rows_PG]

    def by_row(self, x_PG: torch.Tensor) -> torch.Tensor:
        """[P, G, ...] -> [R, ...]."""
        return x_PG.flatten(0, 1) if self.even else x_PG.flatten(0, 1).index_select(0, self.seat_R)
