"""From the reward of the task to the reward that is learnt from: overlong answers and answers far from the reference lose some of it.

    overlong   penalty * min(0, (L - buffer - |y|) / buffer),  buffer = share * L       soft overlong punishment, DAPO, arXiv 2503.14476, eq. 13;
                                                                                        verl `DAPORewardManager`
    kl         -kl_coeff * sum_t KL_t                                                   verl `apply_kl_penalty`; TRL's RLOOTrainer

|y| response tokens of at most L. What is correct, and which groups teach something, is asked of the task's reward, before shaping.
"""

from __future__ import annotations

import numpy as np


def overlong(lengths_R: np.ndarray, longest: int, share: float, penalty: float) -> np.ndarray:
    """What is added to each reward, at most 0: nothing up to the last `share` of `longest` tokens, `-penalty` at the end of them."""
    if share == 0:
        return np.zeros(len(lengths_R))
    buffer = share * longest
    return penalty * np.minimum(0.0, (longest - buffer - lengths_R) / buffer)
