"""Of which weights rollouts may be, and what becomes of those of older ones in the learner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_ext.config.schema import RLConfig
from megatron_ext.errors import WeightSyncError
from megatron_ext.rl.parcels import rows_of
from megatron_ext.rl.staleness import require_versions
from tests.support.rollouts import prompt, scored


def check(*versions, present=5, **rl):
    answer = scored(prompt("p"), 1, length=len(versions))
    answer = replace(answer, rollout=replace(answer.rollout, versions_T=np.array(versions, np.int32)))
    require_versions(rows_of([answer], np.ones(1)), present, RLConfig(**rl))


def test_synchronous_learning_takes_rollouts_of_its_own_weights_alone():
    check(5, 5)
    with pytest.raises(WeightSyncError, match=r"rollout p#1 of version 4 reached a learner of version 5; rl.max_staleness = 0 allows 5 at the oldest"):
        check(4, 4)


def test_weights_that_the_learner_never_had_are_refused():
    with pytest.raises(WeightSyncError, match="rollout p#1 of version 6 reached a learner of version 5, which never had these weights"):
        check(6, 6, max_staleness=3)


def test_rollouts_may_be_as_old_as_allowed():
    check(3, 3, max_staleness=2)
    with pytest.raises(WeightSyncError, match=r"of version 2 reached a learner of version 5; rl.max_staleness = 2 allows 3 at the oldest"):
        check(2, 2, max_staleness=2)


def test_the_oldest_token_of_a_partial_rollout_counts_and_without_the_option_there_are_none():
    check(3, 4, 5, max_staleness=2, partial_rollouts=True)
    with pytest.raises(WeightSyncError, match="of version 2 reached"):
        check(2, 4, 5, max_staleness=2, partial_rollouts=True)
    with pytest.raises(WeightSyncError, match=r"sampled by versions 3 to 5, but rl.partial_rollouts is off"):
        check(3, 4, 5, max_staleness=2)
