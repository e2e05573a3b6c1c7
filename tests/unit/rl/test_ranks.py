"""The switchboard tells its watch what ranks do, with a host that answers at once."""

from __future__ import annotations

import pytest

from megatron_ext.errors import RankFailed
from megatron_ext.observe.fleet_watch import FleetWatch, RoleState
from megatron_ext.rl.hosts.ranks import Call, Rank, Switchboard


class AnswersAtOnce:
    """Ranks with "bad" in their names die."""

    def send(self, rank, verb, arguments):
        pass

    def ready(self, ranks, timeout_s):
        return list(ranks)

    def take(self, rank):
        if "bad" in rank.name:
            raise RankFailed(f"{rank.name} died")
        return rank.name


def test_every_verb_of_every_rank_is_a_span_and_nobody_works_afterwards():
    spans = []
    watch = FleetWatch(lambda rank, verb, start_s, end_s: spans.append((rank, verb, start_s <= end_s)))
    ranks = [Rank(f"rollout replica {number} rank 0", None) for number in (0, 1)]
    Switchboard(AnswersAtOnce(), watch).ask([Call(rank, "generate") for rank in ranks], 1)
    assert spans == [("rollout replica 0 rank 0", "generate", True), ("rollout replica 1 rank 0", "generate", True)]
    assert watch.roles() == {"rollout": RoleState(known=2, alive=2, working=0)}


def test_a_rank_that_dies_is_lost_to_the_watch_too():
    watch = FleetWatch()
    with pytest.raises(RankFailed):
        Switchboard(AnswersAtOnce(), watch).ask([Call(Rank("learner rank 0", None), "update"), Call(Rank("learner bad rank", None), "update")], 1)
    assert watch.roles() == {"learner": RoleState(known=2, alive=1, working=0)}
