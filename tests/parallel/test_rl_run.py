"""The reinforcement-learning stage for real, small: two steps on a random model, over local processes and over Ray, stopped, killed and resumed."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
from collections import Counter

import pytest

from megatron_ext.checkpoint.dist import latest_step
from megatron_ext.config.algorithms import ALGORITHMS
from megatron_ext.config.schema import EarlConfig, EvaluateConfig, ParallelConfig
from megatron_ext.errors import RankFailed, StoppedForRequeue, UserError
from megatron_ext.observe.metrics import read_metrics
from megatron_ext.rl import fleet as fleets
from megatron_ext.rl import run as rl
from tests.support.rl_run import prepare, rl_config, save_clusters
from tests.support.timelines import as_perfetto_reads, slices

EXPECTED = {
    "reward": ("mean", "std", "min", "max", "frac_zero_std_groups"),
    "advantage": ("mean", "min", "max"),
    "actor": ("pg_loss", "loss", "grad_norm", "lr", "entropy", "ppo_kl", "clipfrac_low", "clipfrac_high", "ratio_max"),
    "mismatch": ("logprob_abs_diff_mean", "logprob_abs_diff_max", "kl", "ess"),
    "response_length": ("mean", "max", "clip_ratio"),
    "prompt_length": ("mean", "max"),
    "rollout": ("failed_count", "failed_ratio"),
    "timing_s": ("generate", "reward", "advantages", "update", "sync", "step", "data", "old_log_prob", "forward_backward", "optimizer", "save"),
    "perf": ("tokens_per_s", "tokens_per_s_per_gpu", "mfu", "peak_memory_bytes", "peak_memory_rank", "slowest_rank", "slowest_over_mean"),
    "moe": ("max_vio", "load_entropy"),
    "route": ("coverage", "digest_ok"),
    "sync": ("bytes", "digest_ok"),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The configuration, and the checkpoint that every run of this module starts from."""
    config = rl_config(tmp_path_factory.mktemp("runs"))
    return config, prepare(config)


def change(config, **rl_changes):
    return config.model_copy(update={"rl": config.rl.model_copy(update=rl_changes)})


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    """A two-step run that nothing disturbed: its folder, and what it returned."""
    config, checkpoint = start
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, rl.run_rl(config, folder, checkpoint, None)


def numbers(folder):
    """Every step's metrics but for what the clock and the memory say."""
    records = read_metrics(folder)
    return [{name: value for name, value in record.items() if name != "time" and not name.startswith(("timing_s", "perf"))} for record in records]


