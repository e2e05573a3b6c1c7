"""One tokenizer for all data tests, trained once on the default suite."""

from __future__ import annotations

import pytest

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(DataConfig(), folder, seed=0)
    return load_tokenizer(folder)
