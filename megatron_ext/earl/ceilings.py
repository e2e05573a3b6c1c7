"""How much cluster mass is enough: the 75th percentile of what correct answers of the fine-tuned model have. Beyond it nothing is to be gained.

Ranks hold slices of the answers, so the percentile is that of a histogram, which they add up: it depends on no layout, and is exact to a bin, 1 / 4096.
"""

from __future__ import annotations

import numpy as np

BINS = 4096
SHARE = 0.75


def ceiling_of(counts_N: np.ndarray, share: float = SHARE) -> float:
    """The mass in [0, 1] below which `share` of the counted ones are, taken to lie evenly in their bins; nan for none.

    >>> ceiling_of(np.array([1, 2, 1, 0]), 0.75)
    0.5
    >>> ceiling_of(np.array([1, 2, 1, 0]), 0.5)  # half way through the second bin
    0.375
    """
    ends_N = counts_N.cumsum()
    if not ends_N[-1]:
        return float("nan")
    wanted = share * ends_N[-1]
    place = int(np.searchsorted(ends_N, wanted))
    within = (wanted - (ends_N[place] - counts_N[place])) / counts_N[place]
    return float((place + within) / len(counts_N))
