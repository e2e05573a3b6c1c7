"""A fleet whose answers are conversations, against ten-line fakes."""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.batch import NO_TILES, FailedRollout
from megatron_ext.rl.conversations import Rules
from megatron_ext.rl.conversing import ConversingFleet
from megatron_ext.rl.environments import Observation
from megatron_ext.rl.roles import Ask
from megatron_ext.rl.scoring.pool import Failure
from tests.support.rl_fakes import FakeFleet, FakeWeights, prompt


class Words:
    """A tokenizer of one token a word."""

    eos_id = 6

    def encode(self, text):
        return [7] * len(text.split())


def act(talks):
    """Shows something after the first turn of "two", fails for "broken", ends all else."""
    return [
        Failure("environment_raised", "no picture")
        if of.key.startswith("broken")
        else Observation("look", NO_TILES)
        if of.key == "two" and len(turns) == 1
        else None
        for of, turns in talks
    ]


def conversing(monkeypatch, max_turns=3):
    monkeypatch.setattr("megatron_ext.rl.conversations.encode_observation", lambda text, tokenizer, per_tile, images, ended: [7, 8])
    log = []
    fleet = ConversingFleet(FakeFleet(log), act, Rules(Words(), 4, max_turns, 100))
    fleet.publish(FakeWeights(0))
    log.clear()
    return fleet, log


def hear(fleet, count):
    found = []
    while len(found) < count:
        found += fleet.turn()
    return found


def test_a_turn_that_is_not_the_last_is_asked_on_and_comes_back_as_one_answer(monkeypatch):
    fleet, log = conversing(monkeypatch)
    fleet.ask([Ask(prompt("one"), (0,), 5), Ask(prompt("two"), (0, 1), 5)])
    found = {(outcome.prompt.key, outcome.sample): outcome for outcome in hear(fleet, 3)}
    assert log[2:] == ["ask two#0@1 x1 with version 0", "ask two#1@1 x1 with version 0"]
    assert found["one", 0].response_T.tolist() == [5, 6]
    assert found["two", 1].response_T.tolist() == [5, 6, 7, 8, 5, 6]
    assert found["two", 1].versions_T.tolist()[2:4] == [-1, -1], "what was shown was not sampled"


def test_a_conversation_has_so_many_turns_and_no_more(monkeypatch):
    fleet, log = conversing(monkeypatch, max_turns=1)
    fleet.ask([Ask(prompt("two"), (0,), 5)])
    assert hear(fleet, 1)[0].response_T.tolist() == [5, 6] and len(log) == 1


def test_an_environment_that_fails_fails_its_own_conversation(monkeypatch):
    fleet, _ = conversing(monkeypatch)
    fleet.ask([Ask(prompt("broken"), (0,), 5), Ask(prompt("one"), (0,), 5)])
    broken, one = sorted(hear(fleet, 2), key=lambda outcome: outcome.prompt.key)
    assert isinstance(broken, FailedRollout) and broken.reason == "environment_raised" and not isinstance(one, FailedRollout)


def test_a_turn_that_is_lost_later_fails_the_prompt_that_was_asked(monkeypatch):
    fleet, _ = conversing(monkeypatch)
    inner = fleet._fleet
    fleet.ask([Ask(prompt("two"), (0,), 5)])
    assert fleet.turn() == []
    inner.queue = [(replace(asked, key=asked.key), sample) for asked, sample in inner.queue]
    monkeypatch.setattr(inner, "turn", lambda beside_update=False: [FailedRollout(inner.queue.pop(0)[0], 0, "replica_lost", "it died")])
    (lost,) = fleet.turn()
    assert (lost.prompt.key, lost.sample, lost.reason) == ("two", 0, "replica_lost")
