"""From rewards to advantages, with and without the bonus; tables with holes where rollouts failed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.batch import NO_TILES, Prompt, Rollout, RouteTrace, ScoredRollout
from megatron_ext.config.algorithms import Advantage
from megatron_ext.config.schema import EarlConfig, ModelConfig, RLConfig, RolloutConfig, RunConfig
from megatron_ext.earl.clusters import ExpertClusters, PairEffect, SkillCluster
from megatron_ext.errors import UserError
from megatron_ext.rl.credit import Credit
from megatron_ext.rl.earl_credit import SIGMA_FILE
from megatron_ext.rl.table import Table

TAGS = {"ocr": (90, 91), "count": (92, 93)}


def scored(key, sample, reward, skill="ocr", mass=0.5, response=(1, 2)):
    """Two experts, one layer: expert 0 takes `mass` of every response token."""
    length = 1 + len(response)
    experts = np.broadcast_to(np.array([0, 1], np.uint8), (length, 1, 2))
    gates = np.broadcast_to(np.array([mass, 1 - mass], np.float16), (length, 1, 2))
    prompt = Prompt(key, skill, np.array([5, 6], np.int32), NO_TILES, "")
    tokens = np.array(response)
    logprobs, versions = np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.int32)
    return ScoredRollout(Rollout(prompt, sample, 0, tokens, logprobs, versions, "stop", "", RouteTrace(experts, gates)), reward, {})


def clusters(*skills, sigma=0.1):
    """Expert 0 of the only layer is the cluster of every skill."""
    pair = PairEffect(0, 0, 0.1, 2.0, 9.0, 0.001, 1.0, 0.9, 0.3, 0.1, 9.0, 0.9, 0.3)
    found = tuple(SkillCluster(skill, "ok", "", 9, (pair,), sigma, 0.9, None, 1.0, None) for skill in skills)
    table = np.full((len(skills), 1, 2), 0.5)
    return ExpertClusters(1, 2, found, table, table * 0, np.zeros(1), 4.0, RunConfig().discover, 0, "sft")


def config(rl=None, **earl):
    settings = EarlConfig(**{"warmup": 0.0, "cooldown": 0.0, "bonus": 0.2, **earl})
    chosen = RLConfig(**{"rollouts_per_prompt": 4, "advantage": "dr_grpo", **(rl or {})})
    return RunConfig(model=ModelConfig(num_layers=3), rollout=RolloutConfig(max_new_tokens=10), rl=chosen, earl=settings)


def test_advantages_come_in_the_order_of_the_rollouts_whatever_that_is(tmp_path):
    """Group a: rewards 1, 0 -> +-1/2. Group b: rewards 2, 0, 1 -> 1, -1, 0."""
    answers = [scored("b", 0, 2.0), scored("a", 1, 0.0), scored("b", 3, 0.0), scored("a", 0, 1.0), scored("b", 1, 1.0)]
    advantages, metrics = Credit(config(), None, TAGS, tmp_path)(answers, 0)
    assert advantages.tolist() == [1.0, -0.5, -1.0, 0.5, 0.0]
    assert metrics["advantage/max"] == 1


def test_a_group_that_lost_all_but_one_rollout_teaches_nothing(tmp_path):
    advantages, _ = Credit(config(), None, TAGS, tmp_path)([scored("a", 2, 1.0), scored("b", 0, 1.0), scored("b", 1, 0.0)], 0)
    assert advantages.tolist() == [0.0, 0.5, -0.5]


def test_overlong_answers_lose_reward_but_stay_correct(tmp_path):
    """At most 10 tokens, the last 4 cost: 6 tokens lose nothing, 8 lose 1/2, 10 lose 1 (times the penalty of 0.5). All three are right."""
    answers = [scored("a", sample, reward, response=(1,) * length) for sample, (reward, length) in enumerate([(1.0, 6), (1.0, 8), (1.0, 10), (0.0, 2)])]
    advantages, metrics = Credit(config({"overlong_share": 0.4, "overlong_penalty": 0.5}), None, TAGS, tmp_path)(answers, 0)
    shaped = np.array([1.0, 0.75, 0.5, 0.0])
    assert advantages == pytest.approx(shaped - shaped.mean())
    assert metrics["reward/overlong/mean"] == pytest.approx(-0.75 / 4)
    _, metrics = Credit(config({"overlong_share": 0.4}), clusters("ocr"), TAGS, tmp_path)(answers, 0)
    assert metrics["earl/bonus_mean"] == 0, "equal masses, but all three count as correct"
    answers[2] = scored("a", 2, 1.0, mass=0.9, response=(1,) * 10)
    _, metrics = Credit(config({"overlong_share": 0.4}), clusters("ocr"), TAGS, tmp_path)(answers, 0)
    assert metrics["earl/bonus_mean"] > 0


def test_an_answer_pays_for_its_distance_from_the_reference(tmp_path):
    credit = Credit(config({"kl_coeff": 0.5}), None, TAGS, tmp_path, reference_kl=lambda scored: np.array([0.0, 1.0, 2.0]))
    advantages, metrics = credit([scored("a", 0, 1.0), scored("a", 1, 1.0), scored("a", 2, 1.0)], 0)
    assert advantages.tolist() == [0.5, 0.0, -0.5] and metrics["reward/kl/mean"] == -0.5


def test_named_rewards_are_normalised_apart_and_a_part_that_is_missing_is_named(tmp_path):
    rl = {"advantage": "gdpo", "reward_weights": {"correct": 1.0, "format": 1.0}}
    answers = [replace(scored("a", sample, 0.0), rewards={"correct": right, "format": form}) for sample, (right, form) in enumerate([(1, 0), (0, 0.1), (0, 0)])]
    advantages, _ = Credit(config(rl), None, TAGS, tmp_path)(answers, 0)
    assert advantages[0] == pytest.approx(advantages[1], abs=1e-4) and advantages[2] < 0, "a tenth as large, worth as much"
    with pytest.raises(UserError, match=r"rl.reward_weights.correct: the reward of a has no such part; its parts: none"):
        Credit(config(rl), None, TAGS, tmp_path)([scored("a", 0, 1.0), scored("a", 1, 0.0)], 0)


def test_a_correct_answer_that_used_its_experts_more_gains_and_one_that_used_them_less_loses(tmp_path):
    """Masses 0.55 and 0.45 around their mean 0.5, sigma 0.1: B = +-1/2. lambda 0.2: A = 1/2 +- 0.1. The wrong answer keeps -1."""
    answers = [scored("a", 0, 1.0, mass=0.55), scored("a", 1, 1.0, mass=0.45), scored("a", 2, -0.5, mass=0.9)]
    advantages, metrics = Credit(config(), clusters("ocr"), TAGS, tmp_path)(answers, 0)
    assert advantages == pytest.approx([0.6, 0.4, -1.0], abs=1e-3)
    assert metrics["earl/lambda"] == 0.2
    assert metrics["earl/bonus_mean"] == pytest.approx(1 / 3, abs=1e-2)
    assert metrics["earl/bonus_share"] == pytest.approx(0.2 / 2.0, abs=1e-2)
    assert metrics["earl/cluster_usage/ocr"] == pytest.approx((0.55 + 0.45 + 0.9) / 3, abs=1e-3)


@pytest.mark.parametrize("subtask", ["prompt", "tags"])
def test_the_mass_of_a_conversation_is_that_of_its_own_turns(tmp_path, subtask):
    """Of five tokens three were observed, with all their mass on the cluster; where tags count, one that opens in a turn does not close in the next."""
    plain = scored("a", 0, 1.0, mass=0.5, response=(90, 1, 1, 1, 91))
    gates = plain.rollout.routes.gates_SLK.copy()
    gates[2:5] = (1.0, 0.0)  # the rows that chose the observed tokens
    versions_T = np.array([0, -1, -1, -1, 0], np.int32)
    talk = ScoredRollout(replace(plain.rollout, versions_T=versions_T, routes=replace(plain.rollout.routes, gates_SLK=gates)), 1.0, {})
    _, metrics = Credit(config(subtask=subtask), clusters("ocr"), TAGS, tmp_path)([talk, scored("a", 1, 0.0)], 0)
    assert metrics["earl/cluster_usage/ocr"] == pytest.approx(0.5, abs=1e-3)


def test_lengths_are_those_of_what_was_written(tmp_path):
    """Ten tokens may be written and the last half costs: nine written tokens lose, three written ones among six that were observed do not."""
    written = scored("a", 0, 1.0, response=(1,) * 9)
    observed = ScoredRollout(replace(written.rollout, sample=1, versions_T=np.array([0] + [-1] * 6 + [0, 0], np.int32)), 1.0, {})
    _, metrics = Credit(config({"overlong_share": 0.5}), None, TAGS, tmp_path)([written, observed], 0)
    assert metrics["reward/overlong/mean"] == pytest.approx(-0.8 / 2)


def test_a_skill_without_a_cluster_gets_no_bonus(tmp_path):
    answers = [scored("a", 0, 1.0, "count", 0.9), scored("a", 1, 1.0, "count", 0.1), scored("a", 2, 0.0, "count")]
    with_bonus, metrics = Credit(config(), clusters("ocr"), TAGS, tmp_path)(answers, 0)
    without, _ = Credit(config(), None, TAGS, tmp_path)(answers, 0)
    assert with_bonus.tolist() == without.tolist()
    assert "earl/cluster_usage/count" not in metrics


def test_a_spread_that_discovery_has_not_measured_is_learnt_from_the_first_correct_answers_and_kept_for_a_resumed_run(tmp_path):
    tagged, unmeasured = (90, 7, 91, 92, 8, 93), clusters("ocr", "count", sigma=None)
    answers = [scored("c", 0, 1.0, "composite", 0.6, tagged), scored("c", 1, 1.0, "composite", 0.4, tagged), scored("c", 2, 0.0, "composite", 0.5, tagged)]
    first = Credit(config(subtask="tags"), unmeasured, TAGS, tmp_path)(answers, 4)
    learnt = json.loads((tmp_path / SIGMA_FILE).read_text())["count"]
    assert learnt["step"] == 4 and learnt["sigma"] == pytest.approx(np.std([0.6, 0.4], ddof=1), rel=1e-2)
    later = [scored("d", sample, 1.0, "composite", mass, tagged) for sample, mass in ((0, 0.51), (1, 0.49))] + [scored("d", 2, 0.0, "composite")]
    resumed = Credit(config(subtask="tags"), unmeasured, TAGS, tmp_path)
    resumed(later, 5)
    assert json.loads((tmp_path / SIGMA_FILE).read_text())["count"] == learnt
    repeated = Credit(config(subtask="tags"), unmeasured, TAGS, tmp_path)
    assert repeated(later, 3)[0][0] == repeated(later, 3)[0][1], "a step before it had no such bonus"
    assert first[0][0] > first[0][1] > 0 > first[0][2]


def test_each_sub_task_of_a_composite_counts_by_its_own_sigma(tmp_path):
    """Two right answers; sigma is 0.1 for ocr, 0.4 for count. Their ocr spans have 0.6 and 0.5: x = +-0.5. Their count spans have 0.5 and 0.6: x = -+0.125.
    B = +-(0.5 - 0.125) / 2 = +-0.1875. A = 1/3 +- 0.2 B; tag tokens, which have all their mass on the cluster, count nowhere."""
    tagged = (90, 7, 91, 92, 8, 8, 93)
    found = clusters("ocr", "count")
    found = replace(found, skills=(found.skills[0], replace(found.skills[1], sigma=0.4)))

    def answer(sample, reward, ocr, count):
        plain = scored("c", sample, reward, "composite", 1.0, tagged)
        gates = plain.rollout.routes.gates_SLK.copy()
        first = plain.rollout.response_rows[0]
        gates[first + 1] = (ocr, 1 - ocr)
        gates[first + 4 : first + 6] = (count, 1 - count)
        return replace(plain, rollout=replace(plain.rollout, routes=replace(plain.rollout.routes, gates_SLK=gates)))

    answers = [answer(0, 1.0, 0.6, 0.5), answer(1, 1.0, 0.5, 0.6), answer(2, 0.0, 0.9, 0.9)]
    advantages, metrics = Credit(config(subtask="tags"), found, TAGS, tmp_path)(answers, 0)
    assert advantages == pytest.approx([1 / 3 + 0.2 * 0.1875, 1 / 3 - 0.2 * 0.1875, -2 / 3], abs=1e-3)
    assert metrics["earl/cluster_usage/composite"] == pytest.approx(((0.6 + 2 * 0.5) / 3 + (0.5 + 2 * 0.6) / 3 + 0.9) / 3, abs=1e-3)


def test_add_pays_mass_as_reward_before_answers_are_compared(tmp_path):
    """Rewards 1, 1, 0 and masses 0.55, 0.45, 0.9 with lambda 0.2: 1.11, 1.09, 0.18, less their mean. The wrong answer gains, too."""
    answers = [scored("a", 0, 1.0, mass=0.55), scored("a", 1, 1.0, mass=0.45), scored("a", 2, 0.0, mass=0.9)]
    advantages, _ = Credit(config(combine="add"), clusters("ocr"), TAGS, tmp_path)(answers, 0)
    paid = np.array([1.11, 1.09, 0.18])
    assert advantages == pytest.approx(paid - paid.mean(), abs=1e-3)


def test_gdpo_compares_task_and_mass_apart_and_whitens_their_sum(tmp_path):
    answers = [
        scored("a", 0, 1.0, mass=0.55),
        scored("a", 1, 1.0, mass=0.45),
        scored("a", 2, 0.0, mass=0.9),
        scored("b", 0, 1.0, "count"),
        scored("b", 1, 0.0, "count"),
    ]
    advantages, metrics = Credit(config({"advantage": "grpo"}, combine="gdpo"), clusters("ocr"), TAGS, tmp_path)(answers, 0)
    spread = lambda x: (x - x.mean()) / x.std(ddof=1)  # noqa: E731
    mass = np.array([0.55, 0.45, 0.9], np.float16).astype(float)
    summed = np.concatenate([spread(np.array([1.0, 1, 0])) + 0.2 * spread(mass), spread(np.array([1.0, 0]))])
    assert advantages == pytest.approx(summed / summed.std(ddof=1), rel=1e-4)
    assert metrics["earl/bonus_share"] > 0


def test_a_control_is_paid_for_and_the_true_clusters_are_watched(tmp_path, capsys):
    """Expert 0 is the cluster, with mass 0.6 and 0.4; the control of two experts can only be expert 1."""
    answers = [scored("a", 0, 1.0, mass=0.6), scored("a", 1, 1.0, mass=0.4), scored("a", 2, 0.0, mass=0.2)]
    advantages, metrics = Credit(config(control="random"), clusters("ocr"), TAGS, tmp_path)(answers, 0)
    assert advantages[1] > advantages[0], "the control took more of the second"
    assert metrics["earl/true_usage/ocr"] == pytest.approx(0.4, abs=1e-3) and metrics["earl/cluster_usage/ocr"] == pytest.approx(0.6, abs=1e-3)
    assert "earl.control = random: ocr is paid for a control: random experts" in capsys.readouterr().out


def collapsed(sample, reward, second):
    """Of the three positions behind the prompt, one expert each: two go to `second`, one to expert 0."""
    plain = scored("a", sample, reward, response=(1, 2, 3, 4))
    routes = plain.rollout.routes
    experts, gates = routes.experts_SLK[:, :, :1].copy(), routes.gates_SLK[:, :, :1] * 0 + np.float16(1)
    experts[::2] = second
    return replace(plain, rollout=replace(plain.rollout, routes=replace(routes, experts_SLK=experts, gates_SLK=gates)))


def test_a_collapsing_router_halves_lambda_says_so_and_a_resumed_run_knows_what_it_was(tmp_path, capsys):
    even, uneven = ([collapsed(sample, sample % 2, second) for sample in range(4)] for second in (1, 0))
    credit = Credit(config(), clusters("ocr"), TAGS, tmp_path)
    _, first = credit(even, 0)
    _, later = Credit(config(), clusters("ocr"), TAGS, tmp_path)(uneven, 7)
    assert (first["earl/guard"], later["earl/guard"]) == (0, 1)
    assert later["earl/lambda"] == first["earl/lambda"] / 2
    assert "step 8: lambda counts 0.5, experts are used less evenly than at first: layer 0: MaxVio 1" in capsys.readouterr().out


def test_a_bonus_that_tells_no_answers_apart_is_said_once_after_ten_steps(tmp_path, capsys):
    """Two right answers that are one text have one route and one mass, so x = 0 for both. Where masses differ nothing is said."""
    for other_mass, told in ((0.5, True), (0.6, False)):
        credit = Credit(config(), clusters("ocr"), TAGS, tmp_path)
        answers = [scored("a", 0, 1.0, mass=0.5), scored("a", 1, 1.0, mass=other_mass), scored("a", 2, 0.0)]
        shares = [credit(answers, step)[1]["earl/paid_share"] for step in range(12)]
        assert shares == [0.0 if told else 1.0] * 12
        said = capsys.readouterr().out
        assert said.count("earl: 0 of 20 correct answers got a bonus of 0.01 or more in 10 steps") == int(told) and ("router_pg" in said) is told


GROUPS = st.lists(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.sampled_from(get_args(Advantage)), st.sampled_from([0.0, 0.9]))
def test_the_laws_of_the_bonus_hold_with_every_advantage_and_shaping(tmp_path_factory, groups, advantage, overlong_share):
    """No advantage changes its sign, wrong answers keep theirs, no correct answer falls below a wrong one that it was above, groups that are all correct or all
    wrong get nothing."""
    rl = {"advantage": advantage, "overlong_share": overlong_share, "reward_weights": {"correct": 1.0}}
    answers = [
        replace(scored(f"p{index}", sample, round(reward), mass=mass, response=(1,) * (1 + sample)), rewards={"correct": round(reward)})
        for index, group in enumerate(groups)
        for sample, (reward, mass) in enumerate(group)
    ]
    folder = tmp_path_factory.getbasetemp()
    task, _ = Credit(config(rl), None, TAGS, folder)(answers, 0)
    total, _ = Credit(config(rl), clusters("ocr"), TAGS, folder)(answers, 0)
    assert (np.sign(total) == np.sign(task)).all()
    wrong = np.array([answer.reward < 1 for answer in answers])
    assert (total[wrong] == task[wrong]).all()
    keys = np.array([answer.rollout.prompt.key for answer in answers])
    for key in set(keys):
        bad, good = (keys == key) & wrong, (keys == key) & ~wrong
        if bad.any() and good.any():
            above = task[good] >= task[bad].max()
            assert (total[good][above] >= total[bad].max()).all()
        else:
            assert (total[keys == key] == task[keys == key]).all()


@given(GROUPS)
def test_spreading_over_the_table_and_gathering_is_the_identity(groups):
    answers = [scored(f"p{index}", sample, 0.0) for index, group in enumerate(groups) for sample in range(len(group))]
    table = Table.of(answers, 4)
    values = np.arange(len(answers), dtype=float)
    assert table.gather(table.spread(values)).tolist() == values.tolist()
    assert table.valid_PG.sum() == len(answers) == np.isfinite(table.spread(values)).sum()
