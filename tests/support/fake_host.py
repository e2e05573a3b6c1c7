"""A host whose ranks are objects of this process: every verb is done as it is sent, and dies as the test wants it."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.batch import FailedRollout
from megatron_ext.errors import RankFailed
from megatron_ext.rl.hosts.ranks import LOOPBACK, Rank
from megatron_ext.rl.rollout_worker import Lane
from tests.support.rl_fakes import answer


class FakeHost:
    """`fatal(rank name, verb, arguments)`: whether the rank dies at it. `log`: who was started, ended, and asked what."""

    folder = Path("/nowhere")

    def __init__(self, fatal=lambda name, verb, arguments: False):
        self.fatal, self.log, self.answers, self.dead = fatal, [], {}, set()

    def address(self, rank):
        return LOOPBACK

    def whereabouts(self, rank):
        return LOOPBACK, 1

    def meeting_point(self, world, first):
        return "nowhere"

    def start(self, role, names, world=""):
        self.log += [f"start {name}" for name in names]
        return [Rank(name, FakeRollout(), world) for name in names]

    def send(self, rank, verb, arguments):
        if verb == "advance":
            self.log.append(f"{rank.name}: " + " ".join(f"{ask.prompt.key}x{len(ask.samples)}" for ask in arguments[0]))
        if rank in self.dead or self.fatal(rank.name, verb, arguments):
            self.answers[rank] = RankFailed(f"{rank.name} died at {verb}", rank.name)
        else:
            self.answers[rank] = getattr(rank.process, verb)(*arguments)

    def ready(self, ranks, timeout_s):
        return [rank for rank in ranks if rank in self.answers]

    def take(self, rank):
        found = self.answers.pop(rank)
        if isinstance(found, Exception):
            raise found
        return found

    def end(self, rank):
        if rank not in self.dead:
            self.log.append(f"end {rank.name}")
        self.dead.add(rank)

    def silent_s(self, rank):
        return 0.0


class FakeRollout:
    """Answers one sample a slice."""

    def __init__(self):
        self.queue, self.version = [], -1

    def open(self, config, place):
        return Lane(0, 1, True)

    def advance(self, asks, steps):
        self.queue += [(ask, sample) for ask in asks for sample in ask.samples]
        if not self.queue:
            return []
        ask, sample = self.queue.pop(0)
        if ask.prompt.key.startswith("long"):
            return [FailedRollout(ask.prompt, sample, "prompt_too_long", "it is")]
        return [answer(ask.prompt, sample, self.version)]


class FakePublisher:
    """Gives weights at once, but to those that die of it."""

    def __init__(self, host):
        self.host = host

    def publish(self, weights, replicas):
        lost = [(replica, RankFailed("died at load")) for replica in replicas if self.host.fatal(replica.ranks[0].name, "load", ())]
        for replica in replicas:
            self.host.log.append(f"version {weights.version} to {replica.number}")
            replica.version = replica.ranks[0].process.version = weights.version
        return {}, lost
