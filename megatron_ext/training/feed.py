"""What a rank trains on, step by step: its rows, read while the step before is trained on, as micro-batches on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from megatron_ext.config.schema import StageConfig, TrainConfig
from megatron_ext.data.collate import TokenBatch
from megatron_ext.data.pieces import Tokenizer
from megatron_ext.observe.metrics_file import BAD_SAMPLES
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.context_dropout import with_hidden
from megatron_ext.training.losses import Microbatch
from megatron_ext.training.microbatches import budgeted_microbatches, microbatches
from megatron_ext.training.read_ahead import read_ahead
from megatron_ext.training.reduce import total


class Stream(Protocol):
    def batch(self, step: int, rows: int, /) -> TokenBatch:
        """A rank's `rows` examples of a step."""


class Feed:
    """Micro-batches of the steps in turn. Its verbs are collective."""

    def __init__(self, rows: Callable[[int], TokenBatch], settings: StageConfig, tokenizer: Tokenizer, seed: int, context: ParallelContext) -> None:
        self._rows, self._settings, self._seed, self._context = rows, settings, seed, context
        self._pad_id, self._image_id = tokenizer.pad_id, tokenizer.image_id
        self._num_bad = 0

    def microbatches(self, step: int) -> list[Microbatch]:
        settings, context = self._settings, self._context
        rows = self._hide(self._rows(step), step)
        self._num_bad = rows.num_bad
        if isinstance(settings, TrainConfig) and settings.micro_batch_tokens:
            return budgeted_microbatches(rows, settings.micro_batch_tokens, self._pad_id, context)
        multiple = context.layout.length_multiple
        return microbatches(rows, settings.rows_each * settings.micro_batch, self._pad_id, context.device, packed=settings.packed, multiple=multiple)

    def _hide(self, rows: TokenBatch, step: int) -> TokenBatch:
        share = self._settings.image_context_dropout if isinstance(self._settings, TrainConfig) else 0.0
        first = self._context.dp_rank * len(rows.tokens_BS)
        return with_hidden(rows, share, self._image_id, self._seed, step, first)

    def metrics(self) -> dict[str, float]:
        """`data/bad_samples`: left out by all data-parallel ranks since they started."""
        return {BAD_SAMPLES: total(self._num_bad, self._context.pgs.dp, self._context.device)}


@contextmanager
def open_feed(stream: Stream, settings: StageConfig, tokenizer: Tokenizer, seed: int, context: ParallelContext) -> Iterator[Feed]:
    share = settings.global_batch // context.layout.dp
    with read_ahead(lambda step: stream.batch(step, share), settings.steps) as rows:
        yield Feed(rows, settings, tokenizer, seed, context)
