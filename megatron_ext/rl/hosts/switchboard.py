"""Asking many ranks of one host at once: every wait has a deadline, and whoever holds it up is named.

    answers = board.ask(calls, timeout_s)                            waits for all

    pending = [board.post(calls, timeout_s) for calls in replicas]   an event loop over several worlds
    for one in board.wait(pending, timeout_s): one.collect()         those of which every rank has answered or is lost

A rank is lost when it dies, raises an error, gives no sign of life for `silence_s` (it is stopped, or its machine is gone), or has not answered by the
deadline. The other ranks of its world hang in a collective with it, so their verbs are given up with its own: they must be ended before they are asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.errors import RankFailed
from megatron_ext.observe.fleet_watch import FleetWatch
from megatron_ext.rl.hosts.ranks import CARRIED, Host, Rank

POLL_S = 0.5
"""The longest single wait: Python runs signal handlers in between."""
SILENCE_S = 30.0
GRACE_S = 0.5
"""How long an error that a rank raised waits for news of its peers: one that died is the cause."""
Settle = tuple[type[Exception], ...]


@dataclass(frozen=True)
class Call:
    rank: Rank
    verb: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Switchboard:
    """A rank that has given no sign of life for longer than `silence_s` is lost. Threads may use it at once, for different ranks."""

    host: Host
    watch: FleetWatch = field(default_factory=FleetWatch)
    silence_s: float = SILENCE_S
    census: Callable[[Sequence[Rank]], None] = lambda ranks: None
    """Told of the ranks of a world that has opened."""

    def ask(self, calls: Sequence[Call], timeout_s: float, settle: Settle = ()) -> list[Any]:
        """The answers in the order of the calls. The first error of any rank is raised at once, without waiting for its peers.

        Errors of the types in `settle` stand among the answers instead, and the other ranks are waited for; with RankFailed among them, those of other worlds.
        """
        pending = self.post(calls, timeout_s)
        while not pending.over:
            self._move_on([pending], POLL_S)
            pending.raise_first(settle)
        return pending.collect(settle)

    def post(self, calls: Sequence[Call], timeout_s: float) -> Pending:
        """Asks, and returns at once."""
        pending = Pending(self, calls, timeout_s)
        for call in calls:
            self.watch.began(call.rank.name, call.verb, call.rank.world)
            self.host.send(call.rank, call.verb, call.arguments)
        return pending

    def wait(self, pending: Sequence[Pending], timeout_s: float) -> list[Pending]:
        """Those that are over, after at most `timeout_s`; waits for the first of them. The others may be waited for again."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = 0.0 if any(one.over for one in pending) else max(0.0, deadline - time.monotonic())
            self._move_on(pending, min(POLL_S, left))
            over = [one for one in pending if one.over]
            if over or time.monotonic() >= deadline:
                return over

    def _move_on(self, pending: Sequence[Pending], timeout_s: float) -> None:
        waiting = [rank for one in pending for rank in one.waiting]
        ready = set(self.host.ready(waiting, timeout_s)) if waiting else set()
        for one in pending:
            one.move_on(ready)


class Pending:
    """Verbs that were sent together. Made by `Switchboard.post`, moved on by its `wait`. Belongs to one thread; other threads may have others."""

    def __init__(self, board: Switchboard, calls: Sequence[Call], timeout_s: float) -> None:
        self._host, self._watch, self._silence_s = board.host, board.watch, board.silence_s
        self._verb, self._timeout_s, self._deadline = calls[0].verb if calls else "", timeout_s, time.monotonic() + timeout_s
        self._waiting = {call.rank: index for index, call in enumerate(calls)}
        self._answers: list[Any] = [None] * len(calls)
        self._errors: list[Exception] = []

    @property
    def over(self) -> bool:
        """Whether every rank has answered or is lost."""
        return not self._waiting

    @property
    def waiting(self) -> tuple[Rank, ...]:
        return tuple(self._waiting)

    def collect(self, settle: Settle = ()) -> list[Any]:
        """When it is over: the answers in the order of the calls. Raises the first error, which is the cause where the loss of a rank lost others; those of the
        types in `settle` stand among the answers instead."""
        self.raise_first(settle)
        return self._answers

    def raise_first(self, settle: Settle = ()) -> None:
        """Does nothing while there is no error."""
        for error in self._errors:
            if not isinstance(error, settle):
                raise error

    def move_on(self, ready: Collection[Rank]) -> None:
        """Takes the answers of those that are ready, and loses those that are silent or late."""
        self._lose(self._with_causes(self._take([rank for rank in self._waiting if rank in ready])))
        self._lose(self._silent())
        if self._waiting and time.monotonic() >= self._deadline:
            self._lose(self._late())

    def _take(self, ranks: Iterable[Rank]) -> dict[Rank, RankFailed]:
        """Answers and errors that cross as they are find their places; failures are returned."""
        failures = {}
        for rank in ranks:
            try:
                self._close(rank, self._host.take(rank))
            except CARRIED as error:
                self._close(rank, error)
            except RankFailed as failure:
                failures[rank] = failure
        return failures

    def _with_causes(self, failures: dict[Rank, RankFailed]) -> dict[Rank, RankFailed]:
        """An error that a rank raised may come of a peer that died, of which the news comes a moment later: then that is first."""
        until = time.monotonic() + GRACE_S
        while failures and all(failure.kind == "raised" for failure in failures.values()):
            worlds = {rank.world for rank in failures} - {""}
            mates, left = [rank for rank in self._waiting if rank.world in worlds and rank not in failures], until - time.monotonic()
            if not mates or left <= 0:
                break
            failures = failures | self._take(self._host.ready(mates, left))
        return dict(sorted(failures.items(), key=lambda failed: failed[1].kind == "raised"))

    def _silent(self) -> dict[Rank, RankFailed]:
        """The one that has been silent for longest, where that is too long."""
        silent = {rank: self._host.silent_s(rank) for rank in self._waiting}
        for rank, seconds in silent.items():
            self._watch.silent(rank.name, seconds)
        found = max(silent, key=lambda rank: silent[rank], default=None)
        if found is None or silent[found] <= self._silence_s:
            return {}
        return {found: RankFailed(self._watch.story(found.name), found.name, "hung")}

    def _late(self) -> dict[Rank, RankFailed]:
        message = f"no answer to {self._verb!r} within {self._timeout_s:.0f} s from {', '.join(rank.name for rank in self._waiting)}"
        return {rank: RankFailed(message, rank.name, "late") for rank in self._waiting}

    def _lose(self, failures: Mapping[Rank, RankFailed]) -> None:
        """Those that failed, and with them what is left of their worlds."""
        causes: dict[str, str] = {}
        for rank, failure in failures.items():
            causes.setdefault(rank.world, rank.name)
            self._close(rank, failure)
            if failure.kind == "hung":  # whoever meets it, in whatever world, learns of its end at once
                self._host.end(rank)
        for rank in [rank for rank in self._waiting if rank.world and rank.world in causes]:
            self._close(rank, RankFailed(f"{rank.name} is given up: its world lost {causes[rank.world]}", rank.name, "died"))

    def _close(self, rank: Rank, answer: Any) -> None:
        self._answers[self._waiting.pop(rank)] = answer
        self._watch.ended(rank.name)
        if isinstance(answer, Exception):
            self._errors.append(answer)
        if isinstance(answer, RankFailed):
            self._watch.lost(rank.name)