def test_two_steps_leave_metrics_a_checkpoint_and_what_was_answered(start, finished):
    folder, last = finished
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [1, 2] and last["step"] == 2
    names = [f"{family}/{name}" for family, members in EXPECTED.items() for name in members]
    assert [name for name in names if not math.isfinite(records[0].get(name, math.nan))] == []
    assert latest_step(folder / "checkpoints") == 2
    with gzip.open(folder / "rollouts" / "step_000001.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    assert len(lines) == 24 and len({(line["key"], line["sample"]) for line in lines}) == 24
    assert {line["version"] for line in lines} == {0} and len({line["seed"] for line in lines}) == 24


def test_the_timeline_shows_the_loop_and_what_every_rank_does_for_it(finished):
    tracks = slices(as_perfetto_reads(finished[0]))
    assert set(tracks) == {"loop", "learner rank 0", "learner rank 1", "rollout replica 0 rank 0", "rollout replica 1 rank 0"}
    phases = ["generate", "reward", "advantages", "update", "sync"]
    assert [name for name, *_ in tracks["loop"]] == ["step 1", *phases, "step 2", *phases]
    assert Counter(name for name, *_ in tracks["rollout replica 1 rank 0"])["generate"] == 2
    assert {"open", "update", "send_weights", "save"} <= {name for name, *_ in tracks["learner rank 1"]}
    (generate,) = [event for event in tracks["loop"][:6] if event[0] == "generate"]
    asked = next(event for event in tracks["rollout replica 0 rank 0"] if event[0] == "generate")
    assert generate[1] <= asked[1] <= asked[2] <= generate[2]


def test_the_learner_replays_every_route_and_agrees_with_the_rollouts_to_rounding(finished):
    for record in read_metrics(finished[0]):
        assert record["route/digest_ok"] == 1 and record["route/coverage"] == 1
        assert record["mismatch/logprob_abs_diff_max"] < 1e-5
        assert record["actor/ratio_max"] == 1


@pytest.mark.parametrize(
    ("learner", "rollout", "replicas"),
    [
        pytest.param(ParallelConfig(num_ranks=2), ParallelConfig(), 2, id="two learner ranks and two replicas"),
        pytest.param(ParallelConfig(num_ranks=2, tp=2), ParallelConfig(num_ranks=2, tp=2), 1, id="TP2 on both sides"),
        pytest.param(
            ParallelConfig(num_ranks=2, cp=2, recompute="full"),
            ParallelConfig(num_ranks=2, ep=2),
            1,
            id="a CP2 learner that recomputes, EP2 answers",
            marks=pytest.mark.journey,
        ),
        pytest.param(ParallelConfig(num_ranks=2, pp=2), ParallelConfig(), 1, id="a PP2 learner", marks=pytest.mark.journey),
        pytest.param(
            ParallelConfig(num_ranks=2, tp=2, ep=2), ParallelConfig(num_ranks=2, tp=2, ep=2), 1, id="TP2 EP2 on both sides", marks=pytest.mark.journey
        ),
    ],
)
def test_the_deterministic_mode_agrees_in_every_bit_over_real_learners_and_rollout_workers(start, finished, tmp_path, learner, rollout, replicas):
    """The run of `finished`, which is not deterministic, agrees to rounding."""
    config, checkpoint = start
    settings = config.rollout.model_copy(update={"deterministic": True, "batch_size": 7, "parallel": rollout, "replicas": replicas})
    rl.run_rl(config.model_copy(update={"parallel": learner, "rollout": settings}), tmp_path, checkpoint, None)
    for exact, fast in zip(numbers(tmp_path), numbers(finished[0]), strict=True):
        assert exact["mismatch/logprob_abs_diff_max"] == exact["mismatch/logprob_abs_diff_mean"] == 0 < fast["mismatch/logprob_abs_diff_max"]
        assert exact["actor/ratio_max"] == 1


def test_a_finished_stage_is_not_run_again(start, finished, monkeypatch):
    config, checkpoint = start
    monkeypatch.setattr(rl, "open_host", None)
    assert rl.run_rl(config, finished[0], checkpoint, None)["step"] == 2


@pytest.mark.parametrize(
    ("learner", "rollout", "replicas"),
    [
        pytest.param(ParallelConfig(), ParallelConfig(), 1, id="one learner rank and one replica"),
        pytest.param(ParallelConfig(num_ranks=2, tp=2), ParallelConfig(num_ranks=2, ep=2), 1, id="a TP2 learner and an EP2 replica"),
        pytest.param(ParallelConfig(num_ranks=2, ep=2), ParallelConfig(num_ranks=2, tp=2), 1, id="an EP2 learner and a TP2 replica"),
        pytest.param(ParallelConfig(num_ranks=2, pp=2), ParallelConfig(), 1, id="a PP2 learner and one replica"),
        pytest.param(ParallelConfig(num_ranks=2, cp=2, recompute="full"), ParallelConfig(num_ranks=2, tp=2), 1, id="a CP2 learner that recomputes"),
        pytest.param(ParallelConfig(num_ranks=4, pp=2, tp=2), ParallelConfig(), 1, id="a PP2 TP2 learner and one replica", marks=pytest.mark.journey),
    ],
)
def test_every_layout_computes_the_same_steps(start, finished, tmp_path, learner, rollout, replicas):
    config, checkpoint = start
    settings = config.rollout.model_copy(update={"parallel": rollout, "replicas": replicas})
    rl.run_rl(config.model_copy(update={"parallel": learner, "rollout": settings}), tmp_path, checkpoint, None)
    first, reference = numbers(tmp_path)[0], numbers(finished[0])[0]
    for name in ("reward/mean", "response_length/mean", "actor/grad_norm", "actor/entropy", "advantage/max"):
        assert first[name] == pytest.approx(reference[name], rel=1e-4), name
    assert numbers(tmp_path)[1]["reward/mean"] == pytest.approx(numbers(finished[0])[1]["reward/mean"], rel=0.1)


@pytest.fixture(scope="module")
def objective(request, start, tmp_path_factory):
    """A configuration of two optimizer steps a step, so that ratios leave 1, and its numbers on one rank with one replica."""
    config, checkpoint = start
    parts = {"gspo": {**ALGORITHMS["gspo"], "clip_low": 0.1, "clip_high": 0.1, "kl_estimator": "k2"}, "rloo": ALGORITHMS["rloo"]}[request.param]
    config = change(config, minibatches=2, kl_coeff=0.1, **parts)
    folder = tmp_path_factory.mktemp(request.param)
    rl.run_rl(laid_out(config, ParallelConfig()), folder, checkpoint, None)
    return config, numbers(folder)


def laid_out(config, learner):
    return config.model_copy(update={"parallel": learner, "rollout": config.rollout.model_copy(update={"replicas": 1})})


@pytest.mark.parametrize(
    ("objective", "learner"),
    [
        pytest.param("gspo", ParallelConfig(num_ranks=2), id="gspo, DP2"),
        pytest.param("gspo", ParallelConfig(num_ranks=2, cp=2), id="gspo, CP2"),
        pytest.param("rloo", ParallelConfig(num_ranks=2, cp=2), id="rloo, CP2"),
        pytest.param("rloo", ParallelConfig(num_ranks=2), id="rloo, DP2", marks=pytest.mark.journey),
    ],
    indirect=["objective"],
)
def test_ratios_of_whole_answers_and_sums_over_them_do_not_know_the_layout(objective, start, tmp_path, learner):
    config, reference = objective
    rl.run_rl(laid_out(config, learner), tmp_path, start[1], None)
    first, second = numbers(tmp_path)
    assert first["actor/ratio_max"] > 1
    for name in ("reward/mean", "actor/grad_norm", "actor/entropy", "actor/loss", "actor/ratio_max", "advantage/max"):
        assert first[name] == pytest.approx(reference[0][name], rel=1e-4), name
    (distance,) = {"actor/kl_ref", "reward/kl/mean"} & second.keys()
    assert abs(second[distance]) > 0
    for name in ("reward/mean", distance):
        assert second[name] == pytest.approx(reference[1][name], rel=0.1), name


def test_a_step_asks_further_prompts_in_place_of_groups_that_teach_nothing(start, tmp_path):
    """A threshold makes rewards 0 or 1, so that some groups are all of one kind."""
    config, checkpoint = start
    config = change(config, steps=1, dynamic_sampling=3, overlong_share=0.5, reward="tests.support.vowels:many_vowels")
    rl.run_rl(laid_out(config, ParallelConfig(num_ranks=2)), tmp_path, checkpoint, None)
    (record,) = numbers(tmp_path)
    with gzip.open(tmp_path / "rollouts" / "step_000001.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    trained = {line["key"] for line in lines if line["advantage"] is not None}
    assert record["sampling/groups"] in (12, 18) and record["sampling/groups_set_aside"] == record["sampling/groups"] - len(trained)
    assert record["reward/frac_zero_std_groups"] > 0 and record["reward/overlong/mean"] < 0
    for key in trained:
        assert {line["reward"] for line in lines if line["key"] == key} == {0, 1}


def test_ray_computes_the_very_numbers_of_local_processes(start, finished, tmp_path):
    config, checkpoint = start
    rl.run_rl(change(config, fleet="ray"), tmp_path, checkpoint, None)
    assert numbers(tmp_path) == numbers(finished[0])


def at_step(number, action, monkeypatch):
    """Does something when the prompts of that step are drawn."""
    draw = rl.prompts_of_step

    def draw_and_act(step, config, tokenizer):
        if step == number:
            action()
        return draw(step, config, tokenizer)

    monkeypatch.setattr(rl, "prompts_of_step", draw_and_act)


def test_a_run_that_was_asked_to_stop_resumes_as_if_it_never_had(start, finished, tmp_path, monkeypatch):
    config, checkpoint = start
    with monkeypatch.context() as patch:
        at_step(0, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(StoppedForRequeue, match="after step 1 of 2"):
            rl.run_rl(config, tmp_path, checkpoint, None)
    assert latest_step(tmp_path / "checkpoints") == 1
    rl.run_rl(config, tmp_path, checkpoint, None)
    assert numbers(tmp_path) == numbers(finished[0])


def test_a_replica_that_dies_is_named_and_the_run_resumes_from_its_checkpoint(start, finished, tmp_path, monkeypatch):
    config, checkpoint = start
    config = change(config, save_every=1)
    ranks = []
    begin = fleets.start

    def begin_and_remember(board, *arguments):
        fleet, learner = begin(board, *arguments)
        ranks.extend(fleet._ranks)
        return fleet, learner

    with monkeypatch.context() as patch:
        patch.setattr(fleets, "start", begin_and_remember)
        at_step(1, lambda: ranks[1].process[0].kill(), patch)
        with pytest.raises(RankFailed, match=r"rollout replica 1 rank 0 .* ended with exit code -9"):
            rl.run_rl(config, tmp_path, checkpoint, None)
    rl.run_rl(config, tmp_path, checkpoint, None)
    assert numbers(tmp_path) == numbers(finished[0])


def test_a_bonus_without_expert_clusters_is_refused_before_anything_starts(start, tmp_path):
    config, checkpoint = start
    with pytest.raises(UserError, match=r"earl.enabled: .* run `discover` first"):
        rl.run_rl(config.model_copy(update={"earl": EarlConfig()}), tmp_path, checkpoint, None)


def test_minibatches_a_reference_the_bonus_validation_and_failing_rewards_run_together(start, tmp_path):
    config, checkpoint = start
    earl = EarlConfig(warmup=0.0, cooldown=0.0, correct_threshold=0.2)
    config = change(config, minibatches=3, kl_coeff=0.1, eval_every=2, reward="tests.support.vowels:moody_vowels", **ALGORITHMS["dr_grpo"])
    config = config.model_copy(update={"earl": earl, "evaluate": EvaluateConfig(prompts_per_skill=2, sampled_prompts_per_skill=2)})
    clusters = save_clusters(config, tmp_path / "expert_clusters.json")
    rl.run_rl(config, tmp_path / "rl", checkpoint, clusters)
    first, second = numbers(tmp_path / "rl")
    assert first["actor/kl_ref"] > 0 and first["actor/ratio_max"] > 1
    assert first["earl/lambda"] == 0.3 and first["earl/bonus_mean"] > 0 and 0 < first["earl/bonus_share"] <= 0.5
    assert 0 < first["earl/cluster_usage/color"] < 1
    assert "val/val/ocr/accuracy" not in first and second["val/val/ocr/accuracy"] in (0, 0.5, 1)
    assert first["rollout/failed_count"] == first["rollout/failed/reward_raised"] in (8, 12, 16) and "earl/cluster_usage/composite" not in first
