"""One question about one image (or none): what a person types to see what a checkpoint says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_ext.batch import Prompt, Rollout
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.chat import IMAGE, encode_prompt, tokens_per_tile
from megatron_ext.data.images import load_image
from megatron_ext.device import session
from megatron_ext.inference.replica import load_engine
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.local import run_ranks

TIMEOUT_S = 600.0


def ask(config: RunConfig, checkpoint: Path, image: Path | None, question: str, samples: int = 1) -> list[Rollout]:
    """Answers of the checkpoint with the sampling of `config.rollout`; temperature 0 is greedy. Starts its own ranks.

    Raises DataError for an image that cannot be read, CheckpointError for a checkpoint that does not fit.
    """
    picture = None if image is None else load_image(image, config.data.image_size)
    parallel = config.rollout.parallel
    answers = run_ranks(
        ask_rank, parallel.num_ranks, config, checkpoint, picture, question, samples, timeout_s=TIMEOUT_S, threads_per_rank=parallel.threads_per_rank
    )
    rollouts: list[Rollout] = answers[0]
    return rollouts


def ask_rank(
    rank: int, world_size: int, init_method: str, config: RunConfig, checkpoint: Path, picture: np.ndarray | None, question: str, samples: int
) -> list[Rollout]:
    """Every rank of the replica takes part; the first one's answers are returned."""
    with session(), open_parallel(config.rollout.parallel, rank, world_size, init_method, config.seed) as context:
        engine, tokenizer = load_engine(config, checkpoint, context)
        text = question if picture is None or IMAGE in question else f"{IMAGE}\n{question}"
        tokens = encode_prompt(text, tokenizer, tokens_per_tile(config.model.vision))
        prompt = Prompt("ask", "none", tokens, () if picture is None else (picture,), "")

        def seeds(_: int, sample: int) -> int:
            return rollout_seed("ask", config.seed, question, sample)

        return engine.generate([prompt], samples, seeds=seeds, version=0)
