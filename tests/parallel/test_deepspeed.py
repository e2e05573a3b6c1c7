"""Engine deepspeed trains what engine megatron trains: same loss curve, same gradient of every parameter, same weights; and they continue each other's runs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.observe.metrics import read_metrics
from megatron_ext.observe.metrics_file import EP_RANK_LOAD
from megatron_ext.parallel.local import run_ranks
from megatron_ext.rl.run import run_rl
from megatron_ext.training.stage import run_supervised
from tests.parallel.test_layouts import ADDED, OPTIONS, TWO_VIT_LAYERS
from tests.support.engines import CLIPPED, Trial, run_trials
from tests.support.layouts import TAPS
from tests.support.rl_run import prepare, rl_config

CONFIGS = Path(__file__).parents[2] / "deepspeed_configs"
DP2: dict[str, Any] = {}
TP2, EP2, CP2 = {"tp": 2}, {"ep": 2}, {"cp": 2}
METRICS = {"loss", "grad_norm", "num_tokens", "lr", "moe/aux_loss", "data/tokens_per_row", "clvr/tap0/gate", "clvr/tap2/gate"}


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`deepspeed_configs/` with every weight split under ZeRO-3; it would keep those of less than 100000 elements whole, and so this whole model."""
    folder = tmp_path_factory.mktemp("deepspeed")
    for path in CONFIGS.glob("*.json"):
        settings = json.loads(path.read_text())
        if settings["zero_optimization"]["stage"] == 3:
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (folder / path.name).write_text(json.dumps(settings))
    return folder


def zero(name: str, folder: Path, ranks: int = 2, **layout: Any) -> ParallelConfig:
    return ParallelConfig(num_ranks=ranks, engine="deepspeed", deepspeed=folder / f"{name}.json", **layout)


@cache
def one_rank(**how: Any) -> dict[str, Any]:
    """Engine megatron."""
    return run_ranks(run_trials, 1, [Trial(ParallelConfig(), **how)], None, timeout_s=100)[0][0]


def different(report: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> list[str]:
    """Where a training differs: metrics of any step, gradients and weights of the first update.

    Adam's first step has the size of the learning rate whatever the gradient, so weights are compared where the gradient is not rounding.
    """
    found = [
        f"{metric} of step {step}"
        for step, (ours, theirs) in enumerate(zip(report["curve"], expected["curve"], strict=True))
        for metric in expected["curve"][0].keys() & METRICS
        if ours[metric] != pytest.approx(theirs[metric], rel=tolerance)
    ]
    for name, gradient in expected["gradients"].items():
        if not (report["gradients"][name] - gradient).norm() <= tolerance * gradient.norm():
            found.append(f"gradient of {name}")
        clear = gradient.abs() > 1e-4 * gradient.abs().max()
        if not torch.allclose(report["weights"][name][clear], expected["weights"][name][clear], rtol=0, atol=1e-5):
            found.append(f"weights of {name}")
    return found


SLOW = {"optimizer": CLIPPED, "router_lr_scale": 0.1}
BLIND = {**SLOW, "train_vision": False}
PACKED = {"packed": True}
RECOMPUTED = {"recompute": "full", "recompute_layers": 2}
CASES: dict[int, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    1: [(DP2, {}), (TP2, SLOW), ({**EP2, **RECOMPUTED}, PACKED)],
    2: [(DP2, BLIND), ({**TP2, **RECOMPUTED}, PACKED), (EP2, {})],
    3: [(DP2, SLOW), (TP2, BLIND), ({**CP2, **EP2, **RECOMPUTED}, PACKED)],
}
"""Layouts of two ranks, and how they train: plain, clipped with a slower router and a schedule, the same with a frozen encoder, packed rows. Every batch of
every case holds micro-batches without an image."""


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.journey), pytest.param(2, marks=pytest.mark.journey), 3])
def test_two_ranks_train_like_one_rank_of_engine_megatron(stage: int, small_shards: Path) -> None:
    trials = [Trial(zero(f"zero{stage}", small_shards, **layout), disturbed=layout is DP2, **how) for layout, how in CASES[stage]]
    reports = run_ranks(run_trials, 2, trials, one_rank()["start"], timeout_s=110)
    for number, (layout, how) in enumerate(CASES[stage]):
        expected = one_rank(**{key: value for key, value in how.items() if key != "packed"})
        assert different(reports[0][number], expected) == [], (layout, how)
        if layout is DP2:
            assert all(f"step {1 + i // 2 + 1}: the {'loss' if i % 2 == 0 else 'gradient norm'} is" in m for i, m in enumerate(reports[0][number]["errors"]))
        assert [step["loss"] for step in reports[1][number]["curve"]] == [step["loss"] for step in reports[0][number]["curve"]]


