"""Reinforcement learning of models that look in other ways than the default: rollout workers and learners compute the same in every layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.schema import ParallelConfig, RunConfig
from megatron_ext.observe.metrics import Record, read_metrics
from megatron_ext.rl.run import run_rl
from tests.parallel.test_layouts import OPTIONS
from tests.support.rl_run import prepare, rl_config

layout = partial(ParallelConfig, num_ranks=2)
LOOKS: dict[str, dict[str, Any]] = {
    "memory tokens": {"inject": "slots", "num_slots": 4, "gate_kind": "channel"},
    "everything": {**OPTIONS, "query_source": "tap", "inject": "response"},
    "projected tokens of another picture": {"kv_tokens": "projected", "memory": "shuffled", "query_source": "input_embedding", "inject": "all"},
    "addition": {"fusion": "addition", "kv_tokens": "unshuffled"},
}


def looking(folder: Path, clvr: dict[str, Any]) -> RunConfig:
    """The small run, its encoder of two layers, with these options of CLVR."""
    config = rl_config(folder, ParallelConfig(), replicas=1)
    model = config.model
    changes = {"vision": model.vision.model_copy(update={"num_layers": 2}), "clvr": model.clvr.model_copy(update=clvr)}
    return config.model_copy(update={"model": model.model_copy(update=changes)})


@pytest.fixture(scope="module")
def looks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path, list[Record]]:
    """Of a way to look: the configuration, the checkpoint, and the metrics of one learner rank with one replica."""
    config = looking(tmp_path_factory.mktemp("runs"), LOOKS[request.param])
    checkpoint = prepare(config, looking=True)
    folder = tmp_path_factory.mktemp("alone")
    run_rl(config, folder, checkpoint, None)
    return config, checkpoint, read_metrics(folder)


@pytest.mark.parametrize(
    ("looks", "learner", "rollout"),
    [
        pytest.param("memory tokens", layout(cp=2), layout(tp=2), id="memory tokens, a CP2 learner, TP2 answers"),
        pytest.param("everything", layout(tp=2), layout(ep=2), id="everything, a TP2 learner, EP2 answers", marks=pytest.mark.journey),
        pytest.param("everything", layout(cp=2), layout(tp=2), id="everything, a CP2 learner, TP2 answers", marks=pytest.mark.journey),
        pytest.param("projected tokens of another picture", layout(pp=2), layout(tp=2), id="another picture, a PP2 learner", marks=pytest.mark.journey),
        pytest.param("addition", layout(pp=2), layout(tp=2), id="addition, a PP2 learner, TP2 answers", marks=pytest.mark.journey),
    ],
    indirect=["looks"],
)
def test_learners_compute_what_rollouts_were_sampled_from(
    looks: tuple[RunConfig, Path, list[Record]], learner: ParallelConfig, rollout: ParallelConfig, tmp_path: Path
) -> None:
    config, checkpoint, alone = looks
    settings = config.rollout.model_copy(update={"parallel": rollout})
    run_rl(config.model_copy(update={"parallel": learner, "rollout": settings}), tmp_path, checkpoint, None)
    first, second = read_metrics(tmp_path)
    for record in (*alone, first, second):
        assert record["mismatch/logprob_abs_diff_max"] < 1e-4 and record["route/digest_ok"] == record["sync/digest_ok"] == 1
    for name in ("reward/mean", "response_length/mean", "actor/grad_norm", "actor/entropy", "advantage/max"):
        assert first[name] == pytest.approx(alone[0][name], rel=1e-4), name
    assert second["reward/mean"] == pytest.approx(alone[1]["reward/mean"], rel=0.1)
