"""The run's tokenizer: trained once on the text the run will read, or taken from a Hugging Face checkpoint; then loaded by every stage.

train_tokenizer(config, folder, seed)  ->  folder/tokenizer.model or folder/tokenizer_config.json ...  ->  load_tokenizer(folder)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.config.schema import DataConfig, ModelConfig
from megatron_ext.data.chat import ROLES
from megatron_ext.data.hf_tokenizer import HF_FILE, HfTokenizer, copy_tokenizer
from megatron_ext.data.pieces import Tokenizer
from megatron_ext.data.sources import all_texts
from megatron_ext.data.suite.captions import EMPTY
from megatron_ext.data.suite.draw import KINDS, draw_dialogue
from megatron_ext.data.suite.levels import COLORS, RELATIONS, SHAPES
from megatron_ext.data.vocabulary import MODEL_FILE, SentencePieceTokenizer, train_vocabulary

__all__ = ["Tokenizer", "load_tokenizer", "tokenizer_digest", "train_tokenizer"]

DIALOGUES_PER_KIND = 400
"""Conversations of the suite that the vocabulary is trained on, per kind: each phrase occurs dozens of times."""


def train_tokenizer(config: DataConfig, folder: Path, seed: int, model: ModelConfig | None = None) -> Path:
    """Trains on the text of `config` and writes `folder/tokenizer.model`; the same arguments give the same bytes. Returns the file.

    With `config.tokenizer` set nothing is trained: the files of that Hugging Face folder are copied. `model`: the one it is for, whose memory tokens it gets
    (None: none).

    Colors, shapes, directions and digits of every level are single pieces, so the vocabulary does not depend on the level.
    """
    if config.tokenizer is not None:
        return copy_tokenizer(config.tokenizer, folder, model)
    slots = 0 if model is None else model.clvr.slots
    trained = train_vocabulary(list(_texts(config, seed)), (*ROLES, *COLORS, *SHAPES, *RELATIONS, EMPTY), config.vocab_size, slots)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_FILE
    unfinished = path.with_suffix(".partial")
    unfinished.write_bytes(trained)
    os.replace(unfinished, path)
    return path


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a run. Raises DataError when there is none, or it is damaged, or made for another template."""
    return HfTokenizer(folder) if (folder / HF_FILE).is_file() else SentencePieceTokenizer.read(folder / MODEL_FILE)


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of what turns text into ids; the same for a checkpoint's folder and for the copy of it in a run."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "vocab.json", "merges.txt", MODEL_FILE):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()


def _texts(config: DataConfig, seed: int) -> Iterator[str]:
    """Every text the vocabulary should know: both sides of every turn."""
    if config.kind != "suite":
        yield from all_texts(config)
        return
    for kind in KINDS:
        for index in range(DIALOGUES_PER_KIND):
            for turn in draw_dialogue("train", kind, seed, index, config).turns:
                yield from turn