@pytest.mark.journey
@pytest.mark.parametrize("changes", [{"num_experts": 0, "ffn_hidden_size": 96}, {"dense_layers": (0, 1)}], ids=["dense", "half of the layers dense"])
def test_models_with_dense_layers_train_like_one_rank(changes: dict[str, Any], small_shards: Path) -> None:
    expected = run_ranks(run_trials, 1, [Trial(ParallelConfig(), changes=changes)], None, timeout_s=100)[0][0]
    trials = [Trial(zero(f"zero{stage}", small_shards, **layout), changes=changes) for stage, layout in ((1, DP2), (2, TP2), (3, DP2))]
    reports = run_ranks(run_trials, 2, trials, expected["start"], timeout_s=110)[0]
    assert [different(report, expected) for report in reports] == [[], [], []]


LOOKS: dict[str, dict[str, Any]] = {
    "memory tokens": {"clvr": TAPS.model_copy(update={"inject": "slots", "num_slots": 16})},
    "options": {"clvr": TAPS.model_copy(update={**OPTIONS, "taps": ((0, 1), (0, 2), (0, 3))}), **TWO_VIT_LAYERS},
    "addition": {"clvr": TAPS.model_copy(update=ADDED)},
}


@pytest.mark.journey
@pytest.mark.parametrize("changes", LOOKS.values(), ids=LOOKS)
def test_models_that_look_otherwise_train_like_one_rank(changes: dict[str, Any], small_shards: Path) -> None:
    """The gradient of how much of each encoder layer is looked at is a small difference of large sums, which ZeRO-3 rounds otherwise."""
    expected = run_ranks(run_trials, 1, [Trial(ParallelConfig(), changes=changes)], None, timeout_s=100)[0][0]
    trials = [Trial(zero(f"zero{stage}", small_shards, **layout), changes=changes) for stage, layout in ((1, CP2), (2, TP2), (3, EP2))]
    reports = run_ranks(run_trials, 2, trials, expected["start"], timeout_s=110)[0]
    assert [different(report, expected, 3e-5) for report in reports] == [[], [], []]


@pytest.mark.journey
def test_four_ranks_with_tensor_and_expert_parallelism_train_like_one_rank(small_shards: Path) -> None:
    """Two data-parallel ranks of two tensor-parallel ones, every expert on two; at stage 2 also with experts that are split themselves."""
    grids = [(1, None), (2, None), (3, None), (2, 2)]
    trials = [Trial(zero(f"zero{stage}", small_shards, ranks=4, tp=2, ep=2, etp=etp), **SLOW) for stage, etp in grids]
    reports = run_ranks(run_trials, 4, trials, one_rank()["start"], timeout_s=115)[0]
    assert [different(report, one_rank(**SLOW)) for report in reports] == [[]] * len(grids)


def test_an_engine_with_a_part_left_out_is_seen(small_shards: Path) -> None:
    """The comparison itself. Without the sum over sequence slices the gradients of norms are wrong, and training goes on as if nothing were."""
    trials = [
        Trial(zero("zero1", small_shards, **TP2), sabotage="sum over sequence slices"),
        Trial(zero("zero2", small_shards, **EP2), sabotage="groups of experts"),
    ]
    unsummed, dense = run_ranks(run_trials, 2, trials, one_rank()["start"], timeout_s=110)[0]
    assert "gradient of decoder.final_layernorm.weight" in different(unsummed, one_rank())
    assert "gradient of decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight" in different(dense, one_rank())


@pytest.mark.journey
def test_engines_continue_each_other_in_other_layouts(small_shards: Path, tmp_path: Path) -> None:
    """Four updates on one rank of engine megatron; the same by relay: megatron, ZeRO-3 with experts split, ZeRO-1 with tensors split, megatron.

    A restored learning rate, moment or master weight that is off shows in the next losses and norms.
    """
    straight = run_ranks(run_trials, 1, [Trial(ParallelConfig(), CLIPPED, last=4)], one_rank()["start"], timeout_s=60)[0][0]
    folders = [tmp_path / str(number) for number in range(3)]
    first = run_ranks(run_trials, 1, [Trial(ParallelConfig(), CLIPPED, save=folders[0], last=1)], one_rank()["start"], timeout_s=60)[0]
    relay = [
        Trial(zero("zero3", small_shards, **EP2), CLIPPED, load=folders[0], save=folders[1], last=2),
        Trial(zero("zero1", small_shards, **TP2), CLIPPED, load=folders[1], save=folders[2], last=3),
    ]
    between = run_ranks(run_trials, 2, relay, None, timeout_s=110)[0]
    last = run_ranks(run_trials, 1, [Trial(ParallelConfig(), CLIPPED, load=folders[2], last=4)], None, timeout_s=60)[0]
    curve = [step for report in (*first, *between, *last) for step in report["curve"]]
    assert len(curve) == 4
    for ours, theirs in zip(curve, straight["curve"], strict=True):
        assert {metric: ours[metric] for metric in METRICS} == pytest.approx({metric: theirs[metric] for metric in METRICS}, rel=1e-5)
    for name, weight in straight["end"].items():
        assert (last[0]["end"][name] - weight).abs().max() < 1e-4, name


