"""Says once that the EARL bonus tells next to no answers apart.

The bonus compares the correct answers of one prompt. Where they are one and the same text they take one and the same route, their masses are equal, and a run
with the bonus is the run without it: something to be told in the first minutes, and not after a study.
"""

from __future__ import annotations

import numpy as np

AFTER_STEPS = 10
FELT, RARE = 0.01, 0.05
"""Of a bonus in [-1, 1]: what is less changes nothing to speak of. Of the correct answers: the share of such below which it is said."""


class Notice:
    """Sees the steps of one process, one after the other."""

    def __init__(self) -> None:
        self._steps, self._correct, self._paid = 0, 0, 0

    def see(self, bonus_PG: np.ndarray, correct_PG: np.ndarray) -> float:
        """The share of a step's correct answers, of groups that are neither all correct nor all wrong, that got a bonus one could feel; 0 where there is none.

        >>> Notice().see(np.array([[0.5, 0.0, 0.0]]), np.array([[True, True, False]]))
        0.5
        """
        correct, paid = int(correct_PG.sum()), int((correct_PG & (np.abs(bonus_PG) >= FELT)).sum())
        self._steps, self._correct, self._paid = self._steps + 1, self._correct + correct, self._paid + paid
        if self._steps == AFTER_STEPS and self._correct and self._paid < RARE * self._correct:
            print(
                f"earl: {self._paid} of {self._correct} correct answers got a bonus of {FELT:g} or more in {AFTER_STEPS} steps. It pays for differences "
                "between the correct answers to one prompt; where they are the same text, they take the same route. earl.mode=router_pg draws routes, "
                "earl.combine=add pays for the mass itself.",
                flush=True,
            )
        return paid / max(correct, 1)
