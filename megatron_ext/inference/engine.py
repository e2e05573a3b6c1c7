"""Generation with the Megatron model itself: the rollout engine, with continuous batching.

    engine.generate(prompts, samples)      all answers, when the last one is finished
    engine.session()                       answers in slices: asked, advanced by some steps, left, advanced again (`session.py`)

Every rollout carries the log-probability of each token, the version of the weights that sampled it and the router trace of every position. Under expert
parallelism all ranks of the group step together: a rank without work takes part with padding, or the all-to-all of the others would wait for ever. Under tensor
parallelism every rank returns the same rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from megatron_ext.batch import Prompt, Rollout
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.errors import UserError
from megatron_ext.inference.admission import Request
from megatron_ext.inference.answers import Vocabulary
from megatron_ext.inference.passes import Passes
from megatron_ext.inference.session import Session
from megatron_ext.model.assembly import VisionLanguageModel
from megatron_ext.parallel.groups import ParallelContext

Seeds = Callable[[int, int], int]


class Engine:
    """Generates with one replica's model. `seeds(prompt index, sample)` gives each rollout's seed. Raises UserError for what this device cannot do."""

    def __init__(self, model: VisionLanguageModel, context: ParallelContext, vocabulary: Vocabulary, config: RolloutConfig) -> None:
        if config.deterministic and context.device.type != "cpu":
            raise UserError("rollout.deterministic", f"true on {context.device}: its kernels are for CPUs", "set it to false, or hide the GPU from the run")
        self.model, self.context, self.config = model, context, config
        self.passes = Passes(model, context, vocabulary, config)

    def session(self) -> Session:
        """Several may be under way; each has a memory of its own, and is advanced by itself."""
        return Session(self.passes)

    def generate(self, prompts: Sequence[Prompt], samples: int, *, seeds: Seeds, version: int, greedy: bool = False) -> list[Rollout]:
        """`samples` rollouts of every prompt, prompt by prompt. Greedy ignores seeds. Collective over the replica's ranks."""
        answers = self._asked(prompts, samples, seeds, greedy).advance(math.inf, version)
        return [rollout for _, rollout in sorted(answers, key=lambda answer: (answer[0], answer[1].sample))]

    def stream(self, prompts: Sequence[Prompt], samples: int, *, seeds: Seeds, version: int, greedy: bool = False) -> Iterator[tuple[int, Rollout]]:
        """The same rollouts as they finish, each with the number of its prompt. Whoever reads them must read them all: other ranks wait for this one."""
        session = self._asked(prompts, samples, seeds, greedy)
        while not session.idle:
            yield from session.advance(1, version)

    def _asked(self, prompts: Sequence[Prompt], samples: int, seeds: Seeds, greedy: bool) -> Session:
        session, numbers = self.session(), range(samples)
        asked = enumerate(prompts if samples else ())
        session.ask([Request(number, prompt, tuple((sample, seeds(number, sample)) for sample in numbers), greedy) for number, prompt in asked])
        return session
