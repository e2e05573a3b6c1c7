"""What the parts of generation are called in a profile."""

from __future__ import annotations

from megatron_ext.config.schema import RunConfig
from megatron_ext.inference.answers import Answer
from megatron_ext.inference.chunks import Chunks
from megatron_ext.inference.passes import Passes
from megatron_ext.model.phases import MODEL
from megatron_ext.observe.phases import Phase
from megatron_ext.observe.profiler import Profiler

GENERATION = (
    *MODEL,
    Phase("sampling", Passes, "draw"),
    Phase("routes", Passes, "routes"),
    Phase("routes", Answer, "route"),
)


def chunk_profiler(rank: int, config: RunConfig, chunks: Chunks, left: int) -> Profiler:
    """Of work in chunks, a chunk is a step. `left`: how many this rank will answer."""
    return Profiler(chunks.folder.parent, f"rank {rank}", config.observe.profile if rank == 0 else 0, left, GENERATION)
