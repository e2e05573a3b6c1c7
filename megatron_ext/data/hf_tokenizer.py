"""A tokenizer from Hugging Face: that of the checkpoint a run starts from, used as it is.

The chat template is ChatML in this family (Qwen3, InternVL3.5), which is what `chat.py` writes; the pieces it needs are looked up here, and one that is
missing is an error. Ids come from transformers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_ext.config.schema import ModelConfig
from megatron_ext.data.pieces import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, TURN_END, TURN_START, UNKNOWN, Tokenizer, count_slots, slot_pieces
from megatron_ext.errors import DataError, UserError

HF_FILE = "tokenizer_config.json"
_PARTS = (HF_FILE, "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class HfTokenizer(Tokenizer):
    """Tags are ordinary text to it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its parts raise
            raise DataError(str(folder), f"holds no tokenizer that transformers can load ({error})", "give the folder of a Hugging Face checkpoint") from error
        known = self._tokenizer.get_vocab()
        images = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT)
        sees = any(piece in known for piece in images)
        missing = [piece for piece in (TURN_START, TURN_END, *(images if sees else ())) if piece not in known]
        if missing:
            raise DataError(str(folder), f"its vocabulary lacks {', '.join(missing)}", "it must be that of an InternVL or Qwen3 checkpoint, with ChatML turns")
        self.vocab_size = len(self._tokenizer)
        self.eos_id, self.turn_id, self.image_id = known[TURN_END], known[TURN_START], known.get(IMAGE_CONTEXT, -1)
        self.pad_id = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else known[TURN_START]
        self.tag_ids = {}
        self.slot_ids = tuple(known[piece] for piece in slot_pieces(count_slots(known.__contains__)))
        self._encode = lru_cache(maxsize=65536)(self._encode_uncached)

    def encode(self, text: str) -> list[int]:
        return list(self._encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Ids beyond the vocabulary are left out."""
        return str(self._tokenizer.decode([index for index in map(int, ids) if index != self.pad_id and 0 <= index < self.vocab_size]))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._tokenizer.convert_ids_to_tokens(index) if 0 <= index < self.vocab_size else UNKNOWN for index in map(int, ids)]

    def save_with_slots(self, count: int, folder: Path) -> None:
        """The same tokenizer with memory tokens behind its vocabulary."""
        from tokenizers import AddedToken

        self._tokenizer.add_tokens([AddedToken(piece, special=True, normalized=False) for piece in slot_pieces(count)], special_tokens=True)
        self._tokenizer.save_pretrained(folder)

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))


def copy_tokenizer(source: Path, folder: Path, model: ModelConfig | None = None) -> Path:
    """The tokenizer files of a Hugging Face folder become those of a run, with the memory tokens that `model` asks for.

    Raises DataError when they make no tokenizer for this template, and UserError where the embedding of the model has no rows to spare for memory tokens.
    """
    ours, slots = HfTokenizer(source), 0 if model is None else model.clvr.slots
    folder.mkdir(parents=True, exist_ok=True)
    if model is None or slots in (0, len(ours.slot_ids)):
        return _copy(source, folder)
    if ours.slot_ids:
        problem = f"{slots}, but the tokenizer in {source} has {len(ours.slot_ids)} memory tokens"
        raise UserError("model.clvr.num_slots", problem, f"set it to {len(ours.slot_ids)}, or name a tokenizer without any")
    spare = max(0, model.vocab_size - ours.vocab_size)
    if slots > spare:
        problem = f"{slots} memory tokens do not fit: the tokenizer in {source} has {ours.vocab_size} tokens and model.vocab_size = {model.vocab_size}"
        raise UserError("model.clvr.num_slots", problem, f"use at most {spare}" if spare else "use model.clvr.inject=text, or a model with more rows")
    with TemporaryDirectory(dir=folder) as draft:
        ours.save_with_slots(slots, Path(draft))
        return _copy(Path(draft), folder)


def _copy(source: Path, folder: Path) -> Path:
    for name in (*_PARTS[1:], _PARTS[0]):  # the one that says "complete" comes last
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return folder / HF_FILE
