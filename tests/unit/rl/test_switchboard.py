"""Who is named when ranks die, fall silent or are late, with a host of which a test says what each rank does."""

from __future__ import annotations

import pickle
import time

import pytest

from megatron_ext.errors import RankFailed, WeightSyncError
from megatron_ext.observe.fleet_watch import FleetWatch, RoleState
from megatron_ext.rl.hosts.pulse import Silence
from megatron_ext.rl.hosts.ranks import Rank
from megatron_ext.rl.hosts.switchboard import Call, Switchboard


class Script:
    """A host whose ranks do what their verb's name says: answer, never answer, die, raise, or damage weights."""

    def __init__(self, **silent_s: float) -> None:
        self.asked: dict[str, str] = {}
        self.silent = silent_s

    def send(self, rank, verb, arguments):
        self.asked[rank.name] = verb

    def ready(self, ranks, timeout_s):
        ready = [rank for rank in ranks if self.asked[rank.name] != "hang"]
        if not ready:
            time.sleep(min(timeout_s, 0.02))
        return ready

    def take(self, rank):
        verb = self.asked[rank.name]
        if verb in ("die", "raise"):
            raise RankFailed(f"{rank.name} is lost", rank.name, "died" if verb == "die" else "raised")
        if verb == "damage":
            raise WeightSyncError(rank.name)
        return rank.name

    def end(self, rank):
        self.asked[rank.name] = "ended"

    def silent_s(self, rank):
        return self.silent.get(rank.name, 0.0)


def world(name, *verbs):
    """A call for each verb, to ranks named a0, a1, ... of one world."""
    return [Call(Rank(f"{name}{number}", None, name), verb) for number, verb in enumerate(verbs)]


def kinds(answers):
    return [answer.kind if isinstance(answer, RankFailed) else answer for answer in answers]


def test_a_failure_keeps_its_rank_and_kind_between_processes():
    failure = pickle.loads(pickle.dumps(RankFailed("learner rank 1 hangs", "learner rank 1", "hung")))
    assert (str(failure), failure.rank, failure.kind) == ("learner rank 1 hangs", "learner rank 1", "hung")
    assert (RankFailed("nobody in particular").rank, RankFailed("nobody in particular").kind) == ("", "died")


def test_every_verb_of_every_rank_is_a_span_and_nobody_works_afterwards():
    spans = []
    watch = FleetWatch(lambda rank, verb, start_s, end_s: spans.append((rank, verb, start_s <= end_s)))
    ranks = [Rank(f"rollout replica {number} rank 0", None) for number in (0, 1)]
    Switchboard(Script(), watch).ask([Call(rank, "generate") for rank in ranks], 1)
    assert spans == [("rollout replica 0 rank 0", "generate", True), ("rollout replica 1 rank 0", "generate", True)]
    assert watch.roles() == {"rollout": RoleState(known=2, alive=2, working=0)}


def test_a_rank_that_dies_is_lost_to_the_watch_until_it_is_started_anew():
    watch = FleetWatch()
    board = Switchboard(Script(), watch)
    with pytest.raises(RankFailed):
        board.ask([Call(Rank("learner rank 0", None), "update"), Call(Rank("learner rank 1", None), "die")], 1)
    assert watch.roles() == {"learner": RoleState(known=2, alive=1, working=0)}
    board.ask([Call(Rank("learner rank 1", None), "open")], 1)
    assert watch.roles() == {"learner": RoleState(known=2, alive=2, working=0)}


def test_a_world_is_given_up_with_the_rank_it_lost_and_the_other_worlds_answer():
    answers = Switchboard(Script()).ask([*world("a", "hang", "die", "hang"), *world("b", "work", "work")], 60, settle=(RankFailed,))
    assert kinds(answers) == ["died", "died", "died", "b0", "b1"]
    assert [str(answer) for answer in answers[:3]] == ["a0 is given up: its world lost a1", "a1 is lost", "a2 is given up: its world lost a1"]


