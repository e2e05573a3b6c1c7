"""Where a step's answers come from, against ten-line fakes: what is asked when, what is banked, and what a run that was killed finds again."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.observe.stopwatch import Stopwatch
from megatron_ext.rl.sampling import keep_differing
from megatron_ext.rl.stream import Questions, Stream
from tests.support.rl_fakes import FakeFleet, FakeScorer, FakeStore, FakeWeights, prompt


def questions(steps=3, names=("a", "b"), **changes):
    return Questions(steps, 2, lambda number: [prompt(f"{name}{number}") for name in names], **changes)


def stream(asked=None, store=None, **settings):
    log: list[str] = []
    made = Stream(asked or questions(), FakeFleet(log), FakeScorer(log), store or FakeStore(), **settings)
    made.log = log
    return made


def take(source, step):
    return source.take(step, Stopwatch())


def keys(scored):
    return [f"{one.rollout.prompt.key}#{one.rollout.sample}" for one in scored]


def asked(source):
    return [line for line in source.log if line.startswith("ask")]


def test_a_step_gets_every_answer_of_its_draw_in_the_order_of_the_prompts():
    source = stream()
    source.publish(FakeWeights(0))
    assert keys(take(source, 0).kept) == ["a0#0", "a0#1", "b0#0", "b0#1"]
    assert source.log == ["publish 0", "ask a0 x2 with version 0", "ask b0 x2 with version 0", "score 2", "score 2"]


def test_a_synchronous_run_asks_nothing_before_the_weights_of_the_step_are_there():
    source = stream()
    for step in range(3):
        source.publish(FakeWeights(step))
        take(source, step)
    assert asked(source) == [f"ask {name}{step} x2 with version {step}" for step in range(3) for name in "ab"]


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_draw_is_asked_as_many_versions_ahead_as_may_be_and_never_more(ahead):
    source = stream(questions(steps=5, names=("a",)), ahead=ahead)
    for step in range(5):
        source.publish(FakeWeights(step))
        take(source, step)
    assert asked(source) == [f"ask a{step} x2 with version {max(0, step - ahead)}" for step in range(5)]


def test_what_fails_is_reported_and_never_trained_on():
    source = stream(questions(names=("a", "broken", "lost")))
    source.publish(FakeWeights(0))
    taken = take(source, 0)
    assert keys(taken.kept) == ["a0#0", "a0#1"]
    assert [(one.prompt.key, one.reason) for one in taken.failed] == [("broken0", "reward_raised")] * 2 + [("lost0", "replica_lost")] * 2


def test_a_step_in_which_everything_failed_stops_the_run_and_says_why():
    source = stream(questions(names=("broken",)))
    source.publish(FakeWeights(0))
    with pytest.raises(UserError, match="step 0: all 2 rollouts failed; the first: reward_raised: no gold answer"):
        take(source, 0)


def refilling(draws):
    """Of draw 0 no group teaches anything; of later ones, whose numbers start at the run's steps, every one does."""
    return Questions(
        2, 2, lambda number: [prompt(f"{'p' if number else 'alike'}/{number}/{letter}") for letter in "ab"], partial(keep_differing, wanted=2), draws
    )


def test_a_step_without_enough_groups_to_learn_from_draws_again():
    source = stream(refilling(draws=3))
    source.publish(FakeWeights(0))
    taken = take(source, 0)
    assert keys(taken.kept) == ["p/2/a#0", "p/2/a#1", "p/2/b#0", "p/2/b#1"]
    assert keys(taken.set_aside) == ["alike/0/a#0", "alike/0/a#1", "alike/0/b#0", "alike/0/b#1"]
    assert not take(source, 1).set_aside


def test_a_step_draws_no_more_often_than_it_may():
    source = stream(refilling(draws=1))
    source.publish(FakeWeights(0))
    assert keys(take(source, 0).kept) == ["alike/0/a#0", "alike/0/a#1", "alike/0/b#0", "alike/0/b#1"]
    assert len(asked(source)) == 2


def test_the_ledger_says_what_a_step_trains_on_before_it_does():
    store = FakeStore()
    source = stream(refilling(draws=3), store)
    source.publish(FakeWeights(0))
    take(source, 0)
    assert store.ledger == {0: [(2, "p/2/a"), (2, "p/2/b")]}
    assert store.dropped == {(0, "alike/0/a"), (0, "alike/0/b")}, "what it does not train on is accounted for"


@pytest.mark.parametrize("whole_draws", [False, True])
@given(turns=st.integers(0, 4))
def test_a_run_that_was_killed_asks_only_what_is_not_banked_and_trains_on_the_same(turns, whole_draws):
    """Four answers, one a turn; a group is complete every second turn."""
    store = FakeStore()
    killed = stream(store=store, whole_draws=whole_draws)
    killed.publish(FakeWeights(0))
    killed._begun(0)
    for _ in range(turns):
        killed.turn()
    banked = (turns // 4 * 2) if whole_draws else turns // 2
    resumed = stream(store=store, whole_draws=whole_draws)
    resumed.publish(FakeWeights(0))
    assert keys(take(resumed, 0).kept) == ["a0#0", "a0#1", "b0#0", "b0#1"]
    assert len(asked(resumed)) == 2 - banked
    assert len(store.drawn(0).scored) == 4, "none is banked twice"


def test_a_learner_that_went_back_repeats_its_steps_from_the_bank_while_later_answers_are_under_way():
    store = FakeStore()
    source = stream(questions(steps=4, names=("a",)), store, ahead=1)
    for step in range(2):
        source.publish(FakeWeights(step))
        first = take(source, step)
    source.publish(FakeWeights(1))
    before = len(asked(source))
    source.publish(FakeWeights(0))
    assert keys(take(source, 0).kept) == ["a0#0", "a0#1"]
    source.publish(FakeWeights(1))
    again = take(source, 1)
    assert keys(again.kept) == keys(first.kept) and [one.rollout.version for one in again.kept] == [one.rollout.version for one in first.kept]
    assert len(asked(source)) == before
