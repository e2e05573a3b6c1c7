"""The reinforcement-learning stage for real, small: two steps on a random model, over local processes and over Ray, stopped, killed and resumed."""

from __future__ import annotations

import math
import os
import signal
from collections import Counter

import pytest

from megatron_ext.checkpoint.dist import latest_step
from megatron_ext.config.algorithms import ALGORITHMS
from megatron_ext.config.schema import DiscoverConfig, EarlConfig, EvaluateConfig, ParallelConfig
from megatron_ext.earl.files import read_clusters
from megatron_ext.errors import ProbeMismatch, RankFailed, StoppedForRequeue, UserError
from megatron_ext.observe.metrics import read_metrics
from megatron_ext.rl import questions, replicas
from megatron_ext.rl import run as rl
from megatron_ext.rl.bank.bank import open_bank
from megatron_ext.rl.reestimation import ClusterWatch
from tests.support.rl_run import prepare, rl_config, save_clusters
from tests.support.roles import NoisyRollout
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
    "sync": ("bytes", "digest_ok", "probe_diff"),
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


LUCK = ("timing_s", "perf", "fleet", "sync")


def numbers(folder):
    """Every step's metrics but for what the clock, the memory and the fate of processes say: weights that a fleet has are not published again."""
    return [{name: value for name, value in record.items() if name != "time" and not name.startswith(LUCK)} for record in read_metrics(folder)]


def test_two_steps_leave_metrics_a_checkpoint_and_what_was_answered(start, finished):
    folder, last = finished
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [1, 2] and last["step"] == 2
    names = [f"{family}/{name}" for family, members in EXPECTED.items() for name in members]
    assert [name for name in names if not math.isfinite(records[0].get(name, math.nan))] == []
    assert latest_step(folder / "checkpoints") == 2
    answers = [scored.rollout for scored in open_bank(folder / "rollouts").drawn(0).scored]
    assert len(answers) == 24 and len({(answer.prompt.key, answer.sample) for answer in answers}) == 24
    assert {answer.version for answer in answers} == {0} and len({answer.seed for answer in answers}) == 24


def test_the_timeline_shows_the_loop_and_what_every_rank_does_for_it(finished):
    tracks = slices(as_perfetto_reads(finished[0]))
    assert set(tracks) == {"loop", "learner rank 0", "learner rank 1", "rollout replica 0 rank 0", "rollout replica 1 rank 0"}
    phases = ["generate", "reward", "bank", "advantages", "update", "sync"]
    assert list(dict.fromkeys(name for name, *_ in tracks["loop"])) == ["step 1", *phases, "step 2"]
    assert Counter(name for name, *_ in tracks["rollout replica 1 rank 0"])["advance"] >= 2
    assert {"open", "update", "send_weights", "save"} <= {name for name, *_ in tracks["learner rank 1"]}
    generate = next(event for event in tracks["loop"] if event[0] == "generate")
    asked = next(event for event in tracks["rollout replica 0 rank 0"] if event[0] == "advance")
    assert generate[1] <= asked[1] <= generate[2]


def test_the_learner_replays_every_route_and_agrees_with_the_rollouts_to_rounding(finished):
    for record in read_metrics(finished[0]):
        assert record["route/digest_ok"] == 1 and record["route/coverage"] == 1
        assert record["mismatch/logprob_abs_diff_max"] < 1e-5
        assert record["actor/ratio_max"] == 1 and record["sync/probe_diff"] < 1e-5


