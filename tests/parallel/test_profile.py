"""`--profile` for real: two pipeline stages that train, and a learner and rollout workers over local processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.config.observe import ObserveConfig
from megatron_ext.config.schema import ParallelConfig, TrainConfig
from megatron_ext.observe.metrics import read_metrics
from megatron_ext.observe.profiles import Profile, read_profiles
from megatron_ext.observe.report import write_report
from megatron_ext.rl.run import run_rl
from megatron_ext.training.stage import run_supervised
from tests.support.rl_run import prepare, rl_config


def by_rank(stage_dir: Path) -> dict[str, Profile]:
    return {profile.rank: profile for profile in read_profiles(stage_dir)}


def require_whole(profile: Profile) -> None:
    """What has a name is most of it, and all adds up."""
    spent = profile.table.phases
    assert profile.complete
    assert sum(found.host_s for found in spent.values()) == pytest.approx(profile.table.recorded_s, rel=0.01)


@pytest.mark.journey
def test_the_first_rank_of_every_pipeline_stage_is_recorded(tmp_path: Path) -> None:
    settings = TrainConfig(steps=4, global_batch=4, micro_batch=2, log_every=1)
    config = rl_config(tmp_path, parallel=ParallelConfig(num_ranks=2, pp=2))
    config = config.model_copy(update={"pretrain": settings, "observe": ObserveConfig(profile=2)})
    prepare(config)
    folder = config.run_dir / "pretrain"
    run_supervised(config, "pretrain", folder, None)
    found = by_rank(folder)
    assert found.keys() == {"rank 0", "rank 1"}
    for profile in found.values():
        require_whole(profile)
        assert profile.table.steps == 2
        assert {"attention", "experts", "router", "optimizer", "communication", "data"} <= profile.table.phases.keys()
    assert "vision" in found["rank 0"].table.phases and "head" in found["rank 1"].table.phases
    page = write_report(config.run_dir).read_text(encoding="utf-8")
    assert "pretrain, rank 1: 2 steps" in page and "aten::mm" in page


@pytest.mark.journey
def test_a_learner_and_a_rollout_worker_are_recorded_and_the_numbers_stay(tmp_path: Path) -> None:
    config = rl_config(tmp_path)
    checkpoint = prepare(config)
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    run_rl(config, plain, checkpoint, None)
    run_rl(config.model_copy(update={"observe": ObserveConfig(profile=1)}), profiled, checkpoint, None)
    assert [line["actor/loss"] for line in read_metrics(plain)] == [line["actor/loss"] for line in read_metrics(profiled)]
    found = by_rank(profiled)
    assert found.keys() == {"learner rank 0", "rollout replica 0 rank 0"}
    for profile in found.values():
        require_whole(profile)
        assert {"attention", "experts", "router", "CLVR", "head", "refit"} <= profile.table.phases.keys()
    assert found["learner rank 0"].table.phases["experts"].backward_s > 0
    assert {"sampling", "routes"} <= found["rollout replica 0 rank 0"].table.phases.keys()
    assert read_profiles(plain) == []
