"""The causal gate for real, on a random model: every mask is answered, whoever answers, and a gate that was stopped goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.config.schema import DiscoverConfig, EarlConfig, ParallelConfig, RunConfig
from megatron_ext.earl.clusters import ExpertClusters
from megatron_ext.earl.files import read_clusters
from megatron_ext.errors import StoppedForRequeue
from megatron_ext.inference.causal import run_causal_gate
from megatron_ext.inference.chunks import NEVER
from megatron_ext.parallel.stopping import StopRequest
from tests.support.rl_run import prepare, rl_config, save_clusters

EP2 = {"replicas": 1, "parallel": ParallelConfig(num_ranks=2, ep=2)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = rl_config(tmp_path_factory.mktemp("run"))
    discover = DiscoverConfig(causal_gate="report", causal_prompts=4, causal_masks=2, committee_top=2)
    rl = config.rl.model_copy(update={"init_from": prepare(config)})
    return config.model_copy(update={"discover": discover, "earl": EarlConfig(enabled=False, correct_threshold=0.3), "rl": rl})


def gate(run: RunConfig, folder: Path, stop: StopRequest = NEVER, **rollout: object) -> ExpertClusters:
    clusters = read_clusters(save_clusters(run, folder / "expert_clusters.json"), run.model)
    assert run.rl.init_from is not None
    shaped = run.model_copy(update={"rollout": run.rollout.model_copy(update=rollout)})
    return run_causal_gate(shaped, clusters, run.rl.init_from, folder, stop)


def test_a_gate_that_was_stopped_goes_on_by_ranks_that_share_experts(run: RunConfig, tmp_path: Path) -> None:
    """A rank may have no prompt of a skill, whose masks it answers with the others nevertheless."""
    (stop := tmp_path / "STOP").touch()
    with pytest.raises(StoppedForRequeue, match=r"of 24 prompts answered"):
        gate(run, tmp_path, StopRequest(stop), **EP2)
    found = gate(run, tmp_path, **EP2).skills
    assert not (tmp_path / "causal").exists()
    for skill in found:
        assert skill.status == "ok" and skill.causal is not None and skill.causal.num_prompts == 4
        assert len(skill.causal.random_drops) == 2 and skill.causal.cluster_mass == skill.causal.random_mass == 0.25 and skill.causal.random_overlap == 0
    assert {skill.causal.accuracy for skill in found if skill.causal} - {0.0, 1.0}, "some answers of a skill are right and others wrong"
    assert any(skill.causal.drop_own or skill.causal.drop_random for skill in found if skill.causal), "masks change answers"


@pytest.mark.journey
def test_every_layout_finds_the_same(run: RunConfig, tmp_path: Path) -> None:
    assert gate(run, tmp_path).skills == gate(run, tmp_path, **EP2).skills == gate(run, tmp_path, replicas=1, parallel=ParallelConfig(num_ranks=2, tp=2)).skills
