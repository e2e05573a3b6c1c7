"""A real learner on rollouts of older weights: of two minibatches all of one is of such, and nothing of the other."""

from __future__ import annotations

import pytest

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.parallel.local import run_ranks
from tests.support.rl_run import prepare, rl_config
from tests.support.stale import answers_and_update, update


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The configuration, its checkpoint, answers, and what one rank says of its update."""
    asynchronous = {"max_staleness": 1, "partial_rollouts": True, "mismatch_correction": "sequence_mask"}
    config = rl_config(tmp_path_factory.mktemp("runs"), **asynchronous, minibatches=2, micro_batch=2)
    checkpoint = prepare(config)
    ((scored, told),) = run_ranks(answers_and_update, 1, config, tmp_path_factory.mktemp("one"), checkpoint, timeout_s=100)
    return config, checkpoint, scored, told


def test_what_an_update_says_of_its_rollouts(start):
    told = start[-1]
    assert told["mismatch/logprob_abs_diff_max"] < 1e-5 < 0.1 < told["staleness/logprob_abs_diff_max"]
    assert told["staleness/max"] == 1 and 0 < told["staleness/mean"] < 1 and told["staleness/kl"] > 0.001
    assert 0.5 < told["mismatch/ess"] < 1 and 0 < told["is/clipped_frac"] < 1 and told["is/weight_mean"] < 1
    assert not [name for name in told if name.startswith("mismatch/weight")]


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(ParallelConfig(num_ranks=2, cp=2), id="CP2"),
        pytest.param(ParallelConfig(num_ranks=4, cp=2), id="CP2 DP2", marks=pytest.mark.journey),
        pytest.param(ParallelConfig(num_ranks=2, pp=2), id="PP2", marks=pytest.mark.journey),
    ],
)
def test_every_layout_weighs_rollouts_alike(start, tmp_path, parallel):
    """Whole answers are left out by the mean over all of their tokens, whoever holds them."""
    config, checkpoint, scored, one = start
    compared = [name for name in one if name.startswith(("actor/", "is/", "staleness/", "mismatch/")) and name != "mismatch/logprob_abs_diff_mean"]
    for rank in run_ranks(update, parallel.num_ranks, config, parallel, tmp_path, checkpoint, scored, timeout_s=100):
        assert {name: rank[name] for name in compared} == pytest.approx({name: one[name] for name in compared}, rel=1e-3, abs=1e-6)
