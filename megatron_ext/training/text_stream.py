"""The training stream of plain text: the batch of any step, a pure function of (seed, step), out of Megatron's indexed datasets and their blend.

    PREFIX.bin, PREFIX.idx (tools/preprocess_data.py) -> GPTDataset: documents joined end to end, cut into rows -> BlendedDataset -> rows of a step

The rows of a step are numbered over all data-parallel ranks, as conversations are (`data/stream.py`): the global batch does not depend on how many ranks
share it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_ext.batch import NO_TILES
from megatron_ext.data.collate import TokenBatch, collate
from megatron_ext.data.tokenizer import Tokenizer, tokenizer_digest
from megatron_ext.errors import DataError


@dataclass(frozen=True)
class _Vocabulary:
    """What Megatron's datasets ask of a tokenizer."""

    eod: int
    pad: int
    vocab_size: int
    unique_identifiers: dict[str, str]


class TextStream:
    """Rows of `length` tokens for one data-parallel rank; every token but a row's first is learnt. `text`: dataset prefixes and how much of each;
    `num_rows`: how many rows all steps read; `cache`: where the shuffled indices are kept. Built by all ranks together."""

    def __init__(
        self,
        text: Mapping[str, float],
        tokenizer: Tokenizer,
        tokenizer_folder: Path,
        cache: Path,
        *,
        length: int,
        num_rows: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        multiple_of: int = 8,
    ) -> None:
        digest = tokenizer_digest(tokenizer_folder)
        for prefix in text:
            require_tokenizer(Path(prefix), digest, tokenizer_folder)
        self._pad_id, self._dp_rank, self._dp_size, self._multiple_of = tokenizer.pad_id, dp_rank, dp_size, multiple_of
        settings = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=length - 1,
            blend=(list(text), list(text.values())),
            split="100,0,0",
            path_to_cache=str(cache),
            tokenizer=_Vocabulary(tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size, {"sha256": digest}),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        self._rows, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [num_rows, 0, 0], lambda: True, settings).build()

    def batch(self, step: int, rows: int) -> TokenBatch:
        """The rank's `rows` rows of a step."""
        first = (step * self._dp_size + self._dp_rank) * rows
        read = [self._rows[number] for number in range(first, first + rows)]
        tokens = [np.append(row["tokens"].numpy(), row["labels"].numpy()[-1]).tolist() for row in read]
        return collate(tokens, [[0] + [1] * (len(row) - 1) for row in tokens], [0] * rows, NO_TILES, self._pad_id, self._multiple_of)


def require_tokenizer(prefix: Path, digest: str, folder: Path) -> None:
    """Raises DataError for a dataset that is missing, or was made with another tokenizer. One without a note beside it (made by Megatron's own tool) is taken
    as it is."""
    for suffix in (".bin", ".idx"):
        if not prefix.with_name(prefix.name + suffix).is_file():
            raise DataError(str(prefix), f"there is no {prefix.name}{suffix}", "make it with tools/preprocess_data.py")
    note = prefix.with_name(f"{prefix.name}.json")
    if note.is_file() and (made := json.loads(note.read_text())["tokenizer"]) != digest:
        problem = f"was made with another tokenizer ({made[:12]}) than that of {folder} ({digest[:12]})"
        raise DataError(str(prefix), problem, "preprocess it with the run's own tokenizer")
