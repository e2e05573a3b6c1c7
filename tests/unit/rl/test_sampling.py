"""Dynamic sampling: which groups are trained on, and what is left of them when they are few."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.batch import NO_TILES, Prompt, Rollout, RouteTrace, ScoredRollout
from megatron_ext.rl.sampling import keep_all, keep_differing

ROUTES = RouteTrace(np.zeros((1, 1, 1), np.uint8), np.ones((1, 1, 1), np.float16))


def scored(key, sample, reward):
    prompt = Prompt(key, "ocr", np.array([1], np.int32), NO_TILES, "")
    return ScoredRollout(Rollout(prompt, sample, 0, np.array([2]), np.zeros(1, np.float32), np.zeros(1, np.int32), "stop", "", ROUTES), reward, {})


def answers(**groups):
    return [scored(key, sample, reward) for key, rewards in groups.items() for sample, reward in enumerate(rewards)]


def keys(rollouts):
    return [answer.rollout.prompt.key for answer in rollouts]


def test_groups_whose_answers_are_all_right_or_all_wrong_are_set_aside():
    choice = keep_differing(answers(a=[1, 1], b=[1, 0], c=[0, 0], d=[0, 0.5]), wanted=3)
    assert (keys(choice.kept), keys(choice.set_aside), choice.enough) == (["b", "b", "d", "d"], ["a", "a", "c", "c"], False)


def test_there_are_never_more_groups_than_wanted():
    choice = keep_differing(answers(a=[1, 0], b=[1, 1], c=[0, 1], d=[0, 1]), wanted=2)
    assert (keys(choice.kept), choice.enough) == (["a", "a", "c", "c"], True)


def test_a_step_in_which_no_group_differs_keeps_what_it_would_without_the_filter():
    choice = keep_differing(answers(a=[1, 1], b=[0, 0], c=[1]), wanted=2)
    assert (keys(choice.kept), keys(choice.set_aside), choice.enough) == (["a", "a", "b", "b"], ["c"], False)
    assert keep_differing([], wanted=2).kept == []


def test_without_the_filter_everything_is_kept_and_enough():
    everything = answers(a=[1, 1], b=[1, 0])
    assert keep_all(everything).kept == everything and keep_all(everything).enough


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=4), min_size=1, max_size=8), st.integers(1, 9))
def test_every_answer_is_kept_or_set_aside_once_and_groups_stay_whole(groups, wanted):
    everything = answers(**{f"p{index}": rewards for index, rewards in enumerate(groups)})
    choice = keep_differing(everything, wanted)
    assert sorted(map(id, [*choice.kept, *choice.set_aside])) == sorted(map(id, everything))
    assert not set(keys(choice.kept)) & set(keys(choice.set_aside))
    assert len(set(keys(choice.kept))) <= wanted
    assert choice.enough == (sum(len(set(rewards)) > 1 for rewards in groups) >= wanted)
