"""A reward, and a rank, that come to a halt in the middle of their work, for the tests of stopping. In a light module of its own, because ranks import it."""

from __future__ import annotations

import os
import time

from megatron_ext.batch import Prompt
from megatron_ext.config.schema import RunConfig
from megatron_ext.inference.chunks import Chunks
from tests.support.vowels import vowels

STALL_AFTER = "STALL_AFTER"
"""In the environment: how many answers a process still judges, or chunks it saves. Then it sleeps until it is ended."""
_calls = 0


def stalling_vowels(prompt: Prompt, response: str) -> float:
    global _calls
    _stall(_calls)
    _calls += 1
    return vowels(prompt, response)


def save_numbers(rank: int, world_size: int, init_method: str, config: RunConfig, chunks: Chunks) -> None:
    """A rank without a model: of each chunk it saves the numbers of the prompts."""
    for done, chunk in enumerate(chunks.left_to(rank)):
        _stall(done)
        chunks.save(chunk, repr(list(chunks.prompts_of(chunk, range(chunks.num_prompts)))).encode())  # type: ignore[arg-type]


def _stall(done: int) -> None:
    if done >= int(os.environ.get(STALL_AFTER, 1_000_000)):
        time.sleep(600)
