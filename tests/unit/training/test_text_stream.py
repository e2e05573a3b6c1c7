"""Rows of text: every token in its place, the same rows whoever reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.preprocess import preprocess
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from megatron_ext.errors import DataError
from megatron_ext.parallel.groups import ParallelContext
from megatron_ext.training.text_stream import TextStream

LENGTH = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets: `reds` says nothing but red, `blues` nothing but blue."""
    folder = tmp_path_factory.mktemp("corpus")
    train_tokenizer(DataConfig(), folder / "tokenizer", seed=0)
    for word in ("red", "blue"):
        lines = [json.dumps({"text": " ".join([word] * (3 + number % 7))}) for number in range(200)]
        (folder / f"{word}.jsonl").write_text("\n".join(lines))
        preprocess([folder / f"{word}.jsonl"], folder / f"{word}s", folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return load_tokenizer(corpus / "tokenizer")


def stream(corpus: Path, tokenizer: Tokenizer, cache: Path, num_rows: int = 64, **changes: object) -> TextStream:
    text = changes.pop("text", {str(corpus / "reds"): 3.0, str(corpus / "blues"): 1.0})
    return TextStream(text, tokenizer, corpus / "tokenizer", cache, length=LENGTH, num_rows=num_rows, seed=1, **changes)  # type: ignore[arg-type]


def test_a_row_is_text_from_end_to_end_and_all_but_its_first_token_is_learnt(
    context: ParallelContext, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    batch = stream(corpus, tokenizer, tmp_path).batch(0, 16)
    assert batch.tokens_BS.shape == (16, LENGTH) and len(batch.tiles) == 0 and (batch.row_tiles_BM == -1).all()
    assert (batch.loss_mask_BS[:, 0] == 0).all() and (batch.loss_mask_BS[:, 1:] == 1).all()
    for row in batch.tokens_BS:
        words = tokenizer.decode(row).replace("<|im_end|>", " ").split()
        assert len({*words[1:-1]}) == 1, "a row is of one dataset; its ends may be cut"


def test_datasets_are_blended_by_weight(context: ParallelContext, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    batch = stream(corpus, tokenizer, tmp_path).batch(0, 64)
    assert sum("red" in tokenizer.decode(row) for row in batch.tokens_BS) == 48


def test_ranks_share_the_rows_of_a_step_and_steps_do_not_repeat_them(context: ParallelContext, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = stream(corpus, tokenizer, tmp_path / "a")
    parts = [stream(corpus, tokenizer, tmp_path / "b", dp_rank=rank, dp_size=2) for rank in range(2)]
    for step in (0, 3):
        joined = np.concatenate([part.batch(step, 4).tokens_BS for part in parts])
        assert np.array_equal(joined, whole.batch(step, 8).tokens_BS)
    again = stream(corpus, tokenizer, tmp_path / "c")
    assert np.array_equal(again.batch(5, 8).tokens_BS, whole.batch(5, 8).tokens_BS)


def test_a_dataset_that_is_missing_or_of_another_tokenizer_is_named(context: ParallelContext, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no greens\.bin; make it with tools/preprocess_data\.py"):
        stream(corpus, tokenizer, tmp_path, text={str(corpus / "greens"): 1.0})
    other = tmp_path / "other"
    train_tokenizer(DataConfig(vocab_size=200), other, seed=0)
    with pytest.raises(DataError, match="was made with another tokenizer"):
        TextStream({str(corpus / "reds"): 1.0}, load_tokenizer(other), other, tmp_path, length=LENGTH, num_rows=8, seed=0)