@pytest.mark.journey
def test_a_stage_of_each_kind_has_the_same_metrics_with_either_engine(small_shards: Path, tmp_path: Path) -> None:
    """A step of reinforcement learning in two updates, published to a replica and saved, under ZeRO-3; then fine-tuning from where it ended."""
    start = rl_config(tmp_path, replicas=1, steps=1, save_every=1, minibatches=2, optimizer=CLIPPED)
    checkpoint = prepare(start)
    records = []
    for name, parallel in (("megatron", ParallelConfig(num_ranks=2)), ("zero3", zero("zero3", small_shards))):
        stage = start.sft.model_copy(update={"steps": 2, "global_batch": 4, "micro_batch": 2, "log_every": 1})
        config = start.model_copy(update={"parallel": parallel, "sft": stage})
        run_rl(config, tmp_path / name / "rl", checkpoint, None)
        run_supervised(config, "sft", tmp_path / name / "sft", tmp_path / name / "rl" / "checkpoints")
        records.append([record for kind in ("rl", "sft") for record in read_metrics(tmp_path / name / kind)])
    assert len(records[0]) == 3
    for theirs, ours in zip(*records, strict=True):
        timed = ("time", "timing_s", "perf/")
        assert ours.keys() - {EP_RANK_LOAD} == theirs.keys()  # how even the ranks of the experts are depends on the layout
        assert {name: value for name, value in ours.items() if not name.startswith(timed)} == pytest.approx(
            {name: value for name, value in theirs.items() if not name.startswith(timed)}, rel=1e-3, abs=1e-6
        )


@pytest.mark.journey
def test_in_bf16_it_trains_like_engine_megatron_in_the_same_layout(small_shards: Path) -> None:
    """Accumulated and summed in float32. (With tensor parallelism the sum over sequence slices is in bf16: not equal, and not promised.)"""
    how: dict[str, Any] = {"optimizer": CLIPPED, "changes": {"dtype": "bf16"}}
    trials = [Trial(ParallelConfig(num_ranks=2, ep=2), **how), *(Trial(zero(f"zero{stage}", small_shards, **EP2), **how) for stage in (1, 2, 3))]
    megatron, *others = run_ranks(run_trials, 2, trials, None, timeout_s=110)[0]
    for report in others:
        assert [step["loss"] for step in report["curve"]] == [step["loss"] for step in megatron["curve"]]
        assert all(torch.allclose(report["end"][name], weight, rtol=0, atol=1e-7) for name, weight in megatron["end"].items())


@pytest.mark.journey  # DeepSpeed compiles its CPU optimizer first: minutes where it has not been used before
@pytest.mark.timeout(1200)
def test_an_optimizer_on_the_cpu_trains_like_one_rank_of_engine_megatron(small_shards: Path) -> None:
    cases = [("zero2_offload", EP2, SLOW), ("zero2_offload", TP2, {}), ("zero3_offload", DP2, SLOW), ("zero3_offload", EP2, {})]
    trials = [Trial(zero(name, small_shards, **layout), disturbed=layout is DP2, **how) for name, layout, how in cases]
    reports = run_ranks(run_trials, 2, trials, one_rank()["start"], timeout_s=1100)[0]
    assert [different(report, one_rank(**how)) for report, (_, _, how) in zip(reports, cases, strict=True)] == [[]] * len(cases)


@pytest.mark.journey
@pytest.mark.timeout(1200)
def test_a_run_with_an_optimizer_on_the_cpu_resumes_without_it(small_shards: Path, tmp_path: Path) -> None:
    straight = run_ranks(run_trials, 1, [Trial(ParallelConfig(), CLIPPED, last=3)], one_rank()["start"], timeout_s=60)[0][0]
    relay = [
        Trial(zero("zero3_offload", small_shards, **DP2), CLIPPED, save=tmp_path / "0", last=1),
        Trial(zero("zero2_offload", small_shards, **EP2), CLIPPED, load=tmp_path / "0", save=tmp_path / "1", last=2),
        Trial(ParallelConfig(num_ranks=2, tp=2), CLIPPED, load=tmp_path / "1", last=3),
    ]
    reports = run_ranks(run_trials, 2, relay, one_rank()["start"], timeout_s=1100)[0]
    curve = [step for report in reports for step in report["curve"]]
    assert [step["loss"] for step in curve] == pytest.approx([step["loss"] for step in straight["curve"]], rel=1e-5)
