"""Which GPUs the ranks of RL get."""

from __future__ import annotations

import pytest

from megatron_ext.config.load import load_config
from megatron_ext.errors import ConfigError, UserError
from megatron_ext.rl.hosts.ray_places import ANY, place_ranks, plan_places


def test_ranks_that_follow_each_other_are_on_different_gpus():
    bundles, share = place_ranks(num_ranks=6, num_gpus=4)
    assert [bundle["GPU"] for bundle in bundles] == [1, 1, 1, 1] and share["num_gpus"] == 0.5
    assert place_ranks(4, 4)[1]["num_gpus"] == 1.0
    assert place_ranks(3, 1)[1]["num_gpus"] == 0.33


def test_without_gpus_ranks_take_turns_on_the_nodes():
    bundles, share = place_ranks(num_ranks=5, num_gpus=0, num_nodes=2)
    assert bundles == [{"CPU": 0.03}, {"CPU": 0.03}] and "num_gpus" not in share


def gpus(plan):
    return {role: (sum(bundle.get("GPU", 0) for bundle in bundles), share.get("num_gpus")) for role, (bundles, share) in plan.items()}


def test_colocated_roles_share_every_gpu_and_disaggregated_ones_have_gpus_of_their_own():
    ranks = {"learner": 4, "rollout": 4}
    assert gpus(plan_places(ranks, "colocated", num_gpus=4)) == {ANY: (4, 0.5)}
    assert gpus(plan_places(ranks, "disaggregated", num_gpus=8)) == {"learner": (4, 1.0), "rollout": (4, 1.0)}
    assert gpus(plan_places(ranks, "disaggregated", num_gpus=0)) == {"learner": (0, None), "rollout": (0, None)}


def test_too_few_gpus_for_two_roles_apart_are_told_with_both_counts():
    with pytest.raises(UserError, match=r"a GPU for each of 4 learner ranks and 8 rollout ranks, 12 in all, and there are 8; use colocated"):
        plan_places({"learner": 4, "rollout": 8}, "disaggregated", num_gpus=8)


def test_local_processes_have_no_devices_of_their_own():
    with pytest.raises(ConfigError, match=r"rl.placement .*: disaggregated with rl.fleet = local"):
        load_config("examples/tiny.yaml", ["rl.placement=disaggregated", "rl.fleet=local"])
