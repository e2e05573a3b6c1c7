"""What a fleet does when replicas are lost: nothing that was asked is lost with them, and nothing is answered under weights that nobody knows."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_ext.config.schema import RLConfig, RolloutConfig, RunConfig
from megatron_ext.errors import RankFailed
from megatron_ext.rl.deadlines import DEADLINES
from megatron_ext.rl.fleet import MegatronFleet
from megatron_ext.rl.hosts.switchboard import Switchboard
from megatron_ext.rl.roles import Ask
from megatron_ext.rl.turns import Turns
from tests.support.fake_host import FakeHost, FakePublisher
from tests.support.rl_fakes import FakeWeights, prompt


def fleet(fatal=lambda name, verb, arguments: False, replicas=2, staleness=0, batch_size=4, partial=False, **rollout):
    host = FakeHost(fatal)
    board = Switchboard(host)
    rl = RLConfig(max_staleness=staleness, partial_rollouts=partial, mismatch_correction="tis" if staleness else "none")
    config = RunConfig(rollout=RolloutConfig(replicas=replicas, batch_size=batch_size, **rollout), rl=rl)
    made = MegatronFleet(board, config, DEADLINES, Turns(board, 1, False))
    made._publisher = FakePublisher(host)
    made.wait_open()
    made.publish(FakeWeights(0))
    host.log.clear()
    made.host = host
    return made


def once(*cases):
    """Each (name, verb) is fatal the first time."""
    left = Counter(cases)

    def fatal(name, verb, arguments):
        left[name, verb] -= 1
        return left[name, verb] >= 0

    return fatal


def at(key):
    """Whoever is given this question dies."""
    return lambda name, verb, arguments: verb == "advance" and any(ask.prompt.key == key for ask in arguments[0])


def ask(fleet, *keys, samples=2):
    fleet.ask([Ask(prompt(key), tuple(range(samples)), 0) for key in keys])


def hear(fleet, count):
    """Turns until so many outcomes have come: by key and sample, the reason of a failure, or the version."""
    found = {}
    for _ in range(200):
        for outcome in fleet.turn():
            assert (outcome.prompt.key, outcome.sample) not in found, "every sample once"
            found[outcome.prompt.key, outcome.sample] = getattr(outcome, "reason", None) or outcome.version
        if len(found) == count:
            return found
    raise AssertionError(f"only {found} of {count}")


def test_questions_are_shared_out_and_every_answer_comes_once():
    running = fleet()
    ask(running, "a", "b", "c", "long")
    found = hear(running, 8)
    assert Counter(found.values()) == {0: 6, "prompt_too_long": 2}
    assert sorted(line for line in running.host.log if "x" in line) == ["rollout replica 0 rank 0: ax2 cx2", "rollout replica 1 rank 0: bx2 longx2"]


def test_what_a_lost_replica_owed_is_asked_of_another_and_only_what_it_owed():
    running = fleet(once(("rollout replica 1 rank 0", "noted")))
    ask(running, "a", "b")
    running.turn()
    running.host.fatal = once(("rollout replica 1 rank 0", "advance"))
    hear_left = hear(running, 2)
    assert sorted(hear_left) in ([("a", 1), ("b", 1)],)
    assert [line for line in running.host.log if line.startswith(("end", "start"))] == ["end rollout replica 1 rank 0", "start rollout replica 1 rank 0"]
    assert "rollout replica 0 rank 0: bx1" in running.host.log


def test_a_replica_that_was_started_anew_is_asked_nothing_until_it_has_the_current_weights():
    running = fleet(replicas=1)
    running.publish(FakeWeights(1))
    running.host.fatal = once(("rollout replica 0 rank 0", "advance"))
    ask(running, "a")
    running.turn(beside_update=True)
    for _ in range(5):
        assert running.turn(beside_update=True) == [], "the learner is not free to give them"
    assert running.host.log[-1] == "start rollout replica 0 rank 0"
    assert set(hear(running, 2).values()) == {1}
    assert "version 1 to 0" in running.host.log[3:]


def test_a_question_that_kills_whoever_is_asked_fails_by_name_after_its_retries_and_takes_no_other_along():
    running = fleet(at("poison"), retries=3, restarts=9)
    ask(running, "a", "poison", "b", "c")
    found = hear(running, 8)
    assert {key for key, value in found.items() if value == "replica_lost"} == {("poison", 0), ("poison", 1)}
    given = [line.split(": ")[1] for line in running.host.log if "poison" in line and ": " in line]
    assert len(given) == 4 and given[2:] == ["poisonx2"] * 2, "at last by itself"


def test_the_only_replica_is_not_given_up_for_a_question_that_kills_it():
    running = fleet(at("poison"), replicas=1, retries=3, restarts=3)
    ask(running, "poison", "a")
    found = hear(running, 4)
    assert {key for key, value in found.items() if value == "replica_lost"} == {("poison", 0), ("poison", 1)}


def test_a_replica_that_is_lost_again_and_again_is_given_up_and_the_others_go_on():
    running = fleet(lambda name, verb, arguments: name.startswith("rollout replica 1") and verb == "advance", retries=9, restarts=2)
    ask(running, *"abcdefgh")
    assert set(hear(running, 16).values()) == {0}
    for turn in range(3):
        ask(running, *(f"{key}{turn}" for key in "abcd"))
        hear(running, 8)
    assert [replica.number for replica in running.replicas] == [0]
    assert running.publish(FakeWeights(1))["fleet/given_up"] == 1


def test_a_fleet_without_a_replica_ends_with_what_happened_to_the_last():
    running = fleet(lambda name, verb, arguments: verb == "advance", replicas=1, retries=99, restarts=2)
    ask(running, "a")
    with pytest.raises(RankFailed, match="rollout replica 0 rank 0 died at advance"):
        hear(running, 2)


def test_a_replica_that_dies_of_new_weights_is_replaced_and_gets_them_later():
    running = fleet()
    running.host.fatal = once(("rollout replica 0 rank 0", "load"))
    assert running.publish(FakeWeights(1))["fleet/stale"] == 1
    ask(running, "a", "b")
    assert set(hear(running, 4).values()) == {1}
    assert running.publish(FakeWeights(2))["fleet/stale"] == 0


def test_weights_of_a_learner_that_went_back_are_not_loaded():
    running = fleet()
    running.publish(FakeWeights(3))
    assert running.publish(FakeWeights(2)) == {}
    ask(running, "a")
    assert set(hear(running, 2).values()) == {3}


@pytest.mark.parametrize(("partial", "versions"), [(False, {0}), (True, {0, 1})])
def test_new_weights_come_between_answers_or_in_the_middle_of_them(partial, versions):
    running = fleet(replicas=1, staleness=1, partial=partial)
    ask(running, "a", "b")
    before = running.turn()
    running.publish(FakeWeights(1))
    assert {outcome.version for outcome in before} | set(hear(running, 3).values()) == versions


def test_an_asynchronous_fleet_fills_places_as_they_become_free():
    running = fleet(replicas=1, staleness=1, batch_size=4)
    ask(running, *"abc")
    running.turn()
    assert running.host.log == ["rollout replica 0 rank 0: ax2 bx2"]
    hear(running, 5)
    assert [line for line in running.host.log if "x" in line][1:] == ["rollout replica 0 rank 0: cx2"]


def test_what_is_asked_besides_leaves_the_answers_of_others_to_the_next_turn():
    running = fleet()
    ask(running, "a", "b")
    besides = running.generate([prompt("v1"), prompt("v0")], 1, 7, greedy=True)
    assert [outcome.prompt.key for outcome in besides] == ["v1", "v0"]
    assert len(hear(running, 4)) == 4