def test_the_peer_that_died_is_the_cause_and_not_the_one_that_lost_it():
    """Rank 0 raises, because its connection was reset, before the death of rank 1 is known."""

    class NewsComesLater(Script):
        def ready(self, ranks, timeout_s):
            self.looks = getattr(self, "looks", 0) + 1
            return [rank for rank in super().ready(ranks, timeout_s) if rank.name != "a1" or self.looks > 1]

    with pytest.raises(RankFailed) as failure:
        Switchboard(NewsComesLater()).ask(world("a", "raise", "die", "hang"), 60)
    assert (failure.value.rank, failure.value.kind) == ("a1", "died")


def test_errors_that_are_carried_lose_no_world():
    answers = Switchboard(Script()).ask(world("a", "damage", "work"), 60, settle=(WeightSyncError,))
    assert isinstance(answers[0], WeightSyncError) and answers[1] == "a1"


def test_the_one_that_is_silent_for_longest_is_named_with_who_waits_for_it():
    with pytest.raises(RankFailed) as failure:
        Switchboard(Script(a1=12.0, a0=11.0), silence_s=10).ask(world("a", "hang", "hang"), 60)
    assert (failure.value.rank, failure.value.kind) == ("a1", "hung")
    assert str(failure.value) == "a1 has given no sign of life for 12 s while at 'hang'; waiting for it: a0 (at 'hang' for 0 s)"


def test_a_rank_that_works_silently_for_less_than_it_may_is_waited_for_until_the_deadline():
    board = Switchboard(Script(a0=9.0), silence_s=10)
    answers = board.ask(world("a", "hang", "work"), 0.05, settle=(RankFailed,))
    assert kinds(answers) == ["late", "a1"] and str(answers[0]) == "no answer to 'hang' within 0 s from a0" and answers[0].rank == "a0"


def test_replicas_are_over_one_by_one_and_each_gives_its_answers_or_its_cause():
    host = Script()
    board = Switchboard(host)
    first, second, third = (board.post(world(name, *verbs), 60) for name, *verbs in (("a", "hang", "work"), ("b", "work", "work"), ("c", "hang", "die")))
    assert board.wait([first, second, third], 5) == [second, third]
    assert second.collect() == ["b0", "b1"]
    with pytest.raises(RankFailed, match="c1 is lost"):
        third.collect()
    assert kinds(third.collect(settle=(RankFailed,))) == ["died", "died"]
    assert board.wait([first], 0) == [] and [rank.name for rank in first.waiting] == ["a0"]
    host.asked["a0"] = "work"
    assert board.wait([first], 5) == [first] and first.collect() == ["a0", "a1"]


def test_the_panel_hears_of_a_silent_rank_only_while_it_is_silent():
    watch, host = FleetWatch(), Script(a0=7.0)
    board = Switchboard(host, watch, silence_s=30)
    pending = board.post(world("a", "hang"), 60)
    board.wait([pending], 0)
    assert watch.culprit() == "a0 has given no sign of life for 7 s while at 'hang'"
    host.silent.clear()
    board.wait([pending], 0)
    assert watch.culprit() is None


def test_a_driver_that_was_stopped_blames_no_rank():
    """Looks every half second find a sign of life each second; then the driver is stopped for an hour, its ranks with it, and looks before they do."""
    silence = Silence()
    for half_seconds in range(20):
        silence.look({"a": half_seconds // 2, "b": 4}, half_seconds / 2)
    assert (silence.of("a"), silence.of("b")) == (0.5, 9.5)
    silence.look({"a": 9, "b": 4}, 3600.0)
    assert (silence.of("a"), silence.of("b")) == (0.0, 0.0)
    silence.look({"a": 10, "b": 4}, 3600.5)
    assert (silence.of("a"), silence.of("b")) == (0.0, 0.5)


def test_a_rank_that_is_still_being_started_is_not_silent():
    silence = Silence()
    for now in range(60):
        silence.look({"a": None}, float(now))
    assert silence.of("a") == 0.0 == silence.of("unknown")
