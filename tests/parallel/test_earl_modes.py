"""`earl.mode` for real, small: rollout workers that draw routes, learners of several layouts that are taught by them, a run that is stopped and resumed."""

from __future__ import annotations

import math

import pytest

from megatron_ext.config.schema import EarlConfig, ParallelConfig
from megatron_ext.errors import StoppedForRequeue
from megatron_ext.observe.metrics import read_metrics
from megatron_ext.rl import run as rl
from tests.support.rl_run import prepare, rl_config, save_clusters

EARL = {"warmup": 0.0, "cooldown": 0.0, "correct_threshold": 0.2, "router_kl": 0.01}
MODES = {"pathwise": EarlConfig(mode="pathwise", pathwise_weight=1.0, **EARL), "router_pg": EarlConfig(mode="router_pg", router_weight=0.3, **EARL)}
TOLD = ("earl/", "actor/grad_norm", "actor/loss", "reward/mean")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = rl_config(folder, steps=2, minibatches=2)
    return config, prepare(config), save_clusters(config, folder / "expert_clusters.json")


def run(start, folder, mode, stop_file=None, **changes):
    config, checkpoint, clusters = start
    rl.run_rl(config.model_copy(update={"earl": MODES[mode], **changes}), folder, checkpoint, clusters, stop_file=stop_file)
    return told(folder)


def told(folder):
    return [{name: value for name, value in record.items() if name.startswith(TOLD)} for record in read_metrics(folder)]


@pytest.fixture(scope="module", params=list(MODES))
def finished(request, start, tmp_path_factory):
    return request.param, run(start, tmp_path_factory.mktemp(request.param), request.param)


def test_a_step_tells_what_its_routers_were_taught(finished):
    """The router has not moved when the first step begins; two minibatches later it has. Ceilings are learnt first, and pull from the second step on."""
    mode, (first, second) = finished
    assert 0 < first["earl/softmax_mass"] < 1 and second["earl/router_kl"] > 0
    if mode == "pathwise":
        assert first["earl/pathwise"] == 0 and second["earl/pathwise"] > 0
    else:
        assert math.isfinite(first["earl/route_loss"]) and 0 < first["earl/route_clipfrac"] + second["earl/route_clipfrac"] < 2


@pytest.mark.journey
@pytest.mark.parametrize(
    "learner",
    [ParallelConfig(), ParallelConfig(num_ranks=2, tp=2), ParallelConfig(num_ranks=2, cp=2), ParallelConfig(num_ranks=2, pp=2, recompute="full")],
    ids=["one rank", "TP2", "CP2", "PP2, recompute full"],
)
def test_every_layout_teaches_the_same(start, finished, tmp_path, learner):
    mode, expected = finished
    for ours, theirs in zip(run(start, tmp_path, mode, parallel=learner), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-5)


@pytest.mark.journey
def test_a_run_that_was_stopped_knows_its_ceilings_when_it_resumes(start, finished, tmp_path):
    mode, expected = finished
    (tmp_path / "stop").touch()
    with pytest.raises(StoppedForRequeue):
        run(start, tmp_path / "rl", mode, stop_file=tmp_path / "stop")
    (tmp_path / "stop").unlink()
    assert run(start, tmp_path / "rl", mode) == expected