@pytest.mark.parametrize(
    ("learner", "rollout", "replicas"),
    [
        pytest.param(ParallelConfig(num_ranks=2), ParallelConfig(), 2, id="two learner ranks and two replicas"),
        pytest.param(ParallelConfig(num_ranks=2, tp=2), ParallelConfig(num_ranks=2, tp=2), 1, id="TP2 on both sides", marks=pytest.mark.journey),
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
    for exact, fast in zip(read_metrics(tmp_path), read_metrics(finished[0]), strict=True):
        assert exact["mismatch/logprob_abs_diff_max"] == exact["mismatch/logprob_abs_diff_mean"] == 0 < fast["mismatch/logprob_abs_diff_max"]
        assert exact["actor/ratio_max"] == 1 and exact["sync/probe_diff"] == 0


def test_ranks_that_leave_the_device_to_each_other_in_turn_compute_the_very_numbers(start, finished, tmp_path):
    """A checkpoint after a validation gives the device back to the learner, and then to rollouts without new weights: theirs come from host memory."""
    config, checkpoint = start
    config = change(config, offload=True, save_every=1, eval_every=1)
    config = config.model_copy(update={"evaluate": EvaluateConfig(prompts_per_skill=1, sampled_prompts_per_skill=1)})
    rl.run_rl(config, tmp_path, checkpoint, None)
    found = [{name: value for name, value in record.items() if not name.startswith("val/")} for record in numbers(tmp_path)]
    assert found == numbers(finished[0])


def test_a_finished_stage_is_not_run_again(start, finished, monkeypatch):
    config, checkpoint = start
    monkeypatch.setattr(rl, "open_host", None)
    assert rl.run_rl(config, finished[0], checkpoint, None)["step"] == 2


@pytest.mark.parametrize(
    ("learner", "rollout", "replicas"),
    [
        pytest.param(ParallelConfig(), ParallelConfig(), 1, id="one learner rank and one replica"),
        pytest.param(ParallelConfig(num_ranks=2, tp=2), ParallelConfig(num_ranks=2, ep=2), 1, id="a TP2 learner and an EP2 replica"),
        pytest.param(ParallelConfig(num_ranks=2, ep=2), ParallelConfig(num_ranks=2, tp=2), 1, id="an EP2 learner and a TP2 replica", marks=pytest.mark.journey),
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
        pytest.param("gspo", ParallelConfig(num_ranks=2), id="gspo, DP2", marks=pytest.mark.journey),
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
    bank = open_bank(tmp_path / "rollouts")
    trained = {key for _, key in bank.trained(0)}
    assert record["sampling/groups"] in (12, 18) and record["sampling/groups_set_aside"] == record["sampling/groups"] - len(trained)
    assert record["reward/frac_zero_std_groups"] > 0 and record["reward/overlong/mean"] < 0
    for key in trained:
        assert {answer.reward for answer in bank.groups([group for group in bank.trained(0) if group[1] == key])} == {0, 1}


@pytest.mark.journey
def test_ray_computes_the_very_numbers_of_local_processes(start, finished, tmp_path):
    config, checkpoint = start
    rl.run_rl(change(config, fleet="ray"), tmp_path, checkpoint, None)
    assert numbers(tmp_path) == numbers(finished[0])


def at_step(number, action, monkeypatch):
    """Does something when the prompts of that step are drawn for the first time."""
    draw, done = questions.prompts_of_step, []

    def draw_and_act(step, config, tokenizer):
        if step == number and not done:
            done.append(step)
            action()
        return draw(step, config, tokenizer)

    monkeypatch.setattr(questions, "prompts_of_step", draw_and_act)


def test_a_run_that_was_asked_to_stop_resumes_as_if_it_never_had(start, finished, tmp_path, monkeypatch):
    config, checkpoint = start
    with monkeypatch.context() as patch:
        at_step(0, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(StoppedForRequeue, match="after step 1 of 2"):
            rl.run_rl(config, tmp_path, checkpoint, None)
    assert latest_step(tmp_path / "checkpoints") == 1
    rl.run_rl(config, tmp_path, checkpoint, None)
    assert numbers(tmp_path) == numbers(finished[0])


@pytest.fixture(scope="module")
def exact(start, tmp_path_factory):
    """A deterministic run of three steps that nothing disturbed: its configuration and folder."""
    config, checkpoint = start
    config = change(config, steps=3, save_every=2)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"deterministic": True})})
    folder = tmp_path_factory.mktemp("exact")
    rl.run_rl(config, folder, checkpoint, None)
    return config, folder


@pytest.fixture
def roles(monkeypatch):
    """The fleet and the learner of the run that comes, by these names."""
    found = {}

    def remembering(name, made):
        def make(*arguments):
            found[name] = made(*arguments)
            return found[name]

        return make

    monkeypatch.setattr(rl, "MegatronFleet", remembering("fleet", rl.MegatronFleet))
    monkeypatch.setattr(rl, "MegatronLearner", remembering("learner", rl.MegatronLearner))
    return found


def hit(rank, number):
    os.kill(rank.process[0].pid, number)


def test_a_replica_that_is_killed_is_replaced_and_the_run_is_as_if_it_never_had(start, exact, tmp_path, monkeypatch, roles):
    at_step(1, lambda: hit(roles["fleet"].replicas[1].ranks[0], signal.SIGKILL), monkeypatch)
    rl.run_rl(exact[0], tmp_path, start[1], None)
    assert numbers(tmp_path) == numbers(exact[1])
    assert read_metrics(tmp_path)[-1]["fleet/lost"] == 1


@pytest.mark.journey
def test_a_replica_that_is_stopped_is_noticed_replaced_and_the_run_is_as_if_it_never_had(start, exact, tmp_path, monkeypatch, roles):
    at_step(1, lambda: hit(roles["fleet"].replicas[1].ranks[0], signal.SIGSTOP), monkeypatch)
    rl.run_rl(change(exact[0], silence_s=5), tmp_path, start[1], None)
    assert numbers(tmp_path) == numbers(exact[1])


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.journey), 2])
def test_a_learner_that_is_killed_starts_again_and_repeats_its_steps_from_the_bank(start, exact, tmp_path, monkeypatch, roles, step):
    """Checkpoints are written after step 2: of the three, one or two are repeated."""
    at_step(step, lambda: hit(roles["learner"].ranks[1], signal.SIGKILL), monkeypatch)
    rl.run_rl(exact[0], tmp_path, start[1], None)
    assert numbers(tmp_path) == numbers(exact[1])


