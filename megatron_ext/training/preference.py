"""Mixed preference optimisation, arXiv 2411.10442: which of two answers is better, how good each is, and how to write the better one.

    x the question, y_c the right ("chosen") answer, y_r the wrong ("rejected") one;  log pi(y|x) the sum over its tokens

    c = beta (log pi(y_c|x) - log ref(y_c|x)),   r = beta (log pi(y_r|x) - log ref(y_r|x))                     the implicit rewards

    dpo    -log sigmoid(c - r)                                                                                 DPO, arXiv 2305.18290
    bco    -log sigmoid(c - delta) - log sigmoid(-(r - delta)),  delta the mean of all rewards so far          BCO, arXiv 2404.04656
    sft    -mean over the tokens of right answers of log pi                                                    (`losses.masked_nll`)

    loss = 0.8 mean_pairs dpo + 0.2 mean_pairs bco + 1.0 sft

InternVL `internvl/train/trainer_dpo.py` (weights: `shell/internvl2.0_mpo`); TRL's DPOTrainer, loss types sigmoid, bco_pair (delta = 0) and sft. InternVL's
delta knows the micro-batch at hand too, so that the loss would depend on how a step is cut; ours is the mean over the steps before. In the first step both are
0, as all rewards are; after t steps they differ by about 1/t of what a step is off the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RunningMean:
    """Of all numbers so far: their mean, 0 where there is none, and how many there were.

    >>> RunningMean().joined(3.0, 2).joined(0.0, 1)
    RunningMean(mean=2.0, count=3)
    """

    mean: float = 0.0
    count: int = 0

    def joined(self, mean: float, count: int) -> RunningMean:
        """With `count` more numbers, whose mean is given."""
        total = self.count + count
        return RunningMean(self.mean + (mean - self.mean) * count / total, total)


def dpo(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Of the implicit rewards of pairs. Only their difference counts: both may fall."""
    return -F.logsigmoid(chosen_P - rejected_P)


def bco_pair(chosen_P: Tensor, rejected_P: Tensor, delta: float) -> Tensor:
    """Of the implicit rewards of pairs: each against the mean, so that a right answer that falls costs, whatever the wrong one does."""
    return -F.logsigmoid(chosen_P - delta) - F.logsigmoid(-(rejected_P - delta))
