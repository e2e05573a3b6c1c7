"""`earl.mode` for real, small: rollout workers that draw routes, learners of several layouts that are taught by them, a run that is stopped and resumed."""

from __future__ import annotations

import math

import pytest

from megatron_ext.config.schema import EarlConfig, ParallelConfig
from megatron_ext.errors import StoppedForRequeue
from megatron_ext.observe.metrics import read_metrics
from megatron_ext.parallel.local import run_ranks
from megatron_ext.rl import run as rl
from tests.support.earl_ranks import taught
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


@pytest.fixture(scope="module", params=[pytest.param("pathwise", marks=pytest.mark.journey), "router_pg"])
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


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(taught, 1, ParallelConfig(), timeout_s=60)[0]


LAYOUTS = {
    "TP2": ParallelConfig(num_ranks=2, tp=2),
    "PP2, recompute full": ParallelConfig(num_ranks=2, pp=2, recompute="full"),
    "CP2": ParallelConfig(num_ranks=2, cp=2),
    "DP2 EP2": ParallelConfig(num_ranks=2, ep=2),
    "DP2 TP2": ParallelConfig(num_ranks=4, tp=2),
}
LONG = {"CP2", "DP2 EP2", "DP2 TP2"}


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.journey] if name in LONG else []) for name in LAYOUTS])
def test_every_layout_teaches_the_same(one_rank, layout):
    """Loss, norm of all gradients, means, and the ceiling of the skill that had none; the terms are large enough to be most of the gradient."""
    assert (
        one_rank["pathwise"]["grad_norm"] > 1.5 * one_rank["score"]["grad_norm"] and one_rank["router_pg"]["grad_norm"] > 1.5 * one_rank["score"]["grad_norm"]
    )
    for told_by in run_ranks(taught, LAYOUTS[layout].num_ranks, LAYOUTS[layout], timeout_s=100):
        for mode, expected in one_rank.items():
            assert told_by[mode] == pytest.approx(expected, rel=1e-4, abs=1e-6), mode


@pytest.mark.journey
def test_a_run_that_was_stopped_knows_its_ceilings_when_it_resumes(start, finished, tmp_path, monkeypatch):
    mode, expected = finished
    stop = tmp_path / "stop"
    with monkeypatch.context() as patch:
        whole = rl.after_step
        patch.setattr(rl, "after_step", lambda report, *rest: (whole(report, *rest), stop.touch()))
        with pytest.raises(StoppedForRequeue, match="after step 1 of 2"):
            run(start, tmp_path / "rl", mode, stop_file=stop)
    stop.unlink()
    assert run(start, tmp_path / "rl", mode) == expected