@pytest.mark.journey
def test_a_learner_that_is_killed_each_time_ends_the_run_by_name(start, exact, tmp_path, monkeypatch, roles):
    config = change(exact[0], restarts=1)
    draw = questions.prompts_of_step

    def draw_and_kill(step, *more):
        hit(roles["learner"].ranks[0], signal.SIGKILL)
        return draw(step, *more)

    monkeypatch.setattr(questions, "prompts_of_step", draw_and_kill)
    with pytest.raises(RankFailed, match=r"the learner was lost 2 times at step 1, .*learner rank 0"):
        rl.run_rl(config, tmp_path, start[1], None)


@pytest.mark.parametrize(("staleness", "partial"), [(1, False), (2, True)])
def test_answers_of_older_weights_are_at_most_as_old_as_allowed_and_all_are_trained_on(start, tmp_path, staleness, partial):
    config, checkpoint = start
    config = change(config, steps=4, max_staleness=staleness, partial_rollouts=partial, mismatch_correction="tis")
    rl.run_rl(config, tmp_path, checkpoint, None)
    records = numbers(tmp_path)
    assert records[0]["staleness/max"] == 0 and 0 < max(record["staleness/max"] for record in records) <= staleness
    assert len(open_bank(tmp_path / "rollouts").account().trained.keys()) == 4 * config.rl.prompts_per_step


def test_weights_that_compute_something_else_at_a_rollout_stop_the_run_before_it_answers(start, tmp_path, monkeypatch):
    config, checkpoint = start
    monkeypatch.setattr(replicas, "RolloutRank", NoisyRollout)
    with pytest.raises(ProbeMismatch, match=r"rollout replica 0 rank 0 gives .*; rl.max_logprob_diff allows 0.01"):
        rl.run_rl(laid_out(config, ParallelConfig()), tmp_path, checkpoint, None)
    assert not list((tmp_path / "rollouts" / "answers").glob("*"))


def test_a_bonus_without_expert_clusters_is_refused_before_anything_starts(start, tmp_path):
    config, checkpoint = start
    with pytest.raises(UserError, match=r"earl.enabled: .* run `discover` first"):
        rl.run_rl(config.model_copy(update={"earl": EarlConfig()}), tmp_path, checkpoint, None)


def test_minibatches_a_reference_the_bonus_validation_and_failing_rewards_run_together(start, tmp_path):
    config, checkpoint = start
    earl = EarlConfig(warmup=0.0, cooldown=0.0, correct_threshold=0.2, reestimate_every=1)
    config = change(config, minibatches=3, kl_coeff=0.1, eval_every=2, reward="tests.support.vowels:moody_vowels", **ALGORITHMS["dr_grpo"])
    discover = DiscoverConfig(committee_top=2, permutations=20, bootstraps=3)
    evaluate = EvaluateConfig(prompts_per_skill=2, sampled_prompts_per_skill=2)
    config = config.model_copy(update={"earl": earl, "evaluate": evaluate, "discover": discover})
    clusters = save_clusters(config, tmp_path / "expert_clusters.json")
    rl.run_rl(config, tmp_path / "rl", checkpoint, clusters)
    first, second = numbers(tmp_path / "rl")
    assert first["actor/kl_ref"] > 0 and first["actor/ratio_max"] > 1
    assert first["earl/lambda"] == 0.3 and first["earl/bonus_mean"] > 0 and 0 < first["earl/bonus_share"] <= 0.5
    assert 0 < first["earl/cluster_usage/color"] < 1
    assert "val/val/ocr/accuracy" not in first and second["val/val/ocr/accuracy"] in (0, 0.5, 1)
    assert first["rollout/failed_count"] == first["rollout/failed/reward_raised"] in (8, 12, 16) and "earl/cluster_usage/composite" not in first
    watch = ClusterWatch(config, read_clusters(clusters, config.model), open_bank(tmp_path / "rl" / "rollouts"), tmp_path, image_id=-1)
    assert watch.after(0) | watch.after(1) == {name: value for name, value in (first | second).items() if name.startswith(("earl/drift", "earl/cluster_stale"))}
    assert (tmp_path / "drift.jsonl").read_text() == (tmp_path / "rl" / "drift.jsonl").read_text(), "what is found depends on the bank alone"
