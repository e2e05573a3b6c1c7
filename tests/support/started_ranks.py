"""What ranks do that a launcher has started, in the tests of `started_rank`. In a module of its own, because ranks import it."""

from __future__ import annotations

from typing import Any

from megatron_ext.errors import LeaderEnded
from megatron_ext.parallel.started_rank import meet
from tests.support.rank_functions import summed_over_world


def two_worlds(rank: int, world_size: int, _: str, host: str, port: int) -> list[Any]:
    """Rank 0 decides twice, the others would decide otherwise; then two worlds, one after the other, over the same store."""
    ranks = meet(rank, world_size, host, port)
    answers = [ranks.agree(question, lambda question=question: (question == "first") == (rank == 0)) for question in ("first", "second")]
    sums = [ranks.run(summed_over_world, world_size, threads_per_rank=1, forward_signals=()) for _ in range(2)]
    return [ranks.lead, *answers, *sums]


def leader_raises(rank: int, world_size: int, _: str, host: str, port: int) -> str:
    ranks = meet(rank, world_size, host, port)

    def decide() -> bool:
        raise ValueError("the settings have changed")

    try:
        ranks.agree("pretrain", decide)
    except (ValueError, LeaderEnded) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
