"""Ten-line roles of reinforcement learning, which write down what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_ext.batch import NO_TILES, FailedRollout, Prompt, Rollout, RouteTrace, ScoredRollout


@dataclass(frozen=True)
class FakeWeights:
    version: int


def prompt(key):
    return Prompt(key, "count", np.array([1], np.int32), NO_TILES, "3")


def answer(asked, sample, version=0, seed=0):
    rows = len(asked.tokens_S) + 1
    routes = RouteTrace(np.zeros((rows, 1, 1), np.uint8), np.ones((rows, 1, 1), np.float16))
    versions = np.full(2, version, np.int32)
    return Rollout(asked, sample, seed, np.array([5, 6]), np.zeros(2, np.float32), versions, "stop", str(version), routes)


class FakeFleet:
    """Answers one sample a turn, of what was asked first, with the version that it has; prompts whose key starts with "lost" fail."""

    def __init__(self, log):
        self.log, self.version, self.queue = log, -1, []

    def ask(self, asks):
        self.log += [f"ask {ask.prompt.key} x{len(ask.samples)} with version {self.version}" for ask in asks]
        self.queue += [(ask.prompt, sample) for ask in asks for sample in ask.samples]

    def turn(self, beside_update=False):
        asked, sample = self.queue.pop(0)
        return [FailedRollout(asked, sample, "replica_lost", "its replica died") if asked.key.startswith("lost") else answer(asked, sample, self.version)]

    def publish(self, weights):
        self.log.append(f"publish {weights.version}")
        self.version = weights.version
        return {"sync/bytes": 8.0}


class FakeScorer:
    """Sample n earns n; prompts whose key starts with "alike" earn 1, and those whose key starts with "broken" cannot be scored."""

    def __init__(self, log):
        self.log = log

    def score(self, rollouts):
        self.log.append(f"score {len(rollouts)}")
        return [
            FailedRollout(rollout.prompt, rollout.sample, "reward_raised", "no gold answer")
            if rollout.prompt.key.startswith("broken")
            else ScoredRollout(rollout, 1.0 if rollout.prompt.key.startswith("alike") else float(rollout.sample), {})
            for rollout in rollouts
        ]


class FakeLearner:
    def __init__(self, log, version=0):
        self.log, self.version = log, version

    def update(self, scored, advantages_R, step):
        self.log.append(f"update {step} on {len(scored)}")
        self.version += 1
        return {"actor/loss": float(np.sum(advantages_R))}

    def weights(self):
        return FakeWeights(self.version)

    def save(self, step):
        self.log.append(f"save {step}")


@dataclass
class Drawn:
    scored: list = field(default_factory=list)
    failed: list = field(default_factory=list)


class FakeStore:
    """Keeps everything in memory: several streams may share one, as runs share a folder."""

    def __init__(self):
        self.draws, self.ledger, self.dropped = {}, {}, set()

    def put(self, draw, scored, failed):
        kept = self.draws.setdefault(draw, Drawn())
        kept.scored += scored
        kept.failed += failed

    def drawn(self, draw):
        return self.draws.get(draw, Drawn())

    def train(self, step, groups):
        assert self.ledger.setdefault(step, list(groups)) == list(groups), "a step that is repeated trains on the same groups"
        assert len({group for groups in self.ledger.values() for group in groups}) == sum(map(len, self.ledger.values())), "a group is trained on once"

    def drop(self, groups, reason):
        self.dropped |= set(groups)
